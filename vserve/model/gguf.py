"""Reading GGUF files (versions 2 and 3, little-endian): metadata at once, tensors as windows on the mapped file.

The file is untrusted: every count, length, dimension and offset is checked against the size of the file before it is
used, and whatever is wrong is a ``StartupError`` of one line that names the file.  Owns the byte format only; what the
metadata means is for config.py and the text package, the tensors' Hugging Face names are in gguf_weights.py.
Format: docs/gguf.md in ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from vserve.errors import StartupError, shorten
from vserve.model.kinds import LAYOUTS, Kind

if TYPE_CHECKING:
    from torch import Tensor

MAX_KEYS: Final = 1 << 16
MAX_TENSORS: Final = 1 << 17
MAX_KEY_BYTES: Final = 65535
MAX_STRING_BYTES: Final = 1 << 24
MAX_ELEMENTS: Final = 1 << 22
"""Most array elements in the metadata of one file, all arrays together; the largest vocabularies need a quarter."""
MAX_METADATA_BYTES: Final = 1 << 28

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DIMENSIONS: Final = 4

_KINDS: Final[dict[int, Kind]] = {
    0: Kind.F32,
    1: Kind.F16,
    2: Kind.Q4_0,
    3: Kind.Q4_1,
    6: Kind.Q5_0,
    7: Kind.Q5_1,
    8: Kind.Q8_0,
    12: Kind.Q4_K,
    13: Kind.Q5_K,
    14: Kind.Q6_K,
    30: Kind.BF16,
}
_OTHER_KINDS: Final[dict[int, str]] = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}

_SCALARS: Final[dict[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_SIZES: Final = {n: struct.Struct(f"<{n}Q") for n in range(1, _DIMENSIONS + 1)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: start is its offset from the start of the file, nbytes its length; shape in torch order."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Gguf:
    """A checked GGUF file.

    metadata: values are int, float, bool, str or a list of one of them.  tensors: by GGUF name, in the order of the
    directory.  file: the whole mapped file, uint8, read-only: a write to it kills the process.
    """

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    file: Tensor

    def data(self, name: str) -> Tensor:
        """The tensor's window on the file: typed and shaped for the plain kinds, uint8 [nbytes] for the quantised."""
        info = self.tensors[name]
        raw = self.file[info.start : info.start + info.nbytes]
        dtype = LAYOUTS[info.kind].dtype
        return raw if dtype is None else raw.view(dtype).reshape(info.shape)


def read(path: Path) -> Gguf:
    """Map the file and read its metadata and tensor directory; StartupError when it is not a sound GGUF file."""
    import torch

    mapped = _map(path)
    metadata, tensors = _header(mapped, path)
    with warnings.catch_warnings():
        # torch warns that a read-only buffer may be written to; nothing here does.
        warnings.simplefilter("ignore", UserWarning)
        file = torch.frombuffer(mapped, dtype=torch.uint8)
    return Gguf(path, metadata, tensors, file)


def read_header(path: Path) -> tuple[Mapping[str, object], Mapping[str, TensorInfo]]:
    """The metadata and the tensor directory alone; errors as in read."""
    with _map(path) as mapped:
        return _header(mapped, path)


def _header(mapped: mmap.mmap, path: Path) -> tuple[dict[str, object], dict[str, TensorInfo]]:
    reader = _Reader(mapped, path)
    tensor_count, key_count = reader.header()
    metadata = reader.metadata(key_count)
    return metadata, reader.directory(tensor_count, metadata)


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise StartupError(f"{shorten(str(path))}: the file is empty, not a GGUF file") from None
    except OSError as error:
        raise StartupError(f"{shorten(str(path))}: cannot be read: {error.strerror}") from None
    # Weights are read from front to back: a cold file comes in long runs instead of page by page.
    mapped.madvise(mmap.MADV_SEQUENTIAL)
    return mapped


