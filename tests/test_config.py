"""The flag table: what is accepted, where it comes from, and the one line that refuses the rest."""

from __future__ import annotations

import dataclasses

import pytest

from vserve.config import Config, flag_name, flags, parse_bytes
from vserve.errors import StartupError
from vserve.settings import parse, parser


def test_the_defaults_need_no_flag() -> None:
    assert parse([], {}) == Config()


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse([], {}).port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("argv", "environ", "field", "value"),
    [
        (["model"], {}, "model", "model"),
        (["--model", "a/b"], {}, "model", "a/b"),
        (["--model=a/b"], {}, "model", "a/b"),
        (["--port", "8001"], {}, "port", 8001),
        ([], {"VSERVE_PORT": "8002"}, "port", 8002),
        ([], {"VLLM_PORT": "8003"}, "port", 8003),
        ([], {"VLLM_PORT": "8003", "VSERVE_PORT": "8002"}, "port", 8002),
        (["--port", "1"], {"VSERVE_PORT": "8002"}, "port", 1),
        ([], {"VSERVE_PORT": ""}, "port", 8000),
        (["--api-key", "a", "--api-key", "b"], {}, "api_key", ("a", "b")),
        ([], {"VSERVE_API_KEY": "a,b"}, "api_key", ("a", "b")),
        (["--allowed-origins", "a, b", "--allowed-origins", "c,"], {}, "allowed_origins", ("a", "b", "c")),
        ([], {"VSERVE_ALLOWED_METHODS": "GET,PUT"}, "allowed_methods", ("GET", "PUT")),
        ([], {}, "allowed_headers", ("*",)),
        (["--keep-alive-timeout", "5"], {}, "keep_alive_timeout_s", 5.0),
        (["--no-enable-prefix-caching"], {}, "enable_prefix_caching", False),
        ([], {"VSERVE_ENABLE_PREFIX_CACHING": "off"}, "enable_prefix_caching", False),
        (["--kv-cache-memory-bytes", "1.5GiB"], {}, "kv_cache_memory_bytes", 3 * 2**29),
        (["--drain-timeout", "2.5"], {}, "drain_timeout_s", 2.5),
        (["--block-size", "32"], {}, "block_size", 32),
        (["--quantization", "awq", "--model", "facebook/opt-6.7b-awq"], {}, "quantization", "awq"),
        (["-q", "gptq_marlin"], {}, "quantization", "gptq_marlin"),
    ],
)
def test_a_value_comes_from_the_flag_then_the_environment(
    argv: list[str], environ: dict[str, str], field: str, value: object
) -> None:
    assert getattr(parse(argv, environ), field) == value


@pytest.mark.parametrize(
    ("argv", "environ", "message"),
    [
        (["--prt", "8"], {}, "unknown flag --prt; did you mean --port?"),
        (["--zzzzzz"], {}, "unknown flag --zzzzzz; vserve serve --help lists them all"),
        (["a", "b"], {}, "unexpected argument 'b'; vserve serve --help lists them all"),
        (["a", "--model", "b"], {}, "the model is named twice: 'a' and --model 'b'"),
        (["--port", "x"], {}, "--port: 'x' is not a whole number"),
        (["--port", "70000"], {}, "--port: 70000 is too large; the most is 65535"),
        (["--port", "-1"], {}, "--port: -1 is too small; the least is 0"),
        ([], {"VSERVE_PORT": "x"}, "VSERVE_PORT: 'x' is not a whole number"),
        (["--block-size", "7"], {}, "--block-size: '7' is not one of 8, 16, 32"),
        (
            ["--kv-cache-dtype", "fp8_e5m2"],
            {},
            "--kv-cache-dtype: 'fp8_e5m2' is not one of auto, float32, bfloat16, float16, fp8, fp8_e4m3",
        ),
        (["--device", "tpu"], {}, "--device: 'tpu' is not one of auto, cpu, cuda"),
        (["--request-timeout", "nan"], {}, "--request-timeout: nan is too small; the least is 0.001 seconds"),
        (["--kv-cache-memory-bytes", "3x"], {}, "'3x' is not a whole number of bytes, such as 512MiB"),
        ([], {"VSERVE_STRICT": "maybe"}, "VSERVE_STRICT: 'maybe' is not a switch; use true or false"),
    ],
)
def test_a_bad_value_is_one_line_that_names_it(argv: list[str], environ: dict[str, str], message: str) -> None:
    with pytest.raises(StartupError) as raised:
        parse(argv, environ)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("17", 17), ("1k", 1000), ("1KiB", 1024), ("4 GiB", 2**32), ("2GB", 2 * 10**9), ("0.5m", 500_000)],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "x", "1TiBB", "--", "1 2"])
def test_a_size_that_is_none_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_bytes(text)


def test_every_flag_is_shown_in_the_help() -> None:
    text = parser().format_help()
    for name in flags():
        assert flag_name(name) in text
