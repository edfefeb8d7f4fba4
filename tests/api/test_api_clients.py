"""Real clients against the front end: the official openai package, and requests as in the users' documents."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests

from tests.fakes_api import EOS, LETTERS, NAME, Stand, standing

HI: Any = [{"role": "user", "content": "如何优化Python代码性能?"}]


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with standing() as running:
        yield running


@pytest.fixture(scope="module")
def client(stand: Stand) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stand.url}/v1", api_key="token-abc123", max_retries=0)


def test_openai_lists_and_retrieves_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [NAME, "short"]
    assert client.models.retrieve(NAME).owned_by == "vserve"


def test_openai_chats_whole_and_streamed(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="", messages=HI, temperature=0.3, max_tokens=128)
    assert reply.choices[0].message.content == "Hello, world!"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 14
    stream = client.chat.completions.create(
        model=NAME, messages=HI, stream=True, stream_options={"include_usage": True}, n=2
    )
    chunks = list(stream)
    for index in range(2):
        said = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in said) == "Hello, world!"
        assert said[0].delta.role == "assistant"
        assert said[-1].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 28


def test_openais_stream_helper_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=NAME, messages=HI, logprobs=True, top_logprobs=2) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, world!"
    assert final.choices[0].logprobs is not None
    assert final.choices[0].logprobs.content is not None
    assert "".join(entry.token for entry in final.choices[0].logprobs.content) == f"Hello, world!{EOS}"


def test_openai_completes_whole_and_streamed(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="", prompt=["a", "b"], max_tokens=5, echo=True, logprobs=None)
    assert [choice.text for choice in reply.choices] == ["aHello", "bHello"]
    stream = client.completions.create(model="", prompt="a", max_tokens=5, logprobs=1, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello"


def test_openais_async_client_streams_many_at_once(stand: Stand) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model=NAME, messages=HI, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{stand.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client) for _ in range(16)))

    assert asyncio.run(all_of_them()) == ["Hello, world!"] * 16


def test_openai_raises_its_own_errors(stand: Stand, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=HI, temperature=7)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.chat.completions.create(model="gpt-9", messages=HI)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model=NAME, messages=HI, tools=[{"type": "function", "function": {"name": "not a name", "parameters": {}}}]
        )
    with standing(api_keys=("right",)) as guarded:
        wrong = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        right = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="right", max_retries=0)
        assert right.models.list().data[0].id == NAME


def test_openai_breaks_off_a_stream_and_the_engine_hears_of_it() -> None:
    with standing(engine={"step_s": 0.005}) as stand:
        client = openai.OpenAI(base_url=f"{stand.url}/v1", api_key="x", max_retries=0)
        stream = client.chat.completions.create(
            model=NAME, messages=HI, stream=True, max_tokens=400, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        client.close()
        assert stand.engine.cancels.get(timeout=10)


def test_requests_completes_as_in_the_document(stand: Stand) -> None:
    response = requests.post(
        f"{stand.url}/v1/completions",
        json={"model": NAME, "prompt": "Once upon a time", "max_tokens": 50, "temperature": 0.7},
    )
    assert response.json()["choices"][0]["text"] == "Hello, world!"
    response = requests.post(
        f"{stand.url}/v1/completions", json={"prompt": ["prompt1", "prompt2", "prompt3"], "max_tokens": 50}
    )
    assert len(response.json()["choices"]) == 3


def test_requests_streams_as_in_the_document(stand: Stand) -> None:
    response = requests.post(
        f"{stand.url}/v1/chat/completions", json={"model": NAME, "messages": HI, "stream": True}, stream=True
    )
    text = ""
    for chunk in response.iter_content(chunk_size=None):
        if chunk:
            text += chunk.decode()
    assert text.endswith("data: [DONE]\n\n")


TEXTS = [
    "你好世界",
    "人工智能是计算机科学的一个分支,致力于创建能够模拟人类智能的系统。",
    "Hello 世界! This is a test of tokenization.",
    "def fibonacci(n: int) -> list[int]:",
    "2024年12月31日,温度-5.6°C,占比99.9%",
    "🎉🚀💡\n\t<|im_start|>system<|im_end|>",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_documents_round_trip_of_tokenize_and_detokenize(stand: Stand, text: str) -> None:
    result = requests.post(f"{stand.url}/v1/tokenize", json={"model": "", "text": text}).json()
    assert result["count"] == len(result["tokens"])
    back = requests.post(f"{stand.url}/v1/detokenize", json={"model": NAME, "tokens": result["tokens"]}).json()
    assert back["text"] == text
    response = requests.post(f"{stand.url}/tokenize", json={"text": "你好,世界!"})
    assert len(response.json()["tokens"]) > 0
    ids = LETTERS.encode("abc", add_special=False)
    assert requests.post(f"{stand.url}/detokenize", json={"token_ids": ids}).json()["text"] == "abc"


def test_the_documents_health_check(stand: Stand) -> None:
    for path in ("/health", "/health/ready", "/version", "/v1/models"):
        assert requests.get(stand.url + path, timeout=5).status_code == 200
    assert requests.get(f"{stand.url}/version", timeout=3).json().get("version", "unknown") == "1.2.3"
    assert {"queue_size", "active_workers", "gpu_utilization"} <= requests.get(f"{stand.url}/load").json().keys()
