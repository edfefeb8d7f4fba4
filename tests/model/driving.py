"""What the decoder's tests share: random checkpoints, transformers as the judge, and a small engine of their own.

The engine gives pages out of order, cuts prompts into chunks and mixes them with decodes; it shares no code with
vserve.engine, so a fault there cannot hide one here.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vserve.errors import StartupError
from vserve.model.config import ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.kinds import Kind
from vserve.model.loader import load_weights
from vserve.model.ops import Step
from vserve.model.weights import StoredTensor

KINDS = {torch.float32: Kind.F32, torch.bfloat16: Kind.BF16, torch.float16: Kind.F16}
CPU = torch.device("cpu")


class MemoryWeights:
    """``Weights`` on a dict of plain tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> Sequence[str]:
        return tuple(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def get(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise StartupError(f"tensor {name} is missing")
        tensor = self.tensors[name]
        return StoredTensor(name, KINDS[tensor.dtype], tuple(tensor.shape), tensor)


def random_model(seed: int = 0, /, **settings: object) -> LlamaForCausalLM:
    """A small random Llama; settings are LlamaConfig's.  Spread wide enough that attention is far from uniform."""
    torch.manual_seed(seed)
    shape: dict[str, object] = {
        "vocab_size": 97,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
    }
    model = LlamaForCausalLM(LlamaConfig.from_dict(shape | settings))
    model.train(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def config_of(model: LlamaForCausalLM) -> ModelConfig:
    """The model's configuration as its config.json would give it."""
    return ModelConfig.from_json(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})


def weights_of(model: LlamaForCausalLM) -> MemoryWeights:
    """The model's tensors as its safetensors file would hold them."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return MemoryWeights(tensors)


def decoder_of(model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_weights(weights_of(model), config_of(model), device=CPU, dtype=dtype)


@torch.inference_mode()
def judged(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """transformers' logits of every position [T, V]."""
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@dataclass
class Run:
    """One greedy sequence under way: how much of tokens is computed, and the pages it holds."""

    tokens: list[int]
    wanted: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.output) >= self.wanted


class Driver:
    """Greedy generation with pages of block_size tokens out of a shuffled pool."""

    def __init__(self, decoder: Decoder, num_blocks: int = 512, block_size: int = 16, seed: int = 0) -> None:
        self.decoder = decoder
        self.block_size = block_size
        self.cache = decoder.new_cache(num_blocks, block_size)
        self.random = random.Random(seed)
        self.free = list(range(num_blocks))
        self.random.shuffle(self.free)

    def fill(self, number: float) -> None:
        """Put number in every slot: what must not be read would show."""
        for pair in self.cache.pairs:
            pair.fill_(number)

    def step(self, works: Iterable[tuple[Run, int]], every_logit: bool = False, logits: bool = True) -> Tensor:
        """Compute the next count tokens of each (sequence, count); logits of the last, of all, or of none, on a CPU."""
        works = list(works)
        positions: list[int] = []
        slots: list[int] = []
        ids: list[int] = []
        starts = [0]
        for sequence, count in works:
            end = sequence.computed + count
            while len(sequence.pages) * self.block_size < end:
                sequence.pages.append(self.free.pop())
            for place in range(sequence.computed, end):
                positions.append(place)
                ids.append(sequence.tokens[place])
                slots.append(sequence.pages[place // self.block_size] * self.block_size + place % self.block_size)
            sequence.computed = end
            starts.append(len(ids))
        width = max(len(sequence.pages) for sequence, _ in works)
        rows = list(range(len(ids))) if every_logit else [start - 1 for start in starts[1:]] if logits else []
        contexts = tuple(sequence.computed for sequence, _ in works)
        tables = [s.pages + [0] * (width - len(s.pages)) for s, _ in works]
        place = self.cache.pairs[0].device
        step = Step(
            ids=torch.tensor(ids, device=place),
            positions=torch.tensor(positions, device=place),
            slots=torch.tensor(slots, device=place),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=place),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=place),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=place),
            logit_rows=torch.tensor(rows, dtype=torch.int64, device=place),
            query_lens=tuple(count for _, count in works),
            context_lens_host=contexts,
        )
        return self.decoder.forward(step, self.cache).cpu()

    def logits(self, ids: Sequence[int], chunks: Sequence[int]) -> Tensor:
        """Logits of every position of one sequence, computed in chunks of these sizes and then token by token."""
        sequence = Run(list(ids), 0)
        sizes = [*chunks, *[1] * (len(ids) - sum(chunks))]
        out = torch.cat([self.step([(sequence, size)], every_logit=True) for size in sizes])
        self.release(sequence)
        return out

    def release(self, sequence: Run) -> None:
        self.free += sequence.pages
        sequence.pages = []
        self.random.shuffle(self.free)

    def generate(self, prompts: Sequence[Sequence[int]], count: int, batch: int, chunk: int) -> list[list[int]]:
        """count greedy tokens of each prompt: at most batch sequences at once, prompts in chunks of at most chunk.

        One sequence joins a step, and the order within a step is shuffled, so that chunks and decodes mix.
        """
        waiting = [Run(list(prompt), count) for prompt in prompts]
        everyone = list(waiting)
        running: list[Run] = []
        while waiting or running:
            if waiting and len(running) < batch:
                running.append(waiting.pop(0))
            self.random.shuffle(running)
            works = [(s, min(chunk, len(s.tokens) - s.computed)) for s in running]
            for (sequence, _), row in zip(works, self.step(works), strict=True):
                if sequence.computed == len(sequence.tokens):
                    best = int(row.argmax())
                    sequence.tokens.append(best)
                    sequence.output.append(best)
            for sequence in [s for s in running if s.done]:
                running.remove(sequence)
                self.release(sequence)
        return [sequence.output for sequence in everyone]
