"""The safetensors files of a Hugging Face folder, one or many with an index, as ``Weights``.

The safetensors library checks each file's header and maps its data; this module finds the files, checks the index
against them and turns every failure into a ``StartupError`` of one line.  Pickled weights are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vserve.errors import StartupError, shorten
from vserve.model.json_file import read_object
from vserve.model.kinds import LAYOUTS, Kind
from vserve.model.weights import StoredTensor, require_size

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
MAX_SHARDS: Final = 4096
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD: Final = re.compile(r"[^/\\\0]{1,240}\.safetensors")
"""A bare file name: nothing that leads out of the folder."""
_BITS: Final = {"F32": 32, "F16": 16, "BF16": 16}
_RAW_BITS: Final = {**_BITS, "I32": 32, "F8_E4M3": 8}
"""Those of quantised checkpoints too."""
_KINDS: Final = {LAYOUTS[Kind(name)].dtype: Kind(name) for name in _BITS}
_DTYPES: Final = {
    **{name: LAYOUTS[Kind(name)].dtype for name in _BITS},
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
}


class _Slice(Protocol):
    def get_dtype(self) -> str: ...
    def get_shape(self) -> list[int]: ...


class _Opened(Protocol):
    """What is used of the library's untyped ``safe_open`` object."""

    def keys(self) -> list[str]: ...
    def get_slice(self, name: str) -> _Slice: ...
    def get_tensor(self, name: str) -> Tensor: ...


class SafetensorsWeights:
    """``Weights`` on the safetensors files of a folder; opening reads their headers only."""

    def __init__(self, folder: Path) -> None:
        """StartupError when there are no such files, one is broken, or the index and the files disagree."""
        self._folder = folder
        self._holders: dict[str, tuple[Path, _Opened]] = {}
        self._sizes: dict[Path, int] = {}
        for path in weight_files(folder):
            opened = _open(path)
            self._sizes[path] = path.stat().st_size
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                if name in self._holders:
                    raise StartupError(f"{shorten(str(path))}: tensor {shorten(name)} is in two files")
                self._holders[name] = (path, opened)
        for name, shard in _indexed(folder).items():
            holder = self._holders.get(name)
            if holder is None or holder[0].name != shard:
                raise StartupError(f"{shorten(str(folder / INDEX))}: tensor {shorten(name)} is not in {shorten(shard)}")

    def names(self) -> Sequence[str]:
        return tuple(self._holders)

    def __contains__(self, name: object) -> bool:
        return name in self._holders

    @property
    def total_bytes(self) -> int:
        """Bytes of the tensors of supported kinds."""
        total = 0
        for name, (_, opened) in self._holders.items():
            entry = opened.get_slice(name)
            bits = _RAW_BITS.get(entry.get_dtype(), 0)
            for size in entry.get_shape():
                bits *= size
            total += bits // 8
        return total

    def get(self, name: str) -> StoredTensor:
        data = self.raw(name, *_BITS)
        kind = _KINDS[data.dtype]
        return StoredTensor(name, kind, tuple(data.shape), data)

    def raw(self, name: str, *types: str) -> Tensor:
        """The tensor as it is; StartupError unless its type is one of types, by its name in the format."""
        if name not in self._holders:
            raise StartupError(f"{shorten(str(self._folder))}: tensor {name} is missing")
        path, opened = self._holders[name]
        where = f"{shorten(str(path))}: tensor {shorten(name)}"
        require_size(path, self._sizes[path])
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in types:
            raise StartupError(f"{where} is of type {dtype}, which is not supported; supported are {', '.join(types)}")
        try:
            data = opened.get_tensor(name)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise StartupError(f"{where} cannot be read: {shorten(str(error))}") from None
        if data.dtype != _DTYPES[dtype]:
            raise StartupError(f"{where} was read as {data.dtype}, not {dtype}")
        return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sorted; all exist.  StartupError when there are none or a shard is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shards = sorted(set(_indexed(folder).values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise StartupError(f"{shorten(str(folder / INDEX))}: shard {shorten(shard)} is missing from the folder")
        return [folder / shard for shard in shards]
    where = shorten(str(folder))
    for pattern in _PICKLES:
        pickled = next(folder.glob(pattern), None)
        if pickled is not None:
            raise StartupError(
                f"{where}: {shorten(pickled.name)} may be a pickle, which can run code and is never loaded; "
                "convert the model to safetensors"
            )
    raise StartupError(f"{where}: no weights: neither {SINGLE} nor {INDEX}")


def _indexed(folder: Path) -> Mapping[str, str]:
    """Tensor name to shard file name, from the index; {} when the folder has one file and no need of an index."""
    if (folder / SINGLE).is_file():
        return {}
    path = folder / INDEX
    weight_map = read_object(path, 1 << 26).get("weight_map")
    where = shorten(str(path))
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(f'{where}: "weight_map" is missing or empty')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise StartupError(f"{where}: tensor {shorten(name)} names {shorten(shard)}, which is no safetensors file")
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise StartupError(f"{where}: more than {MAX_SHARDS} shards")
    return weight_map


def _open(path: Path) -> _Opened:
    try:
        return cast(_Opened, safe_open(str(path), framework="pt", device="cpu"))
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{shorten(str(path))}: not a sound safetensors file: {shorten(str(error))}") from None
