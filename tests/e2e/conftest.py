"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.process import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with the default model for all tests that leave it as they found it."""
    with serving() as running:
        yield running
