"""The small parts: life cycle, keys, load, keep-alive set, defaults, Accept."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from tests.fakes_api import options
from vserve.api.accept import prefers
from vserve.api.access import METRICS, Keys
from vserve.api.app import App
from vserve.api.defaults import Defaults
from vserve.api.generation import ignored_header
from vserve.api.keepalive import KeepAlive
from vserve.api.load import Usage
from vserve.api.requests import Drawing
from vserve.api.routes import OPEN, routes, table
from vserve.api.status import Lifecycle, Status
from vserve.engine.request import EngineStats
from vserve.errors import Unauthorized

PATHS = {
    Status.STARTING: (),
    Status.READY: (Status.READY,),
    Status.DRAINING: (Status.READY, Status.DRAINING),
    Status.DEAD: (Status.READY, Status.DEAD),
    Status.STOPPED: (Status.READY, Status.DRAINING, Status.STOPPED),
}
LEGAL = {
    ("starting", "ready"), ("starting", "draining"), ("starting", "dead"), ("starting", "stopped"),
    ("ready", "draining"), ("ready", "dead"), ("draining", "stopped"), ("draining", "dead"), ("dead", "stopped"),
}  # fmt: skip


@pytest.mark.parametrize(("begin", "end"), list(itertools.product(Status, Status)))
def test_only_the_listed_moves_of_the_life_cycle_are_possible(begin: Status, end: Status) -> None:
    life = Lifecycle()
    for status in PATHS[begin]:
        life.to(status)
    assert life.can(end) == ((begin.value, end.value) in LEGAL)
    if life.can(end):
        life.to(end)
        assert life.status is end
    else:
        with pytest.raises(RuntimeError):
            life.to(end)


def test_the_phase_is_the_stage_only_while_starting() -> None:
    life = Lifecycle()
    life.report("loading weights", 0.5)
    assert (life.phase, life.stage.share) == ("loading weights", 0.5)
    life.to(Status.READY)
    assert life.phase == "ready"


@pytest.mark.parametrize(
    "value", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic right", "right", "Bearer right2", "Bearer righ"]
)
def test_a_missing_or_wrong_key_is_401(value: str | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        Keys(["right", "other"]).check(value, "infer")
    assert ("www-authenticate", "Bearer") in caught.value.headers()
    assert "right" not in caught.value.message


@pytest.mark.promise("input: other tenants' prefixes")
def test_each_key_has_its_own_salt_and_no_key_has_none() -> None:
    keys = Keys(["right", "other"])
    salts = {keys.salt("Bearer right"), keys.salt("bearer right"), keys.salt("Bearer other")}
    assert len(salts) == 2
    assert Keys(()).salt(None) == b""


class Clock:
    """Seconds set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_utilization_is_the_busy_share_of_the_last_seconds_and_decays_when_idle() -> None:
    clock = Clock()
    usage = Usage(clock)
    assert usage.utilization() == 0.0
    for step in range(1, 101):
        clock.now += 0.2
        usage.observe(EngineStats(busy_s_total=step * 0.1, finished_total=step))
    assert usage.utilization() == pytest.approx(0.5, abs=0.05)
    assert usage.seconds_to_finish(50) == pytest.approx(10, abs=1)
    clock.now += 5
    assert 0.2 < usage.utilization() < 0.3
    clock.now += 3600
    assert usage.utilization() == 0.0
    assert usage.seconds_to_finish(10**6) == 1
    usage.observe(EngineStats(busy_s_total=15.0, finished_total=101))
    assert usage.utilization() == pytest.approx(0.5, abs=0.01)


def test_the_models_generation_config_stands_in_for_what_the_request_does_not_say() -> None:
    config = {"temperature": 0.2, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "max_new_tokens": 99}
    defaults = Defaults.of(config)
    nothing = Drawing(None, None, None, None, None, 0.0, 0.0, (), None)
    params = defaults.sampling(nothing, None, 1000)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.2, 0.9, 20, 1.1)
    assert defaults.max_tokens == 99
    asked = Drawing(1.5, 1.0, -1, 0.1, 1.0, 0.5, -0.5, ((3, 1.0),), 7)
    params = defaults.sampling(asked, 2, 1000)
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.repetition_penalty) == (
        1.5, 1.0, 0, 0.1, 1.0,
    )  # fmt: skip
    assert (params.logit_bias, params.seed, params.logprobs) == (((3, 1.0),), 7, 2)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"temperature": "hot", "top_p": None, "top_k": -5, "min_p": True, "max_new_tokens": 0},
        {"temperature": float("nan"), "top_p": 0, "repetition_penalty": 0.0, "max_new_tokens": True},
    ],
)
def test_unusable_values_of_the_generation_config_are_as_good_as_missing(config: dict[str, object]) -> None:
    assert Defaults.of(config) == Defaults()


@pytest.mark.parametrize(
    ("accept", "plain"),
    [
        (None, False),
        ("", False),
        ("*/*", False),
        ("text/plain", True),
        ("text/*", True),
        ("text/plain, */*", False),
        ("text/plain, */*;q=0.8", True),
        ("application/json, text/plain, */*", False),
        ("application/json;q=0.1, text/plain;q=0.5", True),
        ("text/plain;q=0", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        (",,;;q=", False),
    ],
)
def test_plain_text_is_given_where_it_is_preferred(accept: str | None, plain: bool) -> None:
    assert prefers(accept, "text/plain", over="application/json") is plain


def test_the_ignored_fields_header_is_bounded_and_safe() -> None:
    names = ["ok_1", "a\r\nx: y", "ü" * 100, *(f"f{i}" for i in range(100))]
    ((name, value),) = ignored_header(names)
    assert name == "x-ignored-params"
    assert value.startswith("ok_1, a??x??y, ????")
    assert value.endswith("f12, and 87 more")
    assert value.isascii()
    assert value.isprintable()
    assert len(value) < 16 * 70
    assert ignored_header(()) == ()


@pytest.mark.promise("R12", "input: side doors")
def test_every_route_is_guarded_but_the_probes_the_metrics_and_the_docs() -> None:
    entries = table(App(options()))
    assert {entry.name for entry in entries if entry.auth == OPEN} == {
        "ping", "health", "ready", "live", "startup", "version", "openapi", "home", "docs",
        "oauth2_redirect", "redoc", "page_files",
    }  # fmt: skip
    assert {entry.name for entry in entries if entry.auth == METRICS} == {"metrics"}
    assert len({entry.name for entry in entries}) == len(entries)
    assert all(route.body == (route.method == "POST" and route.auth != OPEN) for route in routes(entries))


def test_a_stream_that_fails_at_its_comment_silences_no_other() -> None:
    class Quiet:
        def __init__(self, broken: bool) -> None:
            self.broken = broken
            self.ticks = 0
            self.ticked = asyncio.Event()

        def tick(self) -> None:
            self.ticks += 1
            if self.broken:
                raise RuntimeError("a comment broke")
            if self.ticks == 3:
                self.ticked.set()

    async def run() -> None:
        streams = [Quiet(True), Quiet(False), Quiet(True)]
        keep_alive = KeepAlive(0.002)
        for stream in streams:
            keep_alive.add(stream)
        await asyncio.wait_for(streams[1].ticked.wait(), 10)
        keep_alive.close()

    asyncio.run(run())
