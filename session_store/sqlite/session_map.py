"""The session map in one SQLite file.

Whatever writes is one statement that commits by itself, sent to the connection's thread in one hop. So there is no
transaction that a cancelled caller could leave open, and no state between two calls that could go wrong.
"""

import asyncio
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from typing import Any, Self

import aiosqlite

from session_store.errors import StoreUnavailable, ThreadMapped
from session_store.mapping import LAST_MOMENT, Cursor, SessionMapping, ThreadKey, moment
from session_store.sqlite import pages
from session_store.sqlite.connection import translated
from session_store.sqlite.file import SCHEMA_VERSION, open_database, open_for_reading

logger = logging.getLogger(__name__)

# `*` gives the columns in the order of schema.sql, which is the order of SessionMapping; user_version vouches for it.
GET = "SELECT * FROM session_mappings WHERE resource_id = :resource_id AND thread_id = :thread_id"

ADD = """
INSERT INTO session_mappings
    (thread_id, resource_id, sdk_session_id, parent_thread_id, parent_message_id, created_at, updated_at)
VALUES (:thread_id, :resource_id, :sdk_session_id, :parent_thread_id, :parent_message_id, :now, :now)
ON CONFLICT (resource_id, thread_id) DO NOTHING
RETURNING *
"""

# A clock that was set back must not make a row look older than it was.
REPLACE = """
UPDATE session_mappings
SET sdk_session_id = :sdk_session_id, version = version + 1, updated_at = max(updated_at, :now)
WHERE resource_id = :resource_id AND thread_id = :thread_id AND sdk_session_id = :expected
RETURNING *
"""

REMOVE = """
DELETE FROM session_mappings
WHERE resource_id = :resource_id AND thread_id = :thread_id
    AND sdk_session_id = coalesce(:expected, sdk_session_id) AND version = coalesce(:version, version)
RETURNING *
"""

CHECK = "SELECT * FROM session_mappings LIMIT 1"
CHECK_WRITING = f"PRAGMA user_version = {SCHEMA_VERSION}"  # it has that already, but is written all the same
_KINDS = {GET: "get", ADD: "add", REPLACE: "replace", REMOVE: "remove", CHECK: "check", CHECK_WRITING: "check"}
WRITING = frozenset((ADD, REPLACE, REMOVE, CHECK_WRITING))


