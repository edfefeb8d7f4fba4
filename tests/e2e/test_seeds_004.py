"""The snippets of the users' second document, nearly as they stand there: host, port and types apart.

What they print is returned or checked instead.  Those about /debug are tested with it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
import requests
from openai import AsyncOpenAI, OpenAI

from tests.e2e.process import EMBEDDER, NAMES, Server

MODEL = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture
def client(both: Server) -> OpenAI:
    return OpenAI(base_url=f"{both.url}/v1", api_key="token-abc123")


@pytest.mark.parametrize(
    "text",
    [
        "你好世界",
        "人工智能是计算机科学的一个分支,致力于创建能够模拟人类智能的系统。",
        "Hello 世界! This is a test of tokenization.",
        "def fibonacci(n: int) -> list[int]:",
        "2024年12月31日,温度-5.6°C,占比99.9%",
        "🎉🚀💡\n\t<|im_start|>system<|im_end|>",
    ],
)
def test_tokenize_demo(both: Server, text: str) -> None:
    response = requests.post(f"{both.url}/v1/tokenize", json={"model": "Qwen/Qwen2.5-7B-Instruct", "text": text})
    result = response.json()
    assert result["count"] == len(result["tokens"]) > 0
    avg_chars_per_token = len(text) / max(result["count"], 1)
    assert avg_chars_per_token > 0


def test_special_tokens_have_ids_of_their_own(both: Server) -> None:
    for special in ("<|im_start|>", "<|im_end|>"):
        result = requests.post(f"{both.url}/v1/tokenize", json={"model": MODEL, "text": special}).json()
        assert result["count"] == 1


def test_detokenize_demo(both: Server) -> None:
    original = "vLLM 是一个高性能的 LLM 推理引擎"
    r1 = requests.post(f"{both.url}/v1/tokenize", json={"model": "Qwen/Qwen2.5-7B-Instruct", "text": original})
    tokens = r1.json()["tokens"]
    r2 = requests.post(f"{both.url}/v1/detokenize", json={"model": "Qwen/Qwen2.5-7B-Instruct", "tokens": tokens})
    recovered = r2.json()["text"]
    assert recovered == original


class VllmTokenizer:
    """vLLM 远程 Tokenizer 封装"""

    def __init__(self, base_url: str = "http://localhost:8000", model: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self.model = model

    def encode(self, text: str, model: str | None = None) -> list[int]:
        """文本 → Token IDs"""
        resp = requests.post(f"{self.base_url}/v1/tokenize", json={"model": model or self.model, "text": text})
        ids: list[int] = resp.json()["tokens"]
        return ids

    def decode(self, tokens: list[int], model: str | None = None) -> str:
        """Token IDs → 文本"""
        resp = requests.post(f"{self.base_url}/v1/detokenize", json={"model": model or self.model, "tokens": tokens})
        text: str = resp.json()["text"]
        return text

    def count_tokens(self, text: str, model: str | None = None) -> int:
        """计算文本的 token 数量"""
        return len(self.encode(text, model))

    def estimate_cost(self, text: str, price_per_1m: float = 0.6) -> float:
        """估算输入成本(美元/百万token)"""
        n_tokens = self.count_tokens(text)
        return n_tokens / 1_000_000 * price_per_1m

    def check_length_limit(self, text: str, max_tokens: int = 8192) -> tuple[bool, int, float]:
        """检查是否超长"""
        n = self.count_tokens(text)
        ratio = n / max_tokens
        ok = n <= max_tokens
        return ok, n, ratio

    def truncate_to_fit(self, text: str, max_tokens: int, reserve_for_response: int = 512) -> str:
        """智能截断:保留前部内容,为回复预留空间"""
        budget = max_tokens - reserve_for_response
        tokens = self.encode(text)
        if len(tokens) <= budget:
            return text
        kept_tokens = tokens[:budget]
        return self.decode(kept_tokens)


LONG_TEXT = """
    人工智能(Artificial Intelligence,简称AI)是计算机科学的一个分支,
    致力于创建能够执行通常需要人类智能的任务的系统。这些任务包括:
    学习(获取信息和使用信息的规则)、推理(使用规则得出近似或确定的结论)、
    自我纠错。从1956年达特茅斯会议首次提出"人工智能"概念以来,
    AI经历了多次寒冬与繁荣。特别是2017年Transformer架构的提出和2022年
    ChatGPT的发布,将AI推向了新的高度。大语言模型(LLM)展现出了
    令人惊叹的语言理解、生成和推理能力。
    """.strip()


@pytest.mark.parametrize("model", [MODEL, None])
def test_tokenizer_toolkit_demo(both: Server, model: str | None) -> None:
    tk = VllmTokenizer(both.url, model=model)
    n_tokens = tk.count_tokens(LONG_TEXT)
    assert n_tokens > 128
    ok, n, ratio = tk.check_length_limit(LONG_TEXT, max_tokens=256)
    assert (ok, n, ratio) == (n_tokens <= 256, n_tokens, n_tokens / 256)
    assert tk.estimate_cost(LONG_TEXT, price_per_1m=0.6) == n_tokens / 1_000_000 * 0.6
    truncated = tk.truncate_to_fit(LONG_TEXT, max_tokens=128, reserve_for_response=32)
    kept = truncated.rstrip("�")  # the last character may be cut
    assert LONG_TEXT.startswith(kept)
    assert 0 < len(kept) < len(LONG_TEXT)
    assert tk.truncate_to_fit("short", max_tokens=128, reserve_for_response=32) == "short"
    paragraphs = [
        "PagedAttention 是 vLLM 的核心创新。",
        "Continuous Batching 解决了 Static Batching 的三大缺陷。",
        "Scheduler 使用三态机管理请求生命周期。",
    ]
    counts = [tk.count_tokens(p) for p in paragraphs]
    assert min(counts) > 0


def test_models_api_demo(client: OpenAI) -> None:
    response = client.models.list()
    assert [model.id for model in response.data] == [*NAMES, EMBEDDER]
    for model in response.data:
        assert model.object == "model"
        assert model.owned_by


def test_health_check_demo(both: Server) -> None:
    checks = {
        "GET /health": lambda: requests.get(f"{both.url}/health"),
        "GET /health/ready": lambda: requests.get(f"{both.url}/health/ready"),
        "GET /version": lambda: requests.get(f"{both.url}/version"),
        "GET /v1/models": lambda: requests.get(f"{both.url}/v1/models"),
    }
    for name, fn in checks.items():
        resp = fn()
        assert resp.status_code == 200, name
        assert resp.elapsed.total_seconds() > 0


HEALTH_SCRIPT = '''#!/usr/bin/env python3
"""vLLM 生产级健康检查脚本"""

import sys
import time
import requests
from dataclasses import dataclass
from openai import OpenAI

@dataclass
class HealthConfig:
    url: str = "http://localhost:8000"
    timeout: float = 5.0
    max_latency_ms: float = 1000.0
    min_free_blocks_ratio: float = 0.05

def check_vllm_health(config: HealthConfig = None) -> dict:
    """全面健康检查"""
    config = config or HealthConfig()
    results = {"overall": False, "checks": {}}

    # 1. 基础连通性
    try:
        r = requests.get(f"{config.url}/health", timeout=config.timeout)
        results["checks"]["connectivity"] = {
            "ok": r.status_code == 200,
            "latency_ms": r.elapsed.total_seconds() * 1000
        }
    except Exception as e:
        results["checks"]["connectivity"] = {"ok": False, "error": str(e)}
        return results

    # 2. 就绪状态
    try:
        r = requests.get(f"{config.url}/health/ready", timeout=config.timeout)
        results["checks"]["readiness"] = {"ok": r.status_code == 200}
    except:
        results["checks"]["readiness"] = {"ok": False}

    # 3. 响应延迟测试
    try:
        client = OpenAI(base_url=f"{config.url}/v1", api_key="health-check")
        start = time.time()
        r = client.completions.create(
            model="dummy",
            prompt="Hi",
            max_tokens=1,
            temperature=0
        )
        latency = (time.time() - start) * 1000
        results["checks"]["inference_latency"] = {
            "ok": latency < config.max_latency_ms,
            "latency_ms": latency
        }
    except Exception as e:
        results["checks"]["inference_latency"] = {"ok": False, "error": str(e)}

    results["overall"] = all(c.get("ok", False) for c in results["checks"].values())
    return results


if __name__ == "__main__":
    results = check_vllm_health(HealthConfig(url=sys.argv[1], max_latency_ms=float(sys.argv[2])))

    for name, check in results["checks"].items():
        status = "✅" if check.get("ok") else "❌"
        detail = ""
        if "latency_ms" in check:
            detail = f" ({check['latency_ms']:.0f}ms)"
        elif "error" in check:
            detail = f" ({check['error']})"
        print(f"  [{status}] {name}{detail}")

    sys.exit(0 if results["overall"] else 1)
'''


def checked(tmp_path: Path, url: str, max_latency_ms: float) -> tuple[int, str]:
    script = tmp_path / "health.py"
    script.write_text(HEALTH_SCRIPT)
    command = [sys.executable, str(script), url, str(max_latency_ms)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_the_health_script_ends_with_0_where_all_is_well(both: Server, tmp_path: Path) -> None:
    code, said = checked(tmp_path, both.url, 60_000)  # the tests' machine may be busy
    assert code == 0, said
    assert said.count("✅") == 3


def test_the_health_script_ends_with_1_where_something_is_not(both: Server, server: Server, tmp_path: Path) -> None:
    code, said = checked(tmp_path, both.url, 0.0)
    assert code == 1
    assert said.count("✅") == 2
    code, said = checked(tmp_path, server.url, 60_000)  # which serves no model of the name "dummy"
    assert code == 1
    assert "404" in said
    assert "dummy" in said
    assert checked(tmp_path, "http://127.0.0.1:9", 60_000)[0] == 1


@dataclass
class RequestMetrics:
    """请求指标"""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    total_tokens: int = 0
    latency_s: float = 0.0
    success: bool = True
    error: str | None = None


class VllmApiClient:
    """vLLM 全功能 API 客户端"""

    def __init__(
        self, base_url: str, api_key: str = "empty", embed_url: str | None = None, embed_model: str | None = None
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.api_key = api_key
        self.chat_client = OpenAI(base_url=f"{base_url}/v1", api_key=api_key)
        self.async_chat_client = AsyncOpenAI(base_url=f"{base_url}/v1", api_key=api_key)
        self.embed_url = (embed_url or base_url).rstrip("/")
        self.embed_client = OpenAI(base_url=f"{embed_url}/v1", api_key=api_key)
        self.async_embed_client = AsyncOpenAI(base_url=f"{embed_url}/v1", api_key=api_key)
        self.embed_model = embed_model

    def health_check(self) -> bool:
        """快速健康检查"""
        r = requests.get(f"{self.base_url}/health", timeout=3)
        return r.status_code == 200

    def list_models(self) -> list[str]:
        """列出可用模型"""
        response = self.chat_client.models.list()
        return [m.id for m in response.data]

    def get_version(self) -> str:
        """获取 vLLM 版本"""
        r = requests.get(f"{self.base_url}/version", timeout=3)
        return str(r.json().get("version", "unknown"))

    def chat(self, messages: list[Any], **kwargs: Any) -> str:
        """同步 Chat Completions"""
        response = self.chat_client.chat.completions.create(model=kwargs.pop("model", ""), messages=messages, **kwargs)
        return str(response.choices[0].message.content)

    def chat_stream(self, messages: list[Any], **kwargs: Any) -> Iterator[str]:
        """流式 Chat Completions(同步包装器)"""
        stream = self.chat_client.chat.completions.create(
            model=kwargs.pop("model", ""), messages=messages, stream=True, **kwargs
        )
        for chunk in stream:
            delta = chunk.choices[0].delta.content
            if delta:
                yield delta

    async def async_chat_stream(self, messages: list[Any], **kwargs: Any) -> AsyncIterator[str]:
        """异步流式 Chat Completions"""
        stream = await self.async_chat_client.chat.completions.create(
            model=kwargs.pop("model", ""), messages=messages, stream=True, **kwargs
        )
        async for chunk in stream:
            delta = chunk.choices[0].delta.content
            if delta:
                yield delta

    def complete(self, prompt: str, **kwargs: Any) -> Generator[Any, None, Any]:
        """Completions API + 指标"""
        start = time.time()
        ttft = None
        stream = kwargs.pop("stream", False)
        if stream:
            full_text = []
            for chunk in self.chat_client.completions.create(
                model=kwargs.pop("model", ""), prompt=prompt, stream=True, **kwargs
            ):
                if not ttft:
                    ttft = time.time() - start
                text = chunk.choices[0].text
                if text:
                    full_text.append(text)
                    yield text
            elapsed = time.time() - start
            n_tokens = len(full_text)
            tpot = ((elapsed - ttft) / max(n_tokens - 1, 1) * 1000) if ttft and n_tokens > 1 else 0
            yield RequestMetrics(
                ttft_ms=ttft * 1000 if ttft else 0, tpot_ms=tpot, total_tokens=n_tokens, latency_s=elapsed
            )
            return None
        response = self.chat_client.completions.create(model=kwargs.pop("model", ""), prompt=prompt, **kwargs)
        elapsed = time.time() - start
        return response.choices[0].text, RequestMetrics(
            total_tokens=response.usage.completion_tokens, latency_s=elapsed
        )

    def embed(self, texts: list[str], batch_size: int = 64) -> list[np.ndarray]:
        """批量 Embedding"""
        all_embeddings = []
        for i in range(0, len(texts), batch_size):
            batch = texts[i : i + batch_size]
            response = self.embed_client.embeddings.create(model=self.embed_model or "", input=batch)
            batch_embs = [np.array(e.embedding) for e in response.data]
            all_embeddings.extend(batch_embs)
        return all_embeddings

    async def async_embed(self, texts: list[str], batch_size: int = 64) -> np.ndarray:
        """异步批量 Embedding"""
        all_embeddings = []
        for i in range(0, len(texts), batch_size):
            batch = texts[i : i + batch_size]
            response = await self.async_embed_client.embeddings.create(model=self.embed_model or "", input=batch)
            batch_embs = [np.array(e.embedding) for e in response.data]
            all_embeddings.extend(batch_embs)
        return np.array(all_embeddings)

    def tokenize(self, text: str) -> list[int]:
        """Tokenize"""
        r = requests.post(f"{self.base_url}/v1/tokenize", json={"model": "", "text": text})
        ids: list[int] = r.json()["tokens"]
        return ids

    def detokenize(self, tokens: list[int]) -> str:
        """Detokenize"""
        r = requests.post(f"{self.base_url}/v1/detokenize", json={"model": "", "tokens": tokens})
        return str(r.json()["text"])

    def count_tokens(self, text: str) -> int:
        """计算 token 数量"""
        return len(self.tokenize(text))


@pytest.fixture
def unified(both: Server) -> VllmApiClient:
    return VllmApiClient(base_url=both.url, embed_url=both.url, embed_model="BAAI/bge-m3")


def returned(generator: Generator[Any, None, Any]) -> Any:
    """What a generator returns that yields nothing: the document's complete() is one whenever it does not stream."""
    with pytest.raises(StopIteration) as end:
        next(generator)
    return end.value.value


