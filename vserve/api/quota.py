"""Quotas: how many requests and tokens a named key may spend in a minute, a day or a month.

A window begins with the first request that it counts and lasts as long as its name says, by a clock that is never set:
a change of the wall clock gives nothing and takes nothing.  Counted in this process alone and lost with it.
Event-loop thread only.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vserve.errors import RateLimited


class Goods(enum.Enum):
    """What is counted.  Tokens are those of prompt and answer, counted when the answer ends."""

    REQUESTS = "requests"
    TOKENS = "tokens"


class Span(enum.Enum):
    """How long a window lasts; the value is the word for it."""

    MINUTE = "minute"
    DAY = "day"
    MONTH = "month"

    @property
    def seconds(self) -> int:
        return _SECONDS[self]


_SECONDS = {Span.MINUTE: 60, Span.DAY: 86400, Span.MONTH: 30 * 86400}


@dataclass(frozen=True, slots=True)
class Quota:
    """At most limit (>= 1) of the goods in one window.  What is under way when it is reached still ends."""

    goods: Goods
    span: Span
    limit: int


@dataclass(slots=True)
class _Window:
    used: int
    until_s: float


class Ledger:
    """What each key has spent: at most one window a key and kind of quota."""

    def __init__(self) -> None:
        self._windows: dict[tuple[str, Goods, Span], _Window] = {}

    def keep(self, names: Collection[str | None]) -> None:
        """Forget the keys that are not among names."""
        self._windows = {place: window for place, window in self._windows.items() if place[0] in names}

    def refusal(self, name: str, quotas: Sequence[Quota], now_s: float) -> RateLimited | None:
        """The 429 of the used-up quota that lasts longest, None when every quota has something left."""
        spent = [
            (window.until_s - now_s, quota, window.used)
            for quota in quotas
            if (window := self._windows.get((name, quota.goods, quota.span))) is not None
            and window.until_s > now_s
            and window.used >= quota.limit
        ]
        if not spent:
            return None
        left_s, quota, used = max(spent, key=lambda entry: entry[0])
        wait_s = max(1, math.ceil(left_s))
        return RateLimited(
            f"This API key has used {used} {quota.goods.value}, its quota is {quota.limit} a {quota.span.value}; "
            f"the {quota.span.value} ends in {wait_s} s.",
            retry_after_s=wait_s,
        )

    def count(self, name: str, quotas: Sequence[Quota], goods: Goods, number: int, now_s: float) -> None:
        """Add to every window of these goods."""
        for quota in quotas:
            if quota.goods is not goods:
                continue
            place = (name, goods, quota.span)
            window = self._windows.get(place)
            if window is None or window.until_s <= now_s:
                window = self._windows[place] = _Window(0, now_s + quota.span.seconds)
            window.used += number
