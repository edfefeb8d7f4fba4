"""The tensors of a GGUF file under their Hugging Face names and in the Hugging Face row order.

Owns the un-permutation of the rotary rows; names are the families', the byte format is gguf.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from vserve.errors import StartupError, shorten
from vserve.model.config import ModelConfig
from vserve.model.families import family_of, gguf_of
from vserve.model.gguf import Gguf
from vserve.model.weights import StoredTensor, require_size

ROPE_FACTORS: Final = "rope_freqs.weight"
"""Divisors of the rotary frequencies, part of the configuration here rather than a weight."""

_BLOCK_NAME: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)", re.ASCII)


def hf_name(name: str, config: ModelConfig) -> str | None:
    """The Hugging Face name of a tensor of a GGUF file; None when a model of config has no tensor of this name."""
    form, names = gguf_of(config.architecture), family_of(config.architecture).names
    module, _, kind = name.rpartition(".")
    if module in form.top and kind in ("weight", "bias"):
        found = form.top[module]
        return f"{found}.{kind}" if found == names.head else f"{names.base}{found}.{kind}"
    match = _BLOCK_NAME.fullmatch(name)
    if match is None or match[2] not in form.tensors or int(match[1]) >= config.num_layers:
        return None
    return f"{names.base}{names.layer.format(match[1])}{form.tensors[match[2]]}.{match[3]}"


class GgufWeights:
    """``Weights`` on a GGUF file whose metadata gave config.  q and k are copied as they are put in order, no other."""

    def __init__(self, gguf: Gguf, config: ModelConfig) -> None:
        """StartupError for a tensor that a model of this configuration does not have."""
        self._gguf = gguf
        interleaved = gguf_of(config.architecture).interleaved
        self._heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if interleaved else {}
        self._stored: dict[str, str] = {}
        for name in gguf.tensors:
            if name == ROPE_FACTORS:
                continue
            known = hf_name(name, config)
            if known is None:
                raise StartupError(
                    f"{shorten(str(gguf.path))}: tensor {shorten(name)} is not one of a {config.num_layers}-layer "
                    f"{config.architecture}"
                )
            self._stored[known] = name

    def names(self) -> Sequence[str]:
        return tuple(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    @property
    def total_bytes(self) -> int:
        return sum(self._gguf.tensors[name].nbytes for name in self._stored.values())

    def get(self, name: str) -> StoredTensor:
        """The tensor; StartupError naming it when it is absent, cut off, or not made of whole heads."""
        if name not in self._stored:
            raise StartupError(f"{shorten(str(self._gguf.path))}: tensor {name} is missing")
        require_size(self._gguf.path, self._gguf.file.numel())
        info = self._gguf.tensors[self._stored[name]]
        stored = StoredTensor(name, info.kind, info.shape, self._gguf.data(info.name))
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return stored
        rows = info.shape[0]
        if rows % (2 * heads):
            path = shorten(str(self._gguf.path))
            raise StartupError(f"{path}: tensor {info.name} has {rows} rows, which {heads} rotary heads cannot share")
        return stored.select_rows(halves_order(rows, heads))


def halves_order(rows: int, heads: int) -> Tensor:
    """Where each row of the halves layout lies in a GGUF file's q or k, int64 [rows].

    Within a head, GGUF interleaves the two halves that rotate together (0, E/2, 1, E/2 + 1, ...) as llama.cpp's
    converter writes them for the llama architecture; Hugging Face keeps each half together.
    """
    return torch.arange(rows).reshape(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)