class SqliteSessionMap:
    """A SessionMap in a SQLite file that this process alone has open."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        """Take over a connection that is ready for use; `open` makes one."""
        self._connection = connection
        self._closing: asyncio.Task[None] | None = None
        self._trouble: str | None = None  # what the last call failed with; a write that succeeds ends it
        self.observe: Callable[[str, float], object] = lambda *_: None
        """Told after each statement of what kind it was, and how many seconds it took."""

    @classmethod
    async def peek(cls, path: str | os.PathLike[str]) -> Self:
        """Open the file at `path` to read it only, while another process owns it. Raises StoreUnusable."""
        return await cls._of(open_for_reading(path))

    @classmethod
    async def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open the file at `path`, or make one there. Raises StoreUnusable, having changed nothing.

        It blocks the event loop for some milliseconds (a third of a second for a million rows): it belongs before
        serving. Whoever gets the map must close it, or the process will not end. Raises StoreInUse if it is another's.
        """
        return await cls._of(open_database(path))

    @classmethod
    async def _of(cls, database: sqlite3.Connection) -> Self:
        try:
            return cls(await aiosqlite.Connection(lambda: database, iter_chunk_size=64))
        except BaseException:  # cancelled: the thread ends by itself, the file is still ours to give back
            database.close()
            raise

    async def get(self, key: ThreadKey) -> SessionMapping | None:
        """See SessionMap."""
        return await self._row(GET, key)

    async def add(
        self,
        key: ThreadKey,
        sdk_session_id: str,
        *,
        parent_thread_id: str | None = None,
        parent_message_id: str | None = None,
    ) -> SessionMapping:
        """See SessionMap."""
        added = await self._row(
            ADD,
            key,
            sdk_session_id=sdk_session_id,
            parent_thread_id=parent_thread_id,
            parent_message_id=parent_message_id,
            now=_now(),
        )
        if added is None:
            raise ThreadMapped
        return added

    async def replace(self, key: ThreadKey, sdk_session_id: str, *, expected: str) -> SessionMapping | None:
        """See SessionMap."""
        return await self._row(REPLACE, key, sdk_session_id=sdk_session_id, expected=expected, now=_now())

    async def touch(self, key: ThreadKey, sdk_session_id: str) -> SessionMapping | None:
        """See SessionMap."""
        return await self.replace(key, sdk_session_id, expected=sdk_session_id)

    async def remove(
        self, key: ThreadKey, *, expected: str | None = None, version: int | None = None
    ) -> SessionMapping | None:
        """See SessionMap."""
        return await self._row(REMOVE, key, expected=expected, version=version)

    async def page(
        self,
        resource_id: str | None,
        *,
        limit: int,
        after: Cursor | None = None,
        descending: bool = True,
        thread_id_prefix: str | None = None,
        parent_thread_id: str | None = None,
    ) -> list[SessionMapping]:
        """See SessionMap."""
        if limit < 1:
            raise ValueError("limit must be at least 1")  # SQLite takes a negative one for none at all
        if parent_thread_id is not None and resource_id is None:
            raise ValueError("a parent needs its resource")
        start = after or Cursor(LAST_MOMENT if descending else 0, "")
        parameters = {
            "resource_id": resource_id,
            "created_at": start.created_at_us,
            "after_thread_id": start.thread_id,
            "after_resource_id": start.resource_id,
            "prefix": thread_id_prefix,
            "beyond": thread_id_prefix.encode() + b"\xff" if thread_id_prefix else None,
            "parent_thread_id": parent_thread_id,
            "limit": limit,
        }
        of: pages.Of = "all" if resource_id is None else "one" if parent_thread_id is None else "forks"
        way = pages.page_of_nearby if thread_id_prefix else pages.page
        rows = await self._fetched(way(of, descending=descending), parameters)
        if thread_id_prefix and len(rows) < limit:
            ((begin_so,),) = await self._fetched(pages.count(of), parameters)
            way = pages.page_by_sort if begin_so <= pages.FEW else pages.page_by_walk
            rows = await self._fetched(way(of, descending=descending), parameters)
        return [_mapping(row) for row in rows]

    async def check(self) -> None:
        """See SessionMap."""
        await self._fetched(CHECK_WRITING if self._trouble else CHECK, {})

    async def close(self) -> None:
        """See SessionMap."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._connection.close())
        await asyncio.shield(self._closing)  # one closes, all wait for it, and none of them can break it off

    async def _row(self, statement: str, key: ThreadKey, **parameters: str | int | None) -> SessionMapping | None:
        key_of_it = {"thread_id": key.thread_id, "resource_id": key.resource_id}
        rows = await self._fetched(statement, key_of_it | parameters)
        return _mapping(rows[0]) if rows else None

    async def _fetched(self, statement: str, parameters: dict[str, Any]) -> list[Any]:
        if self._closing is not None:
            raise StoreUnavailable
        asked = time.perf_counter()
        try:
            try:
                rows = list(await self._connection.execute_fetchall(statement, parameters))
            except sqlite3.Error as error:
                raise translated(error) from error
        except StoreUnavailable as error:
            self._note_trouble(str(error))
            raise
        finally:
            self.observe(_KINDS.get(statement, "page"), time.perf_counter() - asked)
        if statement == CHECK_WRITING or (statement in WRITING and rows):  # one that finds no row writes nothing
            self._note_trouble(None)
        return rows

    def _note_trouble(self, trouble: str | None) -> None:
        """Log what is wrong once, however many calls meet it, and once that it has passed."""
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble:
                logger.error("the session map cannot be used: %s", trouble)
            else:
                logger.info("the session map can be used again")


def _mapping(row: Any) -> SessionMapping:
    return SessionMapping(*row[:-2], *map(moment, row[-2:]))  # its last two columns are times


def _now() -> int:
    return time.time_ns() // 1000
