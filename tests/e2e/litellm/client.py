"""LiteLLM against the server at the URL given: what it got, as JSON.  Runs in an environment of its own."""

from __future__ import annotations

import asyncio
import json
import sys

import litellm

MODEL, EMBEDDER = "openai/gpt-3.5-turbo", "openai/BAAI/bge-m3"
ASKED = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "What is the capital of France? Answer with one word."}],
    "temperature": 0,
    "max_tokens": 8,
}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


def main(url: str) -> dict[str, object]:
    at = {"api_base": f"{url}/v1", "api_key": "unused", "num_retries": 0}
    whole = litellm.completion(**ASKED, **at)
    chunks = list(litellm.completion(**ASKED, **at, stream=True))
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
    called = litellm.completion(
        **{**ASKED, "max_tokens": 100},
        **at,
        tools=tools,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )
    vectors = litellm.embedding(model=EMBEDDER, input=["a", "b"], **at)
    response = litellm.responses(model=MODEL, input=ASKED["messages"][0]["content"], temperature=0, **at)
    later = asyncio.run(litellm.acompletion(**ASKED, **at))
    try:
        litellm.completion(**{**ASKED, "temperature": 9}, **at)
    except litellm.BadRequestError as error:
        refused = str(error)
    return {
        "text": whole.choices[0].message.content,
        "finish": whole.choices[0].finish_reason,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "later": later.choices[0].message.content,
        "call": json.loads(called.choices[0].message.tool_calls[0].function.arguments),
        "sizes": [len(entry["embedding"]) for entry in vectors.data],
        "response": "".join(part.text for item in response.output for part in item.content),
        "refused": refused,
    }


if __name__ == "__main__":
    litellm.telemetry = False
    print(json.dumps(main(sys.argv[1])))
