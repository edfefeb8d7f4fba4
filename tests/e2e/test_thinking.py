"""Reasoning, its budget and calls of a model made of noise: whatever it would say, the grammar has the last word."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import openai
import pytest
import requests
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from tests.e2e.process import Server, serving

SPECIAL = ("<|bos|>", "<|eos|>", "[TOOL_CALLS]", "[ARGS]")
TEMPLATE = """{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls }}{% endif %}
{%- endfor %}[assistant]<think>
"""
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 9}},
    "required": ["n", "s"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
HI: Any = [{"role": "user", "content": "hi"}]
BUDGET = 20


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model is random weights; its letters are bytes, its marks tokens."""
    folder: Path = tmp_path_factory.mktemp("noise")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    core.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    core.save(str(folder / "tokenizer.json"))
    words = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": core.get_vocab_size(),
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 256,
        "eos_token_id": 257, "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "float32",
        "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    with serving("--model", str(folder), "--load-format", "dummy", "--device", "cpu") as running:
        yield running


@pytest.fixture
def client(noise: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{noise.url}/v1", api_key="unused", max_retries=0)


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_closes_the_reasoning(client: openai.OpenAI, seed: int) -> None:
    reply = client.chat.completions.create(
        model="", messages=HI, seed=seed, max_tokens=100, extra_body={"thinking_token_budget": BUDGET}
    )
    message: Any = reply.choices[0].message
    assert message.reasoning
    assert message.reasoning == message.reasoning_content
    assert reply.usage is not None
    assert reply.usage.completion_tokens_details is not None
    assert (reply.usage.completion_tokens_details.reasoning_tokens or 0) <= BUDGET
    if reply.choices[0].finish_reason == "length":  # noise goes on: behind the reasoning then
        assert message.content


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_are_valid_behind_bounded_reasoning(client: openai.OpenAI, seed: int, stream: bool) -> None:
    fields: Any = {
        "model": "", "messages": HI, "tools": TOOLS, "tool_choice": "required", "seed": seed, "max_tokens": 1500,
        "parallel_tool_calls": False, "extra_body": {"thinking_token_budget": BUDGET},
    }  # fmt: skip
    if stream:
        with client.chat.completions.stream(**fields) as events:
            choice: Any = events.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert len(call.id) == 9
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    assert not choice.message.content


@pytest.mark.parametrize("seed", range(3))
def test_what_begins_as_a_call_to_a_strict_function_ends_as_a_valid_one(client: openai.OpenAI, seed: int) -> None:
    strict: Any = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    begins = 256 + SPECIAL.index("[TOOL_CALLS]")
    reply = client.chat.completions.create(
        model="",
        messages=HI,
        tools=strict,
        parallel_tool_calls=False,
        seed=seed,
        max_tokens=1500,
        logit_bias={str(begins): 100},
        extra_body={"thinking_token_budget": 0},
    )
    (call,) = reply.choices[0].message.tool_calls or []
    assert call.type == "function"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_a_format_of_the_answer_begins_behind_the_reasoning(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="",
        messages=HI,
        max_tokens=1500,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        extra_body={"thinking_token_budget": 0},
    )
    message: Any = reply.choices[0].message
    assert message.reasoning is None
    jsonschema.validate(json.loads(message.content or ""), SCHEMA)


def test_without_a_budget_noise_never_ends_its_reasoning_and_all_of_it_is_reasoning(noise: Server) -> None:
    body = {"messages": HI, "max_tokens": 50, "temperature": 0, "include_reasoning": False}
    reply = requests.post(f"{noise.url}/v1/chat/completions", json=body, timeout=60).json()
    message = reply["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (None, "")
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
