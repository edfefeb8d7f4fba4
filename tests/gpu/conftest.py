"""Tests that need a GPU: without one nothing of this folder is collected, so that no run has skipped tests."""

from __future__ import annotations

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
