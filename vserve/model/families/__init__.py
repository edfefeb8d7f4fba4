"""The table of supported decoders, and which row of it a model's own configuration asks for.

One family a file.  Everything they read is untrusted; what is wrong is a StartupError of one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from vserve.errors import StartupError, shorten
from vserve.model.config import Architecture, ModelConfig
from vserve.model.families import gemma2, gemma3, gpt2, llama, mistral, mixtral, opt, phi3, qwen2, qwen3, qwen3_moe
from vserve.model.families.family import Family, GgufFamily, GgufShapes, Names
from vserve.model.fields import Fields

__all__ = ["FAMILIES", "Family", "GgufFamily", "Names", "family_of", "gguf_of", "read_gguf", "read_json"]

FAMILIES: Final[tuple[Family, ...]] = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    mixtral.FAMILY,
    phi3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    opt.FAMILY,
    gpt2.FAMILY,
)
_BY_ARCHITECTURE: Final = {family.architecture: family for family in FAMILIES}
_BY_NAME: Final[dict[str, Family]] = {family.architecture.value: family for family in FAMILIES}
_BY_GGUF: Final[dict[str, Family]] = {family.gguf.name: family for family in FAMILIES if family.gguf is not None}


def family_of(architecture: Architecture) -> Family:
    """The row of an architecture."""
    return _BY_ARCHITECTURE[architecture]


def gguf_of(architecture: Architecture) -> GgufFamily:
    """The GGUF form of an architecture that was read from a GGUF file."""
    form = family_of(architecture).gguf
    assert form is not None, "it was read from one"
    return form


def read_json(values: Mapping[str, object], where: str) -> ModelConfig:
    """The configuration in a config.json; StartupError that lists what is supported for any other architecture."""
    family = _json_family(values, where)
    fields = Fields(values, where)
    if "quantization_config" in fields:
        raise fields.fail("quantization_config", "not supported: use unquantised safetensors or a GGUF file")
    return family.read(fields)


def read_gguf(
    metadata: Mapping[str, object], shapes: GgufShapes, rope_factors: tuple[float, ...], where: str
) -> ModelConfig:
    """The configuration in a GGUF file's metadata and tensors; errors as above."""
    name = metadata.get("general.architecture")
    family = _BY_GGUF.get(name) if isinstance(name, str) else None
    if family is None or family.gguf is None:
        supported = ", ".join(_BY_GGUF)
        raise StartupError(f"{where}: architecture {shorten(name)} is not supported; supported are {supported}")
    experts = metadata.get(f"{name}.expert_count")
    if experts not in (None, 0):
        raise StartupError(
            f"{where}: mixture-of-experts models ({shorten(experts)} experts) are not supported as GGUF files"
        )
    return family.gguf.read(Fields(metadata, where), shapes, rope_factors)


def _json_family(values: Mapping[str, object], where: str) -> Family:
    supported = ", ".join(_BY_NAME)
    names = values.get("architectures")
    if not isinstance(names, list) or not names:
        raise StartupError(f'{where}: "architectures" is missing; supported are {supported}')
    for name in names:
        if isinstance(name, str) and name in _BY_NAME:
            return _BY_NAME[name]
    raise StartupError(f"{where}: architecture {shorten(names[0])} is not supported; supported are {supported}")
