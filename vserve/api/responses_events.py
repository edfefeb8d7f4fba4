"""How a response is worded: its JSON document and its stream of events, both from the same steps in the same order.

Pure.  A ``Telling`` turns steps into events; whoever has the steps of a response can tell it again, byte for byte, to
as many listeners as there are, each at its own pace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from vserve.api.responses_items import Item, output_id
from vserve.http import sse
from vserve.store.record import Status
from vserve.text.parts import CallArguments, CallBegin, Content, Part, Reasoning

Logprobs = list[dict[str, object]]
Document = dict[str, object]


@dataclass(frozen=True, slots=True)
class Step:
    """One part of the answer, and the log-probabilities of its tokens where they are wanted."""

    part: Part
    logprobs: Logprobs | None = None


def pack(steps: Sequence[Step]) -> bytes:
    """Steps as JSON, short for what is frequent: a plain text is a string."""
    return orjson.dumps([_packed(step) for step in steps])


def _packed(step: Step) -> str | list[object]:
    match step.part:
        case Content(text):
            return text if step.logprobs is None else ["t", text, step.logprobs]
        case Reasoning(text):
            return ["r", text]
        case CallBegin(index, id, name):
            return ["c", index, id, name]
        case CallArguments(index, text):
            return ["a", index, text]


def unpack(trace: bytes) -> list[Step]:
    """The steps that ``pack`` took."""
    return [Step(Content(entry)) if type(entry) is str else _unpacked(entry) for entry in orjson.loads(trace)]


def _unpacked(entry: list[object]) -> Step:
    match entry:
        case ["t", str(text), list(logprobs)]:
            return Step(Content(text), logprobs)
        case ["r", str(text)]:
            return Step(Reasoning(text))
        case ["c", int(index), str(id), str(name)]:
            return Step(CallBegin(index, id, name))
        case ["a", int(index), str(text)]:
            return Step(CallArguments(index, text))
    raise ValueError("the trace of a response is damaged")


def started(document: Document) -> Document:
    """The document as it was when the response was made."""
    status = Status.QUEUED if document["background"] else Status.IN_PROGRESS
    fresh: Document = {
        "status": status.value, "completed_at": None, "error": None, "incomplete_details": None, "output": [],
        "usage": None,
    }  # fmt: skip
    return {**document, **fresh}


class Output:
    """The output items that steps add up to."""

    def __init__(self, key: str) -> None:
        """key: of the response, for the ids."""
        self._key = key
        self.items: list[Item] = []
        self._texts: list[str] = []  # of the item that is open
        self._logprobs: Logprobs = []

    @property
    def text(self) -> str:
        """What the open item has so far: text or arguments."""
        return "".join(self._texts)

    @property
    def logprobs(self) -> Logprobs:
        """Those of the open item."""
        return self._logprobs

    def begins(self, part: Part) -> bool:
        """Whether part begins an item of its own rather than going on with the open one."""
        kind = self.items[-1]["type"] if self.items else None
        match part:
            case Content():
                return kind != "message"
            case Reasoning():
                return kind != "reasoning"
            case CallBegin():
                return True
            case CallArguments():
                return kind != "function_call"

    def begin(self, part: Part) -> Item:
        """Open the item that part begins; the one before is closed."""
        self._texts, self._logprobs = [], []
        index, running = len(self.items), Status.IN_PROGRESS.value
        match part:
            case Content():
                item: Item = {"id": output_id(self._key, "message", index), "type": "message", "role": "assistant"}
                item |= {"status": running, "content": []}
            case Reasoning():
                item = {"id": output_id(self._key, "reasoning", index), "type": "reasoning", "summary": []}
                item |= {"content": [], "status": running}
            case CallBegin(_, call_id, name):
                item = {"id": output_id(self._key, "function_call", index), "type": "function_call"}
                item |= {"status": running, "call_id": call_id, "name": name, "arguments": ""}
            case CallArguments():
                raise ValueError("the arguments of a call came before the call")
        self.items.append(item)
        return item

    def add(self, step: Step) -> None:
        """More of the open item."""
        if not isinstance(step.part, CallBegin):
            self._texts.append(step.part.text)
            self._logprobs += step.logprobs or []

    def content(self) -> Item:
        """The open item's content part as it is now; the item is no call."""
        if self.items[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self._logprobs}

    def close(self, status: Status) -> Item:
        """The open item as it is in the end; it takes the place of the opened one."""
        self.items[-1] = self._closed(status)
        return self.items[-1]

    def take(self, step: Step) -> None:
        """The next step, whether it goes on with an item or begins one."""
        if self.begins(step.part):
            if self.items:
                self.close(Status.COMPLETED)
            self.begin(step.part)
        self.add(step)

    def snapshot(self, status: Status) -> list[Item]:
        """The items of a response of that status; nothing is changed.

        An answer that ended by itself has at least one item, an empty message when nothing was said.
        """
        if self.items:
            return [*self.items[:-1], self._closed(item_status(status))]
        if not says_nothing(status):
            return []
        empty = Output(self._key)
        empty.begin(Content(""))
        return [empty.close(item_status(status))]

    def _closed(self, status: Status) -> Item:
        item = {**self.items[-1], "status": status.value}
        if item["type"] == "function_call":
            item["arguments"] = self.text
        else:
            item["content"] = [self.content()]
        return item


