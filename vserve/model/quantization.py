"""How a checkpoint's weights are quantised: ``Quantization``, read from its configuration and checked against the flag.

AWQ and GPTQ keep integers in groups, fp8 checkpoints e4m3 numbers with a scale.  Owns the checks of those settings;
how the tensors are packed is grouped_weights.py's.  Everything read is untrusted; what is wrong is a StartupError of
one line.  Formats: arXiv:2306.00978 (AWQ, AutoAWQ's gemm layout), arXiv:2210.17323 (GPTQ, AutoGPTQ's layout).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from vserve.errors import StartupError, shorten
from vserve.model.fields import Fields
from vserve.model.json_file import read_object

GROUP_SIZES: Final = (32, 64, 128, 256, 512, 1024)
BESIDE: Final = ("quantize_config.json", "quant_config.json")
"""Where older tools put the settings of GPTQ and of AWQ."""

ALIASES: Final = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
"""Names of another server's kernels for the same files."""


_MOST_SKIPPED: Final = 1 << 12


class Method(StrEnum):
    AWQ = "awq"
    GPTQ = "gptq"
    FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class Quantization:
    """bits: 4 or 8.  group: inputs that share a scale, None for all of an output.

    zero_shift: what is added to a packed zero point (GPTQ before version 2 stores it less 1).  symmetric: all zero
    points are the middle.  ordered: groups take the inputs in an order of their own.  online: the checkpoint is plain,
    and its linear layers become fp8 as they are loaded.  static: each layer says by what its inputs are scaled to fp8.
    skipped: modules that are left plain, with all that is inside of them, from any part of their names on.
    """

    method: Method
    bits: int = 8
    group: int | None = None
    zero_shift: int = 0
    symmetric: bool = False
    ordered: bool = False
    online: bool = False
    static: bool = False
    skipped: tuple[str, ...] = ()

    def skips(self, module: str) -> bool:
        """Whether a module, such as model.layers.0.mlp.down_proj, is left plain."""
        return any(f".{part}." in f".{module}." for part in self.skipped)


def read(folder: Path, values: Mapping[str, object]) -> Quantization | None:
    """What the config.json (values) of folder, or a file beside it, says; None for a plain checkpoint."""
    where = shorten(str(folder / "config.json"))
    section = Fields(values, where).section("quantization_config")
    if section is None:
        found = next((folder / name for name in BESIDE if (folder / name).is_file()), None)
        if found is None:
            return None
        section = Fields(read_object(found), shorten(str(found)))
        default = Method.GPTQ if found.name == BESIDE[0] else Method.AWQ
        return _read(section, section.text("quant_method", default.value))
    return _read(section, section.text("quant_method"))


def choose(flag: str, found: Quantization | None, where: str, *, gguf: bool = False) -> Quantization | None:
    """What to load by: found, or online fp8 where the flag asks for that; StartupError where flag and files disagree.

    flag: auto, none, or a method by any of its names.  where: names the model in errors.
    """
    wanted = ALIASES.get(flag, flag)
    if wanted == "auto" or (found is not None and wanted == found.method):
        return found
    if wanted == "compressed-tensors":
        raise StartupError("--quantization compressed-tensors: not supported; supported are awq, gptq and fp8")
    if found is not None:
        raise StartupError(f"--quantization {flag}: {where} is quantised by {found.method}; leave the flag out")
    if wanted == "none":
        return None
    if gguf:
        raise StartupError(
            f"--quantization {flag}: {where} is a GGUF file, which has its own formats; leave the flag out"
        )
    if wanted == Method.FP8:
        return Quantization(Method.FP8, online=True)
    raise StartupError(f"--quantization {flag}: {where} is not quantised: its config.json has no quantization_config")


def _read(fields: Fields, method: str | None) -> Quantization:
    supported = ", ".join(Method)
    match method:
        case Method.AWQ:
            return _awq(fields)
        case Method.GPTQ:
            return _gptq(fields)
        case Method.FP8:
            return _fp8(fields)
        case None:
            raise StartupError(f"{fields.where}: quant_method is missing; supported are {supported}")
        case _:
            raise fields.fail("quant_method", f"not supported; supported are {supported}, or a GGUF file")


def _awq(fields: Fields) -> Quantization:
    version = (fields.text("version", "gemm") or "").lower()
    if version != "gemm":
        raise fields.fail("version", "only gemm is supported")
    bits = fields.integer("bits" if "bits" in fields else "w_bit", 1, 32)
    if bits != 4:
        raise fields.fail("bits" if "bits" in fields else "w_bit", "only 4 is supported")
    if not fields.flag("zero_point", True):
        raise fields.fail("zero_point", "only true is supported")
    group = _group(fields, "group_size" if "group_size" in fields else "q_group_size")
    return Quantization(Method.AWQ, 4, group, skipped=_skipped(fields, "modules_to_not_convert"))


def _gptq(fields: Fields) -> Quantization:
    bits = fields.integer("bits", 1, 32)
    if bits not in (4, 8):
        raise fields.fail("bits", "only 4 and 8 are supported")
    symmetric, ordered = fields.flag("sym", True), fields.flag("desc_act", False)
    if fields.flag("is_marlin_format", False):
        raise fields.fail("is_marlin_format", "only the plain layout is supported")
    layout = fields.text("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise fields.fail("checkpoint_format", "only gptq and gptq_v2 are supported")
    if fields.mapping("dynamic"):
        raise fields.fail("dynamic", "layers that are quantised each in another way are not supported")
    shift = 1 if layout == "gptq" else 0
    skipped = _skipped(fields, "modules_to_not_convert")
    return Quantization(Method.GPTQ, bits, _group(fields, "group_size"), shift, symmetric, ordered, skipped=skipped)


def _fp8(fields: Fields) -> Quantization:
    scheme = fields.text("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise fields.fail("activation_scheme", "only dynamic and static are supported")
    if fields.integers("weight_block_size", 1, 1 << 16):
        raise fields.fail("weight_block_size", "scales of blocks are not supported, only of tensors and of rows")
    if (fields.text("fmt", "e4m3") or "").lower() not in ("e4m3", "float8_e4m3fn"):
        raise fields.fail("fmt", "only e4m3 is supported")
    skipped = _skipped(fields, "ignored_layers") + _skipped(fields, "modules_to_not_convert")
    return Quantization(Method.FP8, static=scheme == "static", skipped=skipped)


def _group(fields: Fields, key: str) -> int | None:
    size = fields.integer(key, -1, 1 << 16, 128)
    if size != -1 and size not in GROUP_SIZES:
        raise fields.fail(key, f"must be -1 or one of {', '.join(map(str, GROUP_SIZES))}")
    return None if size == -1 else size


def _skipped(fields: Fields, key: str) -> tuple[str, ...]:
    return fields.texts(key, _MOST_SKIPPED) or ()
