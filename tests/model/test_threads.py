"""Steps take every core, but leave one while other processes want it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vserve.model.threads import LOOK_EVERY_S, Neighbours, Sharing, StepThreads


class Machine:
    """Two processors whose counters the test sets; ticks are hundredths of a second."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.own_s = 3.0
        self.busy = [0, 0, 0, 0]
        self.steal = 0
        self.idle = 50

    def stat(self) -> str:
        lines = ["cpu  9 9 9 9 9 9 9 9 9 9", ""]
        for number, busy in enumerate(self.busy):
            lines.append(f"cpu{number} {1000 + busy} 20 30 {self.idle} 70 1 2 {self.steal if number == 0 else 0} 5 0")
        return "\n".join([*lines, "intr 5 5 5", "ctxt 99"])

    def neighbours(self) -> Neighbours:
        return Neighbours(frozenset((0, 1)), self.stat, lambda: self.own_s, lambda: self.now_s)

    def run(self, seconds: float, own: float = 0.0, others: float = 0.0, cpu: int = 1) -> None:
        self.now_s += seconds
        self.own_s += own
        self.busy[cpu] += round((own + others) * 100)
        self.idle += round(seconds * 100)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_others_work_is_what_the_processors_did_beyond_our_own() -> None:
    machine = Machine()
    neighbours = machine.neighbours()
    machine.run(2.0, own=2.5, others=1.0)
    assert neighbours.look() == pytest.approx(0.5)
    machine.run(2.0, own=3.9)
    assert neighbours.look() == pytest.approx(0.0)


def test_time_stolen_by_other_virtual_machines_counts_as_others_work() -> None:
    machine = Machine()
    neighbours = machine.neighbours()
    machine.run(1.0)
    machine.steal = 80
    assert neighbours.look() == pytest.approx(0.8)


def test_processors_we_may_not_use_do_not_count() -> None:
    machine = Machine()
    neighbours = machine.neighbours()
    machine.run(1.0, others=1.0, cpu=3)
    assert neighbours.look() == 0.0


@pytest.mark.parametrize("text", ["", "nothing of use", "cpu 1 2 3"])
def test_a_system_without_counters_has_no_neighbours(text: str) -> None:
    neighbours = Neighbours(frozenset((0, 1)), lambda: text)
    assert neighbours.look() == 0.0


def test_two_looks_at_one_moment_are_no_division_by_zero() -> None:
    machine = Machine()
    neighbours = machine.neighbours()
    assert neighbours.look() == 0.0


@pytest.mark.parametrize(("cores", "few"), [(1, 1), (2, 1), (4, 3)])
def test_a_core_is_left_while_others_want_one_and_taken_back_after(cores: int, few: int) -> None:
    machine = Machine()
    threads = StepThreads(cores, machine.neighbours(), lambda: machine.now_s)
    seen = []
    for others in (0.0, 0.9, 0.9, 0.1, 0.0):
        machine.run(LOOK_EVERY_S, own=LOOK_EVERY_S, others=others * LOOK_EVERY_S)
        threads.prepare()
        seen.append(torch.get_num_threads())
    assert seen == [cores, few, few, cores, cores]


def test_steps_between_two_looks_keep_the_number() -> None:
    machine = Machine()
    threads = StepThreads(2, machine.neighbours(), lambda: machine.now_s)
    machine.run(LOOK_EVERY_S / 2, others=LOOK_EVERY_S / 2)
    threads.prepare()
    assert torch.get_num_threads() == 2


def test_two_models_in_one_process_share_the_cores() -> None:
    sharing = Sharing(4)
    assert (sharing.step_threads, sharing.encoder_threads) == (4, 4)
    sharing.encoding = True
    assert (sharing.step_threads, sharing.encoder_threads) == (3, 4)
    sharing.stepping = lambda: True
    assert (sharing.step_threads, sharing.encoder_threads) == (3, 1)
    assert Sharing(1).step_threads == Sharing(1).encoder_threads == 1


def test_a_limit_is_looked_at_before_every_step() -> None:
    machine = Machine()
    threads = StepThreads(2, machine.neighbours(), lambda: machine.now_s)
    sharing = Sharing(2)
    threads.limit = lambda: sharing.step_threads
    seen = []
    for encoding in (False, True, False):
        sharing.encoding = encoding
        threads.prepare()
        seen.append(torch.get_num_threads())
    assert seen == [2, 1, 2]


def test_the_counters_of_this_machine_can_be_read() -> None:
    threads = StepThreads(1, clock=iter(range(100)).__next__)  # a look a step
    for _ in range(3):
        threads.prepare()
    assert torch.get_num_threads() == 1
