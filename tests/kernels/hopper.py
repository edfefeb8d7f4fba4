"""Launches caught on their way to the driver, and what they would be on an H100, on a machine without one.

For the scripts of this folder, each a process of its own without TRITON_INTERPRET: ``catch`` takes the place of every
launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}


def catch(found: Callable[[str, ASTSource, dict[str, object]], None]) -> None:
    """From now on a launch calls found(kernel's name, what it would compile, options) and does nothing else."""

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        found(self.fn.__name__, source(self, args), options)

    JITFunction.run = run


def source(kernel: JITFunction, args: tuple[object, ...]) -> ASTSource:
    """What a launch with args compiles: the types, constants and alignments."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for place, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            assert isinstance(value, int)
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def shared_bytes(what: ASTSource, options: dict[str, object]) -> int:
    """Shared memory of a program, without the steps to machine code that do not change it: some 0.05 s a kernel."""
    backend = make_backend(TARGET)
    parsed = backend.parse_options(options | what.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = what.make_ir(TARGET, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
    metadata: dict[str, object] = {}
    module = backend.make_ttir(module, metadata, parsed, TARGET.arch)
    module = backend.make_ttgir(module, metadata, parsed, TARGET.arch)
    # The beginning of Triton's own make_llir.
    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, TARGET.arch, 80)
    manager.run(module, "shared_bytes")
    return int(module.get_int_attr("ttg.shared"))


def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor that no kernel will read."""
    return torch.empty(*shape, dtype=dtype)
