"""Records in one SQLite file: they outlive the process, however it ends.

Every call of the database runs on one thread of its own; the methods are for the event loop.  A write is one
transaction of a write-ahead log, so a kill at any moment leaves the file as it was before or after.  The file is held
exclusively: two servers on one file would call each other's running responses lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vserve.errors import StartupError
from vserve.store.record import Bounds, Figures, Record, Status, StoreFailed

T = TypeVar("T")

LOCK_WAIT_S = 1.0
LOG_LIMIT_BYTES = 4 * 2**20
"""The write-ahead log is cut back to this after a checkpoint."""
FORMAT = 1
APPLICATION = 0x7673726D
"""Marks the file as ours in SQLite's own header."""

_RUNNING = ", ".join(f"'{status.value}'" for status in Status if status.running)
_TABLE = (
    "CREATE TABLE responses (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, owner BLOB NOT NULL, created_s REAL "
    "NOT NULL, status TEXT NOT NULL, size INTEGER NOT NULL, document BLOB NOT NULL, items BLOB NOT NULL, trace BLOB "
    "NOT NULL)"
)


class SqliteStore:
    """A Store in a file."""

    def __init__(self, path: str, bounds: Bounds | None = None, clock: Callable[[], float] = time.time) -> None:
        """Open or make the file.  What was running when it was last used has failed, and is kept beyond the bounds
        until the next write, so that it can be told.

        clock: seconds since the epoch.  Raises StartupError, one line, for a file that cannot be used.
        """
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._evictions = 0
        self._database = _open(path)
        self._entries, self._bytes = self._database.execute("SELECT count(*), total(size) FROM responses").fetchone()
        self._bytes = int(self._bytes)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    @property
    def bounds(self) -> Bounds:
        """See Store."""
        return self._bounds

    @property
    def figures(self) -> Figures:
        """See Store."""
        return Figures(self._entries, self._bytes, self._evictions)

    async def put(self, record: Record) -> None:
        """See Store."""
        await self._run(lambda: self._put(record))

    async def get(self, id: str, owner: bytes) -> Record | None:
        """See Store."""
        return await self._run(lambda: self._get(id, owner))

    async def delete(self, id: str, owner: bytes) -> bool:
        """See Store."""
        return await self._run(lambda: self._delete(id, owner))

    def close(self) -> None:
        """See Store."""
        self._thread.submit(self._database.close)
        self._thread.shutdown(wait=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, work)

    # ---- the store's own thread ----------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # most such errors have rolled back already
                self._database.rollback()
            raise StoreFailed(str(error)) from error

    def _put(self, record: Record) -> None:
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        entries, size, evictions = self._entries, self._bytes, 0
        for (old,) in database.execute("DELETE FROM responses WHERE id = ? RETURNING size", (record.id,)).fetchall():
            entries, size = entries - 1, size - old
        database.execute(
            "INSERT INTO responses (id, owner, created_s, status, size, document, items, trace) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(record.id, record.owner, record.created_s, record.status.value),
                *(record.size, record.document, record.items, record.trace),
            ),
        )
        entries, size = entries + 1, size + record.size
        oldest = f"SELECT seq, size, created_s FROM responses WHERE status NOT IN ({_RUNNING}) ORDER BY seq LIMIT 1"
        while (row := database.execute(oldest).fetchone()) is not None:
            seq, old, created_s = row
            full = entries > self._bounds.entries or size > self._bounds.bytes
            if not full and created_s >= self._oldest_s():
                break
            database.execute("DELETE FROM responses WHERE seq = ?", (seq,))
            entries, size, evictions = entries - 1, size - old, evictions + 1
        database.execute("COMMIT")
        self._entries, self._bytes, self._evictions = entries, size, self._evictions + evictions

    def _get(self, id: str, owner: bytes) -> Record | None:
        row = self._database.execute(
            "SELECT created_s, status, document, items, trace FROM responses WHERE id = ? AND owner = ? "
            f"AND (created_s >= ? OR status IN ({_RUNNING}))",
            (id, owner, self._oldest_s()),
        ).fetchone()
        if row is None:
            return None
        created_s, status, document, items, trace = row
        return Record(id, owner, created_s, Status(status), document, items, trace)

    def _delete(self, id: str, owner: bytes) -> bool:
        if self._get(id, owner) is None:
            return False
        ((size,),) = self._database.execute("DELETE FROM responses WHERE id = ? RETURNING size", (id,)).fetchall()
        self._entries, self._bytes = self._entries - 1, self._bytes - size
        return True

    def _oldest_s(self) -> float:
        return self._clock() - self._bounds.age_s


def _open(path: str) -> sqlite3.Connection:
    """The file, checked from end to end, ready to be written.  Raises StartupError."""
    where = f"--response-store {path}"
    try:
        # Before SQLite makes it: what people asked is nobody else's to read.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise StartupError(f"{where}: {error.strerror}") from None
    database = sqlite3.connect(path, timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False)
    try:
        _prepare(database)
    except (sqlite3.Error, _Unusable) as error:
        database.close()
        text = str(error)
        if "locked" in text:
            text = "another process uses it"
        raise StartupError(f"{where}: {text}; name another file, or move this one away") from None
    return database


class _Unusable(Exception):
    """A sound database that is not a store of ours."""


def _prepare(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
    fresh = _check(database)  # before anything is written: a file that is not ours stays as it is
    for setting in (
        "journal_mode = WAL",
        "synchronous = NORMAL",  # a kill of the process loses nothing; a power cut may lose the last moments
        "secure_delete = ON",
        f"journal_size_limit = {LOG_LIMIT_BYTES}",
    ):
        database.execute(f"PRAGMA {setting}").fetchall()
    database.execute("BEGIN IMMEDIATE")
    if fresh:
        database.execute(_TABLE)
        database.execute(f"PRAGMA application_id = {APPLICATION}")
        database.execute(f"PRAGMA user_version = {FORMAT}")
    database.execute(f"UPDATE responses SET status = '{Status.FAILED.value}' WHERE status IN ({_RUNNING})")
    database.execute("COMMIT")


def _check(database: sqlite3.Connection) -> bool:
    """Whether the database is empty.  Raises _Unusable for one that is damaged or somebody else's."""
    verdict = database.execute("PRAGMA quick_check(1)").fetchone()[0]
    if verdict != "ok":
        raise _Unusable(f"the file is damaged ({verdict.splitlines()[-1]})")
    if not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return True
    version = database.execute("PRAGMA user_version").fetchone()[0]
    application = database.execute("PRAGMA application_id").fetchone()[0]
    if (application, version) != (APPLICATION, FORMAT):
        raise _Unusable("the file is a database, but not a response store of this version")
    return False
