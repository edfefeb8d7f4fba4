"""The official anthropic SDK against the real server and the real default model."""

from __future__ import annotations

import asyncio

import anthropic
import pytest
import requests
from anthropic.types import MessageParam

from tests.e2e.process import Server, serving

QUESTION: list[MessageParam] = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]

GREEDY = {"temperature": 0}  # this release of the SDK has no argument for it


@pytest.fixture
def client(server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)


def texts_of(message: anthropic.types.Message) -> list[str]:
    """The text of each block; any other kind of block fails."""
    return [block.text if block.type == "text" else block.type for block in message.content]


def ask(client: anthropic.Anthropic) -> anthropic.types.Message:
    return client.messages.create(model="", max_tokens=20, messages=QUESTION, extra_body=GREEDY)


def test_a_message_says_what_a_chat_says(client: anthropic.Anthropic, server: Server) -> None:
    reply = ask(client)
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 20}
    chat = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert [block.type for block in reply.content] == ["text"]
    assert reply.content[0].type == "text"
    assert reply.content[0].text == chat["choices"][0]["message"]["content"]
    assert "Paris" in reply.content[0].text
    assert reply.stop_reason == "end_turn"
    assert reply.usage.output_tokens == chat["usage"]["completion_tokens"]
    read = reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)
    assert read == chat["usage"]["prompt_tokens"]
    assert client.messages.count_tokens(model="", messages=QUESTION).input_tokens == read


def test_a_stream_says_what_the_whole_message_says(client: anthropic.Anthropic) -> None:
    whole = ask(client)
    with client.messages.stream(model="", max_tokens=20, messages=QUESTION, extra_body=GREEDY) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(texts) > 1
    assert texts_of(final) == texts_of(whole)
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    raw = client.messages.create(model="", max_tokens=20, messages=QUESTION, extra_body=GREEDY, stream=True)
    kinds = [event.type for event in raw]
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_the_asynchronous_client_streams_beside_others(server: Server, client: anthropic.Anthropic) -> None:
    whole = ask(client)

    async def both() -> list[anthropic.types.Message]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="unused", max_retries=0) as many:

            async def one() -> anthropic.types.Message:
                stream_of = many.messages.stream(model="", max_tokens=20, messages=QUESTION, extra_body=GREEDY)
                async with stream_of as stream:
                    return await stream.get_final_message()

            return list(await asyncio.gather(one(), one()))

    assert [texts_of(message) for message in asyncio.run(both())] == [texts_of(whole)] * 2


def test_systems_stops_limits_and_beginnings_are_obeyed(client: anthropic.Anthropic) -> None:
    told = client.messages.create(
        model="", max_tokens=12, extra_body=GREEDY, messages=QUESTION,
        system=[{"type": "text", "text": "You are a poet.", "cache_control": {"type": "ephemeral"}}],
    )  # fmt: skip
    plain = client.messages.count_tokens(model="", messages=QUESTION).input_tokens
    assert told.usage.input_tokens + (told.usage.cache_read_input_tokens or 0) != plain
    cut = client.messages.create(
        model="", max_tokens=20, messages=QUESTION, extra_body=GREEDY, stop_sequences=["Paris"]
    )
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", "Paris")
    short = client.messages.create(model="", max_tokens=1, messages=QUESTION, extra_body=GREEDY)
    assert short.stop_reason == "max_tokens"
    begun: list[MessageParam] = [*QUESTION, {"role": "assistant", "content": "The capital is"}]
    rest = client.messages.create(model="", max_tokens=8, messages=begun, extra_body=GREEDY)
    assert rest.content[0].type == "text"
    assert "Paris" in rest.content[0].text


def test_errors_are_the_sdks_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="other", max_tokens=5, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="", max_tokens=0, messages=QUESTION)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    with pytest.raises(anthropic.BadRequestError, match="text only") as caught:
        client.messages.create(model="", max_tokens=5, messages=[{"role": "user", "content": [image]}])  # type: ignore[list-item]
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "invalid_request_error"


def test_the_sdks_own_key_header_opens_the_server_and_no_other_key_does() -> None:
    with serving("--api-key", "secret") as guarded:
        good = anthropic.Anthropic(base_url=guarded.url, api_key="secret", max_retries=0)
        assert ask(good).stop_reason == "end_turn"
        with pytest.raises(anthropic.AuthenticationError):
            ask(anthropic.Anthropic(base_url=guarded.url, api_key="other", max_retries=0))
