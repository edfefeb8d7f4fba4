"""How much memory the KV cache takes and how many blocks fit: the arithmetic of starting, and of saying why not.

Pure but for ``host_memory``, which asks the system.  Knows nothing of schedulers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vserve.errors import StartupError
from vserve.model.config import ModelConfig

GIB: Final = 2**30
HOST_SHARE: Final = 0.25
HOST_MOST: Final = 4 * GIB


@dataclass(frozen=True, slots=True)
class CacheForm:
    """How keys and values lie in the cache: the type, bytes of a number, and of the scale of each head of a token."""

    dtype: str
    element_bytes: int
    scale_bytes: int = 0

    @classmethod
    def of(cls, asked: str, activations: str) -> CacheForm:
        """What --kv-cache-dtype means for a model whose activations are of this type."""
        return _FORMS[activations if asked == "auto" else asked]


_FORMS: Final = {
    "float32": CacheForm("float32", 4),
    "bfloat16": CacheForm("bfloat16", 2),
    "float16": CacheForm("float16", 2),
    "fp8": CacheForm("fp8_e4m3", 1, 2),
    "fp8_e4m3": CacheForm("fp8_e4m3", 1, 2),
}


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The KV cache to make: num_blocks blocks of block_size tokens, each of block_bytes bytes over all layers.

    max_model_len: the longest sequence, in tokens, prompt and answer together; it always fits the blocks.  dtype: of
    keys and values.
    """

    num_blocks: int
    block_size: int
    block_bytes: int
    max_model_len: int
    dtype: str

    @property
    def tokens(self) -> int:
        """Tokens that all blocks hold together."""
        return self.num_blocks * self.block_size

    def explain(self) -> str:
        """One line with the arithmetic, for the log."""
        per_token = self.block_bytes // self.block_size
        return (
            f"KV cache: {self.num_blocks} blocks x {self.block_size} tokens x {per_token:,} bytes a token "
            f"in {self.dtype} = "
            f"{gib(self.num_blocks * self.block_bytes)}, room for {self.tokens / self.max_model_len:.1f} sequences "
            f"of {self.max_model_len} tokens"
        )


def token_bytes(config: ModelConfig, form: CacheForm) -> int:
    """Bytes of one token's keys and values over all layers, their scales included."""
    return 2 * config.num_layers * config.num_kv_heads * (config.head_dim * form.element_bytes + form.scale_bytes)


def step_bytes(config: ModelConfig, *, tokens: int, draws: int, element_bytes: int) -> int:
    """About what one step takes beside weights and cache: its widest activations, and the logits of its draws."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    width = 3 * config.intermediate_size + 2 * heads + 4 * config.hidden_size
    experts, extra = config.experts, 0
    if experts is not None:
        # Each pair of a token and one of its experts has a row of hidden numbers, and its result in float32.
        pair = experts.intermediate_size * element_bytes + config.hidden_size * 4
        extra = experts.active * pair + experts.count * (element_bytes + 8)
    logits = element_bytes + 4 + (4 if config.logit_softcap is not None else 0)
    return tokens * (width * element_bytes + extra) + draws * config.vocab_size * logits


def plan_cache(
    config: ModelConfig, *, budget_bytes: int, form: CacheForm, block_size: int, max_model_len: int | None
) -> CachePlan:
    """As many blocks as budget_bytes holds, and never more than there is a use for.

    max_model_len None: the model's own limit, or as much of it as the budget holds.  Raises StartupError with the
    numbers and the flags to change when a sequence of max_model_len tokens does not fit.
    """
    if max_model_len is not None and max_model_len > config.max_position:
        raise StartupError(
            f"--max-model-len {max_model_len} is more than the {config.max_position} positions the model was made for"
        )
    block_bytes = token_bytes(config, form) * block_size
    num_blocks = budget_bytes // block_bytes
    wanted = max_model_len or config.max_position
    if num_blocks * block_size < wanted:
        if max_model_len is not None or num_blocks == 0:
            needed = -(-wanted // block_size) * block_bytes if max_model_len else block_bytes
            raise StartupError(
                f"the KV cache has {gib(budget_bytes)}, but a sequence of "
                f"{wanted if max_model_len else block_size} tokens takes {gib(needed)}; "
                "raise --kv-cache-memory-bytes or lower --max-model-len"
            )
        wanted = num_blocks * block_size
    return CachePlan(num_blocks, block_size, block_bytes, wanted, form.dtype)


def host_budget(available_bytes: int) -> int:
    """What the KV cache may take of a host's memory when nobody said."""
    return min(HOST_MOST, int(available_bytes * HOST_SHARE))


def host_memory(root: Path = Path("/")) -> int:
    """Bytes this process may still take: free memory of the machine, or of its control group if that has less."""
    available = GIB
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    group = root / "sys/fs/cgroup"
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))


def gib(size: int) -> str:
    """A size for people."""
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / 2**20:.2f} MiB"
