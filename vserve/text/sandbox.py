"""Where chat templates run: jinja2's immutable sandbox as transformers sets it up, with bounds on work and memory.

Owns what a template can call and what it may cost.  It must not know what messages are.  Model files come from
strangers: a template reaches nothing outside its variables, and ends.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_T = TypeVar("_T")

_STEPS_BETWEEN_CLOCKS: Final = 64
_WIDE_FIELD: Final = re.compile(r"\d{5,}|\*")
"""A width in a format string that asks for a lot of padding, or takes it from an argument."""
_LARGEST_POWER: Final = 2**16


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one rendering may cost; passing a bound is the request's error.

    chars bounds the output and every string and list on the way to it; steps the turns of all loops and macro calls.
    """

    chars: int = 16 * 2**20
    steps: int = 2_000_000
    time_s: float = 10.0


class BoundPassed(Exception):
    """A rendering went past one of its Bounds; the message says which."""


class Meter:
    """What one rendering has used so far.  One thread."""

    __slots__ = ("_bounds", "_chars", "_deadline_s", "_steps")

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._steps = 0
        self._chars = 0
        self._deadline_s = time.monotonic() + bounds.time_s

    def step(self) -> None:
        """Count one turn of a loop or one macro call.  Raises BoundPassed."""
        self._steps += 1
        if self._steps > self._bounds.steps:
            raise BoundPassed(f"it takes more than {self._bounds.steps} steps")
        if self._steps % _STEPS_BETWEEN_CLOCKS == 0:
            self._check_time()

    def passed(self, chunk: str) -> str:
        """Count chunk, a piece of the output, and return it.  Raises BoundPassed."""
        self._chars += len(chunk)
        if self._chars > self._bounds.chars:
            raise BoundPassed(f"the prompt has more than {self._bounds.chars} characters")
        self._check_time()
        return chunk

    def _check_time(self) -> None:
        if time.monotonic() > self._deadline_s:
            raise BoundPassed(f"it takes more than {self._bounds.time_s:g} s")


class _ThreadMeter(threading.local):
    """The meter of the rendering that runs on this thread."""

    meter: Meter | None = None


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template.  Any thread may render; each rendering has its own meter.

    Templates must be compiled from a tree that went through with_meter.
    """

    # Every way to make a large value from small ones passes one of our checks before the memory is taken.
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, bounds: Bounds, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self._bounds = bounds
        self._thread = _ThreadMeter()
        self.count_step = self._count_step  # called by every turn of a loop and every macro; one object, see call
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: now().strftime(format)
        self.globals["namespace"] = _Namespace
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        for name in ("center", "format", "indent", "join", "replace", "wordwrap"):
            self.filters[name] = self._checked_filter(name, self.filters[name])

    @contextmanager
    def metered(self) -> Iterator[Meter]:
        """Meter what this thread renders meanwhile."""
        meter = Meter(self._bounds)
        self._thread.meter = meter
        try:
            yield meter
        finally:
            self._thread.meter = None

    def _count_step(self) -> None:
        if self._thread.meter is not None:
            self._thread.meter.step()

    def join_bounded(self, *operands: object) -> str:
        """What ``~`` does."""
        return self._bounded("".join(map(str, operands)))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object, right: object) -> object:
        if operator == "+" and type(left) is str and type(right) is str:  # most there are, by far
            self._check_size(len(left) + len(right))
            return left + right
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, str | list | tuple) and isinstance(times, int):
                    self._check_size(len(sized) * times)
        elif operator == "**" and not all(
            isinstance(side, int) and abs(side) <= _LARGEST_POWER for side in (left, right)
        ):
            raise BoundPassed(f"it takes a power of a number above {_LARGEST_POWER}")
        elif operator == "%" and isinstance(left, str):
            _check_fields(left)
        return self._bounded(super().call_binop(context, operator, left, right))

    def call(self, context: jinja2.runtime.Context, obj: object, /, *args: object, **kwargs: object) -> object:
        if obj is self.count_step:  # ours, and no template can name it: nothing of it need be checked
            self._count_step()
            return None
        self._check_arguments(*args, *kwargs.values())
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self._check_method(getattr(obj, "__name__", ""), owner, args)
        return self._bounded(super().call(context, obj, *args, **kwargs))

    def getattr(self, obj: object, attribute: str) -> object:
        if attribute in ("format", "format_map") and isinstance(obj, str):
            _check_fields(obj)
        return super().getattr(obj, attribute)

    def getitem(self, obj: object, argument: object) -> object:
        if argument in ("format", "format_map") and isinstance(obj, str):
            _check_fields(obj)
        return super().getitem(obj, argument)

    def _checked_filter(self, name: str, filter: Callable[..., object]) -> Callable[..., object]:
        """A filter of jinja2's with our checks before it; the passing of an environment stays as it is."""
        passes_first = getattr(filter, "jinja_pass_arg", None) is not None

        def checked(*args: object, **kwargs: object) -> object:
            subject, *rest = args[1:] if passes_first else args
            self._check_arguments(*rest, *kwargs.values())
            if name == "format":
                _check_fields(str(subject))
            elif name == "replace":
                self._check_method(name, str(subject), tuple(rest))
            elif name == "join" and isinstance(subject, list | tuple):
                self._check_method(name, str(rest[0]) if rest else "", (subject,))
            return self._bounded(filter(*args, **kwargs))

        if passes_first:
            checked.jinja_pass_arg = filter.jinja_pass_arg  # type: ignore[attr-defined]
        return checked

    def _check_arguments(self, *values: object) -> None:
        """Refuse numbers that could only be the width of something enormous."""
        if any(isinstance(value, int) and value > self._bounds.chars for value in values):
            raise BoundPassed(f"it passes a number above {self._bounds.chars}")

    def _check_method(self, name: str, owner: str, args: tuple[object, ...]) -> None:
        """Refuse the string methods whose result is larger than all of their arguments together."""
        if name == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
            self._check_size(owner.count(args[0]) * len(args[1]))
        elif name == "join" and args and isinstance(args[0], list | tuple):
            self._check_size(sum(len(owner) + (len(item) if isinstance(item, str) else 1) for item in args[0]))

    def _check_size(self, size: int) -> None:
        if size > self._bounds.chars:
            raise BoundPassed(f"it makes a value of more than {self._bounds.chars} elements")

    def _bounded(self, value: _T) -> _T:
        if isinstance(value, str | list | tuple):
            self._check_size(len(value))
        return value


def with_meter(tree: nodes.Template) -> nodes.Template:
    """The tree with a count in every loop and macro, and with ``~`` going through join_bounded.  Changes tree."""
    metered = _Metering().visit(tree)
    assert isinstance(metered, nodes.Template)
    return metered


class _Metering(NodeTransformer):
    """Calls go to attributes of the environment, which no variable of the template can hide."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._counted(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._counted(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_bounded", node.nodes, node.lineno)

    def _counted(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("count_step", [], node.lineno), lineno=node.lineno))
        return node


def _call(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=line), arguments, [], None, None, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's, without names that begin with an underscore: none can stand in for a hook of Python."""

    def __init__(*args: object, **kwargs: object) -> None:
        # Without named parameters, so that a template may call an attribute self.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: object) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}: it begins with an underscore")


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the model's own words for training; here it only passes."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _check_fields(format: str) -> None:
    if _WIDE_FIELD.search(format) is not None and ("{" in format or "%" in format):
        raise BoundPassed("it formats a string with a width of five digits or more")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models saw it in training: jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
