"""``vserve health``: is the server here, ready, quick enough, and has it room?  An exit code for container probes.

Owns the four checks and their wording.  Knows the server only over HTTP, and imports nothing that takes long: a probe
that starts every few seconds must cost next to nothing.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NoReturn
from urllib.parse import urlsplit

from vserve.errors import StartupError

EXIT_UNHEALTHY = 1
REPLY_LIMIT_BYTES = 1 << 20
"""More than any reply to a check; the rest of a longer one stays unread."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server listens, and how patient to be.

    uds: a Unix socket that is dialled instead of host and port.  prefix: put before every path.  timeout_s bounds each
    connect, read and write, and is all the time that one check may take.
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""
    uds: str | None = None
    timeout_s: float = 5.0
    api_key: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.  latency_ms, ratio: what was measured, where something was; error: why it is not ok."""

    name: str
    ok: bool
    latency_ms: float | None = None
    ratio: float | None = None
    error: str | None = None

    def line(self) -> str:
        """The finding for a person."""
        shown = []
        if self.latency_ms is not None:
            shown.append(f"{self.latency_ms:.0f} ms")
        if self.ratio is not None:
            shown.append(f"{self.ratio:.1%} free")
        if self.error is not None:
            shown.append(self.error)
        rest = f" ({', '.join(shown)})" if shown else ""
        return f"  [{'ok' if self.ok else 'FAIL'}] {self.name}{rest}"


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """See http.client."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Unreachable(Exception):
    """No whole reply came; the text says why in a few words."""


def ask(target: Target, method: str, path: str, body: object = None) -> tuple[int, object, float]:
    """One request: status, the JSON of the reply (None when it is none), milliseconds.  Raises Unreachable."""
    headers = {"connection": "close"}
    data = None
    if body is not None:
        headers["content-type"] = "application/json"
        data = json.dumps(body)
    if target.api_key:
        headers["authorization"] = f"Bearer {target.api_key}"
    began = time.perf_counter()
    try:
        connection = _connection(target)
        try:
            connection.request(method, target.prefix + path, data, headers)
            reply = connection.getresponse()
            text = reply.read(REPLY_LIMIT_BYTES)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(str(error) or type(error).__name__) from None
    elapsed_ms = (time.perf_counter() - began) * 1000
    try:
        return reply.status, json.loads(text), elapsed_ms
    except ValueError:
        return reply.status, None, elapsed_ms


def _connection(target: Target) -> http.client.HTTPConnection:
    if target.uds is not None:
        return _UnixConnection(target.uds, target.timeout_s)
    if target.scheme == "http":
        return http.client.HTTPConnection(target.host, target.port, timeout=target.timeout_s)
    import ssl

    context = ssl.create_default_context(cafile=target.ca_file)
    if target.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if target.cert_file is not None:
        context.load_cert_chain(target.cert_file)
    return http.client.HTTPSConnection(target.host, target.port, timeout=target.timeout_s, context=context)


def check_all(
    target: Target, *, model: str | None, max_latency_ms: float, min_free_blocks_ratio: float, inference: bool
) -> list[Check]:
    """The checks in order; when the server cannot be reached at all the first is the only one."""
    first = _status(target, "connectivity", "/health")
    if first.error is not None and first.latency_ms is None:
        return [first]
    checks = [first, _status(target, "readiness", "/health/ready")]
    if inference:
        checks.append(_inference(target, model, max_latency_ms))
    checks.append(_blocks(target, min_free_blocks_ratio))
    return checks


def _status(target: Target, name: str, path: str) -> Check:
    try:
        status, said, elapsed_ms = ask(target, "GET", path)
    except Unreachable as error:
        return Check(name, False, error=str(error))
    return Check(name, status == 200, elapsed_ms, error=None if status == 200 else _reason(status, said))


def _inference(target: Target, model: str | None, max_latency_ms: float) -> Check:
    name = "inference_latency"
    body = {"model": model or "", "prompt": "Hi", "max_tokens": 1, "temperature": 0}
    try:
        status, said, elapsed_ms = ask(target, "POST", "/v1/completions", body)
    except Unreachable as error:
        return Check(name, False, error=str(error))
    if status != 200:
        return Check(name, False, elapsed_ms, error=_reason(status, said))
    if elapsed_ms >= max_latency_ms:
        return Check(name, False, elapsed_ms, error=f"the limit is {max_latency_ms:g} ms")
    return Check(name, True, elapsed_ms)


def _blocks(target: Target, least: float) -> Check:
    name = "free_blocks"
    try:
        status, said, _ = ask(target, "GET", "/load")
    except Unreachable as error:
        return Check(name, False, error=str(error))
    held = said.get("kv_blocks_held") if isinstance(said, dict) else None
    total = said.get("kv_blocks_total") if isinstance(said, dict) else None
    if status != 200 or not isinstance(held, int) or not isinstance(total, int) or total < 1:
        return Check(name, False, error=_reason(status, said) if status != 200 else "no model is loaded yet")
    ratio = (total - held) / total
    return Check(name, ratio >= least, ratio=ratio, error=None if ratio >= least else f"the least is {least:.1%}")


