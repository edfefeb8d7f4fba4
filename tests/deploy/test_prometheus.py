"""A real Prometheus scrapes the real server: its rules load, and every query of rules and dashboard means something."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import yaml

from tests.deploy.test_nginx import free_port
from tests.e2e.process import ROOT, Server

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboard.json"
VARIABLES = {"$__rate_interval": "1m", "$__interval": "15s", "$__range": "1h"}
PATIENCE_S = 60.0


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._pause = threading.Event()

    def get(self, path: str, **parameters: str) -> Any:
        """The data of one API call."""
        reply = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert reply["status"] == "success", reply
        return reply["data"]

    def value(self, query: str) -> float | None:
        """The one sample of an instant query, None while there is none."""
        found = self.get("query", query=query)["result"]
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    def until(self, what: Callable[[], bool]) -> None:
        """Wait for something that a scrape will bring."""
        give_up = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < give_up, "no scrape brought it"
            self._pause.wait(0.1)

    def up(self) -> bool:
        """Whether it answers yet."""
        try:
            return requests.get(f"{self.url}/-/ready", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus, scraping the server every second, with our rules."""
    folder = tmp_path_factory.mktemp("prometheus")
    rules = folder / "rules.yml"
    rules.write_text(RULES.read_text().replace("interval: 15s", "interval: 1s"))
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(rules)],
                "scrape_configs": [
                    {"job_name": "vserve", "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}]}
                ],
            }
        )
    )
    program = shutil.which("prometheus")
    assert program is not None
    port = free_port()
    process = subprocess.Popen(
        [
            program,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        ]
    )
    try:
        running = Prometheus(f"http://127.0.0.1:{port}")
        running.until(running.up)
        yield running
    finally:
        process.terminate()
        process.wait(30)


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_promtool_finds_nothing_wrong_with_the_metrics(server: Server) -> None:
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    # It may advise against names that are vLLM's or the users': colons, "total" in a gauge; never an error.
    assert done.returncode in (0, 3), done.stdout + done.stderr
    assert "error while linting" not in done.stderr


def test_what_the_server_did_is_what_prometheus_has(prometheus: Prometheus, server: Server) -> None:
    query = "sum(vllm:generation_tokens_total)"
    prometheus.until(lambda: prometheus.value(query) is not None)
    before = prometheus.value(query)
    assert before is not None
    chat = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 7, "ignore_eos": True}
    for _ in range(3):
        assert requests.post(f"{server.url}/v1/chat/completions", json=chat, timeout=60).status_code == 200
    prometheus.until(lambda: prometheus.value(query) == before + 21)
    assert prometheus.value("up") == 1
    assert prometheus.value("vllm_pending_requests") == 0
    assert prometheus.value("vllm_kv_cache_usage_ratio") == 0
    for name in ("vllm_request_duration_seconds", "vllm:time_to_first_token_seconds"):
        assert (prometheus.value(f"sum({name}_count)") or 0) >= 3


def test_the_rules_are_loaded_and_evaluate(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    written = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len(rules()) == len(written)
    prometheus.until(lambda: all(rule["health"] == "ok" for rule in rules()))
    # Nothing is wrong with an idle server.
    assert [rule["name"] for rule in rules() if rule["type"] == "alerting" and rule["state"] == "firing"] == []


def names_of(query: str) -> set[str]:
    """The metrics a query reads."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|without|ignoring|group_left)\s*\([^)]*\)', " ", query)
    return {name for name in re.findall(r"[a-zA-Z_][\w:]*", bare) if ":" in name or "_" in name} - {
        "histogram_quantile",
        "sum_over_time",
        "avg_over_time",
        "max_over_time",
        "label_replace",
        "count_over_time",
    }


def queries() -> list[str]:
    """Every query of the dashboard and of the rules."""
    found: list[str] = [
        rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    stack: list[object] = [json.loads(DASHBOARD.read_text())]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            found += [item["expr"]] if isinstance(item.get("expr"), str) else []
            stack += item.values()
        elif isinstance(item, list):
            stack += item
    for name, value in VARIABLES.items():
        found = [query.replace(name, value) for query in found]
    return [re.sub(r"\$\{?\w+\}?", ".*", query) for query in found]


def test_every_query_of_rules_and_dashboard_reads_metrics_that_are_there(prometheus: Prometheus) -> None:
    prometheus.until(lambda: prometheus.value("sum(vllm:generation_tokens_total)") is not None)
    recorded = {
        rule["record"]
        for group in yaml.safe_load(RULES.read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    asked = queries()
    assert len(asked) > 30
    there = set(prometheus.get("label/__name__/values"))
    for query in asked:
        prometheus.get("query", query=query)  # parses and runs
        missing = {name for name in names_of(query) if name not in there and name not in recorded}
        # A counter with a label that has not happened yet has no series: its family must be in the server's text.
        assert not {name for name in missing if not family_is_known(name)}, query


def family_is_known(name: str) -> bool:
    """Whether the server's own tables have the family."""
    source = "".join(file.read_text() for file in (ROOT / "vserve" / "observe").glob("*.py"))
    return re.sub(r"_(total|bucket|sum|count)$", "", name) in source
