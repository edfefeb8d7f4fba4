"""The tokenizer of an embedding model: texts and pairs of texts to what the encoder reads.

Adds to ``Tokenizer`` pairs, token types and cutting that leaves the special tokens in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import tokenizers

from vserve.errors import BadRequest, StartupError
from vserve.text.tokenizer import Tokenizer

Input = str | tuple[str, str]
"""One text, or two that are read as a pair."""


@dataclass(frozen=True, slots=True)
class EncoderIds:
    """What the encoder reads of one input.

    types: as long as ids, () where all are 0.  length: tokens before anything was cut; ids are () where these were too
    many and nothing was to be cut.
    """

    ids: Sequence[int]
    types: Sequence[int]
    length: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """What stands before, between and behind the texts of an input, as (id, type); types: those of the texts."""

    gaps: tuple[tuple[tuple[int, int], ...], ...]
    types: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.gaps))

    def fill(self, parts: Sequence[Sequence[int]], length: int) -> EncoderIds:
        ids: list[int] = []
        types: list[int] = []
        for place, gap in enumerate(self.gaps):
            ids += [id for id, _ in gap]
            types += [type for _, type in gap]
            if place < len(parts):
                ids += parts[place]
                types += [self.types[place]] * len(parts[place])
        return EncoderIds(ids, types if any(types) else (), length)


class EncoderTokenizer(Tokenizer):
    """As Tokenizer: immutable, any thread may call any method; the GIL is released while texts are encoded."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        bos_id: int | None,
        eos_ids: Iterable[int],
        special_tokens: Mapping[str, str],
        pieces: Sequence[str] | None = None,
    ) -> None:
        super().__init__(core, bos_id=bos_id, eos_ids=eos_ids, special_tokens=special_tokens, pieces=pieces)
        self._frames = {
            (special, pair): _frame(core, special, pair) for special in (False, True) for pair in (False, True)
        }

    def encode_inputs(
        self,
        inputs: Sequence[Input],
        most: int,
        *,
        cut: bool = False,
        add_special: bool = True,
        lower_case: bool = False,
    ) -> list[EncoderIds]:
        """The ids of each input, those of over most tokens cut at the end or, without cut, left out.

        Special tokens stay when texts are cut; of a pair the longer text is cut first.  Raises BadRequest for text that
        is not valid Unicode, and where most leaves no room beside the special tokens.
        """
        parts = [(given,) if isinstance(given, str) else given for given in inputs]
        # Once each: a query beside a thousand documents would be encoded a thousand times.
        known = {text: i for i, text in enumerate(dict.fromkeys(text for texts in parts for text in texts))}
        try:
            encoded = self._core.encode_batch_fast(
                [text.lower() for text in known] if lower_case else list(known), add_special_tokens=False
            )
        except TypeError:
            raise BadRequest("a text is not valid Unicode: it holds a lone surrogate") from None
        ids = [encoding.ids for encoding in encoded]
        return [self._framed([ids[known[text]] for text in texts], most, cut, add_special) for texts in parts]

    def cut_ids(self, ids: Sequence[int], most: int) -> Sequence[int]:
        """The first ids, at most so many; a special one at the end stays there."""
        if len(ids) <= most:
            return ids
        return [*ids[: most - 1], ids[-1]] if ids[-1] in self.special_ids and most > 1 else ids[:most]

    def _framed(self, parts: Sequence[Sequence[int]], most: int, cut: bool, add_special: bool) -> EncoderIds:
        frame = self._frames[add_special, len(parts) == 2]
        length = frame.size + sum(map(len, parts))
        if length > most:
            if not cut:
                return EncoderIds((), (), length)
            room = most - frame.size
            if room < len(parts):
                raise BadRequest(
                    f"`truncate_prompt_tokens` is {most}, which leaves no room beside {frame.size} special tokens.",
                    param="truncate_prompt_tokens",
                )
            shares = _shares([len(part) for part in parts], room)
            parts = [part[:share] for part, share in zip(parts, shares, strict=True)]
        return frame.fill(parts, length)


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens of each text stay, of more than room in all: the longer one is cut first, then both alike."""
    if len(lengths) == 1:
        return [room]
    first, second = lengths
    if first <= second:
        kept = min(first, room // 2)
        return [kept, room - kept]
    kept = min(second, room // 2)
    return [room - kept, kept]


def _frame(core: tokenizers.Tokenizer, add_special: bool, pair: bool) -> _Frame:
    """What the tokenizer's post-processor puts around texts, by looking at what it makes of short ones."""
    made = core.encode("a", "a" if pair else None, add_special_tokens=add_special)
    gaps: list[list[tuple[int, int]]] = [[]]
    types: list[int] = []
    last: int | None = None
    for id, kind, text in zip(made.ids, made.type_ids, made.sequence_ids, strict=True):
        if text is None:
            gaps[-1].append((id, kind))
        elif text != last:
            # Two texts with nothing between them have an empty gap there.
            gaps.append([])
            types.append(kind)
            if text != len(types) - 1:
                raise StartupError("the tokenizer puts the second text of a pair before the first")
        last = text if text is not None else last
    if len(types) != (2 if pair else 1):
        raise StartupError("the tokenizer makes nothing of the text 'a'")
    return _Frame(tuple(map(tuple, gaps)), tuple(types))
