"""Which shape a GPU step takes, and where its words lie."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vserve.engine.shapes import ALIGN, Buckets, Layout, Shape


@pytest.mark.parametrize(
    ("decodes", "chunks", "tokens", "shape"),
    [
        (1, 0, 1, Shape(1, 1, 0)),
        (3, 0, 3, Shape(4, 4, 0)),
        (100, 0, 100, Shape(128, 128, 0)),
        (256, 0, 256, Shape(256, 256, 0)),
        (0, 1, 512, Shape(512, 0, 32)),
        (0, 1, 513, Shape(640, 0, 32)),
        (31, 1, 256, Shape(256, 32, 32)),
        (31, 1, 257, Shape(384, 32, 32)),
        (100, 2, 612, Shape(640, 128, 32)),
        (200, 1, 210, Shape(256, 256, 32)),
        (0, 33, 64, Shape(64, 0, 256)),
        (0, 4, 5000, Shape(5056, 0, 32)),
    ],
)
def test_a_step_takes_the_smallest_shape_it_fits(decodes: int, chunks: int, tokens: int, shape: Shape) -> None:
    assert Buckets(256, 2048).choose(decodes, chunks, tokens) == shape


@given(st.integers(1, 300), st.integers(16, 4096), st.data())
def test_every_step_fits_its_shape_and_graphs_are_few(rows: int, most: int, data: st.DataObject) -> None:
    buckets = Buckets(rows, most)
    decodes = data.draw(st.integers(0, rows))
    chunks = data.draw(st.integers(0 if decodes else 1, max(1, rows - decodes)))
    tokens = decodes + (data.draw(st.integers(chunks, 9000)) if chunks else 0)
    shape = buckets.choose(decodes, chunks, tokens)
    assert shape.is_decode == (not chunks)
    assert shape.tokens >= max(tokens, shape.decodes)
    assert shape.decodes >= decodes
    assert shape.chunks >= chunks or shape.is_decode
    if shape in buckets.graphs():
        assert buckets.is_graph(shape)
    assert len(buckets.graphs()) <= 120


@pytest.mark.parametrize("shape", [Shape(1, 1, 0), Shape(24, 24, 0), Shape(16, 0, 4), Shape(544, 32, 32)])
def test_fields_are_aligned_and_do_not_overlap(shape: Shape) -> None:
    layout = Layout(shape, 16)
    spans = sorted(layout.fields.values(), key=lambda span: span.start)
    assert all(span.start % ALIGN == 0 for span in spans)
    assert all(before.end <= after.start for before, after in itertools.pairwise(spans))
    assert spans[-1].end <= layout.words
