"""Model files that are wrong or hostile, and flags that name none, as typed: one line and exit code 2."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import requests
import torch
from safetensors.torch import save, save_file
from tokenizers import Tokenizer, models

from tests.e2e.process import ROOT, environment, serving

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "model.norm.weight": (32,),
    LAYER + "input_layernorm.weight": (32,),
    LAYER + "post_attention_layernorm.weight": (32,),
    **{f"{LAYER}self_attn.{name}_proj.weight": (32, 32) for name in "qkvo"},
    LAYER + "mlp.gate_proj.weight": (64, 32),
    LAYER + "mlp.up_proj.weight": (64, 32),
    LAYER + "mlp.down_proj.weight": (32, 64),
}
MOST_KIB = 200 << 10
"""What refusing may take beyond a process that has done nothing but import."""


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (_spring, (str(self.mark),))


def _spring(mark: str) -> object:
    return Path(mark).write_text("a pickle was loaded")


def tokenizer(folder: Path, size: int = 64) -> None:
    vocabulary = {chr(0x4E00 + number): number for number in range(size)}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(folder / "tokenizer.json"))


def tensors(**changes: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...] | None] = {**SHAPES, **changes}
    return {name: torch.ones(shape) for name, shape in shapes.items() if shape is not None}


def sound(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer(folder)
    save_file(tensors(), folder / "model.safetensors")


def stored(**changes: tuple[int, ...] | None) -> Callable[[Path], object]:
    """A folder whose tensors differ from what the configuration asks for."""
    return lambda folder: save_file(tensors(**changes), folder / "model.safetensors")


def raw(make: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """A folder whose only weight file is made from a sound one's bytes."""
    return lambda folder: (folder / "model.safetensors").write_bytes(make(save(tensors())))


def headed(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], object]:
    """A weight file whose header was changed."""

    def make(data: bytes) -> bytes:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return raw(make)


def entry(name: str, **values: object) -> Callable[[Path], object]:
    return headed(lambda header: header[name].update(values))


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(SHAPES, "model-00001-of-00002.safetensors")
    weight_map["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def index_that_leads_out(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(SHAPES, "../../etc/model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(folder / "sprung")))


def sparse(name: str, size: int) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(size)

    return write


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


NORM, DOWN = "model.norm.weight", LAYER + "mlp.down_proj.weight"
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor is missing": (
        stored(**{DOWN: None}),
        f"tensor {DOWN} is missing, which a 1-layer LlamaForCausalLM needs",
    ),
    "a tensor too many": (stored(**{"model.extra.weight": (3,)}), "tensor 'model.extra.weight' is not one of"),
    "a layer too many": (
        stored(**{name.replace(".0.", ".1."): shape for name, shape in SHAPES.items() if ".0." in name}),
        "is not one of a 1-layer LlamaForCausalLM: the file holds another model",
    ),
    "a wrong shape": (stored(**{DOWN: (32, 63)}), "has shape [32, 63], but a 1-layer LlamaForCausalLM of this size"),
    "a shard is missing": (missing_shard, "shard 'model-00002-of-00002.safetensors' is missing from the folder"),
    "an index that leads out": (index_that_leads_out, "which is no safetensors file"),
    "cut short": (raw(lambda data: data[:-100]), "not a sound safetensors file"),
    "a header of an exabyte": (raw(lambda data: struct.pack("<Q", 1 << 60) + data[8:]), "not a sound safetensors file"),
    "overlapping data": (entry(NORM, data_offsets=[0, 128]), "not a sound safetensors file"),
    "huge dimensions": (entry(NORM, shape=[1 << 62, 4]), "not a sound safetensors file"),
    "negative dimensions": (entry(NORM, shape=[-32]), "not a sound safetensors file"),
    "offsets past the end": (entry(NORM, data_offsets=[1 << 50, (1 << 50) + 128]), "not a sound safetensors file"),
    "offsets the wrong way round": (entry(NORM, data_offsets=[128, 0]), "not a sound safetensors file"),
    "pickles": (pickles, "'pytorch_model.bin' may be a pickle, which can run code and is never loaded; convert"),
    "a vocabulary too large": (lambda folder: tokenizer(folder, 65), "it has 65 tokens, the model 64"),
    "a configuration of a gigabyte": (sparse("config.json", 1 << 30), "longer than the limit of 16777216 bytes"),
    "a configuration without end": (text("config.json", "[" * 100_000), "not valid JSON"),
    "a template of a gigabyte": (sparse("chat_template.jinja", 1 << 30), "larger than a chat template may be"),
    "a broken template": (text("chat_template.jinja", "{% for x %}"), "the chat template is wrong at line 1"),
}


