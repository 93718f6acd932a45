"""One PostgreSQL database: a bounded pool, statements, transactions.

It may be reached through a pooler in transaction mode. So a connection is given no options at its start and keeps
nothing between two transactions: no prepared statements, no LISTEN, no settings but `SET LOCAL`.
"""

import asyncio
import logging
import os
import select
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, Self, TypeVar

import psycopg
from psycopg import errors
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from session_store.errors import StoreUnavailable, StoreUnusable
from session_store.postgres.errors import check_url, translated
from session_store.postgres.migrations import migrate

logger = logging.getLogger(__name__)
logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # each attempt of a pool is a warning; we say it once

T = TypeVar("T")
Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Parameters = Mapping[str, Any]

POOL_SIZE = 10
WAIT_SECONDS = 3  # for a connection, be they all in use or none to be had
REFUSED_SECONDS = 0.5  # which one waits that nobody is let in, as the next attempt may be the one that succeeds
STATEMENT_SECONDS = 10  # then its connection is cut: a server that hangs must not hang us
TRANSACTION_SECONDS = 30

# A replica that stands still in mid-transaction must not keep the rows from the others.
BEGIN = b"BEGIN; SET LOCAL idle_in_transaction_session_timeout = 5000"
CHECK = "SELECT v FROM schema_version"
CHECK_WRITING = "UPDATE schema_version SET v = v RETURNING v"

_CONNECTION = {
    "autocommit": True,
    "prepare_threshold": None,
    "client_encoding": "utf8",
    "fallback_application_name": "session-sidecar",
    "connect_timeout": WAIT_SECONDS,
    "tcp_user_timeout": STATEMENT_SECONDS * 1000,
    "keepalives_idle": STATEMENT_SECONDS,
    "keepalives_interval": WAIT_SECONDS,
    "keepalives_count": 3,
}


