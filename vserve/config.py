"""Config: every setting of the server as one frozen value, and the one table its flags come from.

Each field of ``Config`` carries its own flag: the field's name gives ``--the-flag``, ``VSERVE_THE_FLAG`` and the key
``the_flag`` of a TOML file, its metadata the unit, the bounds and the help.  Where values come from is settings.py's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | bool | None | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flag:
    """How one field is set from outside.

    low, high: inclusive bounds of a number.  choices: the only values allowed.  unit: what a number counts.
    aliases: other flags with the same meaning; env: other environment variables, tried after VSERVE_*.
    split: a list's values may also be given in one, with commas between them.  several: one flag may be followed by
    several of them.  secret: never shown.
    """

    help: str
    group: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str | int, ...] = ()
    unit: str = ""
    aliases: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    parse: Callable[[str], Value] | None = None
    split: bool = False
    several: bool = False
    secret: bool = False


def _option(default: Value, help: str, group: str, **rest: Any) -> Any:
    return field(default=default, metadata={"flag": Flag(help=help, group=group, **rest)})


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """``"4GiB"``, ``"512 MiB"``, ``"1g"`` or a plain number as bytes.  ValueError when it is none of these."""
    body = text.strip().lower()
    digits = body.rstrip("kmgib ")
    unit = body[len(digits) :].strip()
    unit = unit[:-1] if unit in ("b", "kb", "mb", "gb") else unit
    if unit not in _UNITS:
        raise ValueError(f"unknown unit {unit!r}; use KiB, MiB or GiB")
    return int(float(digits) * _UNITS[unit])


@dataclass(frozen=True, slots=True)
class Config:
    """All settings, checked.  Built once by ``parse`` and never changed."""

    config: str | None = _option(
        None, "TOML file of settings: keys are the flags' names; flags and VSERVE_* variables win over it", "model"
    )
    model: str | None = _option(
        None,
        "what to serve: a Hugging Face folder, a .gguf file or a hub id; the embedded SmolLM2-135M-Instruct by default",
        "model",
    )
    served_model_name: tuple[str, ...] = _option(
        (), "name clients use in the field model; several may follow, replies show the first", "model", several=True
    )
    embedding_model: str | None = _option(
        None,
        "model of /v1/embeddings, /score and /rerank, beside the one that generates: a Hugging Face folder or a hub id "
        "of the BERT or XLM-RoBERTa family; such a model as --model is served alone",
        "model",
    )
    served_embedding_model_name: tuple[str, ...] = _option(
        (),
        "name clients use for the embedding model; several may follow, replies show the first",
        "model",
        several=True,
    )
    embedding_dtype: str = _option(
        "auto",
        "type of the embedding model's weights; auto: float32 on CPU, the model's own on GPU",
        "model",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    tokenizer: str | None = _option(
        None, "folder to read the tokenizer and the chat template from, where it is not the model's own", "model"
    )
    chat_template: str | None = _option(
        None, "chat template in place of the model's: a file, or the template itself", "model"
    )
    revision: str | None = _option(None, "branch, tag or commit of a hub id; main by default", "model")
    download_dir: str | None = _option(
        None, "cache of models from the hub, in Hugging Face's layout; HF_HUB_CACHE or ~/.cache by default", "model"
    )
    hf_token: str | None = _option(
        None, "token for downloads that need one; HF_TOKEN or the logged-in user's by default", "model", secret=True
    )
    load_format: str = _option(
        "auto",
        "auto reads the files; dummy makes random weights from config.json, for benchmarks",
        "model",
        choices=("auto", "dummy"),
    )
    allow_nan_weights: bool = _option(False, "load weights that hold NaN or infinite numbers", "model")
    dtype: str = _option(
        "auto",
        "type of weights and activations; auto: float32 on CPU, the model's own on GPU",
        "model",
        choices=("auto", "float32", "bfloat16", "float16"),
        parse=lambda text: {"half": "float16", "float": "float32"}.get(text, text),
    )
    quantization: str = _option(
        "auto",
        "how the weights are quantised; auto: as the model's files say; fp8 also makes plain weights fp8 on a GPU; any "
        "other value must be that of the files",
        "model",
        choices=("auto", "none", "awq", "gptq", "fp8", "awq_marlin", "gptq_marlin", "compressed-tensors"),
        aliases=("-q",),
    )
    kv_cache_dtype: str = _option(
        "auto", "type of keys and values in the cache; only auto, that of the activations", "engine", choices=("auto",)
    )
    max_model_len: int | None = _option(
        None, "longest prompt plus answer; the model's own limit by default", "model", low=1, unit="tokens"
    )
    seed: int = _option(0, "seed of dummy weights", "model", low=0, high=2**63 - 1)

    tool_call_parser: str = _option(
        "auto",
        "how the model writes calls of tools; auto: as its chat template shows; none: calls are left in the text",
        "model",
        choices=("auto", "hermes", "llama3_json", "mistral", "none"),
    )
    reasoning_parser: str = _option(
        "auto",
        "how the model's reasoning is told from its answer; auto: as its chat template shows; none: not at all",
        "model",
        choices=("auto", "deepseek_r1", "qwen3", "none"),
    )

    device: str = _option("auto", "where the model runs", "engine", choices=("auto", "cpu", "cuda"))
    block_size: int = _option(16, "tokens in one block of the KV cache", "engine", choices=(8, 16, 32), unit="tokens")
    kv_cache_memory_bytes: int | None = _option(
        None,
        "memory for the KV cache, for example 4GiB; by default a quarter of the free memory, at most 4 GiB, on CPU, "
        "and what --gpu-memory-utilization leaves on GPU",
        "engine",
        low=1,
        unit="bytes",
        parse=parse_bytes,
    )
    gpu_memory_utilization: float = _option(
        0.9, "share of the GPU's memory that weights, activations and KV cache may take", "engine", low=0.05, high=1.0
    )
    max_num_seqs: int | None = _option(
        None, "sequences in one step; 32 on CPU, 256 on GPU by default", "engine", low=1, high=4096
    )
    max_num_batched_tokens: int | None = _option(
        None, "tokens in one step; 512 on CPU, 8192 on GPU by default", "engine", low=16, high=2**20, unit="tokens"
    )
    max_prefill_chunk: int | None = _option(
        None,
        "prompt tokens in one step while others decode; 128 on CPU, 2048 on GPU by default",
        "engine",
        low=16,
        high=2**20,
        unit="tokens",
    )
    enable_prefix_caching: bool = _option(True, "reuse the KV cache of equal prompt beginnings", "engine")
    threads: int | None = _option(
        None, "CPU threads of one operation; the number of cores by default", "engine", low=1, high=1024
    )

    host: str = _option("0.0.0.0", "address to listen on", "server")
    port: int = _option(8000, "port to listen on; 0 takes a free one", "server", low=0, high=65535, env=("VLLM_PORT",))
    uds: str | None = _option(None, "listen on this Unix socket instead of host and port", "server")
    api_key: tuple[str, ...] = _option(
        (), "key that clients must send; repeat the flag for several", "server", secret=True
    )
    api_key_file: str | None = _option(
        None, "TOML file of named keys with scopes and rates, read again on SIGHUP", "access"
    )
    strict: bool = _option(False, "refuse unknown request fields with 400 instead of listing them", "server")
    disable_docs: bool = _option(
        False,
        "do not serve /openapi.json, /docs, /redoc and the home page",
        "server",
        aliases=("--disable-fastapi-docs",),
    )
    max_queue: int = _option(
        1024, "requests that may wait before new ones get 429", "server", low=1, high=1_000_000, unit="requests"
    )
    max_queued_tokens: int = _option(
        2**20,
        "prompt tokens of waiting requests before new ones get 429; one longer prompt may wait alone",
        "server",
        low=1,
        high=2**40,
        unit="tokens",
    )
    max_connections: int = _option(
        8192, "open connections before new ones get 503", "server", low=1, high=1_000_000, unit="connections"
    )
    body_limit_bytes: int = _option(
        32 * 2**20, "largest request body", "server", low=1024, high=2**31, unit="bytes", parse=parse_bytes
    )
    max_bytes_in_flight: int = _option(
        512 * 2**20,
        "bytes of bodies and of replies that wait for slow clients, all together; above 90 % of it new work gets 503",
        "server",
        low=2**20,
        high=2**40,
        unit="bytes",
        parse=parse_bytes,
    )
    max_pipelined: int = _option(
        256,
        "requests that may wait behind another one on its connection; with more it ends after the reply in hand",
        "server",
        low=1,
        high=65536,
        unit="requests",
    )
    request_timeout_s: float | None = _option(
        None, "deadline of a request that names none", "server", low=0.001, high=86400, unit="seconds"
    )
    sse_ping_s: float = _option(
        15.0, "silence on a stream before a keep-alive comment", "server", low=0.1, high=3600, unit="seconds"
    )
    resume_timeout_s: float = _option(
        60.0,
        "time for which a broken stream can be gone on with by Last-Event-ID; 0: never, and events have no ids",
        "server",
        low=0,
        high=86400,
        unit="seconds",
    )
    resume_streams: int = _option(
        1024, "broken or ended streams kept for that", "server", low=0, high=1_000_000, unit="streams"
    )
    resume_bytes: int = _option(
        64 * 2**20, "memory that these take together", "server", low=0, high=2**40, unit="bytes", parse=parse_bytes
    )
    drain_timeout_s: float = _option(
        30.0, "time that streams in flight get after SIGTERM", "server", low=0, high=3600, unit="seconds"
    )
    stall_timeout_s: float = _option(
        60.0,
        "a step longer than this turns /health to 503 and has the stacks of all threads written to stderr",
        "server",
        low=1,
        high=86400,
        unit="seconds",
    )
    exit_on_stall: bool = _option(
        False, "end every stream with an error and exit with code 3 at --stall-timeout", "server"
    )
    enable_rca: bool = _option(
        False, "serve /debug/version, stats, cache_stats, traces and config, to keys with the scope admin", "server"
    )
    rca_traces: int = _option(
        1000, "requests whose timeline /debug/traces keeps", "server", low=1, high=100_000, unit="requests"
    )
    rca_trace_bytes: int = _option(
        16 * 2**20,
        "most memory of these timelines",
        "server",
        low=65536,
        high=2**32,
        unit="bytes",
        parse=parse_bytes,
    )
    otlp_traces_endpoint: str | None = _option(
        None,
        "send a span of each request to this OpenTelemetry collector (OTLP over HTTP), such as "
        "http://127.0.0.1:4318/v1/traces; a URL without a path gets /v1/traces",
        "server",
    )
    response_store: str | None = _option(
        None, "SQLite file that keeps responses over a restart; in memory by default", "server"
    )
    response_store_entries: int = _option(
        10_000, "responses kept; the oldest go first", "server", low=1, high=10**9, unit="responses"
    )
    response_store_bytes: int = _option(
        64 * 2**20,
        "bytes of the responses kept; the oldest go first",
        "server",
        low=2**16,
        high=2**50,
        unit="bytes",
        parse=parse_bytes,
    )
    response_store_age_s: float = _option(
        30 * 86400.0, "age at which a response is forgotten", "server", low=1, high=10**10, unit="seconds"
    )
    access_log: bool = _option(False, "one JSON line on stderr for each request", "server")

    oauth2_issuer: str | None = _option(
        None, "take this issuer's access tokens (JWT) beside API keys; its address, as in their claim iss", "access"
    )
    oauth2_audience: str | None = _option(None, "what the claim aud of such a token must be or hold", "access")
    oauth2_jwks_url: str | None = _option(
        None, "where the issuer's public keys are; by default where its /.well-known/ document says", "access"
    )
    oauth2_scopes: tuple[str, ...] = _option(
        ("infer", "admin"),
        "what the issuer's scopes open here, as SCOPE=OURS with OURS infer, admin or metrics, or OURS alone; several "
        "with commas; infer,admin by default",
        "access",
        split=True,
    )
    oauth2_quotas: tuple[str, ...] = _option(
        (),
        "what each subject of the issuer may spend, with commas: requests_per_minute=60,tokens_per_day=1000000, and "
        "whatever else a table of --api-key-file may say so; no bound by default",
        "access",
        split=True,
    )
    oauth2_authorization_url: str | None = _option(
        None, "where a browser asks for a token, for /openapi.json and /docs", "access"
    )
    oauth2_token_url: str | None = _option(
        None, "where it then gets one; must allow the origin of /docs (CORS)", "access"
    )

    ssl_certfile: str | None = _option(None, "serve TLS with this PEM certificate, read again on SIGHUP", "access")
    ssl_keyfile: str | None = _option(None, "the certificate's PEM key; by default in the same file", "access")
    ssl_ca_certs: str | None = _option(
        None, "PEM authorities; every client must then have a certificate of theirs", "access"
    )
    allowed_origins: tuple[str, ...] = _option(
        (),
        "origins whose pages may read replies (CORS), or *; several with commas; none by default",
        "access",
        split=True,
    )
    allowed_methods: tuple[str, ...] = _option(
        ("GET", "HEAD", "POST", "DELETE"),
        "methods such pages may use, or *; GET, HEAD, POST and DELETE by default",
        "access",
        split=True,
    )
    allowed_headers: tuple[str, ...] = _option(
        ("*",), "header fields such pages may send; * (the default): those they ask for", "access", split=True
    )
    allow_credentials: bool = _option(False, "such pages may send cookies and client certificates", "access")
    root_path: str | None = _option(
        None, "prefix that a proxy leaves on paths, such as /llm; taken off where present", "access"
    )
    max_connections_per_address: int | None = _option(
        None,
        "open connections of one address before it gets 429; a proxy in front is one address",
        "access",
        low=1,
        high=1_000_000,
        unit="connections",
    )
    max_request_line_bytes: int = _option(
        8 * 2**10, "longest request line before 414", "access", low=64, high=2**20, unit="bytes", parse=parse_bytes
    )
    max_header_bytes: int = _option(
        64 * 2**10,
        "header fields of one request before 431",
        "access",
        low=256,
        high=2**24,
        unit="bytes",
        parse=parse_bytes,
    )
    max_header_fields: int = _option(
        256, "number of header fields of one request before 431", "access", low=1, high=65536, unit="fields"
    )
    tls_handshake_timeout_s: float = _option(
        10.0, "whole time of a TLS handshake", "access", low=0.1, high=3600, unit="seconds"
    )
    header_timeout_s: float = _option(
        10.0, "whole time of a request's head before 408", "access", low=0.1, high=86400, unit="seconds"
    )
    body_timeout_s: float = _option(
        30.0, "silence within a request's body before 408", "access", low=0.1, high=86400, unit="seconds"
    )
    body_total_timeout_s: float = _option(
        300.0, "whole time of a request's body before 408", "access", low=0.1, high=86400, unit="seconds"
    )
    keep_alive_timeout_s: float = _option(
        75.0, "silence between requests before the connection is closed", "access", low=0.1, high=86400, unit="seconds"
    )
    write_timeout_s: float = _option(
        60.0, "a client that reads nothing for so long is dropped", "access", low=0.1, high=86400, unit="seconds"
    )


GROUPS = {
    "model": "what to serve",
    "engine": "how it runs",
    "server": "how clients reach it",
    "access": "who may, from where and how slowly",
}


def flags() -> dict[str, tuple[dataclasses.Field[Any], Flag]]:
    """Every field of Config by name, with its flag."""
    return {item.name: (item, item.metadata["flag"]) for item in dataclasses.fields(Config)}


def flag_name(name: str) -> str:
    """``drain_timeout_s`` -> ``--drain-timeout``: the unit suffix that the type hides is not typed by hand."""
    return "--" + name.removesuffix("_s").replace("_", "-").replace("body-limit-bytes", "body-limit")