def says_nothing(status: Status) -> bool:
    """Whether a response of that status has a message even if it is empty."""
    return status in (Status.COMPLETED, Status.INCOMPLETE)


def item_status(status: Status) -> Status:
    """What its last item is in a response of that status."""
    return status if status.running or status is Status.COMPLETED else Status.INCOMPLETE


_LAST = {Status.COMPLETED: "response.completed", Status.FAILED: "response.failed"}
LAST_OTHERWISE = "response.incomplete"
"""The last event of a response cut short, cancelled ones too: OpenAI's clients know no other event for it."""


class Telling:
    """The events of one response, in order, each as bytes.

    ``begin`` first, then ``step`` for each step, then ``end``.  seen: events told so far.
    """

    def __init__(self, document: Document) -> None:
        """document: the response's, of any time; what changes with time is taken from the steps."""
        self._document = started(document)
        self._output = Output(str(document["id"]).removeprefix("resp_"))
        self._in_progress = False
        self._delta = (b"", b"")  # around the number and around the text of a plain delta
        self.seen = 0

    def begin(self) -> list[bytes]:
        """The response as it was made, and that it waits or runs."""
        events = [self._whole("response.created", self._document)]
        if self._document["background"]:
            return [*events, self._whole("response.queued", self._document)]
        return events + self._run()

    def step(self, step: Step) -> list[bytes]:
        """What the step adds."""
        made = self._output
        events = self._run()
        if made.begins(step.part):
            events += self._close(Status.COMPLETED)
            events += self._open(step.part)
        made.add(step)
        if isinstance(step.part, CallBegin):
            return events
        before, after = self._delta
        logprobs = b""
        if isinstance(step.part, Content):
            shown = [_brief(entry) for entry in step.logprobs or ()]
            logprobs = b',"logprobs":' + (orjson.dumps(shown) if shown else b"[]")
        events.append(b"%b%d%b%b%b}\n\n" % (before, self.seen, after, orjson.dumps(step.part.text), logprobs))
        self.seen += 1
        return events

    def end(self, document: Document) -> list[bytes]:
        """document: the finished response's."""
        status = Status(document["status"])
        events: list[bytes] = []
        if says_nothing(status):
            events += self._run()
            if not self._output.items:
                events += self._open(Content(""))
        events += self._close(item_status(status))
        return [*events, self._whole(_LAST.get(status, LAST_OTHERWISE), document)]

    def _run(self) -> list[bytes]:
        if self._in_progress:
            return []
        self._in_progress = True
        return [self._whole("response.in_progress", {**self._document, "status": Status.IN_PROGRESS.value})]

    def _open(self, part: Part) -> list[bytes]:
        made = self._output
        item = made.begin(part)
        place = len(made.items) - 1
        events = [self._event("response.output_item.added", {"output_index": place, "item": item})]
        where: dict[str, object] = {"item_id": item["id"], "output_index": place}
        kind = "response.function_call_arguments.delta"
        if item["type"] != "function_call":
            where["content_index"] = 0
            events.append(self._event("response.content_part.added", {**where, "part": made.content()}))
            name = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            kind = f"response.{name}.delta"
        # Put together by hand: this is the event of every token.
        before = f'event: {kind}\ndata: {{"type":"{kind}","sequence_number":'.encode()
        self._delta = before, b"," + orjson.dumps(where)[1:-1] + b',"delta":'
        return events

    def _close(self, status: Status) -> list[bytes]:
        made = self._output
        if not made.items:
            return []
        place = len(made.items) - 1
        item = made.close(status)
        where: dict[str, object] = {"item_id": item["id"], "output_index": place}
        if item["type"] == "function_call":
            done = {**where, "name": item["name"], "arguments": made.text}
            events = [self._event("response.function_call_arguments.done", done)]
        else:
            where["content_index"] = 0
            said: dict[str, object] = {**where, "text": made.text}
            name = "reasoning_text"
            if item["type"] == "message":
                name = "output_text"
                said["logprobs"] = [_brief(entry) for entry in made.logprobs]
            events = [
                self._event(f"response.{name}.done", said),
                self._event("response.content_part.done", {**where, "part": made.content()}),
            ]
        return [*events, self._event("response.output_item.done", {"output_index": place, "item": item})]

    def _whole(self, kind: str, document: Document) -> bytes:
        return self._event(kind, {"response": document})

    def _event(self, kind: str, fields: dict[str, object]) -> bytes:
        data = orjson.dumps({"type": kind, "sequence_number": self.seen, **fields})
        self.seen += 1
        return sse.frame(data, kind)


def _brief(entry: dict[str, object]) -> dict[str, object]:
    """A token's log-probabilities as events have them: without bytes."""
    top = entry["top_logprobs"]
    assert isinstance(top, list)
    return {
        "token": entry["token"],
        "logprob": entry["logprob"],
        "top_logprobs": [{"token": other["token"], "logprob": other["logprob"]} for other in top],
    }
