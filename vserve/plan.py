"""``vserve plan``: what a model would take of a GPU and how many sequences fit, before either is there.

Owns the command's flags and what it prints; the arithmetic is sizing.py's, the same that starting uses.  Takes the
flags of ``vserve serve`` too, so that a launch line can be tried as it is.  Imports no torch: it answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from vserve import settings
from vserve.config import Config, parse_bytes
from vserve.errors import StartupError, shorten
from vserve.model import hub
from vserve.model.memory import GIB, CacheForm, gib, plan_cache, token_bytes
from vserve.model.outline import SIZES as MODEL_SIZES
from vserve.model.outline import Outline, of_size, outline
from vserve.model.quantization import ALIASES, Method, Quantization
from vserve.sizing import (
    CONTEXT_BYTES,
    ELEMENT_BYTES,
    SIZES,
    GgufTensors,
    Plan,
    Quantisation,
    Reserve,
    cache_budget,
    element_type,
    fitting_sequences,
    reserve,
    weight_bytes,
)

EXIT_DOES_NOT_FIT: Final = 1
GPU_DEFAULT: Final = "40GiB"
INPUT_DEFAULT: Final = 1024
OUTPUT_DEFAULT: Final = 256
ROWS: Final = (("7B", 4096), ("8B", 4096), ("13B", 2048), ("70B", 1024))
"""The table below every plan: a size, and the tokens of each of its sequences."""

QUANTISATIONS: Final[Mapping[str, Quantisation]] = {
    "awq": Quantisation.of(Quantization(Method.AWQ, 4, 128)),
    "gptq": Quantisation.of(Quantization(Method.GPTQ, 4, 128, ordered=True)),
    "fp8": Quantisation.of(Quantization(Method.FP8)),
}
"""What --quantization means for a model whose own files do not say it: the usual group, and all that may lie beside."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked: bytes of the GPU, tokens of each prompt and answer, and how many at once, None: as many as fit."""

    gpu: int
    input_len: int
    output_len: int
    concurrency: int | None

    @property
    def length(self) -> int:
        return self.input_len + self.output_len


@dataclass(frozen=True, slots=True)
class Answer:
    """One model on one GPU.  plan None: it does not fit, for the reason in `problem`; least_gpu: bytes that would do.

    concurrency: sequences of the wanted length that are never sent back to be recomputed; average: as many as fit when
    each is half-way through its answer.  longest_input: of the wanted concurrency, or of the recommended one.
    """

    name: str
    dtype: str
    quantisation: str | None
    weights: int
    token_bytes: int
    cache_dtype: str
    reserve: Reserve
    plan: Plan | None
    problem: str | None
    least_gpu: int
    concurrency: int
    average: int
    longest_input: int


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise StartupError(message)


def _parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="vserve plan",
        allow_abbrev=False,
        usage="vserve plan [MODEL] [flags]",
        description="Print what a model takes of a GPU and how many sequences fit.  MODEL: a folder with a "
        f"config.json, a .gguf file, a hub id in the local cache, or a size ({', '.join(MODEL_SIZES)}); without one, "
        "the table of sizes alone.",
        epilog="The flags of vserve serve that bear on memory count too: --dtype, --block-size, --max-model-len, "
        "--max-num-seqs, --max-num-batched-tokens, --gpu-memory-utilization, --kv-cache-memory-bytes, "
        "--kv-cache-dtype.  Exit code 1: it does not fit.",
    )
    made.add_argument("--gpu", default=GPU_DEFAULT, metavar="BYTES", help=f"memory of the GPU ({GPU_DEFAULT})")
    made.add_argument("--concurrency", default=None, metavar="N", help="sequences at once; as many as fit by default")
    made.add_argument("--input-len", default=None, metavar="TOKENS", help=f"of each prompt ({INPUT_DEFAULT})")
    made.add_argument("--output-len", default=None, metavar="TOKENS", help=f"of each answer ({OUTPUT_DEFAULT})")
    made.add_argument(
        "--quantization",
        "-q",
        default=None,
        metavar="|".join(("auto", "none", *QUANTISATIONS)),
        help="as if the weights were so; auto: as the model's files say",
    )
    made.add_argument("--json", action="store_true", help="print one JSON object")
    return made


