"""The files of a tokenizer in a model's folder, as transformers lays them: read within bounds, joined and checked.

Knows the library's object that they become, not what is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import AddedToken, processors

from vserve.errors import StartupError, shorten

_FILE_LIMIT_BYTES: Final = 512 * 2**20
"""A larger tokenizer file is refused unread; the largest published ones are about 35 MB."""


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has the files of a tokenizer, readable or not."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def read_core(folder: Path) -> tokenizers.Tokenizer:
    """The library's object from tokenizer.json.  Raises StartupError that names the file."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise StartupError(
                f"{folder} has tokenizer.model but no tokenizer.json: save it once with transformers' "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        raise StartupError(f"{folder} has no tokenizer.json")
    data = _read_limited(path)
    try:
        try:
            return tokenizers.Tokenizer.from_buffer(data)
        except BaseException as error:
            check_panic(error)
            raise
    except Exception as error:  # the library raises bare Exception for whatever its parser dislikes
        raise StartupError(f"{path} is not a tokenizer file: {one_line(error)}") from None


def read_config(folder: Path) -> dict[str, object]:
    """tokenizer_config.json, with the older special_tokens_map.json beneath it."""
    merged: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            merged |= read_json_object(path)
    return merged


def read_json_object(path: Path) -> dict[str, object]:
    """The JSON object in a configuration file.  Raises StartupError that names the file."""
    try:
        value = json.loads(_read_limited(path))
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{path} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _read_limited(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _FILE_LIMIT_BYTES:
            raise StartupError(f"{path} has {size} bytes, more than a tokenizer file may have ({_FILE_LIMIT_BYTES})")
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from None


def add_missing_tokens(core: tokenizers.Tokenizer, config: Mapping[str, object], folder: Path) -> None:
    """Add the tokens that only tokenizer_config.json lists (``added_tokens_decoder``: id -> token)."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    present = {token.content for token in core.get_added_tokens_decoder().values()}
    entries = [(int(id), token) for id, token in listed.items() if id.isascii() and id.isdigit()]
    for id, token in sorted(entries, key=lambda entry: entry[0]):
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or not content or content in present:
            continue
        flags = {name: token.get(name) is True for name in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        core.add_tokens([AddedToken(content, **flags)])
        if core.token_to_id(content) != id:
            raise StartupError(
                f"{folder} holds files of two tokenizers: tokenizer_config.json gives {shorten(content)} the id {id}, "
                f"tokenizer.json {core.token_to_id(content)}"
            )


def mark_special(core: tokenizers.Tokenizer, tokens: Iterable[str]) -> None:
    """Make control tokens of those that the vocabulary has as ordinary pieces; their flags stay where they have any."""
    added = {token.content for token in core.get_added_tokens_decoder().values()}
    core.add_special_tokens([token for token in tokens if token not in added and core.token_to_id(token) is not None])


def named_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """The named tokens ("bos_token", "eos_token", "pad_token", ...) and their text."""
    named: dict[str, str] = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str) and text:
            named[key] = text
    return named


def id_of(core: tokenizers.Tokenizer, token: str | None) -> int | None:
    """The id of a token by its text; None for none, and where the vocabulary lacks it."""
    return None if token is None else core.token_to_id(token)


def wrap_with(core: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """Make core put bos_id before and eos_id after each text encoded with add_special; None: nothing there."""
    ends = {id: core.id_to_token(id) for id in (bos_id, eos_id) if id is not None}
    before = [f"{ends[bos_id]}:0"] if bos_id is not None else []
    after = [f"{ends[eos_id]}:0"] if eos_id is not None else []
    core.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=["$A:0", "$B:1"],
        special_tokens=[(str(token), id) for id, token in ends.items()],
    )


def eos_ids_in(generation_config: Mapping[str, object], vocab_size: int) -> frozenset[int]:
    """The end-of-text ids that generation_config.json names, as far as the model has them."""
    return frozenset(id for id in named_eos_ids(generation_config) if id < vocab_size)


def named_eos_ids(generation_config: Mapping[str, object]) -> set[int]:
    """The ids of its eos_token_id, a number or a list; whatever else stands there is none."""
    value = generation_config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return {id for id in values if isinstance(id, int) and not isinstance(id, bool) and id >= 0}


def check_panic(error: BaseException) -> None:
    """Raise RuntimeError if error is a panic of the library: a BaseException, which nobody expects of a bug."""
    if type(error).__name__ == "PanicException":
        raise RuntimeError(f"the tokenizers library gave up: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """The message of an error as it may stand in a StartupError."""
    return " ".join(str(error).split())[:200]
