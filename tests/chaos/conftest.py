"""Fixtures of the chaos tests."""

from __future__ import annotations

import pytest
import uvloop


@pytest.fixture(scope="session", autouse=True)
def first_loop() -> None:
    """libuv opens a pipe with the first loop of a process and keeps it: have it open before descriptors are counted."""
    uvloop.new_event_loop().close()
