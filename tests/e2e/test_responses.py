"""/v1/responses of the real server and the default model: OpenAI's own client, kills, restarts and shutdowns."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from openai.types.responses import Response, ResponseOutputMessage

from tests.e2e.process import Server, serving

QUESTION = "What is the capital of France? Answer with one word."
LONG: dict[str, Any] = {"input": "Tell me a story.", "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return connect(server)


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def polled(client: openai.OpenAI, id: str, until: Callable[[Response], bool]) -> Response:
    """The response once it is as wanted; each look is an exchange with the server."""
    for _ in range(20_000):
        response = client.responses.retrieve(id)
        if until(response):
            return response
    raise AssertionError(f"it stayed {response.status}")


def ended(response: Response) -> bool:
    return response.status not in ("queued", "in_progress")


def test_openai_creates_retrieves_lists_and_deletes(client: openai.OpenAI) -> None:
    response = client.responses.create(model="", input=QUESTION, temperature=0, max_output_tokens=20)
    assert response.status == "completed"
    assert "Paris" in response.output_text
    assert isinstance(response.output[0], ResponseOutputMessage)
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    again = client.responses.retrieve(response.id)
    assert again.model_dump() == response.model_dump()
    items = list(client.responses.input_items.list(response.id))
    assert [item.type for item in items] == ["message"]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_openai_streams_the_same_as_it_gets_whole_and_replays_it(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="", input=QUESTION, temperature=0, max_output_tokens=20)
    with client.responses.stream(model="", input=QUESTION, temperature=0, max_output_tokens=20) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    replay = list(client.responses.retrieve(final.id, stream=True, starting_after=3))
    assert [event.sequence_number for event in replay] == list(range(4, events[-1].sequence_number + 1))


def test_openai_goes_on_from_a_response_as_chat_does_from_its_messages(client: openai.OpenAI) -> None:
    said: Any = [{"role": "user", "content": "My name is Ada."}]
    first = client.responses.create(model="", input=said[0]["content"], temperature=0, max_output_tokens=30)
    second = client.responses.create(
        model="", input="What is my name?", previous_response_id=first.id, temperature=0, max_output_tokens=20
    )
    said += [{"role": "assistant", "content": first.output_text}, {"role": "user", "content": "What is my name?"}]
    chat = client.chat.completions.create(model="", messages=said, temperature=0, max_tokens=20)
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None
    assert chat.usage is not None
    assert second.usage.input_tokens == chat.usage.prompt_tokens


def test_openai_polls_a_background_response_and_cancels_another(client: openai.OpenAI) -> None:
    job = client.responses.create(model="", input=QUESTION, background=True, temperature=0, max_output_tokens=20)
    done = polled(client, job.id, ended)
    assert done.status == "completed"
    assert "Paris" in done.output_text
    endless = client.responses.create(model="", background=True, max_output_tokens=4000, **LONG)
    polled(client, endless.id, lambda response: bool(response.output_text))
    cancelled = client.responses.cancel(endless.id)
    assert cancelled.status == "cancelled"
    assert client.responses.cancel(endless.id).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.responses.cancel(done.id)


def test_openai_follows_a_background_stream_from_where_it_left(client: openai.OpenAI) -> None:
    stream = client.responses.create(
        model="", background=True, stream=True, max_output_tokens=60, temperature=0, **LONG
    )
    id, text, cursor = "", "", 0
    for event in stream:
        if event.type == "response.created":
            id = event.response.id
        if event.type == "response.output_text.delta":
            text += event.delta
        cursor = event.sequence_number
        if len(text) > 20:
            break
    stream.close()
    last: Any = None
    for event in client.responses.retrieve(id, stream=True, starting_after=cursor):
        assert event.sequence_number == cursor + 1
        cursor, last = event.sequence_number, event
        if event.type == "response.output_text.delta":
            text += event.delta
    assert last.type == "response.incomplete"
    assert text == last.response.output_text == client.responses.retrieve(id).output_text


def test_openais_async_client_does_all_that_at_once(server: Server) -> None:
    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        if i % 3 == 0:
            job = await client.responses.create(
                model="", input=QUESTION, background=True, temperature=0, max_output_tokens=8
            )
            while job.status in ("queued", "in_progress"):
                job = await client.responses.retrieve(job.id)
            return job.output_text
        if i % 3 == 1:
            async with client.responses.stream(model="", input=QUESTION, temperature=0, max_output_tokens=8) as stream:
                return (await stream.get_final_response()).output_text
        whole = await client.responses.create(model="", input=QUESTION, temperature=0, max_output_tokens=8)
        return whole.output_text

    async def everything() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(12)))

    texts = asyncio.run(everything())
    assert len(set(texts)) == 1
    assert "Paris" in texts[0]


def test_the_documents_background_snippet(server: Server) -> None:
    start_resp = requests.post(
        f"{server.url}/v1/responses", json={"prompt": "长文本生成...", "max_output_tokens": 30}, timeout=30
    )
    response_id = start_resp.json()["id"]
    result_resp = requests.get(f"{server.url}/v1/responses/{response_id}", timeout=30)
    assert result_resp.json()["status"] in ("queued", "in_progress", "completed", "incomplete")
    client = connect(server)
    assert polled(client, response_id, ended).output_text


def test_a_kill_loses_no_answer_and_forgets_no_job(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    with serving("--response-store", path) as server:
        client = connect(server)
        done = client.responses.create(model="", input=QUESTION, temperature=0, max_output_tokens=8)
        jobs = [client.responses.create(model="", background=True, max_output_tokens=4000, **LONG).id for _ in range(4)]
        polled(client, jobs[0], lambda response: bool(response.output_text))
        server.process.send_signal(signal.SIGKILL)
        server.process.wait(30)
    with serving("--response-store", path) as server:
        client = connect(server)
        assert client.responses.retrieve(done.id).model_dump() == done.model_dump()
        for id in jobs:
            lost = client.responses.retrieve(id)
            assert lost.status == "failed"
            assert lost.error is not None
            assert "restarted" in lost.error.message
        on = client.responses.create(model="", input="And Italy?", previous_response_id=done.id, max_output_tokens=8)
        assert on.output_text


def test_a_drain_waits_for_jobs_and_fails_what_takes_too_long(tmp_path: Path) -> None:
    path = str(tmp_path / "responses.db")
    with serving("--response-store", path) as server:
        short = connect(server).responses.create(model="", background=True, max_output_tokens=40, **LONG)
        assert server.terminate() == 0
    with serving("--response-store", path, "--drain-timeout", "0.2") as server:
        client = connect(server)
        finished = client.responses.retrieve(short.id)
        assert finished.status == "incomplete"
        assert finished.usage is not None
        assert finished.usage.output_tokens == 40
        endless = client.responses.create(model="", background=True, max_output_tokens=6000, **LONG)
        polled(client, endless.id, lambda response: bool(response.output_text))
        assert server.terminate() == 0
    with serving("--response-store", path) as server:
        cut = connect(server).responses.retrieve(endless.id)
        assert cut.status == "failed"
        assert cut.output_text
        assert cut.error is not None
        assert "shutting down" in cut.error.message


def test_a_follower_of_a_server_that_shuts_down_hears_of_the_end() -> None:
    with serving("--drain-timeout", "0") as server:
        client = connect(server)
        stream = client.responses.create(model="", stream=True, background=True, max_output_tokens=6000, **LONG)
        events: list[Any] = [next(iter(stream)) for _ in range(6)]
        reader = threading.Thread(target=lambda: events.extend(stream))
        reader.start()
        assert server.terminate() == 0
        reader.join(30)
        assert events[-1].type == "response.failed"


def test_a_store_that_is_no_store_ends_the_start_with_one_line(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    path.write_text("no database at all, but some text that is long enough to be looked at\n" * 20)
    with (tmp_path / "err").open("w+") as err:
        with (
            pytest.raises(AssertionError, match="the server ended with 2"),
            serving("--response-store", str(path), stderr=err),
        ):
            pass
        err.seek(0)
        (line,) = err.read().splitlines()
    assert line.startswith("vserve: --response-store ")
    assert path.read_text().startswith("no database")
