"""The GGUF reader: against the gguf package and transformers on sound files, and on hostile bytes."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from vserve.errors import StartupError
from vserve.model import gguf
from vserve.model.config import ModelConfig
from vserve.model.gguf_weights import GgufWeights, halves_order, hf_name
from vserve.model.kinds import Kind
from vserve.model.source import ModelSource, resolve

HEADS, KV_HEADS, HEAD_DIM, WIDTH, INNER, VOCAB, LAYERS = 4, 2, 16, 64, 96, 40, 2
U32, F32, STRING, ARRAY = 4, 6, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name: str, shape: Iterable[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = tuple(shape)
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file_bytes(
    entries: Iterable[bytes] = (),
    infos: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF file of these parts; counts, if given, are the claimed numbers of (tensors, keys)."""
    entries, infos = list(entries), list(infos)
    tensors, keys = counts if counts is not None else (len(infos), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(entries) + b"".join(infos)
    return head + bytes(-len(head) % 32) + data


def array(kind: int, count: int, value: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + value


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter stores q and k of a Llama model."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def model_tensors(biases: bool = False) -> dict[str, np.ndarray]:
    """A tiny Llama model's tensors by Hugging Face name, float32."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        rows = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM, "o": WIDTH}
        for name, count in rows.items():
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (count, HEADS * HEAD_DIM if name == "o" else WIDTH)
            if biases:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (count,)
        shapes[prefix + "mlp.gate_proj.weight"] = shapes[prefix + "mlp.up_proj.weight"] = (INNER, WIDTH)
        shapes[prefix + "mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (WIDTH,)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


LLAMA = ModelConfig.from_gguf(
    {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "llama.embedding_length": WIDTH,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    },
    {"token_embd.weight": (VOCAB, WIDTH)},
)
GGUF_NAMES = {
    hf: name
    for name in (
        ["token_embd.weight", "output_norm.weight", "output.weight"]
        + [
            f"blk.{layer}.{part}.{kind}"
            for layer in range(LAYERS)
            for part in "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
            for kind in ("weight", "bias")
        ]
    )
    if (hf := hf_name(name, LLAMA)) is not None
}


def write_model(
    path: Path,
    tensors: dict[str, np.ndarray],
    kind: Kind = Kind.F32,
    change: Callable[[GGUFWriter], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Write tensors the way llama.cpp does, matrices as kind; returns what a reader must see, by Hugging Face name."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_eos_token_id(3)
    if change is not None:
        change(writer)
    seen: dict[str, torch.Tensor] = {}
    qtype = GGMLQuantizationType[kind.value]
    for name, values in tensors.items():
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
        order = np.arange(values.shape[0])
        stored = values
        if heads:
            stored, order = permuted(values, heads), permuted(order, heads)
        if values.ndim == 2 and kind is not Kind.F32:
            packed = quantize(stored, qtype)
            writer.add_tensor(GGUF_NAMES[name], packed, raw_dtype=qtype)
            stored = dequantize(packed, qtype)
        else:
            writer.add_tensor(GGUF_NAMES[name], np.ascontiguousarray(stored))
        whole = np.empty_like(stored)
        whole[order] = stored
        seen[name] = torch.from_numpy(whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen


def open_model(path: Path) -> ModelSource:
    return resolve(str(path), environ={})


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
@pytest.mark.parametrize("biases", [False, True])
def test_a_written_model_reads_back_in_the_hugging_face_layout(tmp_path: Path, kind: Kind, biases: bool) -> None:
    expected = write_model(tmp_path / "tiny.gguf", model_tensors(biases), kind)
    source = open_model(tmp_path / "tiny.gguf")
    weights = source.open_weights()
    assert set(weights.names()) == set(expected)
    assert source.config.tie_embeddings
    assert source.config.attention_bias is biases
    for name, tensor in expected.items():
        stored = weights.get(name)
        assert stored.shape == tuple(tensor.shape)
        assert torch.equal(stored.dense(), tensor), name
    matrices = [weights.get(name) for name in expected if expected[name].dim() == 2]
    assert {stored.kind for stored in matrices} == {kind}
    assert weights.total_bytes == sum(weights.get(name).nbytes for name in weights.names())


def test_a_file_with_an_output_matrix_is_not_tied(tmp_path: Path) -> None:
    tensors = model_tensors() | {"lm_head.weight": np.ones((VOCAB, WIDTH), dtype=np.float32)}
    write_model(tmp_path / "tiny.gguf", tensors)
    source = open_model(tmp_path / "tiny.gguf")
    assert not source.config.tie_embeddings
    assert source.open_weights().get("lm_head.weight").shape == (VOCAB, WIDTH)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", model_tensors())
    with pytest.raises(StartupError, match=r"tiny\.gguf.*lm_head\.weight is missing"):
        open_model(tmp_path / "tiny.gguf").open_weights().get("lm_head.weight")


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_the_row_order_inverts_the_converters(heads: int) -> None:
    rows = np.arange(heads * 16)
    assert np.array_equal(permuted(rows, heads)[halves_order(rows.size, heads).numpy()], rows)


def test_plain_tensors_are_windows_on_the_file(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", model_tensors())
    source = open_model(tmp_path / "tiny.gguf")
    assert source.gguf is not None
    stored = source.open_weights().get("model.norm.weight")
    assert stored.data.untyped_storage().data_ptr() == source.gguf.file.untyped_storage().data_ptr()


@pytest.mark.promise("R13")
def test_a_file_cut_while_mapped_is_refused_before_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_model(path, model_tensors())
    weights = open_model(path).open_weights()
    with path.open("r+b") as opened:
        opened.truncate(4096)
    with pytest.raises(StartupError, match="was cut from"):
        weights.get("model.norm.weight")


def test_the_default_models_metadata_equals_ggufs() -> None:
    source = resolve(None, environ={})
    reader = GGUFReader(source.path)
    assert source.gguf is not None
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert source.gguf.metadata == expected
    for tensor in reader.tensors:
        found = source.gguf.tensors[tensor.name]
        assert (found.start, found.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert found.kind == tensor.tensor_type.name
        assert found.shape == tuple(reversed(tensor.shape.tolist()))


def test_the_default_models_tensors_equal_transformers() -> None:
    source = resolve(None, environ={})
    ours = source.config
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        tie_word_embeddings=ours.tie_embeddings,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    load = cast(Callable[..., dict[str, Any]], load_gguf_checkpoint)
    loaded = load(str(source.path), return_tensors=True, model_to_load=model)["tensors"]
    weights = source.open_weights()
    assert set(weights.names()) == set(loaded) - {"lm_head.weight"}
    for name in weights.names():
        assert torch.equal(weights.get(name).dense(), loaded[name]), name


GOOD_INFO = info("token_embd.weight", (32, 2))
BAD_FILES = {
    "empty": (b"", "is empty"),
    "another format": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "magic alone": (b"GGUF", "ends inside version"),
    "version 1": (file_bytes(version=1), "version 1 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count bomb": (file_bytes(counts=(2**63, 0)), "claims 9223372036854775808 tensors"),
    "key count bomb": (file_bytes(counts=(0, 2**32)), "claims 4294967296 metadata keys"),
    "fewer keys than claimed": (file_bytes(counts=(0, 9)), "ends inside"),
    "fewer tensors than claimed": (file_bytes([], [GOOD_INFO], bytes(256), counts=(2, 0)), "tensor"),
    "key length bomb": (file_bytes([struct.pack("<Q", 2**64 - 1)], counts=(0, 1)), "claims 18446744073709551615 bytes"),
    "key past the end": (file_bytes([struct.pack("<Q", 60000)], counts=(0, 1)), "ends inside a metadata key"),
    "string bomb": (file_bytes([entry("k", STRING, struct.pack("<Q", 2**40))]), "claims 1099511627776 bytes"),
    "string past the end": (file_bytes([entry("k", STRING, struct.pack("<Q", 10**6))]), "ends inside the value of 'k'"),
    "key not UTF-8": (file_bytes([entry(b"\xff\xfe", U32, bytes(4))]), "not UTF-8"),
    "value not UTF-8": (file_bytes([entry("k", STRING, text(b"\x80"))]), "'k' is not UTF-8"),
    "element not UTF-8": (file_bytes([entry("k", ARRAY, array(STRING, 1, text(b"\x80")))]), "not UTF-8"),
    "same key twice": (file_bytes([entry("k", U32, bytes(4))] * 2), "occurs twice"),
    "unknown type": (file_bytes([entry("k", 13, bytes(8))]), "unknown type 13"),
    "nested array": (file_bytes([entry("k", ARRAY, array(ARRAY, 1, array(U32, 1)))]), "nested arrays"),
    "unknown element type": (file_bytes([entry("k", ARRAY, array(99, 1))]), "element type 99"),
    "array count bomb": (file_bytes([entry("k", ARRAY, array(U32, 2**62))]), "more than the limit"),
    "array past the end": (file_bytes([entry("k", ARRAY, array(U32, 10**6))]), "ends inside array 'k'"),
    "string array past the end": (file_bytes([entry("k", ARRAY, array(STRING, 10**6))], data=bytes(64)), "ends inside"),
    "element length bomb": (file_bytes([entry("k", ARRAY, array(STRING, 1, b"\xff" * 8))]), "ends inside array 'k'"),
    "elements spread over arrays": (
        file_bytes([entry(f"k{i}", ARRAY, array(0, 2**21, bytes(2**21))) for i in range(3)]),
        "more than the limit",
    ),
    "no dimensions": (file_bytes([], [info("w", ())]), "has 0 dimensions"),
    "five dimensions": (file_bytes([], [info("w", (1,) * 5)]), "has 5 dimensions"),
    "dimension count bomb": (file_bytes([], [text("w") + struct.pack("<I", 2**32 - 1)]), "has 4294967295 dimensions"),
    "empty shape": (file_bytes([], [info("w", (32, 0))], bytes(256)), "empty shape"),
    "shape product past 2**64": (file_bytes([], [info("w", (2**63, 2**63, 2**63, 2**63))]), "the file has only"),
    "kind we lack": (file_bytes([], [info("w", (256, 1), 23)], bytes(256)), "of kind IQ4_XS, which is not supported"),
    "unknown kind": (file_bytes([], [info("w", (256, 1), 4)], bytes(256)), "of kind number 4"),
    "part of a block": (file_bytes([], [info("w", (33, 2), 3)], bytes(256)), "not whole Q4_1 blocks of 32"),
    "data past the end": (file_bytes([], [info("w", (64, 2))], bytes(511)), "the file has only"),
    "offset bomb": (file_bytes([], [info("w", (32, 2), 0, 2**64 - 32)], bytes(256)), "the file has only"),
    "offset not aligned": (file_bytes([], [info("w", (32, 2), 0, 4)], bytes(512)), "not aligned to 32"),
    "same name twice": (file_bytes([], [info("w", (8,)), info("w", (8,), 0, 32)], bytes(64)), "same name"),
    "overlap": (file_bytes([], [info("a", (16,)), info("b", (16,), 0, 32)], bytes(128)), "'b' overlaps"),
    "identical place": (file_bytes([], [info("a", (8,)), info("b", (8,))], bytes(32)), "overlaps"),
    "alignment zero": (file_bytes([entry("general.alignment", U32, bytes(4))]), "must be a power of two"),
    "alignment 12": (file_bytes([entry("general.alignment", U32, struct.pack("<I", 12))]), "must be a power of two"),
    "alignment bomb": (file_bytes([entry("general.alignment", U32, b"\0\0\0\x80")]), "must be a power of two"),
    "alignment of text": (file_bytes([entry("general.alignment", STRING, text("32"))]), "must be a power of two"),
}


@pytest.mark.parametrize(("content", "problem"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(StartupError) as caught:
        gguf.read(path)
    message = str(caught.value)
    assert problem in message
    assert "bad.gguf" in message
    assert "\n" not in message
    assert len(message) < 1000


def test_a_huge_sparse_file_of_empty_strings_is_refused_by_count(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(file_bytes([entry("k", ARRAY, array(STRING, 2**27))]))
    with path.open("r+b") as opened:
        opened.truncate(2**33)
    with pytest.raises(StartupError, match="claims 134217728 elements"):
        gguf.read(path)


def test_metadata_longer_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    size = gguf.MAX_STRING_BYTES
    with path.open("wb") as opened:
        opened.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 40))
        for i in range(40):
            opened.write(text(f"k{i}") + struct.pack("<IQ", STRING, size))
            opened.seek(size, 1)
        opened.truncate(opened.tell())
    with pytest.raises(StartupError, match="metadata passes the limit"):
        gguf.read(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(StartupError, match="cannot be read"):
            gguf.read(path)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_and_other_alignments_are_read(tmp_path: Path, version: int) -> None:
    entries = [entry("general.alignment", U32, struct.pack("<I", 64)), entry("x", F32, struct.pack("<f", 0.5))]
    head = file_bytes(entries, [info("w", (2, 3), 0, 64)], version=version)
    path = tmp_path / "small.gguf"
    values = np.arange(6, dtype=np.float32)
    path.write_bytes(head.ljust(-(-len(head) // 64) * 64 + 64, b"\0") + values.tobytes())
    read = gguf.read(path)
    assert read.metadata["x"] == 0.5
    assert torch.equal(read.data("w"), torch.from_numpy(values).reshape(3, 2))


MODEL_CHANGES: dict[str, tuple[Callable[[GGUFWriter], None], str]] = {
    "split": (lambda writer: writer.add_uint16("split.count", 3), "merge them first"),
    "experts": (lambda writer: writer.add_expert_count(8), "mixture-of-experts"),
    "template": (lambda writer: writer.add_uint32("tokenizer.chat_template", 1), "chat_template must be a string"),
    "tensor": (
        lambda writer: writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(WIDTH, dtype=np.float32)),
        "'blk.0.attn_q_norm.weight' is not one of a 2-layer LlamaForCausalLM",
    ),
    "layer": (
        lambda writer: writer.add_tensor("blk.2.attn_norm.weight", np.ones(WIDTH, dtype=np.float32)),
        "'blk.2.attn_norm.weight' is not one of",
    ),
    "factors": (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.zeros(HEAD_DIM // 2, dtype=np.float32)),
        "must hold 8 positive factors",
    ),
    "factor matrix": (
        lambda writer: writer.add_tensor("rope_freqs.weight", np.ones((2, HEAD_DIM // 2), dtype=np.float32)),
        "must be a short row of F32",
    ),
}


@pytest.mark.parametrize(("change", "problem"), MODEL_CHANGES.values(), ids=MODEL_CHANGES.keys())
def test_a_model_we_cannot_serve_is_refused_before_loading(
    tmp_path: Path, change: Callable[[GGUFWriter], None], problem: str
) -> None:
    write_model(tmp_path / "tiny.gguf", model_tensors(), change=change)
    with pytest.raises(StartupError) as caught:
        open_model(tmp_path / "tiny.gguf")
    assert problem in str(caught.value)


def test_rope_factors_become_part_of_the_configuration(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)
    write_model(
        tmp_path / "tiny.gguf", model_tensors(), change=lambda writer: writer.add_tensor("rope_freqs.weight", factors)
    )
    source = open_model(tmp_path / "tiny.gguf")
    assert source.config.rope_scaling is not None
    assert source.config.rope_scaling.factors == tuple(factors.tolist())
    assert "rope_freqs.weight" not in source.open_weights()


def test_rows_that_do_not_make_whole_heads_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "tiny.gguf", model_tensors())
    source = open_model(tmp_path / "tiny.gguf")
    assert source.gguf is not None
    weights = GgufWeights(source.gguf, replace(source.config, num_heads=5))
    with pytest.raises(StartupError, match="64 rows, which 5 rotary heads cannot share"):
        weights.get("model.layers.0.self_attn.q_proj.weight")


def survive(path: Path) -> None:
    """Open a model and read all of it; a StartupError is the only way this may fail."""
    with contextlib.suppress(StartupError):
        weights = open_model(path).open_weights()
        for name in weights.names():
            weights.get(name).dense()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "sound.gguf"
    write_model(path, model_tensors(), Kind.Q4_0)
    return path.read_bytes()


@pytest.mark.promise("R13", "fault: hostile model files")
def test_a_file_truncated_anywhere_fails_cleanly(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "cut.gguf"
    cuts = [*range(0, 4096, 7), *range(4096, len(sound), 997), len(sound) - 1]
    for cut in cuts:
        path.write_bytes(sound[:cut])
        with pytest.raises(StartupError):
            open_model(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 4095), st.integers(1, 255)), min_size=1, max_size=4))
@pytest.mark.promise("R13", "fault: hostile model files")
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, sound: bytes, flips: list[tuple[int, int]]) -> None:
    content = bytearray(sound)
    for at, mask in flips:
        content[at] ^= mask
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    survive(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=200), counts=st.tuples(st.integers(0, 40), st.integers(0, 40)))
def test_random_bytes_behind_a_header_never_raise_anything_else(
    tmp_path: Path, tail: bytes, counts: tuple[int, int]
) -> None:
    path = tmp_path / "random.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail)
    survive(path)
