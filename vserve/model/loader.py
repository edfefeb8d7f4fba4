"""load: a model's files, or random numbers in their place, -> a ``Decoder`` ready to run.

Joins where the parts come from (stored.py, dummy.py) with what is made of them (building.py); which tensors there are
is tensors.py's.  All names and shapes are checked before the first tensor is read.  Knows no file format.  Runs on the
engine thread, and on a few of its own.
"""

from __future__ import annotations

from contextlib import closing
from typing import Final

import torch

from vserve.model.building import Progress, build
from vserve.model.config import ModelConfig
from vserve.model.decoder import Decoder
from vserve.model.dummy import DummyParts
from vserve.model.families import family_of
from vserve.model.quantization import Quantization
from vserve.model.source import ModelSource
from vserve.model.stored import StoredParts
from vserve.model.tensors import check, linear_numbers
from vserve.model.upload import MOST_THREADS, Uploader
from vserve.model.weights import Weights

DENSE_COPY_LIMIT: Final = 4 << 30
"""Most bytes of float32 copies kept beside quantised weights, for steps of many rows; a larger model goes without."""


def load(
    source: ModelSource,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load_format: str = "auto",
    seed: int = 0,
    allow_nan: bool = False,
    progress: Progress | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    """Read source's weights, or with load_format "dummy" draw random ones from seed, onto device in dtype.

    Quantised weights stay as they are on a GPU, and on a CPU in float32; elsewhere they become dtype.  quantization:
    what ``choose`` gave for source.  StartupError for a tensor that is missing, of a wrong shape or unknown, or, unless
    allow_nan, not finite.  The decoder does not depend on the files.
    """
    if load_format == "dummy":
        return load_dummy(
            source.config, device=device, dtype=dtype, seed=seed, progress=progress, quantization=quantization
        )
    return load_weights(
        source.open_weights(),
        source.config,
        device=device,
        dtype=dtype,
        progress=progress,
        allow_nan=allow_nan,
        make_fp8=quantization is not None and quantization.online,
    )


def load_weights(
    weights: Weights,
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    dense_copy_limit: int = DENSE_COPY_LIMIT,
    allow_nan: bool = False,
    for_gpu: bool | None = None,
    make_fp8: bool = False,
) -> Decoder:
    """The decoder of config with the tensors of weights; errors as in load.  make_fp8: of plain layers, as they load.

    for_gpu: in the form for a GPU, whatever the device: on a CPU its kernels are interpreted.  None: by the device.
    """
    for_gpu = device.type == "cuda" if for_gpu is None else for_gpu
    names = check(weights, config)
    copies = 4 * linear_numbers(config) <= dense_copy_limit
    if device.type != "cuda":
        parts = StoredParts(weights, config, names, device, dtype, copies, for_gpu, make_fp8)
        decoder = build(parts, config, names, progress)
    else:
        with closing(Uploader(device)) as uploader:
            parts = StoredParts(weights, config, names, device, dtype, copies, for_gpu, make_fp8, uploader)
            decoder = build(parts, config, names, progress, MOST_THREADS)
    if not allow_nan:
        parts.verify()
    return decoder


def load_dummy(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
    progress: Progress | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    """The decoder of config with weights drawn from seed on device: spread 0.02, normal where they are not quantised.

    Norms are 1, biases 0.
    """
    names = family_of(config.architecture).names
    return build(DummyParts(config, names, device, dtype, seed, quantization), config, names, progress)
