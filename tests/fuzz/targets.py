"""What the fuzzer throws bytes at: one function a target, which returns or raises AssertionError, whatever comes.

Each states a promise that holds for any bytes.  Nothing here needs the fuzzer: test_fuzz_targets.py runs the seeds.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.http.judges import disagreement, h11_verdict, httptools_verdict
from tests.http.test_http_parser import INVALID, VALID, parse
from vserve import config, settings
from vserve.api import body, requests, schema
from vserve.api.key_file import read_keys
from vserve.errors import ApiError, StartupError
from vserve.http.limits import Limits

REFUSALS = (None, 400, 413, 414, 417, 431, 501, 505)
"""What the parser may answer; None: nothing is wrong so far."""
VOCAB_SIZE = 259
MESSAGE_LIMIT = 2000
"""An error repeats at most 200 characters of a value and names a few others."""


def parser(data: bytes) -> None:
    """Any bytes parse or are refused with the right status, the same however they are cut, within the memory bound.

    The first two bytes say where the rest is cut.  The bound on the buffer is checked inside parse.
    """
    cuts, wire = data[:2], data[2:]
    whole = parse(wire)
    assert whole.status in REFUSALS
    edges = [0, *sorted(cut * len(wire) // 255 for cut in cuts), len(wire)]
    assert parse(*(wire[a:b] for a, b in itertools.pairwise(edges))) == whole
    if len(wire) <= 64:
        assert parse(*(wire[i : i + 1] for i in range(len(wire)))) == whole


def judges(data: bytes) -> None:
    """What h11 or llhttp takes and we take as well, we read alike."""
    outcome = parse(data, limits=Limits())
    ours = [(head.method.encode(), head.target.encode("latin-1"), content) for head, content in outcome.requests]
    for verdict in (h11_verdict(data), httptools_verdict(data)):
        reason = disagreement(ours, outcome.status is not None, verdict)
        assert reason is None, reason


_ENDPOINTS: tuple[Callable[[dict[str, object], int], object], ...] = (
    requests.parse_chat,
    requests.parse_completion,
    requests.parse_tokenize,
    requests.parse_detokenize,
)


def api(data: bytes) -> None:
    """Any body is a checked request for an endpoint, or a 4xx with a short message that JSON can hold."""
    try:
        value = body.read(data, None)
    except ApiError as error:
        _check_error(error)
        return
    for endpoint in _ENDPOINTS:
        try:
            endpoint(value, VOCAB_SIZE)
        except ApiError as error:
            _check_error(error)


def _check_error(error: ApiError) -> None:
    assert 400 <= error.status < 500, error
    assert len(error.message) <= MESSAGE_LIMIT, len(error.message)
    json.dumps(error.body()).encode("ascii")


_FOLDER = tempfile.TemporaryDirectory(prefix="vserve-fuzz-")


def keys(data: bytes) -> None:
    """Any key file is keys or one line that repeats nothing longer than a name."""
    file = Path(_FOLDER.name, "keys.toml")
    file.write_bytes(data)
    try:
        assert read_keys(str(file))
    except StartupError as error:
        _check_line(str(error))


def flags(data: bytes) -> None:
    """Any words on the command line are a Config or one line.  No file is read: the words could name any."""
    words = [word.decode("utf-8", "surrogateescape") for word in data.split(b"\n")]
    if {"-h", "--help"} & set(words) or any(word.startswith("--config") for word in words):  # help ends the process
        return
    try:
        settings.parse(words, {})
    except StartupError as error:
        _check_line(str(error).replace("\\n", ""))


def toml(data: bytes) -> None:
    """Any file of --config is a Config or one line."""
    file = Path(_FOLDER.name, "config.toml")
    file.write_bytes(data)
    try:
        settings.parse(["--config", str(file)], {})
    except StartupError as error:
        _check_line(str(error))


def canary(data: bytes) -> None:
    """A promise that cannot be kept."""
    assert not data.startswith(b"!"), "found"


def _check_line(line: str) -> None:
    assert line
    assert "Traceback" not in line


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to fuzz: its function, what it starts from, words worth trying, and the longest input."""

    run: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    words: tuple[bytes, ...]
    longest: int


