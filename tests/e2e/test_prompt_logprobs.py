"""Log-probabilities of prompts, and words and ids that are kept out, from the real default model."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
import requests

from tests.e2e.process import Server

PROMPT = "The capital of France is Paris, and the capital of Italy is"


def complete(server: Server, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 4, **fields}
    reply = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def ids_of(server: Server, text: str) -> list[int]:
    ids: list[int] = requests.post(f"{server.url}/tokenize", json={"prompt": text}, timeout=30).json()["tokens"]
    return ids


@pytest.mark.parametrize("top", [0, 3])
def test_prompt_logprobs_have_vllms_form(server: Server, top: int) -> None:
    first = complete(server, prompt_logprobs=top)["choices"][0]["prompt_logprobs"]
    ids = ids_of(server, PROMPT)
    assert first[0] is None
    assert len(first) == len(ids)
    for token, entry in zip(ids[1:], first[1:], strict=True):
        assert next(iter(entry)) == str(token)
        assert all(one.keys() == {"logprob", "rank", "decoded_token"} for one in entry.values())
        ranks = [one["rank"] for one in entry.values()]
        assert len(ranks) <= top + 1
        assert set(ranks) >= set(range(1, top + 1))
    assert first[5][str(ids[5])]["decoded_token"] in PROMPT
    assert complete(server, prompt_logprobs=top)["choices"][0]["prompt_logprobs"] == first  # cached or not


def test_chat_has_them_beside_the_choices(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "prompt_logprobs": 1, "n": 2}
    reply = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]
    assert reply["prompt_logprobs"][0] is None


def test_echo_with_logprobs_scores_prompt_and_answer_alike(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    reply = client.completions.create(model="", prompt=PROMPT, echo=True, logprobs=2, max_tokens=3, temperature=0)
    choice = reply.choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == choice.text
    assert choice.text.startswith(PROMPT)
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
    # The answer, scored as a prompt, has the numbers it was drawn with.
    again = client.completions.create(model="", prompt=choice.text, echo=True, logprobs=2, max_tokens=0)
    assert again.choices[0].text == choice.text
    assert again.choices[0].finish_reason == "length"
    assert again.usage is not None
    assert again.usage.completion_tokens == 0
    scored = again.choices[0].logprobs
    assert scored is not None
    assert scored.tokens == logprobs.tokens
    assert scored.token_logprobs[1:] == pytest.approx(logprobs.token_logprobs[1:], abs=1e-3)
    assert [max(top, key=top.__getitem__) for top in scored.top_logprobs[1:]] == [
        max(top, key=top.__getitem__) for top in logprobs.top_logprobs[1:]
    ]


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_stream_brings_the_same_scores(server: Server, max_tokens: int) -> None:
    fields = {"echo": True, "logprobs": 1, "prompt_logprobs": 0, "max_tokens": max_tokens, "n": 2}
    whole = complete(server, **fields)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)
    stream = client.completions.create(
        model="", prompt=PROMPT, echo=True, logprobs=1, max_tokens=max_tokens, n=2, temperature=0, stream=True,
        extra_body={"prompt_logprobs": 0},
    )  # fmt: skip
    text = ["", ""]
    tokens: list[list[str]] = [[], []]
    prompts: list[Any] = [None, None]
    for chunk in stream:
        for choice in chunk.choices:
            text[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens or []
            prompts[choice.index] = getattr(choice, "prompt_logprobs", None) or prompts[choice.index]
    assert text == [choice["text"] for choice in whole["choices"]]
    assert tokens == [choice["logprobs"]["tokens"] for choice in whole["choices"]]
    for got, choice in zip(prompts, whole["choices"], strict=True):
        assert len(got) == len(choice["prompt_logprobs"])
        assert math.isclose(
            next(iter(got[4].values()))["logprob"], next(iter(choice["prompt_logprobs"][4].values()))["logprob"],
            abs_tol=1e-3,
        )  # fmt: skip


def test_bad_words_do_not_appear_at_the_start_or_behind_a_space(server: Server) -> None:
    free = complete(server, max_tokens=12)["choices"][0]["text"]
    assert "Rome" in free
    bound = complete(server, max_tokens=12, bad_words=["Rome", "Paris"])["choices"][0]["text"]
    assert "Rome" not in bound
    assert "Paris" not in bound


def test_only_allowed_token_ids_are_drawn(server: Server) -> None:
    allowed = ids_of(server, " red green blue")
    text = complete(server, max_tokens=8, temperature=1.5, allowed_token_ids=allowed)["choices"][0]["text"]
    assert set(text.split()) <= {"red", "green", "blue"}
    assert text


def test_the_scores_of_one_reply_are_bounded(server: Server) -> None:
    body = {"prompt": ["word " * 1500] * 40, "prompt_logprobs": 20, "max_tokens": 1}
    reply = requests.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert "1048576" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids[0]"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
def test_what_is_out_of_bounds_is_a_400(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = requests.post(f"{server.url}/v1/completions", json={"prompt": "x", **fields}, timeout=30)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
