"""The safetensors folder: one file, many with an index, and everything that can be wrong with them."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vserve.errors import StartupError
from vserve.model.kinds import Kind
from vserve.model.safetensors_files import INDEX, SINGLE, SafetensorsWeights, weight_files

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(8, dtype=torch.float16).reshape(2, 4),
    "c.weight": torch.arange(6, dtype=torch.bfloat16),
}


def write_single(folder: Path) -> None:
    save_file(TENSORS, folder / SINGLE)


def write_shards(folder: Path) -> None:
    save_file({"a.weight": TENSORS["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    rest = {name: TENSORS[name] for name in ("b.weight", "c.weight")}
    save_file(rest, folder / "model-00002-of-00002.safetensors")
    write_index(folder, {"a.weight": 1, "b.weight": 2, "c.weight": 2})


def write_index(folder: Path, shards: dict[str, int]) -> None:
    weight_map = {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in shards.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_every_tensor_is_read_from_one_file_or_many(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path)
    weights = SafetensorsWeights(tmp_path)
    assert sorted(weights.names()) == sorted(TENSORS)
    assert "a.weight" in weights
    assert "d.weight" not in weights
    assert weights.total_bytes == 12 * 4 + 8 * 2 + 6 * 2
    for name, kind in (("a.weight", Kind.F32), ("b.weight", Kind.F16), ("c.weight", Kind.BF16)):
        stored = weights.get(name)
        assert (stored.name, stored.kind, stored.shape) == (name, kind, tuple(TENSORS[name].shape))
        assert torch.equal(stored.data, TENSORS[name])
        assert torch.equal(stored.dense(), TENSORS[name].float())


def test_what_was_loaded_does_not_depend_on_the_file(tmp_path: Path) -> None:
    write_single(tmp_path)
    dense = SafetensorsWeights(tmp_path).get("a.weight").dense()
    with (tmp_path / SINGLE).open("r+b") as opened:
        opened.write(bytes((tmp_path / SINGLE).stat().st_size))
    assert torch.equal(dense, TENSORS["a.weight"])


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    write_single(tmp_path)
    (tmp_path / INDEX).write_text("nonsense")
    assert weight_files(tmp_path) == [tmp_path / SINGLE]
    assert len(SafetensorsWeights(tmp_path).names()) == 3


def write_missing_shard(folder: Path) -> None:
    write_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def write_wrong_index(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, {"a.weight": 1, "b.weight": 1, "c.weight": 2})


def write_unknown_tensor(folder: Path) -> None:
    write_shards(folder)
    write_index(folder, {"a.weight": 1, "b.weight": 2, "z.weight": 2})


def write_repeated_tensor(folder: Path) -> None:
    write_shards(folder)
    save_file(TENSORS, folder / "model-00002-of-00002.safetensors")


def write_shard_name(shard: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a.weight": shard}}))

    return write


def write_index_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(text)


def write_header(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        size = len(header) if length is None else length
        (folder / SINGLE).write_bytes(struct.pack("<Q", size) + header + data)

    return write


def write_pickle(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(pickle.dumps({"a": 1}))


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def header(**entries: dict[str, object]) -> bytes:
    return json.dumps(entries).encode()


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: None, "no weights: neither model.safetensors nor"),
    "pickle": (write_pickle("pytorch_model.bin"), "'pytorch_model.bin' may be a pickle"),
    "old pickle": (write_pickle("consolidated.00.pth"), "may be a pickle"),
    "missing shard": (write_missing_shard, "shard 'model-00002-of-00002.safetensors' is missing"),
    "tensor in another shard": (write_wrong_index, "'b.weight' is not in 'model-00001-of-00002.safetensors'"),
    "tensor in no shard": (write_unknown_tensor, "'z.weight' is not in"),
    "tensor in two shards": (write_repeated_tensor, "'a.weight' is in two files"),
    "path in the index": (write_shard_name("../evil.safetensors"), "which is no safetensors file"),
    "absolute path in the index": (write_shard_name("/etc/passwd"), "which is no safetensors file"),
    "pickle in the index": (write_shard_name("pytorch_model.bin"), "which is no safetensors file"),
    "number in the index": (write_shard_name(3), "which is no safetensors file"),
    "endless name in the index": (write_shard_name("x" * 9999 + ".safetensors"), "which is no safetensors file"),
    "index not JSON": (write_index_text("{"), "not valid JSON"),
    "index of nesting": (write_index_text("[" * 100_000), "not valid JSON"),
    "index a list": (write_index_text("[]"), "must hold a JSON object"),
    "index without map": (write_index_text("{}"), '"weight_map" is missing'),
    "index with a list for a map": (write_index_text('{"weight_map": []}'), '"weight_map" is missing'),
    "empty file": (lambda folder: (folder / SINGLE).write_bytes(b""), "not a sound safetensors file"),
    "length bomb": (write_header(b"{}", length=2**63), "not a sound safetensors file"),
    "header past the end": (write_header(b"{}", length=1000), "not a sound safetensors file"),
    "header not JSON": (write_header(b"nonsense"), "not a sound safetensors file"),
    "data past the end": (write_header(header(a=entry([4], 0, 16)), bytes(15)), "not a sound safetensors file"),
    "data left over": (write_header(header(a=entry([4], 0, 16)), bytes(17)), "not a sound safetensors file"),
    "shape bomb": (write_header(header(a=entry([2**62, 2**62], 0, 16)), bytes(16)), "not a sound safetensors file"),
    "shape not its bytes": (write_header(header(a=entry([5], 0, 16)), bytes(16)), "not a sound safetensors file"),
    "overlap": (
        write_header(header(a=entry([4], 0, 16), b=entry([4], 8, 24)), bytes(24)),
        "not a sound safetensors file",
    ),
    "unknown type": (write_header(header(a=entry([4], 0, 16, "Q9")), bytes(16)), "not a sound safetensors file"),
}


@pytest.mark.parametrize(("write", "problem"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_bad_folder_is_one_line_that_names_it(tmp_path: Path, write: Callable[[Path], object], problem: str) -> None:
    write(tmp_path)
    with pytest.raises(StartupError) as caught:
        SafetensorsWeights(tmp_path)
    message = str(caught.value)
    assert problem in message
    assert tmp_path.name in message
    assert "\n" not in message
    assert len(message) < 1000


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_single(tmp_path)
    with pytest.raises(StartupError, match=r"lm_head\.weight is missing"):
        SafetensorsWeights(tmp_path).get("lm_head.weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_type_that_is_not_supported_is_refused_when_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"a": torch.zeros(4, 4).to(dtype), "b": torch.ones(2)}, tmp_path / SINGLE)
    weights = SafetensorsWeights(tmp_path)
    assert torch.equal(weights.get("b").dense(), torch.ones(2))
    with pytest.raises(StartupError, match="which is not supported; supported are F32, F16, BF16"):
        weights.get("a")


def test_a_file_cut_while_mapped_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    write_single(tmp_path)
    weights = SafetensorsWeights(tmp_path)
    with (tmp_path / SINGLE).open("r+b") as opened:
        opened.truncate(100)
    with pytest.raises(StartupError, match="was cut from"):
        weights.get("a.weight")


def read_all(folder: Path) -> None:
    weights = SafetensorsWeights(folder)
    for name in weights.names():
        weights.get(name).dense()


@pytest.mark.promise("R13", "fault: hostile model files")
def test_a_file_truncated_anywhere_fails_cleanly(tmp_path: Path) -> None:
    write_single(tmp_path)
    whole = (tmp_path / SINGLE).read_bytes()
    for cut in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:cut])
        with pytest.raises(StartupError):
            read_all(tmp_path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 250), st.integers(1, 255)), min_size=1, max_size=3))
@pytest.mark.promise("R13", "fault: hostile model files")
def test_flipped_bytes_never_raise_anything_but_a_startup_error(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    write_single(tmp_path)
    content = bytearray((tmp_path / SINGLE).read_bytes())
    for at, mask in flips:
        content[at] ^= mask
    (tmp_path / SINGLE).write_bytes(content)
    with contextlib.suppress(StartupError):
        read_all(tmp_path)


@pytest.mark.parametrize("padding", range(8))
def test_data_at_any_alignment_is_read_or_refused(tmp_path: Path, padding: int) -> None:
    text = header(a=entry([4], 0, 16)) + b" " * padding
    values = torch.tensor([1.0, -2.0, 3.0, 4.0])
    write_header(text, values.numpy().tobytes())(tmp_path)
    try:
        dense = SafetensorsWeights(tmp_path).get("a").dense()
    except StartupError:
        return
    assert torch.equal(dense, values)
