"""The session map in one SQLite file."""

import os
import time
from typing import Any, Self

from session_store.errors import ThreadMapped
from session_store.mapping import LAST_MOMENT, Cursor, SessionMapping, ThreadKey, columns_of, moment
from session_store.sqlite import pages
from session_store.sqlite.database import Database, Observe, unobserved
from session_store.sqlite.file import open_database, open_for_reading
from session_store.sqlite.recent import Recent
from session_store.sqlite.turn_keys import SqliteTurnKeys

# `*` gives the columns in the order of schema.sql, which is the order of SessionMapping; user_version vouches for it.
GET = "SELECT * FROM session_mappings WHERE resource_id = :resource_id AND thread_id = :thread_id"

ADD = """
INSERT INTO session_mappings
    (thread_id, resource_id, sdk_session_id, parent_thread_id, parent_message_id, created_at, updated_at)
VALUES (:thread_id, :resource_id, :sdk_session_id, :parent_thread_id, :parent_message_id, :now, :now)
ON CONFLICT (resource_id, thread_id) DO NOTHING
RETURNING *
"""

BRING = """
INSERT INTO session_mappings
VALUES (:thread_id, :resource_id, :sdk_session_id, :parent_thread_id, :parent_message_id, :version, :created_at,
    :updated_at)
ON CONFLICT (resource_id, thread_id) DO NOTHING
RETURNING version
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


class SqliteSessionMap:
    """A SessionMap in a SQLite file that this process alone has open."""

    def __init__(self, database: Database, recent: Recent | None = None) -> None:
        """Take over a file that is open; `open` makes one. `recent` is for the process that owns it."""
        self._database = database
        self._recent = recent or Recent(0)
        self.turn_keys = SqliteTurnKeys(database)
        """See SessionMap."""

    @classmethod
    async def peek(cls, path: str | os.PathLike[str], observe: Observe = unobserved) -> Self:
        """Open the file at `path` to read it only, while another process owns it. Raises StoreUnusable."""
        return cls(await Database.of(open_for_reading(path), observe))

    @classmethod
    async def open(cls, path: str | os.PathLike[str], observe: Observe = unobserved) -> Self:
        """Open the file at `path`, or make one there. Raises StoreUnusable, having changed nothing.

        It blocks the event loop for some milliseconds (half a second from a million and a half rows on): it belongs
        before serving. Whoever gets the map must close it, or the process will not end. Raises StoreInUse if it is
        another's.
        """
        return cls(await Database.of(open_database(path), observe), Recent())

    async def get(self, key: ThreadKey) -> SessionMapping | None:
        """See SessionMap."""
        if (known := self._recent.get(key)) is not None and self._database.is_whole:
            return known
        asked = self._recent.reading()
        found = _first(await self._database.read("get", GET, _names(key)))
        if found is not None:
            self._recent.learn(asked, found)
        return found

    async def add(
        self,
        key: ThreadKey,
        sdk_session_id: str,
        *,
        parent_thread_id: str | None = None,
        parent_message_id: str | None = None,
    ) -> SessionMapping:
        """See SessionMap."""
        added = await self._write(
            "add",
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
        return await self._write("replace", REPLACE, key, sdk_session_id=sdk_session_id, expected=expected, now=_now())

    async def touch(self, key: ThreadKey, sdk_session_id: str) -> SessionMapping | None:
        """See SessionMap."""
        return await self.replace(key, sdk_session_id, expected=sdk_session_id)

    async def remove(
        self, key: ThreadKey, *, expected: str | None = None, version: int | None = None
    ) -> SessionMapping | None:
        """See SessionMap."""
        return await self._write("remove", REMOVE, key, expected=expected, version=version)

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
        rows = await self._database.read("page", way(of, descending=descending), parameters)
        if thread_id_prefix and len(rows) < limit:
            ((begin_so,),) = await self._database.read("page", pages.count(of), parameters)
            way = pages.page_by_sort if begin_so <= pages.FEW else pages.page_by_walk
            rows = await self._database.read("page", way(of, descending=descending), parameters)
        return [_mapping(row) for row in rows]

    async def bring(self, mapping: SessionMapping, *, settled: int = 0) -> None:
        """See Movable; what is settled is not kept."""
        self._recent.writing(mapping.key)
        if not await self._database.write("add", BRING, columns_of(mapping)):
            raise ThreadMapped

    async def check(self) -> None:
        """See SessionMap."""
        await self._database.check()

    async def close(self) -> None:
        """See SessionMap."""
        await self._database.close()

    async def _write(
        self, kind: str, statement: str, key: ThreadKey, **parameters: str | int | None
    ) -> SessionMapping | None:
        asked = self._recent.writing(key)
        written = _first(await self._database.write(kind, statement, _names(key) | parameters))
        if written is not None and kind != "remove":
            self._recent.learn(asked, written)
        return written


def _names(key: ThreadKey) -> dict[str, str | int | None]:
    return {"thread_id": key.thread_id, "resource_id": key.resource_id}


def _first(rows: list[Any]) -> SessionMapping | None:
    return _mapping(rows[0]) if rows else None


def _mapping(row: Any) -> SessionMapping:
    return SessionMapping(*row[:-2], *map(moment, row[-2:]))  # its last two columns are times


def _now() -> int:
    return time.time_ns() // 1000
