"""Buckets are inclusive, count everything once, and a snapshot does not move."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client import Histogram as Reference

from vserve.observe.histogram import Histogram

BOUNDS = (0.01, 0.1, 1.0, 10.0)


@given(st.lists(st.sampled_from(BOUNDS) | st.floats(0, 100)))
def test_the_counts_are_those_of_the_reference_client(values: list[float]) -> None:
    registry = CollectorRegistry()
    reference, ours = Reference("h", "h", buckets=BOUNDS, registry=registry), Histogram(BOUNDS)
    for value in values:
        reference.observe(value)
        ours.observe(value)
    counted = ours.snapshot()
    for le, count in counted.cumulative():
        assert registry.get_sample_value("h_bucket", {"le": le}) == count
    assert registry.get_sample_value("h_sum") == counted.total


def test_a_snapshot_stays_as_it_was() -> None:
    histogram = Histogram(BOUNDS)
    histogram.observe(0.5)
    before = histogram.snapshot()
    histogram.observe(0.5)
    assert before.cumulative()[-1] == ("+Inf", 1.0)
    assert before.total == 0.5
