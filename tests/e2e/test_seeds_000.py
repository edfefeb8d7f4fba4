"""The snippets of the users' first document, nearly as they stand there: host, port and model apart.

Those about /docs, /redoc, probes of Kubernetes and dashboards are tested where those are.
"""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.process import ROOT, Server, environment

MODEL = "gpt-3.5-turbo"


def test_a_request_of_completions(both: Server) -> None:
    response = requests.post(
        f"{both.url}/v1/completions",
        json={"model": "gpt-3.5-turbo", "prompt": "Once upon a time", "max_tokens": 50, "temperature": 0.7},
    )
    said = response.json()
    assert response.status_code == 200
    assert said["model"] == MODEL
    assert said["choices"][0]["text"]
    assert 1 <= said["usage"]["completion_tokens"] <= 50


TURNS = [
    {"role": "system", "content": "你是一个专业的AI助手"},
    {"role": "user", "content": "如何优化Python代码性能?"},
]


def test_a_conversation_of_several_turns(both: Server) -> None:
    body = {"model": "gpt-3.5-turbo", "messages": TURNS, "temperature": 0.7, "max_tokens": 12}
    reply = requests.post(f"{both.url}/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["role"] == "assistant"
    assert "x-ignored-params" not in reply.headers


def test_a_stream_read_in_chunks(both: Server) -> None:
    response = requests.post(
        f"{both.url}/v1/chat/completions",
        json={"model": "gpt-3.5-turbo", "messages": TURNS, "stream": True, "max_tokens": 12},
        stream=True,
    )
    printed = []
    for chunk in response.iter_content(chunk_size=None):
        if chunk:
            printed.append(chunk.decode())
    assert len(printed) > 1  # it came bit by bit
    assert "".join(printed).endswith("data: [DONE]\n\n")


def test_an_answer_that_is_fetched_later(both: Server) -> None:
    # 启动异步任务
    start_resp = requests.post(f"{both.url}/v1/responses", json={"prompt": "长文本生成...", "max_output_tokens": 24})
    response_id = start_resp.json()["id"]
    assert start_resp.json()["status"] in ("queued", "in_progress")
    # 定期获取结果
    result = start_resp.json()
    while result["status"] in ("queued", "in_progress"):
        result = requests.get(f"{both.url}/v1/responses/{response_id}").json()
    assert result["status"] in ("completed", "incomplete")
    assert result["output"][0]["content"][0]["text"]


def test_what_is_rendered_is_a_page(both: Server) -> None:
    body = {"messages": [{"role": "user", "content": "你好!<script>"}]}
    page = requests.post(f"{both.url}/v1/chat/completions/render", json=body)
    assert page.headers["content-type"].startswith("text/html")
    for part in ('<div class="chat-message">', '<div class="message-user">', '<div class="message-content">你好!&lt;'):
        assert part in page.text
    assert "<script>" not in page.text


def test_tokens_are_counted_and_told_as_text_again(both: Server) -> None:
    response = requests.post(f"{both.url}/tokenize", json={"text": "你好,世界!"})
    token_count = len(response.json()["tokens"])
    assert token_count == response.json()["count"] > 1
    again = requests.post(f"{both.url}/detokenize", json={"token_ids": response.json()["tokens"]}).json()["text"]
    assert again == "你好,世界!"
    detokenized = requests.post(f"{both.url}/detokenize", json={"token_ids": [123, 456, 789]}).json()["text"]
    assert detokenized


def test_prompts_in_one_batch_say_what_they_say_alone(both: Server) -> None:
    prompts = ["prompt1", "prompt2", "prompt3"]
    fixed = {"max_tokens": 10, "temperature": 0}
    batch = requests.post(f"{both.url}/v1/completions", json={"prompt": prompts, **fixed}).json()
    alone = [requests.post(f"{both.url}/v1/completions", json={"prompt": prompt, **fixed}).json() for prompt in prompts]
    assert [choice["text"] for choice in batch["choices"]] == [one["choices"][0]["text"] for one in alone]


@pytest.mark.parametrize(("workers", "status"), [(1, 200), (5, 400)])
def test_workers_are_scaled_by_the_query(both: Server, workers: int, status: int) -> None:
    reply = requests.post(f"{both.url}/scale_elastic_ep?workers={workers}")
    assert reply.status_code == status, reply.text
    assert str(workers) in reply.text
    assert requests.get(f"{both.url}/is_scaling_elastic_ep").json()["is_scaling_elastic_ep"] is False


def test_the_load_has_the_fields_of_the_document(both: Server) -> None:
    load = requests.get(f"{both.url}/load").json()
    assert load["queue_size"] >= 0
    assert load["active_workers"] == 1
    assert 0 <= load["gpu_utilization"] <= 1


def test_the_models_have_the_fields_of_the_document(both: Server) -> None:
    first: dict[str, Any] = requests.get(f"{both.url}/v1/models").json()["data"][0]
    assert first["id"] == "gpt-3.5-turbo"
    assert first["object"] == "model"
    assert isinstance(first["created"], int)
    assert isinstance(first["owned_by"], str)


@pytest.mark.parametrize(
    "name",
    [
        "vllm_request_duration_seconds",
        "vllm_gpu_utilization",
        "vllm_kv_cache_usage_ratio",
        "vllm_pending_requests",
    ],
)
def test_the_figures_that_the_document_watches_are_there(both: Server, name: str) -> None:
    found = {family.name for family in text_string_to_metric_families(requests.get(f"{both.url}/metrics").text)}
    assert name in found


@pytest.mark.parametrize("right", [True, False])
def test_a_deployment_checks_the_version(both: Server, right: bool) -> None:
    script = f"""
DEPLOYED_VERSION=$(curl -s {both.url}/version)
if [ "$DEPLOYED_VERSION" != "$EXPECTED_VERSION" ]; then
echo "Version mismatch!"
exit 1
fi
"""
    version = requests.get(f"{both.url}/version").json()["version"]
    shown = requests.get(f"{both.url}/version", headers={"accept": "*/*"}).text  # curl's own
    assert version in shown
    expected = shown if right else "another"
    done = subprocess.run(
        ["bash", "-c", script], env={**environment(), "EXPECTED_VERSION": expected}, capture_output=True, cwd=ROOT
    )
    assert done.returncode == (0 if right else 1)


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        (b'{"prompt": ', 400, "JSON"),
        (b'{"prompt": "x", "temperature": -1}', 400, "temperature"),
    ],
)
def test_a_bad_request_says_what_is_wrong(both: Server, body: bytes, status: int, named: str) -> None:
    reply = requests.post(f"{both.url}/v1/completions", data=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert named in reply.json()["error"]["message"]
