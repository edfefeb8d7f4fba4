"""The default model, quantised as it ships, against transformers with the same weights made dense.

transformers reads each prompt with the answer behind it once: an answer is its greedy one exactly if every token is
the most likely after all tokens before it.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.model.driving import CPU, Driver, distance, judged
from vserve.engine.request import GenRequest, RequestId, SamplingParams, TokenLogprobs
from vserve.engine.runner import Runner
from vserve.engine.scheduler import Limits, Scheduler
from vserve.model import loader, source
from vserve.model.decoder import Decoder
from vserve.text import gguf_vocab

TOKENS = 128
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "A list of planets: Mercury, Venus, Earth,",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\nI am writing to",
)


@cache
def found() -> source.ModelSource:
    return source.resolve(None, environ=os.environ)


@cache
def decoder() -> Decoder:
    return loader.load(found(), device=CPU, dtype=torch.float32)


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    metadata = found().gguf_metadata
    assert metadata is not None
    return tuple(map(tuple, gguf_vocab.build(metadata).encode_batch(PROMPTS)))


@cache
def judge() -> LlamaForCausalLM:
    config = found().config
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig.from_dict(
                {
                    "vocab_size": config.vocab_size,
                    "hidden_size": config.hidden_size,
                    "intermediate_size": config.intermediate_size,
                    "num_hidden_layers": config.num_layers,
                    "num_attention_heads": config.num_heads,
                    "num_key_value_heads": config.num_kv_heads,
                    "max_position_embeddings": config.max_position,
                    "rms_norm_eps": config.norm_eps,
                    "rope_theta": config.rope_theta,
                    "tie_word_embeddings": True,
                }
            )
        )
    weights = found().open_weights()
    dense = {name: weights.get(name).dense() for name in weights.names()}
    model.load_state_dict(dense, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    model.train(False)
    return model


@cache
def alone() -> tuple[tuple[int, ...], ...]:
    """Each prompt's answer when nothing else is computed, its prompt in one piece."""
    driver = Driver(decoder(), 64)
    return tuple(tuple(driver.generate([prompt], TOKENS, 1, 512)[0]) for prompt in prompts())


@cache
def verdicts() -> tuple[Tensor, ...]:
    """For each prompt with its answer, transformers' logits [T, V] of the places that an answer's token follows."""
    texts = zip(prompts(), alone(), strict=True)
    return tuple(judged(judge(), prompt + answer)[len(prompt) - 1 : -1] for prompt, answer in texts)


@pytest.mark.parametrize("cut", [(), (100,), (7, 64, 20)], ids=str)
def test_logits_equal_those_of_transformers_within_rounding(cut: tuple[int, ...]) -> None:
    ids = prompts()[7][:110]
    assert distance(Driver(decoder(), 16).logits(ids, cut), judged(judge(), ids)) < 1e-4


def test_each_answer_alone_is_the_greedy_one_of_transformers() -> None:
    for answer, logits in zip(alone(), verdicts(), strict=True):
        assert logits.argmax(-1).tolist() == list(answer)


@pytest.mark.parametrize(("batch", "chunk"), [(2, 16), (7, 24), (16, 40)])
def test_answers_do_not_depend_on_their_neighbours(batch: int, chunk: int) -> None:
    mixed = [*prompts(), *prompts()[:6]] if batch == 16 else list(prompts())
    answers = Driver(decoder(), 256, seed=batch).generate(mixed, TOKENS, batch, chunk)
    assert answers == [list(answer) for answer in (*alone(), *alone())[: len(mixed)]]


def test_no_answer_hangs_on_a_near_tie() -> None:
    """The equalities above are about tokens only while the choice is wider than rounding could turn."""
    for logits in verdicts():
        best = logits.topk(2, dim=-1).values
        assert float(((best[:, 0] - best[:, 1]) / logits.abs().amax(-1)).min()) > 5e-5


def test_scores_of_prompts_are_transformers_log_softmax() -> None:
    limits = Limits(num_blocks=64, block_size=16, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=512)
    scheduler = Scheduler(limits)
    runner = Runner(decoder(), decoder().new_cache(64, 16), max_num_seqs=4, max_model_len=512)
    chosen = prompts()[7][:90], prompts()[5], prompts()[2]
    for number, prompt in enumerate(chosen):
        scheduler.add(GenRequest(RequestId(number), prompt, 2, SamplingParams(0.0), prompt_logprobs=5), 0.0)
    scores: dict[int, tuple[TokenLogprobs, ...]] = {}
    while (plan := scheduler.plan(0.0)) is not None:
        for emit in scheduler.commit(plan, runner.launch(plan).wait(), 0.0):
            if emit.prompt_logprobs is not None:
                scores[emit.id] = emit.prompt_logprobs
    for number, prompt in enumerate(chosen):
        truth = torch.log_softmax(judged(judge(), prompt).double(), -1)[:-1]
        assert len(scores[number]) == len(prompt) - 1
        for row, token, entry in zip(truth, prompt[1:], scores[number], strict=True):
            assert entry.logprob == pytest.approx(float(row[token]), abs=2e-3)
            best = row.topk(5)
            assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=2e-3)
            assert abs(entry.rank - 1 - int((row > row[token]).sum())) <= 1 + entry.rank // 100  # near ties far down


def test_a_model_without_dense_copies_gives_the_same_logits() -> None:
    lean = loader.load_weights(
        found().open_weights(), found().config, device=CPU, dtype=torch.float32, dense_copy_limit=0
    )
    ids = prompts()[7][:40]
    assert distance(Driver(lean, 16).logits(ids, [20, 10]), judged(judge(), ids)) < 1e-4