def _wire_seeds() -> list[bytes]:
    return [data for data, *_ in VALID.values()] + [data for data, _ in INVALID.values()]


_WIRE_WORDS = tuple(
    b"GET |POST |OPTIONS * |HTTP/1.1\r\n|HTTP/1.0\r\n|\r\n\r\n|Host: a\r\n|Content-Length: 5\r\n|"
    b"Transfer-Encoding: chunked\r\n|0\r\n\r\n|5\r\nhello\r\n|Connection: close\r\n|Expect: 100-continue\r\n|"
    b'chunked|http://a/|%2e|%00|;a="b"|Upgrade: h2c\r\n|\x0b|\xa0|, '.split(b"|")
)


def _api_seeds() -> list[bytes]:
    chat = {"messages": [{"role": "user", "content": "hi"}], "stop": ["a"], "n": 2, "logit_bias": {"1": 2.5}}
    found: list[object] = [
        chat,
        {**chat, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "stream": True},
        {"prompt": "x", "max_tokens": 3, "logprobs": 2, "echo": True, "stop_token_ids": [1, 2]},
        {"prompt": [[1, 2], [3]], "stream_options": {"include_usage": True}},
        {"prompt": ["a", "b"], "return_token_strs": True},
        {"tokens": [1, 2, 3]},
        *({name: value} for name in _field_names() for value in (None, 1, -1, 1.5, "a", [1], {"a": 1}, True)),
    ]
    deep = b'{"a":' + b"[" * 130 + b"]" * 130 + b"}"
    return [json.dumps(value).encode() for value in found] + [deep, b'{"n": 1e999}', b'{"n": NaN}', b'{"a": "\\ud800"}']


def _field_names() -> list[str]:
    return sorted({*schema.CHAT, *schema.COMPLETIONS, *schema.TOKENIZE, *schema.DETOKENIZE})


_KEY_SEEDS = (
    b"[keys.alice]\nkey = 'k'\nscopes = ['infer', 'admin']\nrequests_per_minute = 60\n",
    b"[keys.b]\nsha256 = '" + b"0a" * 32 + b"'\n[keys.c]\nkey = 'x'\nrequests_per_minute = nan\n",
    b"keys = 1\n",
    b"[keys]\n",
    b"[keys.a]\nkey = 99999999999999999999999999\n",
    b"a = " + b"[" * 50,
)


def _flag_seeds() -> list[bytes]:
    names = [config.flag_name(name) for name in config.flags()]
    values = ("1", "x", "-1", "1e999", "nan", "4GiB", "", "\u0661", "1_0")
    return [f"{name}\n{value}".encode() for name in names for value in values] + [b"--port=1", b"a\nb", b"--no-strict"]


def _key(name: str) -> str:
    return config.flag_name(name)[2:]


def _toml_seeds() -> list[bytes]:
    values = ("1", "-1", "1.5", "nan", "true", '"x"', '["a", "b"]', "[1]", "{}", "1979-05-27")
    return [f"{_key(name)} = {value}\n".encode() for name in config.flags() for value in values]


TARGETS: dict[str, Target] = {
    "parser": Target(parser, lambda: [b"\x40\x90" + data for data in _wire_seeds()], _WIRE_WORDS, 600),
    "judges": Target(judges, _wire_seeds, _WIRE_WORDS, 600),
    "api": Target(api, _api_seeds, tuple(f'"{name}":'.encode() for name in _field_names()), 2000),
    "keys": Target(keys, lambda: _KEY_SEEDS, (b"[keys.", b"sha256 = ", b"scopes = "), 400),
    "flags": Target(flags, _flag_seeds, tuple(config.flag_name(name).encode() for name in config.flags()), 200),
    "toml": Target(toml, _toml_seeds, tuple(_key(name).encode() for name in config.flags()), 300),
    "canary": Target(canary, lambda: [b"?"], (b"??",), 8),
}