def run(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """The command; returns its exit code.  Raises StartupError."""
    given, rest = _parser().parse_known_args(list(words))
    config = settings.read(rest, environ).config
    if config.device == "cpu":
        raise StartupError("vserve plan is about GPUs; on a CPU the server says at its start what the KV cache takes")
    wanted = Wanted(
        gpu=_bytes(given.gpu),
        input_len=_count("--input-len", given.input_len, INPUT_DEFAULT),
        output_len=_count("--output-len", given.output_len, OUTPUT_DEFAULT),
        concurrency=None if given.concurrency is None else _count("--concurrency", given.concurrency, 1),
    )
    method = _method(given.quantization or config.quantization)
    found = None
    answer = None
    if config.model is not None:
        environ = hub.environ_with(environ, config.download_dir, config.hf_token)
        found = outline(config.model, environ=environ, revision=config.revision)
        answer = answered(found, config, wanted, _quantisation(found, method))
    # The table's models have their own lengths: a flag for the one asked about is not for them.
    general = dataclasses.replace(config, max_model_len=None)
    rows = [
        answered(of_size(size), general, Wanted(wanted.gpu, tokens - 1, 1, None), quantisation)
        for size, tokens in ROWS
        for quantisation in (None, QUANTISATIONS["awq"])
    ]
    if given.json:
        _print(json.dumps(_as_json(found, answer, rows, config, wanted), indent=2))
    else:
        page = [] if found is None or answer is None else [*_page(found, answer, config, wanted), ""]
        _print("\n".join(page + _table(rows, config, wanted)))
    return 0 if answer is None or _fits(answer, wanted) else EXIT_DOES_NOT_FIT


def _print(text: str) -> None:
    """To stdout; a reader that has seen enough, such as head, is no mistake."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What could not be written would be tried again at the end of the process.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def answered(found: Outline, config: Config, wanted: Wanted, quantisation: Quantisation | GgufTensors | None) -> Answer:
    """The plan of one model.  Raises StartupError where what is wanted contradicts the model or itself."""
    model = found.config
    longest = min(model.max_position, config.max_model_len or model.max_position)
    if wanted.length > longest:
        raise StartupError(
            f"--input-len {wanted.input_len} and --output-len {wanted.output_len} are {wanted.length} tokens, more "
            f"than the {longest} of a sequence"
        )
    dtype = element_type(config.dtype, model.dtype, "cuda")
    size = ELEMENT_BYTES[dtype]
    form = CacheForm.of(config.kv_cache_dtype, dtype)
    rows = config.max_num_seqs or SIZES["cuda"].max_num_seqs
    tokens = config.max_num_batched_tokens or SIZES["cuda"].max_num_batched_tokens
    kept = reserve(model, max_num_seqs=rows, max_tokens=tokens, element_bytes=size, quantisation=quantisation)
    weights = weight_bytes(model, size, quantisation)
    taken = weights + CONTEXT_BYTES
    sequence = -(-wanted.length // config.block_size) * config.block_size * token_bytes(model, form)
    plan: Plan | None = None
    problem: str | None = None
    try:
        budget = config.kv_cache_memory_bytes or cache_budget(
            total=wanted.gpu, utilization=config.gpu_memory_utilization, taken=taken, reserve=kept
        )
        cache = plan_cache(
            model,
            budget_bytes=budget,
            form=form,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
        )
        allowed = int(wanted.gpu * config.gpu_memory_utilization)
        made = Plan(wanted.gpu, allowed, weights, CONTEXT_BYTES, kept, cache)
        if made.planned > wanted.gpu:  # --kv-cache-memory-bytes may ask for more than there is
            problem = f"{gib(made.planned)} are wanted of a GPU of {gib(wanted.gpu)}"
        else:
            plan = made
    except StartupError as error:
        problem = str(error)
    most = 0 if plan is None else min(rows, fitting_sequences(plan.cache, wanted.length))
    if plan is not None and most == 0:
        problem = f"the KV cache holds {plan.cache.tokens} tokens, and one sequence has {wanted.length}"
    average = 0 if plan is None else fitting_sequences(plan.cache, wanted.input_len + -(-wanted.output_len // 2))
    at_once = wanted.concurrency or most
    blocks = 0 if plan is None or not at_once else plan.cache.num_blocks // at_once
    return Answer(
        name=found.name,
        dtype=dtype,
        quantisation=None if quantisation is None else quantisation.name,
        weights=weights,
        token_bytes=token_bytes(model, form),
        cache_dtype=form.dtype,
        reserve=kept,
        plan=plan,
        problem=problem,
        least_gpu=math.ceil((taken + kept.total + sequence) / config.gpu_memory_utilization),
        concurrency=most,
        average=min(rows, average),
        longest_input=max(0, min(longest, blocks * config.block_size) - wanted.output_len),
    )


def _fits(answer: Answer, wanted: Wanted) -> bool:
    return answer.concurrency >= (wanted.concurrency or 1)


def _method(flag: str) -> str:
    """auto, none or one of QUANTISATIONS."""
    method = ALIASES.get(flag, flag)
    if method not in ("auto", "none", *QUANTISATIONS):
        raise StartupError(f"--quantization: {shorten(flag)} is not auto, none, {', '.join(QUANTISATIONS)}")
    return method


def _quantisation(found: Outline, method: str) -> Quantisation | GgufTensors | None:
    """How the weights are to lie: by method, or with auto as the files say."""
    if method == "none":
        return None
    if method != "auto" and (found.quantization is None or method != found.quantization.method):
        return QUANTISATIONS[method]
    if found.tensors is not None:
        return GgufTensors(found.tensors)
    if found.quantization is not None:
        return Quantisation.of(found.quantization)
    if found.refused is not None:
        raise StartupError(f"{found.refused}; --quantization plans the model as if its weights were so")
    return None


def _bytes(text: str) -> int:
    try:
        size = parse_bytes(text)
    except (ValueError, OverflowError):
        size = 0
    if not GIB // 4 <= size <= 1 << 50:
        raise StartupError(f"--gpu: {shorten(text)} is no size of a GPU, such as 40GiB or 80GiB")
    return size


def _count(flag: str, text: str | None, default: int) -> int:
    if text is None:
        return default
    # isdecimal alone takes digits of other scripts and any number of them.
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and int(text) >= 1):
        raise StartupError(f"{flag}: {shorten(text)} is not a whole number from 1 to 999999999")
    return int(text)


def _page(found: Outline, answer: Answer, config: Config, wanted: Wanted) -> list[str]:
    """The plan of the model that was asked about."""
    weights = answer.dtype if answer.quantisation is None else f"{answer.quantisation} and {answer.dtype}"
    cache = "" if answer.cache_dtype == answer.dtype else f" ({answer.cache_dtype})"
    rows = [
        ("model", answer.name),
        ("weights", f"{gib(answer.weights)} ({weights})"),
        ("KV cache", f"{answer.token_bytes:,} bytes a token{cache}"),
        ("driver", gib(CONTEXT_BYTES)),
        ("largest step", gib(answer.reserve.step)),
        ("graphs", gib(answer.reserve.graph)),
        ("libraries", gib(answer.reserve.libraries)),
    ]
    if answer.plan is not None:
        plan, made = answer.plan, answer.plan.cache
        rows += [
            ("most blocks", f"{made.num_blocks} of {made.block_size} tokens, {made.tokens} tokens in all"),
            ("longest sequence", f"{made.max_model_len} tokens"),
            ("in all", f"{gib(plan.planned)} of {gib(plan.allowed)} allowed on a GPU of {gib(plan.total)}"),
        ]
    if answer.problem is not None:
        rows += [("does not fit", answer.problem), ("would do", f"a GPU of {_whole_gib(answer.least_gpu)}")]
    else:
        rows_limit = config.max_num_seqs or SIZES["cuda"].max_num_seqs
        limit = " (--max-num-seqs)" if answer.concurrency == rows_limit else ""
        rows += [
            ("most sequences", f"{answer.concurrency} of {wanted.input_len} + {wanted.output_len} tokens{limit}"),
            ("concurrency", f"{answer.concurrency} recommended; up to {answer.average} while answers are half-way"),
        ]
        at_once = wanted.concurrency or answer.concurrency
        verdict = "" if _fits(answer, wanted) else ": they do not all fit, some wait or are computed again"
        rows.append((f"at {at_once} at once", f"prompts of up to {answer.longest_input} tokens{verdict}"))
    if found.refused is not None:
        rows.append(("note", f"vserve serve would refuse it: {found.refused}"))
    return [f"{label:<17} {text}" for label, text in rows]


def _table(rows: Sequence[Answer], config: Config, wanted: Wanted) -> list[str]:
    lines = [
        f"Sizes on a GPU of {gib(wanted.gpu)}, of which {config.gpu_memory_utilization:g} may be taken:",
        f"{'size':<5} {'weights':<10} {'':>10} {'KV a token':>11} {'tokens each':>12} {'concurrency':>12}",
    ]
    for (size, tokens), pair in zip(ROWS, zip(rows[::2], rows[1::2], strict=True), strict=True):
        for row in pair:
            kind = row.quantisation or row.dtype
            answer = str(row.concurrency) if row.problem is None else f"needs {_whole_gib(row.least_gpu)}"
            kilobytes = f"{row.token_bytes / 1024:g} KiB"
            lines.append(f"{size:<5} {kind:<10} {gib(row.weights):>10} {kilobytes:>11} {tokens:>12} {answer:>12}")
    names = ", ".join(f"{size} is {MODEL_SIZES[size][0]}" for size, _ in ROWS)
    lines.append(f"({names})")
    return lines


def _whole_gib(size: int) -> str:
    return f"{math.ceil(size / GIB)} GiB"


def _as_json(
    found: Outline | None, answer: Answer | None, rows: Sequence[Answer], config: Config, wanted: Wanted
) -> dict[str, object]:
    """The same as a JSON object: sizes in bytes, lengths in tokens."""
    made: dict[str, object] = {
        "gpu_bytes": wanted.gpu,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "input_len": wanted.input_len,
        "output_len": wanted.output_len,
        "concurrency": wanted.concurrency,
    }
    if found is not None and answer is not None:
        made["model"] = {
            **_row(answer),
            "fits": _fits(answer, wanted),
            "refused": found.refused,
        }
    made["sizes"] = [
        {"size": size, "tokens": tokens, **_row(row)}
        for (size, tokens), row in zip([row for row in ROWS for _ in range(2)], rows, strict=True)
    ]
    return made


def _row(answer: Answer) -> dict[str, object]:
    plan = answer.plan
    return {
        "name": answer.name,
        "dtype": answer.dtype,
        "quantization": answer.quantisation,
        "weights_bytes": answer.weights,
        "kv_cache_dtype": answer.cache_dtype,
        "kv_bytes_per_token": answer.token_bytes,
        "driver_bytes": CONTEXT_BYTES,
        "step_bytes": answer.reserve.step,
        "graph_bytes": answer.reserve.graph,
        "libraries_bytes": answer.reserve.libraries,
        "planned_bytes": None if plan is None else plan.planned,
        "num_blocks": None if plan is None else plan.cache.num_blocks,
        "block_size": None if plan is None else plan.cache.block_size,
        "max_model_len": None if plan is None else plan.cache.max_model_len,
        "recommended_concurrency": answer.concurrency,
        "average_concurrency": answer.average,
        "longest_input": answer.longest_input,
        "problem": answer.problem,
        "least_gpu_bytes": answer.least_gpu,
    }
