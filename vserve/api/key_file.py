"""The file of named API keys (``--api-key-file``), TOML:

    [keys.alice]
    key = "…"                        # or sha256 = "<64 hex digits>"
    scopes = ["infer"]               # infer, admin, metrics; infer alone by default
    requests_per_minute = 60         # no bound by default
    requests_per_day = 1000          # quotas: also requests_per_month, tokens_per_minute, tokens_per_day,
    tokens_per_month = 5_000_000     # tokens_per_month; no bound by default

Reads and checks; who may do what is access.py's.  No message repeats a value of the file: it may be a key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from vserve.api.access import SCOPES, Key, digest
from vserve.api.quota import Allowance, Goods, Quota, Span
from vserve.errors import StartupError, shorten

FILE_LIMIT_BYTES = 2**20
MAX_KEYS = 1024
"""Every request is compared with every key, once or twice: a thousand take about 40 us each time."""
MAX_REQUESTS_PER_MINUTE = 1e6

MAX_QUOTA = 10**15

_QUOTAS = {
    f"{goods.value}_per_{span.value}": (goods, span)
    for goods in Goods
    for span in Span
    if (goods, span) != (Goods.REQUESTS, Span.MINUTE)  # that one is a rate: it lets through again little by little
}
_FIELDS = frozenset({"key", "sha256", "scopes", "requests_per_minute", *_QUOTAS})
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[!-~]{1,64}")


def read_keys(path: str) -> tuple[Key, ...]:
    """The keys of the file, at least one: an emptied file must not open the server to everyone.

    Raises StartupError, one line, for a file that cannot be read or is not as above.
    """
    where = f"--api-key-file {path}"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(FILE_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise StartupError(f"{where}: {getattr(error, 'strerror', None) or 'cannot be read'}") from None
    if len(raw) > FILE_LIMIT_BYTES:
        raise StartupError(f"{where}: larger than {FILE_LIMIT_BYTES} bytes")
    try:
        return _keys(_toml(raw))
    except StartupError as error:
        raise StartupError(f"{where}: {error}") from None


def read_allowance(words: Iterable[str]) -> Allowance:
    """``requests_per_minute=60`` and quotas such as ``tokens_per_day=1000000``, as a key's table has them.

    Raises StartupError, one line, for any other word.
    """
    table: dict[str, object] = {}
    for word in words:
        name, _, value = word.partition("=")
        known = name == "requests_per_minute" or name in _QUOTAS
        if not known or name in table or not re.fullmatch(r"[0-9]{1,18}(\.[0-9]{1,18})?", value):
            names = ", ".join(("requests_per_minute", *_QUOTAS))
            raise StartupError(f"{shorten(word)} is not NAME=NUMBER with NAME one of {names}, each once")
        table[name] = float(value) if "." in value else int(value)
    return Allowance(_rate(table), _quotas(table))


def _toml(raw: bytes) -> dict[str, object]:
    try:
        return tomllib.loads(raw.decode())
    except UnicodeDecodeError:
        raise StartupError("not UTF-8") from None
    except ValueError as error:  # bad TOML or a number of too many digits; its own text may quote the file
        at = re.search(r"line \d+", str(error))
        raise StartupError(f"not TOML{f', {at[0]}' if at else ''}") from None
    except RecursionError:
        raise StartupError("nested too deeply") from None


def _keys(document: dict[str, object]) -> tuple[Key, ...]:
    if set(document) - {"keys"}:
        raise StartupError("only tables [keys.NAME] are known")
    tables = document.get("keys")
    if not isinstance(tables, dict) or not tables:
        raise StartupError("holds no key; write a table [keys.NAME] for each")
    if len(tables) > MAX_KEYS:
        raise StartupError(f"holds {len(tables)} keys, the most is {MAX_KEYS}")
    return tuple(_key(name, table) for name, table in tables.items())


def _key(name: str, table: object) -> Key:
    if not _NAME.fullmatch(name):
        raise StartupError("a name must be 1 to 64 visible ASCII characters")
    try:
        if not isinstance(table, dict):
            raise StartupError("must be a table")
        if set(table) - _FIELDS:
            raise StartupError(f"only {', '.join(sorted(_FIELDS))} are known")
        return Key(name, _digest(table), _scopes(table), _rate(table), _quotas(table))
    except StartupError as error:
        raise StartupError(f"keys.{name}: {error}") from None


def _digest(table: dict[str, object]) -> bytes:
    key, hashed = table.get("key"), table.get("sha256")
    if (key is None) == (hashed is None):
        raise StartupError("give either key or sha256")
    if key is not None:
        if not isinstance(key, str):
            raise StartupError("key must be a string")
        return digest(key)
    if not isinstance(hashed, str) or not _SHA256.fullmatch(hashed):
        raise StartupError("sha256 must be 64 hexadecimal digits")
    return bytes.fromhex(hashed)


def _scopes(table: dict[str, object]) -> frozenset[str]:
    scopes = table.get("scopes", ["infer"])
    if not isinstance(scopes, list) or not scopes or not all(isinstance(s, str) and s in SCOPES for s in scopes):
        raise StartupError(f"scopes must be a list of one or more of {', '.join(sorted(SCOPES))}")
    return frozenset(scopes)


def _rate(table: dict[str, object]) -> float | None:
    rate = table.get("requests_per_minute")
    if rate is None:
        return None
    # Written so that NaN fails too.
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= MAX_REQUESTS_PER_MINUTE:
        raise StartupError(f"requests_per_minute must be a number above 0 and at most {MAX_REQUESTS_PER_MINUTE:g}")
    return float(rate)


def _quotas(table: dict[str, object]) -> tuple[Quota, ...]:
    quotas = []
    for name, (goods, span) in _QUOTAS.items():
        limit = table.get(name)
        if limit is None:
            continue
        if type(limit) is not int or not 1 <= limit <= MAX_QUOTA:
            raise StartupError(f"{name} must be a whole number from 1 to {MAX_QUOTA}")
        quotas.append(Quota(goods, span, limit))
    return tuple(quotas)