def gguf(*parts: bytes) -> bytes:
    return b"GGUF" + struct.pack("<I", 3) + b"".join(parts)


COUNTS = struct.Struct("<QQ")
FILES = {
    "tensors without number": ("x.gguf", gguf(COUNTS.pack(1 << 63, 0)), "more than the limit"),
    "keys without number": ("x.gguf", gguf(COUNTS.pack(0, 1 << 63)), "more than the limit"),
    "a key without end": ("x.gguf", gguf(COUNTS.pack(0, 1), struct.pack("<Q", 1 << 62), b"a"), "claims"),
    "an array without end": (
        "x.gguf",
        gguf(COUNTS.pack(0, 1), struct.pack("<Q", 1), b"a", struct.pack("<IIQ", 9, 4, 1 << 61)),
        "more than the limit",
    ),
    "nothing behind the counts": ("x.gguf", gguf(COUNTS.pack(3, 3)), "truncated or corrupt"),
    "a pickle": ("model.pt", pickle.dumps({}), ".pt files may be pickles, which can run code and are never loaded"),
    "a lone weight file": ("model.safetensors", b"x", "pass the folder that holds this file"),
}


def test_tokenizer_and_template_may_come_from_elsewhere(tmp_path: Path) -> None:
    model, words = tmp_path / "model", tmp_path / "words"
    for folder in (model, words):
        folder.mkdir()
    sound(model)
    (model / "tokenizer.json").unlink()
    tokenizer(words)
    (words / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    own = words / "own.jinja"
    own.write_text("{% for m in messages %}\u4e01{{ m.content }}{% endfor %}")
    flags = [str(model), "--tokenizer", str(words), "--chat-template", str(own), "--served-model-name", "m"]
    with serving(*flags) as server:
        body = {"model": "m", "messages": [{"role": "user", "content": "\u4e02\u4e03"}]}
        reply = requests.post(f"{server.url}/tokenize", json=body, timeout=60)
        assert (reply.status_code, reply.json().get("tokens")) == (200, [1, 2, 3]), reply.text
        body |= {"max_tokens": 2, "ignore_eos": True}
        reply = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert (reply.status_code, reply.json()["usage"]["completion_tokens"]) == (200, 2), reply.text


def refused(cases: list[list[str]]) -> list[dict[str, object]]:
    """The outcome of `vserve serve` with each of these words."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("many_starts.py"))],
        input=json.dumps([["serve", "--host", "127.0.0.1", "--port", "0", *words] for words in cases]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.promise("fault: hostile model files", "input: pickled weights")
def test_bad_models_and_their_flags_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    cases: list[tuple[str, list[str], str]] = []
    for name, (spoil, said) in FOLDERS.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        sound(folder)
        spoil(folder)
        cases.append((name, [str(folder)], said))
    for name, (file, content, said) in FILES.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        (folder / file).write_bytes(content)
        cases.append((name, [str(folder / file)], said))
    good = tmp_path / "good"
    good.mkdir()
    sound(good)
    other = tmp_path / "broken.jinja"
    other.write_text("{{ 1 + }}")
    cases += [
        ("a tokenizer that is not there", [str(good), "--tokenizer", "nowhere"], "--tokenizer 'nowhere'"),
        (
            "a tokenizer of a folder without one",
            [str(good), "--tokenizer", str(tmp_path)],
            "no folder with a tokenizer",
        ),
        (
            "a template that is not there",
            [str(good), "--chat-template", "nowhere.jinja"],
            "neither a file nor a template",
        ),
        ("a template file that is broken", [str(good), "--chat-template", str(other)], "wrong at line 1"),
        ("a revision that is no name", ["org/name", "--revision", "../x"], "revision '../x' is not the name"),
        (
            "a cache without the model",
            ["org/name", "--download-dir", str(tmp_path)],
            f"not whole in the cache {tmp_path}",
        ),
    ]
    for (name, _, said), outcome in zip(cases, refused([words for _, words, _ in cases]), strict=True):
        lines = str(outcome["stderr"]).strip().splitlines()
        assert outcome["code"] == 2, (name, lines)
        assert said in lines[-1], (name, lines)
        assert lines[-1].startswith("vserve: "), (name, lines)
        assert len([line for line in lines if line.startswith("vserve: ")]) == 1, (name, lines)
        assert len(lines[-1]) < 700, (name, lines)
        assert "Traceback" not in str(outcome["stderr"]), (name, lines)
        assert int(str(outcome["peak_kib"])) < int(str(outcome["idle_kib"])) + MOST_KIB, (name, outcome["peak_kib"])
    assert not list(tmp_path.rglob("sprung"))
