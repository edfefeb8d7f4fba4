"""Names, labels and buckets of the exposition; labels stay few whatever clients send."""

from __future__ import annotations

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from vserve.observe.engine_series import EngineNow, EngineSeries, token_bounds
from vserve.observe.metrics import Metrics

NOW = EngineNow(
    running=3,
    waiting=4,
    swapped=0,
    cache_usage=0.5,
    utilization=0.75,
    prompt_tokens_total=100,
    generation_tokens_total=50,
    prefix_queries_total=40,
    prefix_hits_total=20,
    preemptions_total=1,
    steps_total=9,
)


def families(metrics: Metrics) -> dict[str, Metric]:
    text = metrics.render(metrics.snapshot()).decode()
    found = list(text_string_to_metric_families(text))
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def serving() -> tuple[Metrics, EngineSeries]:
    metrics, series = Metrics(), EngineSeries("org/model", 1000, lambda: NOW)
    metrics.serve(series)
    return metrics, series


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm:num_requests_running", 3),
        ("vllm:num_requests_waiting", 4),
        ("vllm:num_requests_swapped", 0),
        ("vllm:kv_cache_usage_perc", 0.5),
        ("vllm_kv_cache_usage_ratio", 0.5),
        ("vllm_pending_requests", 4),
        ("vllm_gpu_utilization", 0.75),
        ("vllm:prompt_tokens_total", 100),
        ("vllm:generation_tokens_total", 50),
        ("vllm:prefix_cache_queries_total", 40),
        ("vllm:prefix_cache_hits_total", 20),
        ("vllm:num_preemptions_total", 1),
        ("vserve_steps_total", 9),
    ],
)
def test_a_figure_of_the_engine_has_its_name_and_labels(name: str, value: float) -> None:
    metrics, _ = serving()
    metrics.render(metrics.snapshot())
    assert metrics.registry.get_sample_value(name, {"model_name": "org/model", "engine": "0"}) == value


def test_the_drivers_word_on_the_gpu_goes_before_the_engines() -> None:
    metrics, _ = serving()
    for said, shown in ((0.25, 0.25), (0.0, 0.0), (None, 0.75)):
        metrics.gpu = lambda said=said: said
        assert families(metrics)["vllm_gpu_utilization"].samples[0].value == shown


def test_before_the_model_is_there_its_names_stand_without_values_and_the_process_has_some() -> None:
    found = families(Metrics())
    assert found["vllm:num_requests_running"].samples == []
    assert found["vllm:time_to_first_token_seconds"].samples == []
    assert found["process_resident_memory_bytes"].samples[0].value > 0
    assert found["python_gc_collections"].samples


def test_token_buckets_end_at_the_context() -> None:
    assert token_bounds(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_bounds(512) == (1, 2, 5, 10, 20, 50, 100, 200, 500)


@pytest.mark.promise("R8", "input: odd metric labels")
def test_label_sets_are_bounded_under_odd_methods_and_paths() -> None:
    metrics, _ = serving()
    for i in range(1000):
        metrics.exchange(None, f"BREW{i}", 501, 0.001)
        metrics.exchange(None, "get", 404, 0.001)
        metrics.exchange(None, None, 400, 0.0)
    metrics.exchange("chat", "POST", 0, 0.5)
    samples = families(metrics)["http_requests"].samples
    assert {(s.labels["handler"], s.labels["method"], s.labels["status"]): s.value for s in samples} == {
        ("other", "other", "501"): 1000,
        ("other", "other", "404"): 1000,
        ("other", "other", "400"): 1000,
        ("chat", "POST", "499"): 1,
    }
