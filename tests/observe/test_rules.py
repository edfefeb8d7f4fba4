"""The rules in deploy/ speak only of metrics that the server has."""

from __future__ import annotations

import re
from pathlib import Path

from vserve.observe.metrics import EngineNow, EngineSeries, Metrics

RULES = Path(__file__).resolve().parents[2] / "deploy" / "prometheus" / "rules.yml"


def test_every_metric_of_the_rules_is_exposed_or_recorded() -> None:
    metrics = Metrics()
    metrics.serve(EngineSeries("m", 10, lambda: EngineNow(0, 0, 0, 0.0, 0.0, 0, 0, 0, 0, 0, 0)))
    metrics.refused("overloaded")
    exposed = set(re.findall(r"^([a-z_:0-9]+)[ {]", metrics.render(metrics.snapshot()).decode(), re.MULTILINE))
    text = RULES.read_text()
    recorded = set(re.findall(r"record: (\S+)", text))
    used = set(re.findall(r"\b(?:vllm|vserve)[:_][a-z_:0-9]+", text))
    assert used
    assert used - recorded <= exposed
