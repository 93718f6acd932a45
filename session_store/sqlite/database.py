"""The SQLite file while it is open: statements, each in one hop to the connection's thread; and how they fare.

Whatever writes is one statement that commits by itself. So there is no transaction that a cancelled caller could leave
open, and no state between two calls that could go wrong.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import aiosqlite

from session_store.errors import StoreUnavailable
from session_store.sqlite.connection import OwnedConnection, translated
from session_store.sqlite.file import SCHEMA_VERSION

logger = logging.getLogger(__name__)

CHECK = "SELECT * FROM session_mappings LIMIT 1"
CHECK_WRITING = f"PRAGMA user_version = {SCHEMA_VERSION}"  # it has that already, but is written all the same


Observe = Callable[[str, float], object]
"""Told after each statement of what kind it was, and how many seconds it took."""


def unobserved(kind: str, seconds: float) -> None:
    """Take no notice."""


class Database:
    """A SQLite file that is open."""

    def __init__(self, file: sqlite3.Connection, connection: aiosqlite.Connection, observe: Observe) -> None:
        """Take over a file that is open, and its thread; `of` makes one."""
        self._file = file
        self.connection = connection
        self._observe = observe
        self._closing: asyncio.Task[None] | None = None
        self._trouble: str | None = None  # what the last call failed with; a write that succeeds ends it

    @classmethod
    async def of(cls, opened: sqlite3.Connection, observe: Observe) -> Self:
        """Give a connection that was just opened a thread of its own."""
        try:
            return cls(opened, await aiosqlite.Connection(lambda: opened, iter_chunk_size=64), observe)
        except BaseException:  # cancelled: the thread ends by itself, the file is still ours to give back
            opened.close()
            raise

    async def read(self, kind: str, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
        """The rows of a statement. Raises StoreUnavailable, SessionMapped."""
        if self._closing is not None:
            raise StoreUnavailable
        asked = time.perf_counter()
        try:
            try:
                return list(await self.connection.execute_fetchall(statement, parameters))
            except sqlite3.Error as error:
                raise translated(error) from error
        except StoreUnavailable as error:
            self._note_trouble(str(error))
            raise
        finally:
            self._observe(kind, time.perf_counter() - asked)

    async def write(self, kind: str, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
        """The same for one that writes, and gives the rows that it has written."""
        rows = await self.read(kind, statement, parameters)
        if rows:  # one that finds no row writes nothing
            self._note_trouble(None)
        return rows

    @property
    def is_whole(self) -> bool:
        """Whether the file is open and can be used, as far as that is known; else what was read counts for nothing."""
        return self._closing is None and isinstance(self._file, OwnedConnection) and self._file.is_whole

    async def check(self) -> None:
        """Return if the file can be used, else raise StoreUnavailable. After a failure it is written to."""
        if self._trouble:
            await self.read("check", CHECK_WRITING, {})
            self._note_trouble(None)
        else:
            await self.read("check", CHECK, {})

    async def close(self) -> None:
        """Finish what was begun and give the file back. May be called again, from anywhere."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self.connection.close())
        await asyncio.shield(self._closing)  # one closes, all wait for it, and none of them can break it off

    def _note_trouble(self, trouble: str | None) -> None:
        """Log what is wrong once, however many calls meet it, and once that it has passed."""
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble:
                logger.error("the session map cannot be used: %s", trouble)
            else:
                logger.info("the session map can be used again")
