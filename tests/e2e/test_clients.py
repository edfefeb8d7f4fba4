"""Real clients against the real server and the real default model."""

from __future__ import annotations

import json

import openai
import pytest
import requests

from tests.e2e.process import Server

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def test_the_openai_client_lists_and_retrieves_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert len(models) == 1
    assert models[0].object == "model"
    assert client.models.retrieve(models[0].id).id == models[0].id


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="", messages=QUESTION, temperature=0, max_tokens=20)
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_streamed_chat_says_the_same_as_a_whole_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="", messages=QUESTION, temperature=0, max_tokens=20)
    stream = client.chat.completions.create(
        model="", messages=QUESTION, temperature=0, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_the_openai_client_completes_several_prompts_with_several_choices(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="", prompt=["Once upon a time", "The sun is"], n=2, max_tokens=8, temperature=0, echo=True
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == reply.choices[1].text
    assert reply.choices[0].text.startswith("Once upon a time")
    assert reply.choices[2].text.startswith("The sun is")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 32


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(client: openai.OpenAI) -> None:
    def draw(n: int) -> list[str]:
        reply = client.completions.create(
            model="", prompt=["My favourite animal is"] * n, max_tokens=12, temperature=0.9, seed=1234
        )
        return [choice.text for choice in reply.choices]

    alone = draw(1)[0]
    assert draw(1)[0] == alone
    assert draw(5)[0] == alone


def test_logprobs_add_up_to_what_was_said(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="", messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert reply.choices[0].logprobs is not None
    entries = reply.choices[0].logprobs.content
    assert entries
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob <= 0.0
        assert entry.token == entry.top_logprobs[0].token  # greedy


def test_requests_streams_as_in_the_users_document(server: Server) -> None:
    response = requests.post(
        f"{server.url}/v1/chat/completions",
        json={"model": "", "messages": QUESTION, "stream": True, "max_tokens": 16, "temperature": 0},
        stream=True,
        timeout=60,
    )
    text = "".join(chunk.decode() for chunk in response.iter_content(chunk_size=None) if chunk)
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    said = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    assert "Paris" in said


def test_requests_completes_as_in_the_users_document(server: Server) -> None:
    model = requests.get(f"{server.url}/v1/models", timeout=10).json()["data"][0]["id"]
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 50, "temperature": 0.7}
    reply = requests.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert reply["object"] == "text_completion"
    assert reply["usage"]["completion_tokens"] <= 50


@pytest.mark.parametrize(
    "text", ["你好世界", "Hello 世界! This is a test.", "🎉🚀💡\n\t<|im_start|>system<|im_end|>", "a"]
)
@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_text_survives_tokenize_and_detokenize(server: Server, text: str, prefix: str) -> None:
    first = requests.post(f"{server.url}{prefix}/tokenize", json={"model": "", "text": text}, timeout=10).json()
    assert first["count"] == len(first["tokens"])
    back = requests.post(f"{server.url}{prefix}/detokenize", json={"tokens": first["tokens"]}, timeout=10).json()
    assert back["text"] == text


@pytest.mark.parametrize(
    ("path", "body", "status", "named"),
    [
        ("/v1/chat/completions", {"messages": QUESTION, "temperature": 9}, 400, "temperature"),
        ("/v1/chat/completions", {"messages": QUESTION, "max_tokens": 10**6}, 400, "max_tokens"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/completions", {"prompt": [10**9]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "word " * 20_000}, 400, "8192"),
        ("/v1/completions", {"prompt": "x", "model": "nobody"}, 404, "nobody"),
        ("/nowhere", {}, 404, "/nowhere"),
        ("/v1/models", {}, 405, "POST"),
    ],
)
def test_a_bad_request_is_named_and_the_server_goes_on(
    server: Server, path: str, body: dict[str, object], status: int, named: str
) -> None:
    reply = requests.post(f"{server.url}{path}", json=body, timeout=30)
    assert reply.status_code == status
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert named in error["message"]
    assert requests.get(f"{server.url}/health", timeout=10).status_code == 200


@pytest.mark.parametrize(
    "path", ["/ping", "/health", "/health/ready", "/livez", "/readyz", "/startupz", "/version", "/load"]
)
def test_every_probe_of_a_ready_server_is_200(server: Server, path: str) -> None:
    assert requests.get(server.url + path, timeout=10).status_code == 200
    assert requests.head(server.url + path, timeout=10).status_code == 200