def test_unified_client_demo(unified: VllmApiClient) -> None:
    assert unified.health_check()
    assert unified.get_version() != "unknown"
    assert unified.list_models() == [*NAMES, EMBEDDER]
    reply = unified.chat(
        [{"role": "user", "content": "用一句话解释 PagedAttention"}], model="", max_tokens=24, temperature=0.3
    )
    assert reply
    result, metrics = returned(unified.complete("快速排序算法的时间复杂度是:", model="", max_tokens=16, temperature=0))
    assert result.strip()
    assert 1 <= metrics.total_tokens <= 16
    text = "Continuous Batching 动态调度机制"
    assert unified.count_tokens(text) > 4
    assert unified.detokenize(unified.tokenize(text)) == text
    embeddings = unified.embed(["vLLM 推理引擎", "PagedAttention 内存管理"])
    norms = np.linalg.norm(embeddings[0]) * np.linalg.norm(embeddings[1])
    assert -1 <= np.dot(embeddings[0], embeddings[1]) / norms < 1


def test_the_clients_streams_say_what_it_gets_whole(unified: VllmApiClient) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": "Name the capital of France."}]
    whole = unified.chat(messages, **asked)
    assert "".join(unified.chat_stream(messages, **asked)) == whole

    async def streamed() -> tuple[str, np.ndarray]:
        said = [delta async for delta in unified.async_chat_stream(messages, **asked)]
        return "".join(said), await unified.async_embed(["a", "b", "c"], batch_size=2)

    said, vectors = asyncio.run(streamed())
    assert said == whole
    assert np.allclose(vectors, np.array(unified.embed(["a", "b", "c"])), atol=1e-5)
    *parts, metrics = unified.complete("The sun is", stream=True, **asked)
    text, _ = returned(unified.complete("The sun is", **asked))
    assert "".join(parts) == text
    assert metrics.total_tokens == len(parts)
    assert metrics.latency_s * 1000 >= metrics.ttft_ms > 0


def test_many_streams_at_once_with_aiohttp(both: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Name the capital of France."}], "max_tokens": 12}

    async def stream(session: aiohttp.ClientSession) -> str:
        said = []
        sent = {**body, "temperature": 0, "stream": True}
        async with session.post(f"{both.url}/v1/chat/completions", json=sent) as reply:
            assert reply.status == 200
            async for line in reply.content:
                if line.startswith(b"data: {"):
                    said.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
        return "".join(said)

    async def many() -> list[str]:
        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(stream(session) for _ in range(6)))

    said = asyncio.run(many())
    assert len(set(said)) == 1
    assert "Paris" in said[0]


def test_a_model_that_is_not_served_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.completions.create(model="nobody", prompt="Hi", max_tokens=1)
