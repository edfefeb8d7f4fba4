"""The environment of PyTorch's libraries, decided before torch is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vserve.model import cpu

AMX = "processor\t: 0\nflags\t\t: fpu vme avx512f avx512_bf16 amx_bf16 amx_tile amx_int8\n"
PLAIN = "processor\t: 0\nflags\t\t: fpu vme avx512f avx512_bf16\n"


def never() -> int:
    raise AssertionError("the probe ran")


@pytest.mark.parametrize(
    ("cpuinfo", "status", "expected"),
    [
        (AMX, -signal.SIGILL, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}),
        (AMX, -signal.SIGSEGV, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}),
        (AMX, 0, {}),
        (AMX, 1, {}),  # no torch to import: nothing was learned, and nothing will be multiplied
    ],
)
def test_tiles_are_forbidden_where_a_process_that_used_them_died(
    cpuinfo: str, status: int, expected: dict[str, str]
) -> None:
    assert cpu.safe_isa_environment({}, cpuinfo, lambda: status) == expected


@pytest.mark.parametrize("cpuinfo", [PLAIN, "", "flags : amx_bf16", "model name\t: amx_tile\n"])
def test_nothing_is_tried_on_a_processor_that_claims_no_tiles(cpuinfo: str) -> None:
    assert cpu.safe_isa_environment({}, cpuinfo, never) == {}


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_limit_the_user_has_set_is_kept_untried(name: str) -> None:
    assert cpu.safe_isa_environment({name: "ALL"}, AMX, never) == {}


def test_float32_never_starts_the_probe() -> None:
    found = cpu.library_environment({}, reduced_precision=False, cpuinfo=AMX, probe=never)
    assert found == {"GOMP_SPINCOUNT": cpu.SPIN_COUNT, **cpu.KEPT_KERNELS}


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_a_wait_policy_the_user_has_set_is_kept(name: str) -> None:
    assert cpu.library_environment({name: "x"}, reduced_precision=True, cpuinfo=PLAIN) == cpu.KEPT_KERNELS


@pytest.mark.promise("R8")
def test_the_kernels_kept_for_shapes_seen_are_bounded_unless_the_user_says_otherwise() -> None:
    assert all(int(bound) <= 128 for bound in cpu.KEPT_KERNELS.values())
    found = cpu.library_environment(dict.fromkeys(cpu.KEPT_KERNELS, "7"), reduced_precision=False)
    assert not set(found) & set(cpu.KEPT_KERNELS)


def test_the_probe_reports_the_child_and_this_processor_survives_it_under_what_was_found() -> None:
    environ = os.environ | cpu.safe_isa_environment(os.environ)
    done = subprocess.run([sys.executable, "-c", cpu._PROBE], env=environ, check=False)
    assert done.returncode == 0


def test_the_module_is_imported_without_torch() -> None:
    code = "import sys, vserve.model.cpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
