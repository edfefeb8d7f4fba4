"""Both stores behave the same, keep their bounds, and the one in a file outlives whatever happens to its process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vserve.errors import StartupError
from vserve.store.memory import MemoryStore
from vserve.store.record import NEXT, Bounds, Record, Status, Store, StoreFailed
from vserve.store.sqlite import SqliteStore

T = TypeVar("T")

BOUNDS = Bounds(entries=5, bytes=8000, age_s=100.0)
OWNERS = (b"", b"ann", b"bob")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


class StoreMachine(RuleBasedStateMachine):
    """A memory and a file store under the same calls; the file is closed and opened again now and then."""

    ids = st.sampled_from([f"resp_{i}" for i in range(9)])

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = Clock()
        self.path = f"/tmp/vserve-store-{os.getpid()}-{id(self)}.db"
        self.memory = MemoryStore(BOUNDS, self.clock)
        self.file = SqliteStore(self.path, BOUNDS, self.clock)
        self.last: dict[str, Record] = {}
        self.lost = 0  # evictions that a reopened file no longer counts
        self.failed: list[Record] = []  # by a restart, since the last write: kept, so that their end can be told

    def both(self, ask: Callable[[Store], Awaitable[T]]) -> T:
        first = self.loop.run_until_complete(_await(ask(self.memory)))
        assert self.loop.run_until_complete(_await(ask(self.file))) == first
        return first

    @rule(id=ids, owner=st.sampled_from(OWNERS), size=st.integers(0, 3000), ago_s=st.integers(0, 150))
    def begin(self, id: str, owner: bytes, size: int, ago_s: int) -> None:
        known = self.last.get(id)
        if known is None:
            self.put(Record(id, owner, self.clock.now_s - ago_s, Status.QUEUED, b"d" * size, b"i", b"t"))

    @rule(id=ids, choose=st.randoms(use_true_random=False), size=st.integers(0, 3000))
    def go_on(self, id: str, choose: object, size: int) -> None:
        known = self.last.get(id)
        if known is not None and known.status.running:
            status = choose.choice(sorted(NEXT[known.status], key=lambda s: s.value))  # type: ignore[attr-defined]
            self.put(Record(id, known.owner, known.created_s, status, b"e" * size, known.items, b"tt"))

    def put(self, record: Record) -> None:
        self.both(lambda store: store.put(record))
        self.last[record.id] = record
        self.failed = []

    @rule(id=ids, owner=st.sampled_from(OWNERS))
    def delete(self, id: str, owner: bytes) -> None:
        if self.both(lambda store: store.delete(id, owner)):
            assert self.last.pop(id).owner == owner

    @rule(passed_s=st.integers(1, 60))
    def wait(self, passed_s: int) -> None:
        self.clock.now_s += passed_s

    @rule()
    def restart(self) -> None:
        self.file.close()
        self.file = SqliteStore(self.path, BOUNDS, self.clock)
        self.lost = self.memory.figures.evictions
        for known in list(self.last.values()):  # the memory store has no such moment: do there what it does to a file
            if known.status.running:
                failed = Record(
                    known.id, known.owner, known.created_s, Status.FAILED, known.document, known.items, known.trace
                )
                self.last[known.id] = failed
                self.failed.append(failed)
                self.memory._running.pop(known.id)
                self.memory._ended[known.id] = failed
        order = self.loop.run_until_complete(self.file._run(lambda: self._order()))
        self.memory._ended = {id: self.memory._ended[id] for id in order}

    def _order(self) -> list[str]:
        return [id for (id,) in self.file._database.execute("SELECT id FROM responses ORDER BY seq")]

    @invariant()
    def they_agree(self) -> None:
        for id in [f"resp_{i}" for i in range(9)]:
            for owner in OWNERS:
                found = self.both(lambda store, id=id, owner=owner: store.get(id, owner))  # type: ignore[misc]
                if found is not None:
                    assert found == self.last[id]
                    assert found.owner == owner
        mine, files = self.memory.figures, self.file.figures
        assert (mine.entries, mine.bytes) == (files.entries, files.bytes)
        assert mine.evictions == files.evictions + self.lost

    @invariant()
    def bounds_hold_and_what_runs_stays(self) -> None:
        running = [record for record in self.last.values() if record.status.running]
        for record in running:
            assert self.both(lambda store, record=record: store.get(record.id, record.owner)) == record  # type: ignore[misc]
        kept = [*running, *self.failed]
        figures = self.file.figures
        assert figures.entries <= max(BOUNDS.entries, len(kept))
        assert figures.bytes <= max(BOUNDS.bytes, sum(record.size for record in kept))

    def teardown(self) -> None:
        self.file.close()
        self.loop.close()
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + suffix)


async def _await(value: Awaitable[T]) -> T:
    return await value


TestStores = StoreMachine.TestCase
TestStores.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def record(id: str, status: Status = Status.COMPLETED, size: int = 10) -> Record:
    return Record(id, b"ann", 1e9, status, os.urandom(size).hex().encode()[:size])


@contextlib.contextmanager
def opened(path: Path, bounds: Bounds | None = None) -> Iterator[SqliteStore]:
    store = SqliteStore(str(path), bounds, clock=Clock())
    try:
        yield store
    finally:
        store.close()


def test_the_file_is_its_owners_alone_and_what_is_deleted_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    with opened(path) as store:
        secret = Record("resp_1", b"", 1e9, Status.COMPLETED, b"a very secret text")
        asyncio.run(store.put(secret))
        assert path.stat().st_mode & 0o777 == 0o600
        assert asyncio.run(store.delete("resp_1", b""))
    assert b"secret" not in path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["responses.db"]


@pytest.mark.promise("fault: disk full")
def test_a_full_disk_fails_that_write_alone_and_harms_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "responses.db") as store:
        asyncio.run(store.put(record("resp_small", size=100)))
        before = store.figures
        pages = store._database.execute("PRAGMA page_count").fetchone()[0]
        store._database.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(StoreFailed, match="full"):
            asyncio.run(store.put(record("resp_large", size=100_000)))
        assert store.figures == before
        assert asyncio.run(store.get("resp_large", b"ann")) is None
        assert asyncio.run(store.get("resp_small", b"ann")) is not None
        asyncio.run(store.put(record("resp_tiny")))  # what still fits is still stored
        store._database.execute("PRAGMA max_page_count = 1000000")
        asyncio.run(store.put(record("resp_large", size=100_000)))
    with opened(tmp_path / "responses.db") as store:
        assert store.figures.entries == 3


FILLER = """
import asyncio, resource, sys
from vserve.store.record import Record, Status, StoreFailed
from vserve.store.sqlite import SqliteStore
store = SqliteStore(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
kept = 0
for i in range(100):
    try:
        asyncio.run(store.put(Record(f"resp_{i}", b"ann", 1e12, Status.COMPLETED, b"x" * 10_000)))
        kept += 1
    except StoreFailed as error:
        print("failed:", error)
for i in range(kept):
    assert asyncio.run(store.get(f"resp_{i}", b"ann")) is not None, i
print("kept", kept)
"""


@pytest.mark.promise("fault: disk full")
def test_a_file_that_may_not_grow_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    done = subprocess.run([sys.executable, "-c", FILLER, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kept = int(done.stdout.split()[-1])
    assert 0 < kept < 100
    assert "failed:" in done.stdout
    with opened(path) as store:
        assert store.figures.entries == kept


KILLED = """
import asyncio, sys
from vserve.store.record import Record, Status
from vserve.store.sqlite import SqliteStore
store = SqliteStore(sys.argv[1])
async def main():
    for i in range(100_000):
        id = f"resp_{i}"
        await store.put(Record(id, b"ann", 1e12, Status.IN_PROGRESS, b"x" * 3000))
        if i % 2:
            await store.put(Record(id, b"ann", 1e12, Status.COMPLETED, b"y" * 5000))
        print(i, flush=True)
asyncio.run(main())
"""


@pytest.mark.promise("R11")
@pytest.mark.parametrize("lines", [1, 20, 77])
def test_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "responses.db"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [int(process.stdout.readline()) for _ in range(lines)]
        process.send_signal(signal.SIGKILL)
        seen += [int(line) for line in process.stdout.read().split()]
    with opened(path) as store:
        for i in seen:
            found = asyncio.run(store.get(f"resp_{i}", b"ann"))
            assert found is not None
            assert found.status is (Status.COMPLETED if i % 2 else Status.FAILED)


def test_one_file_serves_one_process(tmp_path: Path) -> None:
    with opened(tmp_path / "responses.db"), pytest.raises(StartupError, match="another process"):
        SqliteStore(str(tmp_path / "responses.db"))


def _text(path: Path) -> None:
    path.write_text("this is no database, but long enough to be taken for one\n" * 100)


def _foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE other (x)")
        database.commit()


def _later(path: Path) -> None:
    SqliteStore(str(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")


def _torn(path: Path) -> None:
    with opened(path) as store:
        for i in range(50):
            asyncio.run(store.put(record(f"resp_{i}", size=3000)))
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xa5" * 8192
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.promise("fault: corrupt store")
@pytest.mark.parametrize("spoil", [_text, _foreign, _later, _torn, _folder])
def test_a_file_that_is_no_store_ends_the_start_with_one_line(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "responses.db"
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StartupError) as error:
        SqliteStore(str(path))
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.promise("fault: disk full")
def test_what_may_not_be_written_can_still_be_read(tmp_path: Path) -> None:
    with opened(tmp_path / "responses.db") as store:
        asyncio.run(store.put(record("resp_1")))
        store._database.execute("PRAGMA query_only = ON")
        with pytest.raises(StoreFailed, match="readonly"):
            asyncio.run(store.put(record("resp_2")))
        with pytest.raises(StoreFailed, match="readonly"):
            asyncio.run(store.delete("resp_1", b"ann"))
        assert asyncio.run(store.get("resp_1", b"ann")) is not None
        store._database.execute("PRAGMA query_only = OFF")
        asyncio.run(store.put(record("resp_2")))


@pytest.mark.promise("fault: corrupt store")
def test_damage_while_it_runs_fails_that_request_alone(tmp_path: Path) -> None:
    path = tmp_path / "responses.db"
    with opened(path) as store:
        for i in range(50):
            asyncio.run(store.put(record(f"resp_{i}", size=3000)))
        store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        store._database.execute("PRAGMA cache_size = 0")
        store._database.execute("PRAGMA shrink_memory")
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"\xa5" * (size // 2))
        outcomes = []
        for i in range(50):
            try:
                outcomes.append(asyncio.run(store.get(f"resp_{i}", b"ann")) is not None)
            except StoreFailed:
                outcomes.append(False)
        assert any(outcomes)
        assert not all(outcomes)


@pytest.mark.parametrize("status", list(Status))
def test_only_what_runs_has_a_next_state(status: Status) -> None:
    assert status.running == bool(NEXT[status])
    assert status not in NEXT[status]
    assert all(not NEXT[after] or after is Status.IN_PROGRESS for after in NEXT[status])
