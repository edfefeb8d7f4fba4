"""Where settings come from: the file beside flags and variables, what is shown of them, and vLLM's own flags."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.process import ROOT, environment
from vserve import familiar, settings
from vserve.cli import main
from vserve.config import Config, flags
from vserve.errors import StartupError


def write(folder: Path, text: str) -> str:
    file = folder / "vserve.toml"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("port = 81", "port", 81),
        ("max-queue = 7", "max_queue", 7),
        ("max_queue = 7", "max_queue", 7),
        ('kv-cache-memory-bytes = "1GiB"', "kv_cache_memory_bytes", 2**30),
        ("kv-cache-memory-bytes = 1073741824", "kv_cache_memory_bytes", 2**30),
        ("drain-timeout = 2.5", "drain_timeout_s", 2.5),
        ("drain-timeout = 2", "drain_timeout_s", 2.0),
        ("strict = true", "strict", True),
        ('api-key = ["a", "b,c"]', "api_key", ("a", "b,c")),
        ('allowed-origins = ["https://a", "https://b"]', "allowed_origins", ("https://a", "https://b")),
        ('allowed-origins = "https://a, https://b"', "allowed_origins", ("https://a", "https://b")),
        ('model = "some/folder"', "model", "some/folder"),
        ("enable_prefix_caching = false", "enable_prefix_caching", False),
    ],
)
def test_a_file_sets_what_a_flag_can(tmp_path: Path, text: str, field: str, value: object) -> None:
    path = write(tmp_path, text)
    found = settings.read(["--config", path], {})
    assert getattr(found.config, field) == value
    assert found.origins[field] == path


def test_a_flag_beats_a_variable_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "port = 1\nmax_queue = 2\nblock_size = 8")
    found = settings.read(["--port", "3"], {"VSERVE_CONFIG": path, "VSERVE_MAX_QUEUE": "4", "VSERVE_PORT": "5"})
    config = found.config
    assert (config.port, config.max_queue, config.block_size, config.seed) == (3, 4, 8, 0)
    origins = [found.origins[name] for name in ("port", "max_queue", "block_size", "seed")]
    assert origins == ["--port", "VSERVE_MAX_QUEUE", path, "default"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown key 'prot'; did you mean port?"),
        ("zzzzzz = 1", "unknown key 'zzzzzz'; vserve config lists them all"),
        ("config = 'x'", "unknown key 'config'"),
        ("[server]\nport = 1", "unknown key 'server'"),
        ("port = true", "port: True is of the wrong type"),
        ("port = [1]", "port: [1] is of the wrong type"),
        ("port = 70000", "port: 70000 is too large; the most is 65535"),
        ("port = 1.5", "port: '1.5' is not a whole number"),
        ("drain-timeout = nan", "drain-timeout: nan is too small"),
        ("api-key = [1]", "api-key: must be a list of strings"),
        ("strict = 'maybe'", "strict: 'maybe' is not a switch"),
        ("port = ", "not TOML"),
        ("\x00", "not TOML"),
        ("a = " + "[" * 100_000, "not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(StartupError, match=re.escape(message)) as raised:
        settings.read(["--config", path], {})
    assert path in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        settings.read(["--config", str(tmp_path / "none.toml")], {})
    path = write(tmp_path, "#" * (settings.FILE_LIMIT_BYTES + 1))
    with pytest.raises(StartupError, match="larger than"):
        settings.read(["--config", path], {})


def test_what_is_shown_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["a/b", "--port", "81", "--allowed-origins", "https://a", "--dtype", "half", "--drain-timeout", "2"]
    assert main(["config", *argv]) == 0
    shown = capsys.readouterr().out
    assert settings.parse(["--config", write(tmp_path, shown)], {}) == settings.parse(
        [*argv, "--config", str(tmp_path / "vserve.toml")], {}
    )
    assert re.search(r"^port = 81 +# --port$", shown, re.MULTILINE)
    assert re.search(r"^max-queue = 1024 +# default$", shown, re.MULTILINE)
    assert re.search(r"^# max-model-len = +# default$", shown, re.MULTILINE)


def test_every_setting_is_shown_and_no_key_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--api-key", "hunter2"]) == 0
    shown = capsys.readouterr().out
    assert "hunter2" not in shown
    assert "# api-key = (hidden)" in shown
    assert len(re.findall(r"^(?:# )?[a-z0-9-]+ =", shown, re.MULTILINE)) == len(flags())


def test_vllms_list_form_is_taken() -> None:
    assert settings.parse(["--allowed-origins", '["*"]'], {}).allowed_origins == ("*",)
    with pytest.raises(StartupError, match="not a JSON list of strings"):
        settings.parse(["--allowed-origins", "[1]"], {})


@pytest.mark.parametrize("names", ["served-model-name", "served-embedding-model-name"])
@pytest.mark.parametrize(
    ("argv", "model", "named"),
    [
        ("M --{} a b", "M", ("a", "b")),
        ("M --{} a b --port 1", "M", ("a", "b")),
        ("--{} a b --model M", "M", ("a", "b")),
        ("M --{} a b --{} c", "M", ("a", "b", "c")),
        ("M --{}=a --{}=b", "M", ("a", "b")),
        ("--{} a M", "M", ("a",)),  # nothing else can be the model
        ("--{} a b --{} c M", "M", ("a", "b", "c")),
        ("--{} a --{} b", None, ("a", "b")),
    ],
)
def test_one_flag_takes_several_names_as_vllms_does(
    names: str, argv: str, model: str | None, named: tuple[str, ...]
) -> None:
    found = settings.parse(argv.replace("{}", names).split(), {})
    assert (found.model, getattr(found, names.replace("-", "_"))) == (model, named)


def test_vllms_flags_without_effect_are_taken_and_said() -> None:
    argv = ["--trust-remote-code", "--swap-space", "4", "-tp", "1", "--disable-log-requests"]
    found = settings.read(argv, {})
    assert found.config == Config()
    assert [note.split()[0] for note in found.notes] == [
        "--trust-remote-code",
        "--disable-log-requests",
        "--swap-space",
        "--tensor-parallel-size",
    ]


def test_a_familiar_flag_that_asks_for_more_is_refused() -> None:
    with pytest.raises(StartupError, match="--tensor-parallel-size: '2' is not supported: there is one worker"):
        settings.read(["--tensor-parallel-size", "2"], {})


def test_no_familiar_flag_is_one_of_our_own() -> None:
    ours = {"--" + name.replace("_", "-") for name in flags()}
    assert not ours & {name for same in familiar.FAMILIAR for name in same.names}


def test_the_notes_go_to_stderr(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vserve", "serve", "--trust-remote-code", str(tmp_path / "nothing.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "vserve: --trust-remote-code has no effect: code from a model's folder is never run"
    )


def test_the_settings_that_are_shown_have_every_flag_and_no_secret() -> None:
    config = settings.read(["--api-key", "sk-one", "--api-key", "sk-two", "--enable-rca", "--port", "1234"], {}).config
    shown = settings.public(config)
    assert shown.keys() == flags().keys()
    assert (shown["api_key"], shown["enable_rca"], shown["port"]) == ("(2 hidden)", True, 1234)
    assert "sk-" not in json.dumps(shown)
    assert settings.public(Config())["api_key"] == ()
    secret = [name for name, (_, flag) in flags().items() if flag.secret]
    assert secret  # what a flag marks is what is hidden
