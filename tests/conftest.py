"""What must hold before any test module is imported."""

from __future__ import annotations

import contextlib
import os

import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which modules of several folders bring about.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # What the GPU is held against runs on the CPU: processes with a thread a core each would wait on each other.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

with contextlib.suppress(ImportError):  # the tests of kernels run where there is no Hypothesis, too
    from hypothesis import HealthCheck, settings

    # How long an example takes is the machine's doing: no test may fail for it.
    settings.register_profile("vserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("vserve")
