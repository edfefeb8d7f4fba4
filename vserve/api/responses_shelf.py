"""The shelf: every response that can be asked for, running or stored, each for its owner alone.

Owns the running jobs and their tasks, and the store behind them.  Event-loop thread only.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import replace

import orjson

from vserve.api.app import App
from vserve.api.prompts import MESSAGE_LIMIT
from vserve.api.responses_items import Item, owner_of
from vserve.api.responses_job import Job, lost, unstorable
from vserve.errors import BadRequest, Conflict, NotFound, PayloadTooLarge, shorten
from vserve.http.exchange import Exchange
from vserve.store.memory import MemoryStore
from vserve.store.record import Bounds, Record, Status, Store, StoreFailed

log = logging.getLogger(__name__)

_UNSAVED = Bounds(entries=256, bytes=4 * 2**20)
"""Failures that could not be stored are remembered so far: what a full disk leaves behind."""


class Shelf:
    """What this server's clients may ask for by id."""

    def __init__(self, store: Store, tasks: set[asyncio.Task[None]]) -> None:
        """tasks: holds what must end before the process does."""
        self._store = store
        self._unsaved = MemoryStore(replace(_UNSAVED, age_s=store.bounds.age_s))
        self._running: dict[str, Job] = {}
        self._tasks = tasks

    async def begin(self, job: Job) -> None:
        """Start the job and let it go on by itself; returns once it is known to be stored, if it is to be.

        Raises ApiError when it could not be queued or stored.
        """
        self.check_fits(job)
        job.start()
        if job.kept:
            self._running[job.ticket.id] = job
        task = asyncio.get_running_loop().create_task(self._live(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(job.recorded)
        if job.ticket.kept and not job.kept and job.error is not None:
            raise job.error

    def check_fits(self, job: Job) -> None:
        """Raises PayloadTooLarge for a request that alone is more than the store keeps."""
        size, limit = len(job.ticket.items) + len(orjson.dumps(job.document)), self._store.bounds.bytes
        if job.kept and size > limit:
            raise PayloadTooLarge(
                f"The request has {size} bytes to be stored, the store keeps {limit}; send `store`: false.",
                param="store",
            )

    async def _live(self, job: Job) -> None:
        try:
            await job.live(self)
        finally:
            # First: who hears of the end may ask for it at once.
            if self._running.get(job.ticket.id) is job:
                del self._running[job.ticket.id]
            job.announce()

    async def write(self, record: Record) -> None:
        """See responses_job.Shelves."""
        await self._store.put(record)

    async def write_failure(self, record: Record) -> None:
        """See responses_job.Shelves."""
        await self._unsaved.put(record)

    async def find(self, id: str, owner: bytes) -> Job | Record:
        """The owner's response.  Raises NotFound, also for another's, and Unavailable when the store fails."""
        job = self._running.get(id)
        if job is not None and job.ticket.owner == owner:
            return job
        record = await self._unsaved.get(id, owner)
        if record is None:
            try:
                record = await self._store.get(id, owner)
            except StoreFailed as error:
                log.error("a response could not be read: %s", error)
                raise unstorable(error) from None
        if record is None:
            raise missing(id)
        return lost(record)

    async def delete(self, id: str, owner: bytes) -> None:
        """Forget the owner's response; one that runs is cancelled.  Raises as ``find`` does."""
        found = await self.find(id, owner)
        if isinstance(found, Job):
            found.kept = False
            found.stop()
            self._running.pop(id, None)
        try:
            await self._unsaved.delete(id, owner)
            await self._store.delete(id, owner)  # behind the job's last write, if that is under way
        except StoreFailed as error:
            log.error("a response could not be deleted: %s", error)
            raise unstorable(error) from None

    async def chain(self, id: str, owner: bytes) -> list[Item]:
        """What was said up to the response with that id and in it, oldest first, over all that it goes on from.

        Raises NotFound for a missing link, Conflict for a response that still runs and BadRequest for one without an
        answer to go on from.
        """
        links: list[list[Item]] = []
        count, next_id = 0, id
        while next_id:
            found = await self._link(next_id, owner)
            document = orjson.loads(found.document)
            if found.status not in (Status.COMPLETED, Status.INCOMPLETE):
                raise BadRequest(
                    f"`previous_response_id` names {shorten(next_id)}, which is {found.status.value}: it has no answer "
                    "to go on from.",
                    param="previous_response_id",
                )
            links.append([*orjson.loads(found.items), *document["output"]])
            count += len(links[-1])
            if count > MESSAGE_LIMIT:
                raise BadRequest(
                    f"The conversation that `previous_response_id` goes on from has more than {MESSAGE_LIMIT} items.",
                    param="previous_response_id",
                )
            next_id = document["previous_response_id"]
        return [item for link in reversed(links) for item in link]

    async def _link(self, id: str, owner: bytes) -> Record:
        try:
            found = await self.find(id, owner)
        except NotFound:
            raise NotFound(
                f"`previous_response_id` leads to {shorten(id)}, which does not exist (any more).",
                param="previous_response_id",
            ) from None
        if isinstance(found, Job):
            raise Conflict(
                f"`previous_response_id` names {shorten(id)}, which is {found.status.value}; wait for its end.",
                param="previous_response_id",
            )
        return found

    async def resolve(self, items: tuple[Item, ...], owner: bytes) -> list[Item]:
        """The items with what each item_reference names in its place.  Raises NotFound."""
        return [
            await self._referenced(str(item["id"]), owner) if item["type"] == "item_reference" else item
            for item in items
        ]

    async def _referenced(self, item_id: str, owner: bytes) -> Item:
        id = owner_of(item_id)
        found = None
        if id is not None:
            try:
                found = await self.find(id, owner)
            except NotFound:
                found = None
        if isinstance(found, Record):
            items = [*orjson.loads(found.items), *orjson.loads(found.document)["output"]]
            for item in items:
                if item["id"] == item_id:
                    assert isinstance(item, dict)
                    return item
        raise NotFound(f"`input` refers to the item {shorten(item_id)}, which does not exist.", param="input")


def missing(id: str) -> NotFound:
    """What a client hears of an id that is nobody's, deleted, too old, or another's."""
    return NotFound(f"There is no response with the id {shorten(id)}.", param="response_id")


def owner(app: App, exchange: Exchange) -> bytes:
    """Whose the caller's responses are: the key's, by name or hash, never the key itself; everybody's without keys."""
    salt = app.salt(exchange, None)
    return hashlib.sha256(b"owner of responses\0" + salt).digest()[:16] if salt else b""