class _Reader:
    """A cursor over the mapped bytes; it never passes the end of the file or MAX_METADATA_BYTES."""

    def __init__(self, mapped: mmap.mmap, path: Path) -> None:
        self._bytes = mapped
        self._path = path
        self._size = len(mapped)
        self._limit = min(self._size, MAX_METADATA_BYTES)
        self._at = 0
        self._elements_left = MAX_ELEMENTS

    def header(self) -> tuple[int, int]:
        """(number of tensors, number of metadata keys)."""
        if self._bytes[:4] != _MAGIC:
            self._fail(f"not a GGUF file: it begins with {self._bytes[:4]!r}, not {_MAGIC!r}")
        self._at = 4
        (version,) = self._unpack(_U32, "version")
        if version not in _VERSIONS:
            endian = " (big-endian files are not supported)" if version and version & 0xFFFF == 0 else ""
            self._fail(f"GGUF version {version} is not supported; supported are 2 and 3{endian}")
        (tensors,) = self._unpack(_U64, "tensor count")
        (keys,) = self._unpack(_U64, "metadata count")
        if tensors > MAX_TENSORS:
            self._fail(f"it claims {tensors} tensors, more than the limit {MAX_TENSORS}")
        if keys > MAX_KEYS:
            self._fail(f"it claims {keys} metadata keys, more than the limit {MAX_KEYS}")
        return tensors, keys

    def metadata(self, count: int) -> dict[str, object]:
        """The next count keys and their values."""
        values: dict[str, object] = {}
        for _ in range(count):
            key = self._string("a metadata key", MAX_KEY_BYTES)
            if key in values:
                self._fail(f"metadata key {shorten(key)} occurs twice")
            (value_type,) = self._unpack(_U32, f"the type of {shorten(key)}")
            values[key] = self._value(value_type, key)
        return values

    def directory(self, count: int, metadata: Mapping[str, object]) -> dict[str, TensorInfo]:
        """The next count tensor entries, checked to lie in the file, aligned and apart from each other."""
        alignment = self._alignment(metadata)
        entries = [self._entry() for _ in range(count)]
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in entries:
            tensors[name] = self._place(name, kind, shape, base, offset)
            if offset % alignment:
                self._fail(f"tensor {shorten(name)} is not aligned to {alignment} bytes")
        if len(tensors) != count:
            self._fail("two tensors have the same name")
        end = 0
        for info in sorted(tensors.values(), key=lambda info: info.start):
            if info.start < end:
                self._fail(f"tensor {shorten(info.name)} overlaps another one")
            end = info.start + info.nbytes
        return tensors

    def _entry(self) -> tuple[str, Kind, tuple[int, ...], int]:
        name = self._string("a tensor name", MAX_KEY_BYTES)
        (dimensions,) = self._unpack(_U32, f"the dimensions of tensor {shorten(name)}")
        if not 1 <= dimensions <= _DIMENSIONS:
            self._fail(f"tensor {shorten(name)} has {dimensions} dimensions, must be 1 to {_DIMENSIONS}")
        sizes = self._unpack(_SIZES[dimensions], f"the shape of tensor {shorten(name)}")
        (number,) = self._unpack(_U32, f"the kind of tensor {shorten(name)}")
        kind = _KINDS.get(number)
        if kind is None:
            supported = ", ".join(_KINDS.values())
            label = _OTHER_KINDS.get(number, f"number {number}")
            self._fail(f"tensor {shorten(name)} is of kind {label}, which is not supported; supported are {supported}")
        (offset,) = self._unpack(_U64, f"the offset of tensor {shorten(name)}")
        return name, kind, tuple(reversed(sizes)), offset

    def _place(self, name: str, kind: Kind, shape: tuple[int, ...], base: int, offset: int) -> TensorInfo:
        layout = LAYOUTS[kind]
        numbers = math.prod(shape)
        if numbers == 0:
            self._fail(f"tensor {shorten(name)} has the empty shape {shape}")
        if shape[-1] % layout.block_size:
            self._fail(
                f"tensor {shorten(name)} has rows of {shape[-1]}, not whole {kind} blocks of {layout.block_size}"
            )
        nbytes = numbers // layout.block_size * layout.block_bytes
        if base + offset + nbytes > self._size:
            self._fail(
                f"tensor {shorten(name)} ends at byte {base + offset + nbytes}, the file has only {self._size}: "
                "it is truncated or corrupt"
            )
        return TensorInfo(name, kind, shape, base + offset, nbytes)

    def _alignment(self, metadata: Mapping[str, object]) -> int:
        value = metadata.get("general.alignment", 32)
        # At least 8, as the format says: the views of float tensors need it.
        if not isinstance(value, int) or not 8 <= value <= 65536 or value & (value - 1):
            self._fail(f"general.alignment is {shorten(value)}, must be a power of two from 8 to 65536")
        return value

    def _value(self, value_type: int, key: str) -> object:
        if value_type == _STRING:
            return self._string(f"the value of {shorten(key)}", MAX_STRING_BYTES)
        if value_type == _ARRAY:
            return self._array(key)
        scalar = _SCALARS.get(value_type)
        if scalar is None:
            self._fail(f"metadata key {shorten(key)} has the unknown type {value_type}")
        (value,) = self._unpack(scalar, f"the value of {shorten(key)}")
        return value

    def _array(self, key: str) -> list[object]:
        (element_type,) = self._unpack(_U32, f"the type of {shorten(key)}")
        (count,) = self._unpack(_U64, f"the length of {shorten(key)}")
        if count > self._elements_left:
            self._fail(f"array {shorten(key)} claims {count} elements, more than the limit {MAX_ELEMENTS} of a file")
        self._elements_left -= count
        if element_type == _STRING:
            return self._strings(count, key)
        scalar = _SCALARS.get(element_type)
        if scalar is None:
            problem = "nested arrays are" if element_type == _ARRAY else f"element type {element_type} is"
            self._fail(f"array {shorten(key)}: {problem} not supported")
        whole = struct.Struct(f"<{count}{scalar.format[1:]}")
        return list(self._unpack(whole, f"array {shorten(key)}"))

    def _strings(self, count: int, key: str) -> list[object]:
        """An array of strings.  A flat loop on locals: vocabularies have 10^5 of them, and starting up waits for it."""
        data, at, last = self._bytes, self._at, self._limit - 8
        unpack = _U64.unpack_from
        strings: list[object] = []
        try:
            for _ in range(count):
                # last - at bytes remain behind the length; at can only pass last through a string that was too long.
                length = unpack(data, at)[0] if at <= last else self._size
                if length > last - at:
                    self._truncated(f"array {shorten(key)}")
                end = at + 8 + length
                strings.append(data[at + 8 : end].decode())
                at = end
        except UnicodeDecodeError:
            self._fail(f"array {shorten(key)} holds a string that is not UTF-8")
        self._at = at
        return strings

    def _string(self, what: str, most: int) -> str:
        (length,) = self._unpack(_U64, what)
        if length > most:
            self._fail(f"{what} claims {length} bytes, more than the limit {most}")
        if length > self._limit - self._at:
            self._truncated(what)
        raw = self._bytes[self._at : self._at + length]
        self._at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self._fail(f"{what} is not UTF-8")

    def _unpack(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        if form.size > self._limit - self._at:
            self._truncated(what)
        values = form.unpack_from(self._bytes, self._at)
        self._at += form.size
        return values

    def _truncated(self, what: str) -> NoReturn:
        if self._limit < self._size:
            self._fail(f"its metadata passes the limit of {MAX_METADATA_BYTES} bytes at {what}")
        self._fail(f"the file ends inside {what}: it is truncated or corrupt")

    def _fail(self, problem: str) -> NoReturn:
        raise StartupError(f"{shorten(str(self._path))}: {problem}")