class Database:
    """A pool of connections that are made when they are needed and again when they were lost."""

    def __init__(self, url: str) -> None:
        """`open` makes one; the URL may hold a password, so it is never shown."""
        self._pool = AsyncConnectionPool(
            url,
            connection_class=_Connection,
            kwargs=_CONNECTION | {"heed": self._note_refusal},
            min_size=1,
            max_size=POOL_SIZE,
            open=False,
            check=self._alive,
            reconnect_timeout=0,  # whoever asks next has it try again, not a clock that may be minutes away
        )
        self._refusal: psycopg.Error | None = None  # why the last attempt to connect failed, if it did
        self._calls: set[asyncio.Task[Any]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._trouble: str | None = None  # what the last call failed with; a write that succeeds ends it

    @classmethod
    async def open(cls, url: str, *, read_only: bool = False) -> Self:
        """Connect, and bring the schema up to date unless it is only to be read. Raises StoreUnusable in one line."""
        check_url(url)
        try:
            async with await Connection.connect(url, **_CONNECTION) as connection:  # type: ignore[arg-type]
                await migrate(connection, look_only=read_only)
        except psycopg.Error as error:
            raise StoreUnusable(f"The session map cannot be opened: {translated(error)}") from error
        database = cls(url)
        await database._pool.open()
        return database

    async def rows(
        self, statement: str, parameters: Parameters | None = None, *, writes: bool = False, binary: bool = False
    ) -> list[tuple[Any, ...]]:
        """Run one statement, which commits by itself; give its rows. One that `writes` should return what it wrote.

        A caller that is cancelled waits for the end of it all the same, some seconds at most: then it has happened or
        it has not, and no connection is in between. Raises SessionMapError, mostly StoreUnavailable.
        """
        return await self.finished(self.fetched(statement, parameters, writes=writes, binary=binary))

    async def fetched(
        self, statement: str, parameters: Parameters | None = None, *, writes: bool = False, binary: bool = False
    ) -> list[tuple[Any, ...]]:
        """Do as `rows` does, for whoever sees to it by `finished` that it is not broken off."""
        async with self._connection(STATEMENT_SECONDS) as connection:
            cursor = await connection.execute(statement.encode(), parameters, binary=binary)
            rows = await cursor.fetchall() if cursor.description else []
        if writes and rows:  # one that finds no row writes nothing
            self._note_trouble(None)
        return rows

    async def finished(self, call: Coroutine[Any, Any, T]) -> T:
        """Give the result of a call that nobody breaks off, neither its cancelled caller nor `close`."""
        if self._closing is not None:
            call.close()
            raise StoreUnavailable
        task = asyncio.create_task(call)
        self._calls.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task])
            raise

    @asynccontextmanager
    async def transaction(self, *, seconds: float = TRANSACTION_SECONDS) -> AsyncIterator[Connection]:
        """A transaction around the block: committed at its end, rolled back if it raises or is cancelled.

        It has so many seconds; within, the block may keep the server waiting for 5 s at a time. What PostgreSQL raises
        in it, or at its commit, leaves the block as SessionMapError, mostly StoreUnavailable.
        """
        if self._closing is not None:
            raise StoreUnavailable
        async with self._connection(seconds) as connection:
            await connection.execute(BEGIN)
            yield connection  # and the pool commits, or rolls back
        self._note_trouble(None)

    async def check(self) -> None:
        """Return if the database can be used, else raise StoreUnavailable. After a failure it has been written to."""
        await self.rows(CHECK_WRITING if self._trouble else CHECK, writes=self._trouble is not None)

    async def close(self) -> None:
        """Finish the statements that were begun and close all connections. May be called again, from anywhere."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)  # one closes, all wait for it, and none of them can break it off

    async def _close(self) -> None:
        while self._calls:
            await asyncio.wait(self._calls)
        await self._pool.close()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # whoever has been cancelled does not ask for it any more

    @asynccontextmanager
    async def _connection(self, seconds: float) -> AsyncIterator[Connection]:
        cut: asyncio.TimerHandle | None = None
        try:
            async with AsyncExitStack() as stack:
                connection = await self._get(stack)
                cut = asyncio.get_running_loop().call_later(seconds, _cut, connection)
                yield connection
        except psycopg.Error as error:
            if isinstance(error, errors.ReadOnlySqlTransaction):
                await self._pool.drain()  # whoever has become the primary is found only by connecting anew
            known = translated((isinstance(error, PoolTimeout) and self._refusal) or error)
            if isinstance(known, StoreUnavailable):
                self._note_trouble(str(known))
            raise known from error
        finally:
            if cut is not None:
                cut.cancel()  # only behind the commit, which may hang too

    async def _get(self, stack: AsyncExitStack) -> Connection:
        """A connection of the pool until the end of `stack`. Each turn of the loop has it try anew."""
        until = asyncio.get_running_loop().time() + WAIT_SECONDS
        while True:
            try:
                return await stack.enter_async_context(self._pool.connection(REFUSED_SECONDS))
            except PoolTimeout:
                if self._refusal is not None or asyncio.get_running_loop().time() > until:
                    raise

    async def _alive(self, connection: "_Connection") -> None:
        """Let nobody have a connection that the server has closed: there is something to read, its end."""
        poll = select.poll()
        poll.register(connection.pgconn.socket, select.POLLIN)
        if not poll.poll(0):
            return
        try:
            await self._pool.check_connection(connection)
        except psycopg.Error:
            await self._pool.check()  # the others may well have been closed with it
            raise

    def _note_refusal(self, refusal: psycopg.Error | None) -> None:
        self._refusal = refusal

    def _note_trouble(self, trouble: str | None) -> None:
        """Log what is wrong once, however many calls meet it, and once that it has passed."""
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble:
                logger.error("the session map cannot be used: %s", trouble)
            else:
                logger.info("the session map can be used again")


class _Connection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """A connection of the pool, which keeps it to itself why it could not connect."""

    @classmethod
    async def connect(  # type: ignore[override]
        cls, url: str, *, heed: Callable[[psycopg.Error | None], None], **options: Any
    ) -> Self:
        try:
            connection = await super().connect(url, **options)
        except psycopg.Error as error:
            heed(error)
            raise
        heed(None)
        return connection


def _cut(connection: Connection) -> None:
    """End what hangs, as if the network had been cut: libpq sees the end of the stream."""
    with suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(connection.pgconn.socket)) as stream:
        stream.shutdown(socket.SHUT_RDWR)
