"""Settings: argv, the environment and a TOML file -> Config, and where each value came from.

A flag beats ``VSERVE_*``, which beats the file, which beats the default.  Nothing else reads argv, the environment or
the file.  Every mistake is one StartupError that names the flag, the value and what would work.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vserve import familiar
from vserve.config import GROUPS, Config, Flag, Value, flag_name, flags, parse_bytes
from vserve.errors import StartupError, shorten

FILE_LIMIT_BYTES = 1 << 20
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Settings:
    """config, the origin of each of its fields (a flag, a variable, a file's path or DEFAULT), and notes to show."""

    config: Config
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad flag as one StartupError."""

    def error(self, message: str) -> NoReturn:
        raise StartupError(message)


def parser(prog: str = "vserve serve") -> argparse.ArgumentParser:
    """The command line of ``vserve serve``, grouped as in GROUPS; every default is None so that origins stay known."""
    made = _Parser(
        prog=prog,
        allow_abbrev=False,
        usage=f"{prog} [MODEL] [flags]",
        description="Serve a language model over an OpenAI-compatible API.",
        epilog="Each flag is also a variable (--max-queue: VSERVE_MAX_QUEUE) and a key of the file of --config "
        "(max-queue = 10).  vserve config prints what is in force and where it came from.",
    )
    groups = {key: made.add_argument_group(title) for key, title in GROUPS.items()}
    groups["model"].add_argument("MODEL", nargs="?", help="same as --model")
    for name, (item, flag) in flags().items():
        names = [flag_name(name), *flag.aliases]
        help_text = f"{flag.help}{_default_note(item.default, flag)}".replace("%", "%%")
        group = groups[flag.group]
        if isinstance(item.default, bool):
            group.add_argument(*names, dest=name, default=None, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            metavar = "|".join(str(choice) for choice in flag.choices) or (flag.unit or name).upper()
            action = "append" if isinstance(item.default, tuple) else "store"
            words = "+" if flag.several else None
            group.add_argument(
                *names, dest=name, default=None, action=action, nargs=words, metavar=metavar, help=help_text
            )
    taken = {option for action in made._actions for option in action.option_strings}
    others = made.add_argument_group("taken as vLLM has them, without effect")
    for same in familiar.FAMILIAR:
        names = [option for option in same.names if option not in taken]
        if not names:
            continue
        if same.values is None:
            others.add_argument(*names, dest=same.dest, default=None, action="store_true", help=same.why)
        else:
            metavar = "|".join(same.values) or "VALUE"
            others.add_argument(*names, dest=same.dest, default=None, metavar=metavar, help=same.why)
    return made


def _default_note(default: Any, flag: Flag) -> str:
    if default is None or isinstance(default, tuple | bool):
        return ""
    return f" ({default}{' ' + flag.unit if flag.unit else ''})"


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """The Config of ``read``."""
    return read(argv, environ).config


def read(argv: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """argv (without the program and the command), the environment and the file they name.  Raises StartupError."""
    known, unknown = parser().parse_known_args(list(argv))
    if unknown:
        raise StartupError(_unknown(unknown[0]))
    given: dict[str, Any] = vars(known)
    positional = _join_names(given, given.pop("MODEL"))
    if positional is not None:
        if given["model"] is not None and given["model"] != positional:
            raise StartupError(f"the model is named twice: {positional!r} and --model {given['model']!r}")
        given["model"] = positional
    notes = tuple(
        familiar.note(same, given[same.dest]) for same in familiar.FAMILIAR if given.get(same.dest) is not None
    )
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, (item, flag) in flags().items():
        if given[name] is not None:
            origins[name] = flag_name(name)
            values[name] = _convert(item, flag, given[name], flag_name(name))
            continue
        for variable in variables(name, flag):
            if environ.get(variable):
                origins[name] = variable
                values[name] = _convert(item, flag, environ[variable], variable)
                break
    if values.get("config") is not None:
        _add_file(values["config"], values, origins)
    return Settings(Config(**values), {name: origins.get(name, DEFAULT) for name in flags()}, notes)


def _join_names(given: dict[str, Any], model: str | None) -> str | None:
    """Make one list of what follows each flag that takes several words; returns MODEL.

    In ``--served-model-name a b`` argparse takes b for a name.  So it is where the command line names the model
    elsewhere, as with vLLM; where it does not, b is MODEL.
    """
    for name, (_, flag) in flags().items():
        groups = given[name]
        if flag.several and groups:
            if model is None and given["model"] is None and len(groups[-1]) > 1:
                model = groups[-1].pop()
            given[name] = [word for words in groups for word in words]
    return model


def variables(name: str, flag: Flag) -> tuple[str, ...]:
    """The environment variables that a field may come from, the first that is set being taken."""
    return (f"VSERVE_{flag_name(name)[2:].replace('-', '_').upper()}", *flag.env)


def _add_file(path: str, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Add what the TOML file says of fields that have no value yet."""
    rows = {flag_name(name)[2:]: name for name in flags() if name != "config"}
    for key, raw in _toml(path).items():
        where = f"{path}: {key}"
        name = rows.get(key.replace("_", "-"))
        if name is None:
            near = difflib.get_close_matches(key.replace("_", "-"), rows, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; vserve config lists them all"
            raise StartupError(f"{path}: unknown key {shorten(key)}{hint}")
        item, flag = flags()[name]
        value = _from_toml(item, flag, raw, where)
        if name not in values:
            values[name], origins[name] = value, path


def _toml(path: str) -> dict[str, object]:
    try:
        with Path(path).open("rb") as file:
            data = file.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise StartupError(f"--config {path}: {error.strerror or error}") from None
    if len(data) > FILE_LIMIT_BYTES:
        raise StartupError(f"--config {path}: larger than {FILE_LIMIT_BYTES} bytes")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StartupError(f"--config {path}: not TOML: {shorten(str(error))}") from None


def _from_toml(item: dataclasses.Field[Any], flag: Flag, raw: object, where: str) -> Value:
    """A value of the file, of TOML's own type or as text like a variable's."""
    if isinstance(item.default, bool) and isinstance(raw, bool):
        return raw
    if isinstance(item.default, tuple) and isinstance(raw, list):
        if not all(isinstance(part, str) for part in raw):
            raise StartupError(f"{where}: must be a list of strings")
        return tuple(raw)
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise StartupError(f"{where}: {shorten(raw)} is of the wrong type")
    return _convert(item, flag, str(raw), where)


def _unknown(argument: str) -> str:
    name = argument.split("=", 1)[0]
    options = [option for action in parser()._actions for option in action.option_strings]
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; vserve serve --help lists them all"
    return f"unknown flag {name}{hint}" if name.startswith("-") else f"unexpected argument {name!r}{hint}"


_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _convert(item: dataclasses.Field[Any], flag: Flag, raw: Any, where: str) -> Value:
    """raw (text, a list of texts or a bool) as the field's type, checked against its bounds and choices."""
    if isinstance(item.default, bool):
        if isinstance(raw, bool):
            return raw
        if raw.lower() not in _WORDS:
            raise StartupError(f"{where}: {raw!r} is not a switch; use true or false")
        return _WORDS[raw.lower()]
    if isinstance(item.default, tuple):
        if isinstance(raw, list) and not flag.split:
            return tuple(raw)
        text = ",".join(raw) if isinstance(raw, list) else raw
        if text.lstrip().startswith("["):
            return _json_list(text, where)
        return tuple(part.strip() if flag.split else part for part in text.split(",") if part.strip())
    value = _number(item, flag, raw, where)
    if flag.choices and value not in flag.choices:
        raise StartupError(f"{where}: {raw!r} is not one of {', '.join(str(choice) for choice in flag.choices)}")
    if isinstance(value, int | float):
        unit = f" {flag.unit}" if flag.unit else ""
        # Written so that NaN fails too.
        if flag.low is not None and not value >= flag.low:
            raise StartupError(f"{where}: {raw} is too small; the least is {flag.low:g}{unit}")
        if flag.high is not None and not value <= flag.high:
            raise StartupError(f"{where}: {raw} is too large; the most is {flag.high:g}{unit}")
    return value


def _json_list(text: str, where: str) -> tuple[str, ...]:
    """A list as vLLM's flags take it: ["*"]."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        raise StartupError(f"{where}: {shorten(text)} is not a JSON list of strings")
    return tuple(found)


def _number(item: dataclasses.Field[Any], flag: Flag, raw: str, where: str) -> Value:
    kind = str(item.type).split(" ", 1)[0]
    try:
        if flag.parse is not None:
            return flag.parse(raw)
        if kind == "int":
            return int(raw)
        if kind == "float":
            return float(raw)
    except (ValueError, OverflowError):
        hint = " of bytes, such as 512MiB" if flag.parse is parse_bytes else ""
        raise StartupError(f"{where}: {raw!r} is not a {'whole ' if kind == 'int' else ''}number{hint}") from None
    return raw


def show(settings: Settings) -> str:
    """The effective values as TOML, each with its origin; what is not set is a comment, and secrets are not shown."""
    lines: list[str] = []
    group = ""
    order = list(GROUPS)
    for name, (_, flag) in sorted(flags().items(), key=lambda row: order.index(row[1][1].group)):
        if flag.group != group:
            group = flag.group
            lines += [*([""] if lines else []), f"# {GROUPS[group]}"]
        value, origin = getattr(settings.config, name), settings.origins[name]
        key = flag_name(name)[2:]
        if flag.secret and value:
            line = f"# {key} = (hidden)"
        elif value is None:
            line = f"# {key} ="
        else:
            line = f"{'# ' if name == 'config' else ''}{key} = {_as_toml(value)}"
        lines.append(f"{line:<44}  # {origin}")
    lines += [f"# note: {text}" for text in settings.notes]
    return "\n".join(lines) + "\n"


def public(config: Config) -> dict[str, Value]:
    """The effective values by flag, as JSON has them; of secrets only how many there are."""
    shown: dict[str, Value] = {}
    for name, (_, flag) in flags().items():
        value = getattr(config, name)
        if flag.secret and value:
            value = f"({len(value)} hidden)" if isinstance(value, tuple) else "(hidden)"
        shown[name] = value
    return shown


def _as_toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    # JSON's strings, numbers and lists of strings are TOML's.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
