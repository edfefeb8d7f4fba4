"""A broken stream goes on behind the last event its client saw: the same text, once, and nothing held meanwhile."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.chaos.stack import COMPLETE, Hang, Stack, reset, running
from vserve.api.access import Key, digest
from vserve.api.quota import Goods, Quota, Span
from vserve.errors import BadRequest

PROMPT = [3, 1, 4, 1, 5]


@dataclass
class Heard:
    """What a client has of a stream, over all its connections."""

    ids: list[str] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[str]] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    completion: int | None = None
    error: dict[str, Any] | None = None
    done: bool = False

    def take(self, block: str) -> None:
        """One event, which must have an id that was never there before."""
        name, _, rest = block.partition("\n")
        assert name.startswith("id: "), block
        assert name[4:] not in self.ids
        self.ids.append(name[4:])
        assert not self.done
        data = rest.removeprefix("data: ")
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]
            return
        if event.get("usage"):
            self.completion = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            self.pieces.append(choice["text"])
            index = choice["index"]
            assert index not in self.finishes
            self.texts[index] = self.texts.get(index, "") + choice["text"]
            self.tokens.setdefault(index, []).extend((choice["logprobs"] or {}).get("tokens", ()))
            if choice["finish_reason"]:
                self.finishes[index] = choice["finish_reason"]

    @property
    def answer(self) -> tuple[object, ...]:
        return self.texts, self.tokens, self.finishes, self.completion, self.done


def ask(stack: Stack, body: dict[str, Any] | bytes | None, last: str | None = None, **headers: str) -> socket.socket:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
    fields = {**headers, **({"Last-Event-ID": last} if last is not None else {})}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    peer = stack.connect()
    peer.sendall(
        f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\n{lines}Content-Length: {len(payload)}\r\n\r\n".encode() + payload
    )
    return peer


def blocks(peer: socket.socket) -> Iterator[str]:
    """The events of a chunked stream as they come."""
    with peer.makefile("rb") as file:
        status = file.readline()
        assert b" 200 " in status, status
        while file.readline() != b"\r\n":
            pass
        text = b""
        while size := int(file.readline(), 16):
            text += file.read(size)
            file.readline()
            while b"\n\n" in text:
                block, _, text = text.partition(b"\n\n")
                if not block.startswith(b":"):
                    yield block.decode()


def refusal(peer: socket.socket) -> tuple[int, str]:
    """Status and message of an answer that is no stream."""
    with peer:
        data = b""
        while b"}}" not in data:
            part = peer.recv(65536)
            assert part, data
            data += part
    return int(data.split()[1]), json.loads(data.partition(b"\r\n\r\n")[2])["error"]["message"]


def hear(peer: socket.socket, heard: Heard, most: int | None = None) -> Heard:
    """Take up to so many events."""
    for count, block in enumerate(blocks(peer), 1):
        heard.take(block)
        if count == most:
            break
    return heard


BODIES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 7, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    {"temperature": 0.8, "seed": 3, "n": 3},
    {"temperature": 0, "prompt": [PROMPT, [9, 9], [7] * 9], "echo": True},
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0.9, "seed": 5, "stop": ["q", "Cd"], "min_tokens": 9, "n": 2},
    {"temperature": 0.9, "seed": 5, "stop_token_ids": [30, 31, 32, 33], "min_tokens": 6},
    {"temperature": 0.9, "seed": 5, "bad_words": ["q", "ab"], "allowed_token_ids": [*range(30)]},
    {"temperature": 0, "max_tokens": 1},
    {"temperature": 0, "max_tokens": 0, "echo": True},
]


@pytest.mark.parametrize("cut", ["fin", "rst", "half-open"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: "-".join(body))
def test_a_stream_cut_behind_any_event_goes_on_as_if_it_had_not_been(body: dict[str, Any], cut: str) -> None:
    whole_body = {
        "prompt": PROMPT,
        "max_tokens": 20,
        "stream": True,
        "stream_options": {"include_usage": True},
        **body,
    }
    with running(depth=2) as stack:
        whole = Heard()
        with ask(stack, whole_body) as peer:
            hear(peer, whole)
        assert whole.done
        for most in (*range(1, len(whole.ids), 2), len(whole.ids)):
            heard = Heard()
            peer = ask(stack, whole_body)
            hear(peer, heard, most)
            if cut == "fin":
                peer.close()
            elif cut == "rst":
                reset(peer)
            # Cut again and again; each connection brings at least one more event, but for one that lacks none.
            while not heard.done:
                with ask(stack, None, heard.ids[-1]) as later:
                    hear(later, heard, 2)
            assert heard.answer == whole.answer
            peer.close()


def test_what_was_sent_and_lost_is_sent_again() -> None:
    with running() as stack:
        body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stream": True}
        with ask(stack, body) as peer:
            whole = hear(peer, Heard())
        for seen in sorted({1, 2, len(whole.ids) // 2, len(whole.ids) - 1, len(whole.ids)}):
            heard = Heard(ids=whole.ids[:seen])
            with ask(stack, body, whole.ids[seen - 1]) as peer:
                hear(peer, heard)
            assert heard.texts.get(0, "") == "".join(whole.pieces[seen:])
            assert heard.done == (seen < len(whole.ids))


class Pause:
    """A fault that holds the engine from its nth publication on until it is let go."""

    def __init__(self, stack: Stack, nth: int) -> None:
        self._left = nth
        self._hang = Hang()
        stack.faults.armed["publish"] = self

    def __call__(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._hang()

    def end(self) -> None:
        self._hang.over.set()


def test_a_broken_stream_holds_nothing_and_counts_as_an_abort_until_it_goes_on() -> None:
    with running() as stack:
        body = {"prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": True}
        heard, pause = Heard(), Pause(stack, 6)
        with ask(stack, body) as peer:
            hear(peer, heard, 1)
        stack.until(lambda: not stack.app.replies)
        pause.end()
        stack.settled()  # no page, no sequence, no reply
        assert stack.call(lambda: stack.app.trails.parked) == 1
        assert stack.scheduler.stats().aborted_total == 1
        generated = stack.scheduler.stats().generated_tokens_total
        with ask(stack, None, heard.ids[-1]) as peer:
            hear(peer, heard)
        assert len(heard.texts[0]) == 200
        # Drawn tokens are not drawn again, but for those that had not reached the reply when the client went.
        assert 200 <= stack.scheduler.stats().generated_tokens_total <= 200 + generated - 1


def test_a_stream_that_ended_with_an_error_ends_with_it_again() -> None:
    with running() as stack:
        body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "stream": True, "timeout_ms": 86_000_000}
        heard, pause = Heard(), Pause(stack, 6)
        with ask(stack, body) as peer:
            hear(peer, heard, 1)
            reply = stack.call(lambda: next(iter(stack.app.replies)))
            stack.call(lambda: reply.fail(BadRequest("broken on purpose")))
            hear_rest = Heard(ids=list(heard.ids))
        pause.end()
        with ask(stack, None, heard.ids[-1]) as peer:
            hear(peer, hear_rest)
        assert hear_rest.error is not None
        assert hear_rest.error["message"] == "broken on purpose"
        assert hear_rest.done


def test_ids_of_others_of_elsewhere_and_made_up_are_not_found() -> None:
    with running(api_keys=("mine", "other")) as stack:
        mine, other = {"Authorization": "Bearer mine"}, {"Authorization": "Bearer other"}
        body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True}
        heard = Heard()
        with ask(stack, body, **mine) as peer:
            hear(peer, heard)
        last = heard.ids[0]
        stream, _, number = last.rpartition(".")
        for made_up in (f"{stream}.99", f"{stream}.0", f"{stream}x.{number}", "x", "1", stream, f"{stream}.1e1"):
            status, message = refusal(ask(stack, None, made_up, **mine))
            assert (status, "Last-Event-ID" in message) == (404, True)
        assert refusal(ask(stack, None, last, **other)) == refusal(ask(stack, None, "x", **other))
        assert refusal(ask(stack, None, last))[0] == 401
        assert refusal(ask(stack, {**body, "max_tokens": 4}, last, **mine))[0] == 400
        with ask(stack, body, last, **mine) as peer:
            assert hear(peer, Heard(ids=[last])).done


def test_a_full_queue_leaves_the_stream_as_it_was() -> None:
    with running(rows=1, max_queue=1) as stack:
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stream": True}
        with ask(stack, body) as peer:
            whole = hear(peer, Heard())
        heard, pause = Heard(), Pause(stack, 6)
        with ask(stack, body) as peer:
            hear(peer, heard, 1)
        stack.until(lambda: not stack.app.replies)
        pause.end()
        stack.settled()
        pause = Pause(stack, 3)
        held = ask(stack, {**body, "max_tokens": 200})
        next(blocks(held))
        queued = ask(stack, {**body, "prompt": [8], "max_tokens": 200})
        stack.until(lambda: stack.inbox.size == 1)
        assert refusal(ask(stack, None, heard.ids[-1]))[0] == 429
        held.close()
        queued.close()
        pause.end()
        stack.settled()
        with ask(stack, None, heard.ids[-1]) as peer:
            assert hear(peer, heard).answer == whole.answer


def test_without_streams_to_keep_events_have_no_ids() -> None:
    for off in ({"resume_s": 0.0}, {"resume_streams": 0}):
        with running(**off) as stack:
            peer = ask(stack, {"prompt": PROMPT, "max_tokens": 3, "stream": True})
            assert all(block.startswith("data: ") for block in blocks(peer))
            peer.close()


def test_a_stream_that_goes_on_counts_each_token_once() -> None:
    with running() as stack:
        used: list[int] = []
        stack.call(
            lambda: stack.app.keys.name([Key("k", digest("secret"), quotas=(Quota(Goods.TOKENS, Span.DAY, 10_000),))])
        )
        count = stack.app.keys.use
        stack.app.keys.use = lambda caller, tokens: (used.append(tokens), count(caller, tokens))[1]  # type: ignore[method-assign]
        heard = Heard()
        body = {"prompt": PROMPT, "max_tokens": 60, "temperature": 0, "stream": True}
        with ask(stack, body, Authorization="Bearer secret") as peer:
            hear(peer, heard, 2)
        stack.settled()
        while not heard.done:
            with ask(stack, None, heard.ids[-1], Authorization="Bearer secret") as peer:
                hear(peer, heard)
            stack.settled()
        # The tokens of a step that was under way when the client went were never its answer.
        assert sum(used) == len(PROMPT) + 60
        assert len(heard.texts[0]) == 60
