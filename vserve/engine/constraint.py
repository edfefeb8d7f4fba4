"""DrawMask: which ids a sequence may draw next, as bits made on the host, for every back end.

Joins the grammar that the answer follows, the ids that alone are allowed, the words that must not appear, and the ban
on stop ids before min_tokens.  The sampler of each device applies the bits.  G only.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from vserve.engine.request import GenRequest
from vserve.engine.sequence import Sequence

Bits = NDArray[np.uint8]
"""[ceil(V / 8)]: bit i % 8 of byte i // 8 is set where id i may be drawn; bits beyond V are clear."""


def is_masked(request: GenRequest) -> bool:
    """True where some ids may not be drawn, min_tokens apart."""
    params = request.sampling
    return request.constraint is not None or params.allowed_ids is not None or bool(params.bad_words)


def unpack(bits: Bits, vocab_size: int) -> NDArray[np.bool_]:
    """One truth value an id, [vocab_size]."""
    return np.unpackbits(bits, count=vocab_size, bitorder="little").view(np.bool_)


class DrawMask:
    """The mask of one sequence whose request is masked, from its admission to the row's next owner.

    After a preemption the sequence gets another one; its constraint goes on from what it has seen.
    """

    __slots__ = ("_constraint", "_first_free", "_fixed", "_sequence", "_stop", "_vocab", "_words")

    def __init__(self, sequence: Sequence, vocab_size: int) -> None:
        request, params = sequence.request, sequence.request.sampling
        self._sequence = sequence
        self._vocab = vocab_size
        self._constraint = request.constraint
        self._words = [(list(word[:-1]), word[-1]) for word in params.bad_words if len(word) > 1]
        allowed = range(vocab_size) if params.allowed_ids is None else params.allowed_ids
        self._fixed = _packed(allowed, vocab_size)
        self._fixed &= ~_packed([word[0] for word in params.bad_words if len(word) == 1], vocab_size)
        self._first_free = sequence.prompt_length + request.min_tokens if request.stop_ids else 0
        self._stop = _packed(request.stop_ids, vocab_size)

    def bits(self, length: int) -> Bits:
        """For the draw after length tokens, which are all known where the request needs ids.  Read only.

        Raises what the constraint raises.
        """
        bits = self._fixed
        if self._constraint is not None or self._words:
            generated = self._sequence.tokens[self._sequence.prompt_length : length]
            bits = bits.copy()
            if self._constraint is not None:
                grammar = np.frombuffer(self._constraint.mask(generated), np.uint8)[: len(bits)]
                bits[: len(grammar)] &= grammar
                bits[len(grammar) :] = 0
            for before, last in self._words:
                if generated[-len(before) :] == before:
                    bits[last >> 3] &= ~(1 << (last & 7)) & 0xFF
        if length < self._first_free:
            going_on = bits & ~self._stop
            if going_on.any():  # else the answer is complete, and min_tokens cannot make it longer
                return going_on
        return bits


def _packed(ids: Iterable[int], vocab_size: int) -> Bits:
    flags = np.zeros(vocab_size, np.bool_)
    flags[[id for id in ids if 0 <= id < vocab_size]] = True
    return np.packbits(flags, bitorder="little")
