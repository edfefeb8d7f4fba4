"""The real server, shared with the end-to-end tests' own fixture."""

from __future__ import annotations

from tests.e2e.conftest import server

__all__ = ["server"]
