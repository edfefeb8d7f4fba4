"""Chat templates: a conversation to the text of a prompt, in a sandbox.

Owns what a template is given, how the content of a message is brought to the form that the template takes, and where a
model folder keeps its template.  It must not know about tokens: it returns text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Final

import jinja2
from jinja2 import nodes

from vserve.errors import BadRequest, StartupError, shorten
from vserve.text.sandbox import BoundPassed, Bounds, Sandbox, with_meter
from vserve.text.tokenizer_files import read_json_object

_SOURCE_LIMIT_CHARS: Final = 2**20
_BOUNDS: Final = Bounds()
_MARK: Final = "END-OF-THE-MESSAGE-TO-CONTINUE "
"""Put behind the text to be continued, to find where it ends in the rendered prompt.

Where the template trims messages the space at its end is gone, which says that the text's own must go too.  Plain
letters: templates that write messages as JSON leave them as they are.
"""
_REASONING: Final = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message's reasoning comes; families' templates read the first or the last."""


class ContentFormat(Enum):
    """What a template takes as the content of a message."""

    STRING = "string"
    PARTS = "openai"
    """A list of parts, ``{"type": "text", "text": ...}``."""


class ChatTemplate:
    """One compiled chat template.  Immutable; any thread may render."""

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        bounds: Bounds = _BOUNDS,
        now: Callable[[], datetime] = datetime.now,
        for_tools: ChatTemplate | None = None,
    ) -> None:
        """Compile source.  Raises StartupError with the line where it is not a template.

        special_tokens are further named tokens that the template may use, as Tokenizer.special_tokens gives them;
        now is the clock behind ``strftime_now``.  for_tools: what the model has for conversations with tools, if that
        is another template.
        """
        self.for_tools = for_tools
        if len(source) > _SOURCE_LIMIT_CHARS:
            raise StartupError(f"the chat template has {len(source)} characters, more than {_SOURCE_LIMIT_CHARS}")
        self.source = source
        self._sandbox = Sandbox(bounds, now)
        try:
            tree = self._sandbox.parse(source)
            self.content_format = _content_format(tree)
            self._words = _words(tree)
            self._tests_string = _tests(tree, "string")
            self._joins_arguments = _joins(tree, "arguments")
            self._tests_none = _tests(tree, "none") or _compares_with_none(tree)
            self._template = self._sandbox.from_string(with_meter(tree))
        except jinja2.TemplateSyntaxError as error:
            raise StartupError(f"the chat template is wrong at line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise StartupError(f"the chat template cannot be compiled: {type(error).__name__}") from None
        named = {"bos_token": bos_token, "eos_token": eos_token}
        self._named = dict(special_tokens or {}) | {name: token for name, token in named.items() if token is not None}

    def knows(self, word: str) -> bool:
        """Whether the template has a use for a variable or an attribute of this name."""
        return word in self._words

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for messages: the text, special tokens spelled out (encode it with add_special=False).

        The messages are plain JSON values and stay as they are.  extra are further variables for the template; they
        cannot replace those named here.  With continue_final_message the prompt ends inside the last message, so that
        the model goes on with it; add_generation_prompt is then off.
        Raises BadRequest(param="messages") where the template refuses them, fails, or passes a bound.
        """
        conversation = [self._message(message) for message in messages]
        if continue_final_message:
            final = _mark_end(conversation)
            prompt = self._render(conversation, tools, documents, False, extra)
            return _cut_at_mark(prompt, final)
        return self._render(conversation, tools, documents, add_generation_prompt, extra)

    def _render(
        self,
        conversation: list[dict[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        documents: Sequence[Mapping[str, object]] | None,
        add_generation_prompt: bool,
        extra: Mapping[str, object] | None,
    ) -> str:
        variables: dict[str, object] = {
            **(extra or {}),
            **self._named,
            "messages": conversation,
            "tools": None if tools is None else list(tools),
            "documents": None if documents is None else list(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with self._sandbox.metered() as meter:
                return "".join(map(meter.passed, self._template.generate(variables)))
        except RecursionError:
            raise _refused("it nests too deeply") from None
        except (jinja2.TemplateError, BoundPassed) as error:
            raise _refused(str(error)) from None
        except Exception as error:  # a template is a program: whatever it raises is about these messages
            raise _refused(f"{type(error).__name__}: {error}") from None

    def _message(self, message: Mapping[str, object]) -> dict[str, object]:
        """A copy of message with its content in the template's format and tool arguments as objects."""
        copy = dict(message)
        reasoning = next((copy[name] for name in _REASONING if copy.get(name) is not None), None)
        if reasoning is not None:
            copy = {"thinking": reasoning, **copy, "reasoning_content": reasoning}
        calls = copy.get("tool_calls")
        if isinstance(calls, list):
            as_object = self._tests_string or not self._joins_arguments
            copy["tool_calls"] = [_with_arguments(call, as_object) for call in calls]
        content = copy.get("content")
        if content is None:
            # Templates that never test for none would join it to a string.
            copy["content"] = None if self._tests_none else ""
        elif self.content_format is ContentFormat.PARTS:
            if isinstance(content, str) and not self._tests_string:
                copy["content"] = [{"type": "text", "text": content}]
            elif isinstance(content, list):
                copy["content"] = [dict(part) if isinstance(part, Mapping) else part for part in content]
        elif isinstance(content, list):
            copy["content"] = "\n".join(_texts(content))
        return copy


def missing_template() -> BadRequest:
    """The answer to a chat request when the model has no template."""
    return BadRequest(
        "this model has no chat template: use /v1/completions, or start the server with a template", param="messages"
    )


def find_templates(folder: Path) -> dict[str, str]:
    """The chat templates of a model folder by name; "default" is the one for chats, "tool_use" for those with tools.

    Looks where transformers does: chat_template.jinja, then chat_template.json, then tokenizer_config.json (a string,
    or a list of ``{"name", "template"}``); additional_chat_templates/*.jinja add theirs.  Empty where there is none.
    Raises StartupError that names an unreadable file.
    """
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = folder / name
        if path.is_file():
            found |= _listed_templates(read_json_object(path).get("chat_template"), path)
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read_template(path)
    if (folder / "chat_template.jinja").is_file():
        found["default"] = _read_template(folder / "chat_template.jinja")
    return found


def read_template(given: str) -> str:
    """The template that --chat-template names: a file's content, or given itself where it holds Jinja.

    Raises StartupError for what is neither.
    """
    path = Path(given)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a name, or of several lines
        is_file = False
    if is_file:
        return _read_template(path)
    if "{{" in given or "{%" in given:
        return given
    raise StartupError(f"--chat-template {shorten(given)} is neither a file nor a template with {{{{ }}}} or {{% %}}")


def _listed_templates(value: object, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else [value]
    found: dict[str, str] = {}
    for entry in entries:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise StartupError(f"{path}: chat_template must be a string or a list of objects with name and template")
        found[name] = template
    return found


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > 4 * _SOURCE_LIMIT_CHARS:
            raise StartupError(f"{path} is larger than a chat template may be ({4 * _SOURCE_LIMIT_CHARS} bytes)")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise StartupError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise StartupError(f"cannot read {path}: {error.strerror}") from None


def _content_format(tree: nodes.Template) -> ContentFormat:
    """Whether the template loops over the parts of a content: then it is given parts, otherwise text.

    What counts is a loop over ``….content``, ``…["content"]``, a variable set to one of these or named content, with
    or without filters.
    """
    names = {"content"} | {
        assignment.target.name
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, frozenset())
    }
    loops = tree.find_all(nodes.For)
    return ContentFormat.PARTS if any(_is_content(loop.iter, names) for loop in loops) else ContentFormat.STRING


def _is_content(node: nodes.Node | None, names: Collection[str]) -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name in names


def _words(tree: nodes.Template) -> frozenset[str]:
    """Every variable, attribute and short constant string of the template."""
    names = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
    names |= {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = (node.value for node in tree.find_all(nodes.Const))
    return frozenset(names | {text for text in texts if isinstance(text, str) and text.isidentifier()})


def _tests(tree: nodes.Template, name: str) -> bool:
    return any(test.name == name for test in tree.find_all(nodes.Test))


def _joins(tree: nodes.Template, attribute: str) -> bool:
    """Whether an attribute of this name is written, or joined to a string, as it is, which takes text."""
    names = {
        assignment.target.name
        for assignment in tree.find_all(nodes.Assign)
        if isinstance(assignment.target, nodes.Name) and _reads(assignment.node, attribute)
    }
    written: list[nodes.Node] = [part for joined in tree.find_all(nodes.Concat) for part in joined.nodes]
    written += [part for output in tree.find_all(nodes.Output) for part in output.nodes]
    written += [side for sum in tree.find_all(nodes.Add) for side in (sum.left, sum.right)]
    return any(_reads(part, attribute) or (isinstance(part, nodes.Name) and part.name in names) for part in written)


def _reads(node: nodes.Node, attribute: str) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == attribute
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == attribute


def _compares_with_none(tree: nodes.Template) -> bool:
    operands = (operand.expr for operand in tree.find_all(nodes.Operand))
    return any(isinstance(operand, nodes.Const) and operand.value is None for operand in operands)


def _texts(parts: Sequence[object]) -> list[str]:
    """The text of each part; parts of other types have none (the API refuses them before)."""
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return [text for text in texts if isinstance(text, str)]


def _with_arguments(call: object, as_object: bool) -> object:
    """A tool call whose arguments are an object, as most templates expect, or the JSON text that clients send."""
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), str) is not as_object:
        return dict(call)
    try:
        if as_object:
            arguments = json.loads(function["arguments"] or "{}")
        else:
            arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _mark_end(conversation: list[dict[str, object]]) -> str:
    """Put the mark behind the last text of the last message, which is a copy; return that text."""
    content = conversation[-1].get("content") if conversation else None
    if isinstance(content, str):
        conversation[-1]["content"] = content + _MARK
        return content
    if isinstance(content, list):
        for part in reversed(content):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text = str(part["text"])
                part["text"] = text + _MARK
                return text
    raise BadRequest("continue_final_message needs a last message with text to continue", param="messages")


def _cut_at_mark(prompt: str, final: str) -> str:
    """The prompt up to the end of the final text."""
    end = prompt.rfind(_MARK.rstrip())
    if end < 0 or final.strip() not in prompt:
        raise BadRequest(
            "continue_final_message: the model's chat template does not keep the last message as it is",
            param="messages",
        )
    return prompt[:end] if prompt.startswith(_MARK, end) else prompt[:end].rstrip()


def _refused(reason: str) -> BadRequest:
    # The reason may quote the messages: cut it, on one line.
    return BadRequest(f"the model's chat template refused the messages: {shorten(reason)}", param="messages")
