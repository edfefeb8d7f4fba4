"""Quotas: how many requests and tokens a named key or a subject may spend in a minute, a day or a month.

A window begins with the first request that it counts and lasts as long as its name says, by a clock that is never set:
a change of the wall clock gives nothing and takes nothing.  Counted in this process alone and lost with it.
Event-loop thread only.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one caller may spend.  requests_per_minute: so many may come at once; None is no bound."""

    requests_per_minute: float | None = None
    quotas: tuple[Quota, ...] = ()


@dataclass(slots=True)
class _Window:
    used: int
    until_s: float


@dataclass(slots=True)
class _Account:
    """What one caller has spent: a window a kind of quota, and requests that may still be made at once.

    left grows with time up to a minute's worth; None before the first request.
    """

    windows: dict[tuple[Goods, Span], _Window] = field(default_factory=dict)
    left: float | None = None
    at_s: float = 0.0


NO_BOUND = Allowance()


class Accounts:
    """What each caller of one kind has spent."""

    def __init__(self, whose: str, most: int | None = None) -> None:
        """whose: what refusals call a caller.  most: so many are known; who came longest ago is forgotten."""
        self._whose = whose
        self._most = most
        self._accounts: dict[str, _Account] = {}  # who came last is last

    def keep(self, names: Collection[str | None]) -> None:
        """Forget the callers that are not among names."""
        self._accounts = {name: account for name, account in self._accounts.items() if name in names}

    def spend(self, name: str, allowance: Allowance, now_s: float) -> RateLimited | None:
        """Count one request; the 429, and nothing counted, when a quota or the rate is used up."""
        if allowance == NO_BOUND:
            return None
        account = self._of(name)
        refusal = self._refusal(account, allowance.quotas, now_s)
        if refusal is None and allowance.requests_per_minute is not None:
            refusal = self._draw(account, allowance.requests_per_minute, now_s)
        if refusal is None:
            _count(account, allowance.quotas, Goods.REQUESTS, 1, now_s)
        return refusal

    def use(self, name: str, allowance: Allowance, tokens: int, now_s: float) -> None:
        """Count tokens of an answer that has ended, and of its prompt."""
        if allowance.quotas and tokens > 0:
            _count(self._of(name), allowance.quotas, Goods.TOKENS, tokens, now_s)

    def _of(self, name: str) -> _Account:
        account = self._accounts.pop(name, None)
        if account is None:
            account = _Account()
            if len(self._accounts) == self._most:
                del self._accounts[next(iter(self._accounts))]
        self._accounts[name] = account
        return account

    def _refusal(self, account: _Account, quotas: Sequence[Quota], now_s: float) -> RateLimited | None:
        """The 429 of the used-up quota that lasts longest, None when every quota has something left."""
        spent = [
            (window.until_s - now_s, quota, window.used)
            for quota in quotas
            if (window := account.windows.get((quota.goods, quota.span))) is not None
            and window.until_s > now_s
            and window.used >= quota.limit
        ]
        if not spent:
            return None
        left_s, quota, used = max(spent, key=lambda entry: entry[0])
        wait_s = max(1, math.ceil(left_s))
        return RateLimited(
            f"This {self._whose} has used {used} {quota.goods.value}, its quota is {quota.limit} a {quota.span.value}; "
            f"the {quota.span.value} ends in {wait_s} s.",
            retry_after_s=wait_s,
        )

    def _draw(self, account: _Account, requests_per_minute: float, now_s: float) -> RateLimited | None:
        """Take one of the requests that may be made at once."""
        most, per_s = max(1.0, requests_per_minute), requests_per_minute / 60
        left = most if account.left is None else min(most, account.left + (now_s - account.at_s) * per_s)
        account.left, account.at_s = left, now_s
        # A hair below one is one: a client that waits exactly as long as it was told must not be refused again.
        if left < 1 - 1e-6:
            return RateLimited(
                f"This {self._whose} may make {requests_per_minute:g} requests a minute; try again later.",
                retry_after_s=max(1, math.ceil((1 - left) / per_s - 1e-3)),
            )
        account.left = left - 1
        return None


def _count(account: _Account, quotas: Sequence[Quota], goods: Goods, number: int, now_s: float) -> None:
    """Add to every window of these goods."""
    for quota in quotas:
        if quota.goods is not goods:
            continue
        place = (goods, quota.span)
        window = account.windows.get(place)
        if window is None or window.until_s <= now_s:
            window = account.windows[place] = _Window(0, now_s + quota.span.seconds)
        window.used += number
