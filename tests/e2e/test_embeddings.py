"""Real clients of embeddings against the real server, beside the default model and alone."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import requests
from sentence_transformers import SentenceTransformer

from tests.e2e.process import EMBEDDER as NAME
from tests.e2e.process import MINILM, Server, serving

TEXTS = ["vLLM 推理引擎", "PagedAttention 内存管理", "a", "", "The capital of France is Paris. " * 8, "naïve 🙂"]


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    made: np.ndarray = SentenceTransformer(str(MINILM), device="cpu").encode(TEXTS)
    return made


class EmbedClient:
    """The user's own client, its embedding half."""

    def __init__(self, embed_url: str, embed_model: str | None) -> None:
        self.embed_client = openai.OpenAI(base_url=f"{embed_url}/v1", api_key="empty")
        self.async_embed_client = openai.AsyncOpenAI(base_url=f"{embed_url}/v1", api_key="empty")
        self.embed_model = embed_model

    def embed(self, texts: list[str], batch_size: int = 64) -> list[np.ndarray]:
        all_embeddings = []
        for i in range(0, len(texts), batch_size):
            batch = texts[i : i + batch_size]
            response = self.embed_client.embeddings.create(model=self.embed_model or "", input=batch)
            all_embeddings.extend([np.array(e.embedding) for e in response.data])
        return all_embeddings

    async def async_embed(self, texts: list[str], batch_size: int = 64) -> np.ndarray:
        all_embeddings = []
        for i in range(0, len(texts), batch_size):
            batch = texts[i : i + batch_size]
            response = await self.async_embed_client.embeddings.create(model=self.embed_model or "", input=batch)
            all_embeddings.extend([np.array(e.embedding) for e in response.data])
        return np.array(all_embeddings)


def cosine_gap(ours: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(1 - (ours * wanted).sum(1) / np.linalg.norm(ours, axis=1)).max())


@pytest.mark.parametrize("model", [NAME, None])
def test_the_users_client_gets_the_vectors_of_sentence_transformers(
    both: Server, wanted: np.ndarray, model: str | None
) -> None:
    client = EmbedClient(both.url, model)
    assert cosine_gap(np.array(client.embed(TEXTS, batch_size=4)), wanted) < 1e-5
    assert cosine_gap(asyncio.run(client.async_embed(TEXTS, batch_size=4)), wanted) < 1e-5


def test_the_openai_client_asks_for_numbers_too(both: Server, wanted: np.ndarray) -> None:
    client = openai.OpenAI(base_url=f"{both.url}/v1", api_key="unused", max_retries=0)
    reply = client.embeddings.create(model=NAME, input=TEXTS, encoding_format="float")
    assert cosine_gap(np.array([entry.embedding for entry in reply.data]), wanted) < 1e-5
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > len(TEXTS)
    assert reply.model == NAME
    with pytest.raises(openai.BadRequestError, match="384"):
        client.embeddings.create(model=NAME, input="a", dimensions=100)
    assert [model.id for model in client.models.list().data][-1:] == [NAME]


def test_generation_and_embeddings_run_side_by_side(both: Server, wanted: np.ndarray) -> None:
    client = openai.OpenAI(base_url=f"{both.url}/v1", api_key="unused", max_retries=0)
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]

    def chat(_: int) -> str:
        reply = client.chat.completions.create(model="", messages=question, temperature=0, max_tokens=8)
        return reply.choices[0].message.content or ""

    def embed(_: int) -> float:
        reply = client.embeddings.create(model=NAME, input=TEXTS)
        return cosine_gap(np.array([entry.embedding for entry in reply.data]), wanted)

    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(chat, range(3))
        gaps = pool.map(embed, range(12))
        assert all("Paris" in answer for answer in answers)
        assert max(gaps) < 1e-5


def test_a_server_may_have_an_embedding_model_alone(wanted: np.ndarray) -> None:
    with serving(str(MINILM), "--served-embedding-model-name", NAME) as server:
        assert cosine_gap(np.array(EmbedClient(server.url, NAME).embed(TEXTS)), wanted) < 1e-5
        ranked = requests.post(
            server.url + "/rerank", json={"query": "capital of France", "documents": ["banana", "Paris"]}, timeout=30
        ).json()
        assert [entry["index"] for entry in ranked["results"]] == [1, 0]
        chat = requests.post(
            server.url + "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]}, timeout=30
        )
        assert chat.status_code == 404
        assert requests.get(server.url + "/health", timeout=30).status_code == 200
        assert server.terminate() == 0
