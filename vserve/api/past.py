"""The tokens that one choice has been told of, kept so that its text can be worded again.

Knows no text: ids take 4 bytes each, and of the bulky log-probabilities only the latest are kept.  Event-loop thread
only.
"""

from __future__ import annotations

from array import array
from collections import deque

from vserve.engine.request import Emit, FinishReason, RequestId, TokenLogprobs

SCORES_KEPT = 1024
"""Log-probabilities kept of a choice, in tokens: with 20 alternatives each takes about 3 KiB."""

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


class Past:
    """What was pushed to a choice."""

    __slots__ = ("_end", "_prompt_scores", "_scores", "ids")

    def __init__(self) -> None:
        self.ids = array("I")
        self._scores: deque[TokenLogprobs] = deque(maxlen=SCORES_KEPT)
        self._end: Emit | None = None
        self._prompt_scores: tuple[TokenLogprobs, ...] | None = None

    @property
    def complete(self) -> bool:
        """Whether the engine has said its last token."""
        return self._end is not None

    @property
    def num_bytes(self) -> int:
        """Roughly the memory that this takes."""
        scores = self._scores
        kept = (*scores, *(self._prompt_scores or ()))
        return 4 * len(self.ids) + (len(kept) * (160 + 128 * len(kept[-1].top)) if kept else 0)

    def take(self, emit: Emit) -> None:
        """Keep what was emitted."""
        self.ids.extend(emit.ids)
        if emit.logprobs is not None:
            self._scores.extend(emit.logprobs)
        if emit.prompt_logprobs is not None:
            self._prompt_scores = emit.prompt_logprobs
        if emit.finish in _COMPLETE:
            self._end = emit

    def has_scores_from(self, place: int) -> bool:
        """Whether the log-probabilities of the tokens from that place on are all kept."""
        return len(self.ids) - place <= len(self._scores)

    def until(self, place: int) -> Emit:
        """The tokens before that place, without log-probabilities or an end."""
        return Emit(RequestId(0), tuple(self.ids[:place]))

    def since(self, place: int) -> Emit:
        """The tokens from that place on, and the end if there was one."""
        ids, scores, end = tuple(self.ids[place:]), None, self._end
        if self._scores and len(self._scores) >= len(ids):
            scores = tuple(self._scores)[len(self._scores) - len(ids) :]
        emit = Emit(RequestId(0), ids, logprobs=scores, prompt_logprobs=None if place else self._prompt_scores)
        return emit if end is None else emit._replace(finish=end.finish, stop_id=end.stop_id, timing=end.timing)
