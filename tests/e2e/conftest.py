"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.process import EMBEDDER, MINILM, NAMES, Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with the default model for all tests that leave it as they found it."""
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def both() -> Iterator[Server]:
    """The same with an embedding model beside it, under the names that the users' documents have."""
    flags = ("--embedding-model", str(MINILM), "--served-embedding-model-name", EMBEDDER)
    names = [f"--served-model-name={name}" for name in NAMES]
    with serving(*names, *flags) as running:
        yield running
