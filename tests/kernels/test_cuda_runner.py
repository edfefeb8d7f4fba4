"""The CUDA runner against the plain one: the same plans, the same texts.  Interpreted on a CPU, graphs on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fakes_gpu import Engine, Parts, config, cuda_runner, masked_requests, plain_runner, scores_of

from vserve.engine.request import FinishReason, GenRequest, RequestFault, RequestId, SamplingParams
from vserve.errors import BadRequest
from vserve.kernels import dispatch
from vserve.kernels.gemv import MAX_ROWS

GREEDY = SamplingParams(temperature=0.0)
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module")
def parts() -> Parts:
    # One layer of few heads: interpreted, a kernel's program takes milliseconds.
    return Parts(
        config(layers=1, heads=2, kv_heads=1),
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        torch.float32,
    )


def requests(count: int, max_tokens: int, **more: object) -> list[GenRequest]:
    return [
        GenRequest(RequestId(name), [name % 3 + 1, 2, 3, *range(name * 2 % 11)], max_tokens, GREEDY, **more)  # type: ignore[arg-type]
        for name in range(count)
    ]


@pytest.mark.parametrize(
    ("depth", "limits"),
    [
        (1, {}),
        (2, {"max_num_batched_tokens": 16, "max_prefill_chunk": 3}),
        (2, {"num_blocks": 4, "prefix_caching": False}),
    ],
    ids=["roomy", "small chunks", "few blocks"],
)
def test_every_text_is_that_of_the_plain_runner(parts: Parts, depth: int, limits: dict[str, int]) -> None:
    wanted = requests(4, 9)
    engine = Engine(cuda_runner(parts), depth, **(SIZES | limits))
    assert engine.run(wanted) == Engine(plain_runner(parts), 1, **SIZES).run(wanted)
    if "num_blocks" in limits:
        assert engine.scheduler.stats().preemptions_total > 0


def test_layers_that_leave_their_norms_to_each_other_have_the_plain_runners_texts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Off a GPU no product would run in gemv.py.
    monkeypatch.setattr(dispatch, "use_gemv", lambda rows, *_: rows <= MAX_ROWS)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = Parts(config(layers=2, heads=2, kv_heads=1), device, torch.float32)
    wanted = requests(4, 4)
    assert Engine(cuda_runner(parts), **SIZES).run(wanted) == Engine(plain_runner(parts), 1, **SIZES).run(wanted)


def test_penalties_biases_bans_and_logprobs_are_those_of_the_plain_runner(parts: Parts) -> None:
    kinds = [
        SamplingParams(temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5, logprobs=3),
        SamplingParams(temperature=0.0, repetition_penalty=1.7),
        SamplingParams(temperature=0.0, logit_bias=((5, 40.0), (7, -3.0)), logprobs=0),
        SamplingParams(temperature=0.0, logprobs=5),
        GREEDY,
    ]
    stops = frozenset(range(0, 97, 2))
    wanted = [GenRequest(RequestId(i), [1 + i, 2, 3], 4, kind) for i, kind in enumerate(kinds)]
    wanted.append(GenRequest(RequestId(9), [8, 9], 8, GREEDY, min_tokens=3, stop_ids=stops))
    engine, plain = Engine(cuda_runner(parts), **SIZES), Engine(plain_runner(parts), **SIZES)
    assert engine.run(wanted) == plain.run(wanted)
    for one, other in zip(
        sorted(engine.emits, key=lambda emit: emit.id), sorted(plain.emits, key=lambda emit: emit.id), strict=True
    ):
        assert (one.id, one.ids, one.finish) == (other.id, other.ids, other.finish)
        for mine, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert mine.rank == theirs.rank
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
            assert [id for id, _ in mine.top] == [id for id, _ in theirs.top]
            assert [value for _, value in mine.top] == pytest.approx([value for _, value in theirs.top], abs=1e-3)


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(parts: Parts) -> None:
    sampling = SamplingParams(temperature=1.2, top_k=20, top_p=0.9, min_p=0.01, seed=5)
    wanted = [GenRequest(RequestId(name), [name + 1, 2, 3], 4, sampling) for name in range(2)]
    alone = {request.id: Engine(cuda_runner(parts), 1, **SIZES).run([request])[request.id] for request in wanted}
    assert Engine(cuda_runner(parts), **SIZES).run(wanted) == alone
    assert len({tuple(text) for text in alone.values()}) > 1


def test_parameters_that_cannot_be_used_end_their_request_and_no_other(parts: Parts) -> None:
    engine = Engine(cuda_runner(parts), **SIZES)
    good = requests(2, 4)
    bad = GenRequest(RequestId(9), [1], 5, SamplingParams(logit_bias=((2**70, 1.0),)))
    texts = engine.run([bad, *good])
    assert [emit.finish for emit in engine.emits if emit.id == 9] == [FinishReason.ERROR]
    plain = Engine(plain_runner(parts), **SIZES).run(good)
    assert {request.id: texts[request.id] for request in good} == plain


def test_a_row_that_can_draw_nothing_ends_its_request(parts: Parts) -> None:
    engine = Engine(cuda_runner(parts), **SIZES)
    banned = GenRequest(RequestId(9), [1, 2], 5, GREEDY, min_tokens=3, stop_ids=frozenset(range(97)))
    good = requests(1, 3)
    texts = engine.run([banned, *good])
    (end,) = [emit for emit in engine.emits if emit.id == 9]
    assert end.finish is FinishReason.ERROR
    assert texts[0] == Engine(plain_runner(parts), **SIZES).run(good)[0]


@pytest.mark.parametrize(
    "limits", [{}, {"max_scored_tokens": 3, "max_prefill_chunk": 3}], ids=["roomy", "small slices"]
)
def test_masks_and_scored_prompts_are_those_of_the_plain_runner(parts: Parts, limits: dict[str, int]) -> None:
    engine, plain = Engine(cuda_runner(parts), **(SIZES | limits)), Engine(plain_runner(parts), 1, **SIZES)
    assert engine.run(masked_requests(6)) == plain.run(masked_requests(6))
    mine, theirs = scores_of(engine), scores_of(plain)
    assert mine.keys() == theirs.keys() == {4, 5}
    for name, entries in theirs.items():
        assert [entry[1:] for entry in mine[name]] == [entry[1:] for entry in entries]
        assert [entry[0] for entry in mine[name]] == pytest.approx([entry[0] for entry in entries], abs=1e-3)


def test_a_constraint_that_fails_ends_its_request_and_no_other(parts: Parts) -> None:
    class Broken:
        def mask(self, generated: Sequence[int]) -> bytes:
            raise BadRequest("broken")

    engine = Engine(cuda_runner(parts), **SIZES)
    good = requests(1, 3)
    texts = engine.run([GenRequest(RequestId(9), [1, 2], 5, GREEDY, constraint=Broken()), *good])
    (end,) = [emit for emit in engine.emits if emit.id == 9]
    assert end.finish is FinishReason.ERROR
    assert isinstance(end.error, RequestFault)
    assert texts[0] == Engine(plain_runner(parts), **SIZES).run(good)[0]
