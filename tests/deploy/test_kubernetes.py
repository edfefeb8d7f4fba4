"""The manifests: valid by Kubernetes' own schemas, and true of the server they start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.e2e.process import ROOT
from vserve import settings
from vserve.config import Config
from vserve.observe.metrics import Metrics

FOLDER = ROOT / "deploy" / "kubernetes"
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "vserve.yaml").read_text()))
BY_KIND = {item["kind"]: item for item in OBJECTS}
POD = BY_KIND["Deployment"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


@pytest.mark.parametrize("item", OBJECTS, ids=lambda item: item["kind"])
def test_a_manifest_is_valid_by_kubernetes_own_schema(item: dict[str, Any]) -> None:
    kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


def test_every_object_selects_the_same_pods() -> None:
    labels = BY_KIND["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert BY_KIND["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert BY_KIND["Service"]["spec"]["selector"] == labels
    assert BY_KIND["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert BY_KIND["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert BY_KIND["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "vserve"


def test_the_probes_ask_routes_that_answer_without_a_key() -> None:
    source = (ROOT / "vserve" / "api" / "routes.py").read_text()
    for probe, path in (("startupProbe", "/startupz"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        assert CONTAINER[probe]["httpGet"] == {"path": path, "port": "http"}
        row = next(line for line in source.splitlines() if f'"{path}"' in line)
        assert "OPEN, Need.NOTHING" in row


def test_the_settings_are_ones_the_server_takes(tmp_path: Path) -> None:
    file = tmp_path / "vserve.toml"
    file.write_text(BY_KIND["ConfigMap"]["data"]["vserve.toml"])
    config = settings.parse([*CONTAINER["args"][1:-1], str(file)], {})
    assert config.exit_on_stall
    # The commented lines are keys too.
    file.write_text(re.sub(r"^# ", "", file.read_text(), flags=re.MULTILINE))
    assert settings.parse(["--config", str(file)], {}).model == "org/name"


def test_a_drain_ends_before_the_pod_is_killed() -> None:
    sleep = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > sleep + Config().drain_timeout_s + 2


def test_the_container_runs_as_the_images_user_and_writes_where_the_image_does() -> None:
    image = (ROOT / "Dockerfile").read_text()
    assert f"USER {POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}" in image
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    writable = {mount["mountPath"] for mount in CONTAINER["volumeMounts"] if not mount.get("readOnly")}
    assert f"VOLUME {sorted(writable)}".replace("'", '"') in image
    assert f"EXPOSE {CONTAINER['ports'][0]['containerPort']}" in image


def test_the_autoscaler_asks_for_a_figure_that_the_server_has() -> None:
    name = BY_KIND["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    metrics = Metrics()
    assert f"# TYPE {name} gauge" in metrics.render(metrics.snapshot()).decode()
    rules = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]
    assert all(rule["seriesQuery"].startswith(name + "{") for kind in rules.values() for rule in kind)
