"""The two back ends of vserve.model.ops.Ops answer alike, over a step of any mix of chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton.runtime.jit import JITFunction

from vserve.kernels import cuda, reference

HEADS, KV_HEADS, WIDTH, SIZE = 6, 2, 64, 8
# The CUDA back end attends in the caches' dtype; the interpreter multiplies no bf16 matrices.
DTYPE = torch.float16 if torch.cuda.is_available() else torch.float32
TOLERANCE = 2e-3 if torch.cuda.is_available() else 1e-5


@pytest.mark.parametrize(
    ("queries", "contexts"),
    [((1, 1, 1), (9, 140, 1)), ((1, 1, 6), (17, 30, 6)), ((4, 1, 6), (4, 33, 21)), ((13,), (13,))],
    ids=str,
)
def test_a_step_through_both_back_ends_is_the_same(
    queries: tuple[int, ...], contexts: tuple[int, ...], device: torch.device, random: torch.Generator
) -> None:
    tokens, longest = sum(queries), -(-max(contexts) // SIZE)
    tables = torch.randperm(longest * len(queries), generator=random).view(len(queries), longest).int()
    positions = torch.cat([torch.arange(c - n, c) for n, c in zip(queries, contexts, strict=True)])
    rows = torch.arange(len(queries)).repeat_interleave(torch.tensor(queries))
    slots = tables[rows, positions // SIZE].long() * SIZE + positions % SIZE
    angles = torch.rand(150, WIDTH // 2, generator=random) * 6.0
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lens = torch.tensor(contexts, dtype=torch.int32)
    qkv = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * WIDTH, generator=random)
    pairs = torch.randn(longest * len(queries), SIZE, 2, KV_HEADS, WIDTH, generator=random)
    gate_up = torch.randn(tokens, 2 * 33, generator=random)
    x, residual, weight = (
        torch.randn(tokens, 50, generator=random),
        torch.randn(tokens, 50, generator=random),
        torch.rand(50),
    )

    answers = []
    for ops, place, dtype in ((reference, torch.device("cpu"), torch.float32), (cuda, device, DTYPE)):
        cache = pairs.to(place, dtype).clone()
        on = [t.to(place) for t in (positions, slots, starts, lens, tables)]
        plan = ops.plan(*on, queries, contexts, angles.cos().to(place), angles.sin().to(place), SIZE)
        q = ops.rope_and_write(qkv.to(place, dtype).clone(), cache, plan)
        outs = [ops.paged_attention(q, cache, plan, 0.125), cache]
        outs.append(ops.silu_mul(gate_up.to(place, dtype).clone()))
        outs.append(ops.rms_norm(x.to(place, dtype), weight.to(place, dtype), 1e-5))
        outs += ops.add_rms_norm(x.to(place, dtype), residual.to(place, dtype).clone(), weight.to(place, dtype), 1e-5)
        answers.append([out.float().cpu() for out in outs])
    for ours, theirs in zip(answers[1], answers[0], strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= TOLERANCE * theirs.norm()


if torch.cuda.is_available():

    def launches(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
        """The kernels that work launches early, and the others."""
        found: tuple[set[str], set[str]] = (set(), set())
        run = JITFunction.run

        def noted(self: JITFunction, *args: object, **options: object) -> object:
            found[0 if options.get("launch_pdl") else 1].add(self.fn.__name__)
            return run(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", noted)
            work()
        return found

    @pytest.mark.parametrize(("tokens", "product"), [(1, "_vector"), (3, "_matrix"), (cuda.EARLY_ROWS, "_matrix")])
    def test_layers_launched_early_give_the_same_bits_every_time(
        tokens: int, product: str, device: torch.device, random: torch.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # A missing wait for a kernel ahead would show as a difference between runs.
        # No poison: filling each output would put a kernel between every two.
        torch.use_deterministic_algorithms(False)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=random).mul(0.1).to(device, torch.bfloat16)

        model, inner, eps = 384, 1024, 1e-5
        qkv, o = draw((HEADS + 2 * KV_HEADS) * WIDTH, model), draw(model, HEADS * WIDTH)
        gate_up, down, norm = draw(2 * inner, model), draw(model, inner), draw(model)
        pairs = draw(tokens * 40, SIZE, 2, KV_HEADS, WIDTH)
        lens = torch.full((tokens,), 300, dtype=torch.int32, device=device)
        tables = torch.arange(tokens * 40, dtype=torch.int32, device=device).view(tokens, 40)
        positions, starts = lens.long() - 1, torch.arange(tokens + 1, dtype=torch.int32, device=device)
        slots = tables.long().gather(1, positions[:, None] // SIZE)[:, 0] * SIZE + positions % SIZE
        angles = torch.rand(512, WIDTH // 2, generator=random).to(device)
        start = draw(tokens, model)

        def step() -> torch.Tensor:
            x = start
            host = (1,) * tokens
            plan = cuda.plan(positions, slots, starts, lens, tables, host, host, angles.cos(), angles.sin(), SIZE)
            for _ in range(6):
                q = cuda.rope_and_write(cuda.norm_linear(x, norm, eps, qkv), pairs, plan)
                x = cuda.linear(cuda.paged_attention(q, pairs, plan, 0.125), o, residual=x)
                x = cuda.linear(cuda.norm_gated_linear(x, norm, eps, gate_up), down, residual=x)
                y, x = cuda.add_rms_norm(cuda.rms_norm(x, norm, eps), x, norm, eps)
                x = x + cuda.silu_mul(torch.cat((y, y), 1))
            return x

        monkeypatch.setattr(cuda, "_early", lambda x: False)
        monkeypatch.setattr(cuda.dispatch, "use_gemv", lambda *shape: True)
        plain = step()
        monkeypatch.undo()
        monkeypatch.setattr(cuda.dispatch, "use_gemv", lambda *shape: True)
        early, rest = launches(step, monkeypatch)
        assert early == {product, "_rope_and_write", "_decode", "_reduce", "_norm", "_activate"}
        assert rest == {"_plan_tasks"}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for _ in range(300):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, plain)
