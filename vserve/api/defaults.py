"""What a model's generation_config.json says about sampling, and how a request's wishes override it.

Knows nothing of HTTP.  A value that is not usable is as good as missing: the file is the model's, not the client's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vserve.api.requests import Drawing
from vserve.engine.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Defaults:
    """Sampling of a request that does not say; where the model does not say either, OpenAI's values.

    max_tokens: the model's own bound on a chat answer, or None.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Defaults:
        """From the content of generation_config.json."""
        max_tokens = config.get("max_new_tokens")
        return cls(
            temperature=_number(config, "temperature", 0.0, 2.0, 1.0),
            top_p=_number(config, "top_p", 1e-6, 1.0, 1.0),
            top_k=int(_number(config, "top_k", 0, 2**31, 0)),
            min_p=_number(config, "min_p", 0.0, 1.0, 0.0),
            repetition_penalty=_number(config, "repetition_penalty", 1e-6, 100.0, 1.0),
            max_tokens=max_tokens if type(max_tokens) is int and max_tokens >= 1 else None,
        )

    def sampling(self, drawing: Drawing, logprobs: int | None, vocab_size: int) -> SamplingParams:
        """The parameters of choice 0: the request's values over these."""
        top_k = self.top_k if drawing.top_k is None else max(0, drawing.top_k)
        return SamplingParams(
            temperature=self.temperature if drawing.temperature is None else drawing.temperature,
            top_k=0 if top_k >= vocab_size else top_k,
            top_p=self.top_p if drawing.top_p is None else drawing.top_p,
            min_p=self.min_p if drawing.min_p is None else drawing.min_p,
            repetition_penalty=(
                self.repetition_penalty if drawing.repetition_penalty is None else drawing.repetition_penalty
            ),
            presence_penalty=drawing.presence_penalty,
            frequency_penalty=drawing.frequency_penalty,
            logit_bias=drawing.logit_bias,
            seed=drawing.seed,
            logprobs=logprobs,
            allowed_ids=drawing.allowed_ids,
        )


def _number(config: Mapping[str, object], name: str, low: float, high: float, missing: float) -> float:
    value = config.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high:
        return float(value)
    return missing
