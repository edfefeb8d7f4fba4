"""The rules and the dashboard in deploy/ speak only of metrics that the server has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vserve.observe.engine_series import EngineNow, EngineSeries
from vserve.observe.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@pytest.mark.parametrize("file", ["prometheus/rules.yml", "grafana/dashboard.json"])
def test_every_metric_in_use_is_exposed_or_recorded(file: str) -> None:
    metrics = Metrics()
    metrics.serve(EngineSeries("m", 10, lambda: EngineNow(0, 0, 0, 0.0, 0.0, 0, 0, 0, 0, 0, 0)))
    metrics.refused("overloaded")
    metrics.exchange("ping", "GET", 200, 0.0)
    exposed = set(re.findall(r"^([a-z_:0-9]+)[ {]", metrics.render(metrics.snapshot()).decode(), re.MULTILINE))
    text = (DEPLOY / file).read_text()
    recorded = set(re.findall(r"record: (\S+)", text))
    used = set(re.findall(r"\b(?:(?:vllm|vserve)[:_]|http_|process_)[a-z_:0-9]+", text))
    assert used
    assert used - recorded <= exposed
