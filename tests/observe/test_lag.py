"""The loop's lag is what its timer was late by; a stopped sampler leaves nothing on the loop."""

from __future__ import annotations

import asyncio

from vserve.observe import lag
from vserve.observe.lag import Lag


def test_a_beat_says_how_late_it_was_and_the_next_one_is_due() -> None:
    async def main() -> list[float]:
        heard: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        seen: list[float] = []
        times = iter([0.0, lag.EVERY_S + 0.125, 1.0, 1.0 + lag.EVERY_S - 0.001, 2.0])

        def observe(late_s: float) -> None:
            seen.append(late_s)
            if len(seen) == 2:
                heard.set_result(None)

        sampler = Lag(observe, lambda: next(times))
        sampler.start()
        sampler.start()
        await heard
        sampler.stop()
        sampler.stop()
        return seen

    assert asyncio.run(main()) == [0.125, 0.0]
