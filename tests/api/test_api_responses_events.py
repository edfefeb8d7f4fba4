"""A response's document and its events say the same, are OpenAI's own types, and can be told again byte for byte."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import ConfigDict, TypeAdapter

from vserve.api.responses_events import Document, Output, Step, Telling, pack, started, unpack
from vserve.api.responses_items import owner_of
from vserve.api.responses_request import parse
from vserve.store.record import Status
from vserve.text.parts import CallArguments, CallBegin, Content, Reasoning

KEY = "0123456789abcdef" * 2
ENDS = [Status.COMPLETED, Status.INCOMPLETE, Status.FAILED, Status.CANCELLED]
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent, config=ConfigDict())

TEXT = st.text(min_size=1, max_size=12)
LOGPROBS = st.lists(
    st.fixed_dictionaries(
        {"token": TEXT, "logprob": st.floats(-20, 0), "bytes": st.just([104]), "top_logprobs": st.just([])}
    ),
    max_size=2,
)


@st.composite
def steps(draw: st.DrawFn) -> list[Step]:
    """What a model may say: runs of text and reasoning, and calls with their arguments, in any order."""
    said: list[Step] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from(("content", "reasoning", "call", "scored")), max_size=6)):
        more = draw(st.lists(TEXT, max_size=4))
        match kind:
            case "content":
                said += [Step(Content(text)) for text in more]
            case "scored":
                said += [Step(Content(text), draw(LOGPROBS)) for text in more]
            case "reasoning":
                said += [Step(Reasoning(text)) for text in more]
            case _:
                said.append(Step(CallBegin(calls, f"call_{calls}", "look_up")))
                said += [Step(CallArguments(calls, text)) for text in more]
                calls += 1
    return said


def output(said: list[Step], status: Status) -> list[dict[str, object]]:
    """The output items of a response that said so."""
    made = Output(KEY)
    for step in said:
        made.take(step)
    return made.snapshot(status)


def document(status: Status, said: list[Step], *, background: bool) -> Document:
    """A finished response."""
    usage = {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 8,
    }
    asked = parse({"input": "hi", "background": background, "metadata": {"a": "b"}}, 100)
    error = {"code": "server_error", "message": "It broke."} if status is Status.FAILED else None
    return {
        "id": f"resp_{KEY}",
        "object": "response",
        "created_at": 1,
        "status": status.value,
        "completed_at": 2 if status is Status.COMPLETED else None,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if status is Status.INCOMPLETE else None,
        "model": "m",
        "output": output(said, status),
        "usage": usage,
        "temperature": 1.0,
        "top_p": 1.0,
        **asked.echoed,
    }


def tell(said: list[Step], final: Document, base: Document | None = None) -> list[bytes]:
    """All events of a response."""
    telling = Telling(final if base is None else base)
    events = telling.begin()
    for step in said:
        events += telling.step(step)
    events += telling.end(final)
    assert telling.seen == len(events)
    return events


def parsed(event: bytes) -> dict[str, object]:
    """The data of one event, whose name is the data's type."""
    name, data, *rest = event.decode().split("\n")
    assert rest == ["", ""]
    value: dict[str, object] = json.loads(data.removeprefix("data: "))
    assert name == f"event: {value['type']}"
    return value


@settings(deadline=None)
@given(steps(), st.sampled_from(ENDS), st.booleans())
def test_every_event_is_one_of_openais_and_they_add_up_to_the_document(
    said: list[Step], status: Status, background: bool
) -> None:
    final = document(status, said, background=background)
    Response.model_validate(final, strict=True)
    events = [parsed(event) for event in tell(said, final)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event)
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert items == final["output"]
    last = events[-1]
    assert last["response"] == final
    assert last["type"] == f"response.{status.value if status is not Status.CANCELLED else 'incomplete'}"
    deltas: dict[object, str] = {}
    for event in events:
        if str(event["type"]).endswith(".delta"):
            deltas[event["item_id"]] = deltas.get(event["item_id"], "") + str(event["delta"])
    for item in final["output"]:  # type: ignore[attr-defined]
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert deltas.get(item["id"], "") == text
        assert owner_of(item["id"]) == final["id"]


@settings(deadline=None)
@given(steps(), st.sampled_from([Status.COMPLETED, Status.INCOMPLETE]))
def test_openais_own_stream_state_follows_every_stream(said: list[Step], status: Status) -> None:
    final = document(status, said, background=False)
    state: ResponseStreamState[None] = ResponseStreamState(input_tools=[], text_format=omit)
    for event in tell(said, final):
        state.handle_event(EVENT.validate_python(parsed(event)))
    if status is Status.COMPLETED:
        done = state._completed_response
        assert done is not None
        assert [item.id for item in done.output] == [item["id"] for item in final["output"]]  # type: ignore[attr-defined]


@settings(deadline=None)
@given(steps(), st.sampled_from(ENDS), st.booleans())
def test_what_was_stored_is_told_again_byte_for_byte(said: list[Step], status: Status, background: bool) -> None:
    final = document(status, said, background=background)
    live = tell(said, final, base=started(final))
    stored = orjson.loads(orjson.dumps(final))
    assert tell(unpack(pack(said)), stored) == live


@pytest.mark.parametrize("status", ENDS)
def test_an_answer_of_no_text_has_an_empty_message_unless_it_broke_off(status: Status) -> None:
    final = document(status, [], background=True)
    kinds = [parsed(event)["type"] for event in tell([], final)]
    whole = status in (Status.COMPLETED, Status.INCOMPLETE)
    assert ("response.output_item.done" in kinds) == whole
    assert bool(final["output"]) == whole
    assert kinds[:2] == ["response.created", "response.queued"]


@pytest.mark.parametrize("trace", [b"[1]", b'[["x"]]', b'[["c", "0", "a", "b"]]', b"[{}]"])
def test_a_damaged_trace_is_not_told(trace: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        unpack(trace)


def test_arguments_without_a_call_are_a_bug_that_shows() -> None:
    telling = Telling(document(Status.COMPLETED, [], background=False))
    with pytest.raises(ValueError, match="before the call"):
        Telling.step(telling, Step(CallArguments(0, "{}")))