def _reason(status: int, said: object) -> str:
    """What a refusal says, short."""
    if isinstance(said, dict):
        error = said.get("error")
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return f"{status}: {error['message'][:200]}"
        if isinstance(said.get("phase"), str):
            return f"{status}: {said['phase'][:200]}"
    return str(status)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartupError(f"health: {message}")


def parser() -> argparse.ArgumentParser:
    """The command line of ``vserve health``."""
    made = _Parser(
        prog="vserve health",
        allow_abbrev=False,
        description="Ask a running server whether it is healthy; exit code 0: yes, 1: no, 2: a flag is wrong.",
        epilog="Without --url the server's own settings are used: VSERVE_HOST, VSERVE_PORT, VLLM_PORT, VSERVE_UDS, "
        "VSERVE_ROOT_PATH, VSERVE_API_KEY and VSERVE_SSL_CERTFILE (then https, unverified: the host is this one).",
    )
    made.add_argument("--url", help="where the server is, for example http://127.0.0.1:8000")
    made.add_argument("--uds", metavar="PATH", help="the server's Unix socket, instead of --url")
    made.add_argument("--api-key", metavar="KEY", help="key to send; better given as VSERVE_API_KEY")
    made.add_argument("--model", metavar="NAME", help="model of the one-token completion; the default one if left out")
    made.add_argument("--timeout", type=_positive, default=5.0, metavar="SECONDS", help="for each check (5)")
    made.add_argument(
        "--max-latency-ms", type=_positive, default=1000.0, metavar="MS", help="for a one-token completion (1000)"
    )
    made.add_argument(
        "--min-free-blocks-ratio",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="KV-cache blocks that must be free (0.05)",
    )
    made.add_argument(
        "--inference",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="make a one-token completion; a busy server may be slow and still well (yes)",
    )
    made.add_argument("--ssl-ca-certs", metavar="FILE", help="PEM authorities to check an https server with")
    made.add_argument("--ssl-certfile", metavar="FILE", help="PEM certificate and key to show to an https server")
    made.add_argument("--insecure", action="store_true", help="do not check an https server's certificate")
    made.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    return made


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 86_400_000:  # NaN is not either
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number") from None


def target_of(given: argparse.Namespace, environ: Mapping[str, str]) -> Target:
    """Flags, then the environment that the server itself is configured with.  Raises StartupError for a bad URL."""
    key = given.api_key or (environ.get("VSERVE_API_KEY") or "").split(",")[0].strip() or None
    prefix = (environ.get("VSERVE_ROOT_PATH") or "").rstrip("/") if given.url is None else ""
    scheme, host, port = "http", "127.0.0.1", 8000
    insecure = given.insecure
    if given.url is not None:
        scheme, host, port, prefix = _split(given.url)
    else:
        bound = environ.get("VSERVE_HOST") or host
        host = _HERE.get(bound, bound)
        text = environ.get("VSERVE_PORT") or environ.get("VLLM_PORT") or str(port)
        if not text.isascii() or not text.isdigit() or not 0 < int(text) < 65536:
            raise StartupError(f"health: port {text!r} is not a number from 1 to 65535")
        port = int(text)
        if environ.get("VSERVE_SSL_CERTFILE"):
            scheme, insecure = "https", insecure or given.ssl_ca_certs is None
    uds = given.uds or (environ.get("VSERVE_UDS") if given.url is None else None)
    return Target(
        scheme, host, port, prefix, uds or None, given.timeout, key, given.ssl_ca_certs, given.ssl_certfile, insecure
    )


_HERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where a server that listens on every address is found on its own machine."""


def _split(url: str) -> tuple[str, str, int, str]:
    """scheme, host, port and path of an http or https URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise StartupError(f"health: --url {url!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StartupError(f"health: --url {url!r} must be such as http://127.0.0.1:8000")
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), parts.path.rstrip("/")


def run(
    argv: Sequence[str], environ: Mapping[str, str], say: Callable[[str], None] = lambda line: print(line, flush=True)
) -> int:
    """The command.  Returns 0 when every check passed, else EXIT_UNHEALTHY.  Raises StartupError for a bad flag."""
    given = parser().parse_args(list(argv))
    checks = check_all(
        target_of(given, environ),
        model=given.model,
        max_latency_ms=given.max_latency_ms,
        min_free_blocks_ratio=given.min_free_blocks_ratio,
        inference=given.inference,
    )
    well = all(check.ok for check in checks)
    if given.json:
        found = {
            check.name: {key: value for key, value in asdict(check).items() if key != "name" and value is not None}
            for check in checks
        }
        say(json.dumps({"overall": well, "checks": found}))
    else:
        for check in checks:
            say(check.line())
    return 0 if well else EXIT_UNHEALTHY
