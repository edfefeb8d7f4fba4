"""langchain-openai against the real server: chat, streams, tools, structured output, embeddings."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pydantic
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.e2e.process import EMBEDDER, NAMES, Server

QUESTION = "What is the capital of France? Answer with one word."


def chat(server: Server, **fields: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"model": NAMES[1], "temperature": 0, "max_tokens": 60, "max_retries": 0, **fields}
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="unused", **settings)


def test_it_chats_and_streams_the_same(both: Server) -> None:
    model = chat(both, max_tokens=8)
    whole = model.invoke(QUESTION)
    assert "Paris" in str(whole.content)
    assert whole.usage_metadata is not None
    assert "".join(str(chunk.content) for chunk in model.stream(QUESTION)) == whole.content

    async def many() -> list[str]:
        return [str(message.content) for message in await model.abatch([QUESTION] * 4)]

    assert asyncio.run(many()) == [whole.content] * 4


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"It is 31 degrees celsius in {city}."


def test_it_calls_tools_and_goes_on_with_what_they_say(both: Server) -> None:
    model = chat(both)
    asked = HumanMessage("What is the weather in Paris?")
    choice = {"type": "function", "function": {"name": "get_weather"}}
    call = model.bind_tools([get_weather], tool_choice=choice, strict=True).invoke([asked]).tool_calls[0]
    assert call["name"] == "get_weather"
    assert set(call["args"]) == {"city"}
    said = AIMessage("", tool_calls=[call])
    answer = model.invoke([asked, said, ToolMessage("It is 31 degrees celsius.", tool_call_id=call["id"])])
    assert "31" in str(answer.content)


class City(pydantic.BaseModel):
    """A city."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=20)
    inhabitants: int = pydantic.Field(ge=0, le=10**8)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_its_structured_output_is_an_object_of_the_class(both: Server, method: Any) -> None:
    made = chat(both).with_structured_output(City, method=method).invoke("Describe Paris as JSON.")
    assert isinstance(made, City)


def test_it_speaks_responses_too(both: Server) -> None:
    model = chat(both, use_responses_api=True, max_tokens=16)
    whole = model.invoke(QUESTION)
    assert "Paris" in str(whole.text)
    assert "".join(str(chunk.text) for chunk in model.stream(QUESTION)) == str(whole.text)


def test_it_embeds(both: Server) -> None:
    # Unless told not to check the context's length it sends ids of OpenAI's own vocabulary.
    made = OpenAIEmbeddings(
        model=EMBEDDER, base_url=f"{both.url}/v1", api_key="unused", check_embedding_ctx_length=False, max_retries=0
    )
    vectors = np.array(made.embed_documents(["Paris", "a banana"]))
    query = np.array(made.embed_query("the capital of France"))
    assert vectors.shape == (2, 384)
    assert vectors[0] @ query > vectors[1] @ query
