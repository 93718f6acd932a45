"""The archive in a SQLite file of its own: for encryption keys on one machine. One process has it, so it has no fences.

All of a call is done in one hop to the one thread that has the connection: a cancelled caller leaves nothing half done.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from session_sidecar.replicas.archive.chunks import Change, Chunk, ChunkHead, Position, Row, SealedOutline
from session_sidecar.replicas.archive.sealing import SALT_BYTES
from session_store import StoreUnavailable, StoreUnusable, ThreadKey
from session_store.sqlite.connection import translated
from session_store.sqlite.file import BUSY_TIMEOUT_MS

T = TypeVar("T")

SCHEMA_VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS session_files (
    sdk_session_id TEXT NOT NULL, path TEXT NOT NULL, seq INTEGER NOT NULL, off INTEGER NOT NULL, len INTEGER NOT NULL,
    mac BLOB NOT NULL, key_id TEXT, resource_id TEXT NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (sdk_session_id, path, seq)
) STRICT;
CREATE TABLE IF NOT EXISTS session_outlines (
    sdk_session_id TEXT PRIMARY KEY, resource_id TEXT NOT NULL, key_id TEXT, data BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS resource_keys (resource_id TEXT PRIMARY KEY, salt BLOB NOT NULL) STRICT;
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

_HEAD = "path, seq, off, len, mac, key_id"
_HEADS = f"SELECT {_HEAD} FROM session_files WHERE sdk_session_id = ? ORDER BY path, seq"  # noqa: S608 - all of it is ours
_READ = f"SELECT {_HEAD}, data FROM session_files WHERE sdk_session_id = ? AND path = ? AND seq = ?"  # noqa: S608
_CUT = "DELETE FROM session_files WHERE sdk_session_id = ? AND path = ? AND seq >= ?"
_ADD = "INSERT INTO session_files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_OUTLINE = "INSERT OR REPLACE INTO session_outlines VALUES (?, ?, ?, ?)"
_OTHER_FILES = f"""
SELECT {_HEAD}, sdk_session_id, resource_id, data FROM session_files
WHERE key_id IS NOT ? AND (sdk_session_id, path, seq) > (?, ?, ?) ORDER BY sdk_session_id, path, seq LIMIT ?
"""  # noqa: S608
_OTHER_OUTLINES = """
SELECT sdk_session_id, resource_id, key_id, data FROM session_outlines
WHERE key_id IS NOT ? AND sdk_session_id > ? ORDER BY sdk_session_id LIMIT ?
"""
_COUNT_OTHER = """
SELECT (SELECT count(*) FROM session_files WHERE key_id IS NOT ?1)
    + (SELECT count(*) FROM session_outlines WHERE key_id IS NOT ?1)
"""
_RESEAL_FILE = """
UPDATE session_files SET key_id = ?, mac = ?, data = ?
WHERE sdk_session_id = ? AND path = ? AND seq = ? AND key_id IS ? AND mac = ?
"""
_RESEAL_OUTLINE = """
UPDATE session_outlines SET key_id = ?, data = ? WHERE sdk_session_id = ? AND key_id IS ? AND data = ?
"""


class SqliteChunks:
    """Chunks in a SQLite file that this process alone has open."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """`open` makes one."""
        self._connection = connection
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="archive")
        self._closed = False

    @classmethod
    def open(cls, file: Path) -> Self:
        """Open the file, or make one there; it blocks. Whoever has the home's lock may. Raises StoreUnusable."""
        with _usable(file), ExitStack() as undo:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite makes those beside it like this one
            connection = sqlite3.connect(
                file, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False
            )
            undo.callback(connection.close)
            _refuse_newer(file, connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")  # a deleted salt is to be gone
            connection.executescript(_SCHEMA)
            undo.pop_all()
        return cls(connection)

    @classmethod
    def peek(cls, file: Path) -> Self:
        """Open the file to read it only, beside the process that has it; it blocks. Raises StoreUnusable."""
        with _usable(file), ExitStack() as undo:
            uri = f"{file.absolute().as_uri()}?mode=ro"
            connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_MS / 1000, check_same_thread=False)
            undo.callback(connection.close)
            _refuse_newer(file, connection)
            undo.pop_all()
        return cls(connection)

    async def heads(self, session_id: str) -> list[ChunkHead]:
        """See Chunks."""
        return [ChunkHead(*row) for row in await self._fetched(_HEADS, session_id)]

    async def read(self, session_id: str, wanted: Sequence[ChunkHead]) -> list[Chunk]:
        """See Chunks."""

        in_order = sorted(wanted, key=lambda head: (head.path, head.seq))

        def read() -> list[Chunk]:
            rows = [self._execute(_READ, session_id, head.path, head.seq).fetchone() for head in in_order]
            return [Chunk(ChunkHead(*row[:-1]), row[-1]) for row in rows if row is not None]

        return await self._do(read)

    async def write(self, session_id: str, key: ThreadKey, fence: int | None, change: Change) -> bool:
        """See Chunks; the fence is not looked at."""
        await self._do(partial(self._transaction, partial(self._write, session_id, key.resource_id, change)))
        return True

    async def delete(self, session_id: str) -> None:
        """See Chunks."""

        def delete() -> None:
            for table in ("session_files", "session_outlines"):
                self._execute(f"DELETE FROM {table} WHERE sdk_session_id = ?", session_id)  # noqa: S608

        await self._do(partial(self._transaction, delete))

    async def erased(self, seconds: float) -> list[str]:
        """See Chunks. Only this process has copies, and it has removed them."""
        return []

    async def outlines(self, session_ids: Collection[str]) -> dict[str, SealedOutline]:
        """See Chunks."""
        statement = "SELECT sdk_session_id, resource_id, key_id, data FROM session_outlines WHERE sdk_session_id IN"
        rows = await self._fetched(f"{statement} ({_marks(session_ids)})", *session_ids)
        return {session_id: SealedOutline(*rest) for session_id, *rest in rows}

    async def salts(self, resource_ids: Collection[str]) -> dict[str, bytes]:
        """See Chunks."""
        statement = "SELECT resource_id, salt FROM resource_keys WHERE resource_id IN"
        return dict(await self._fetched(f"{statement} ({_marks(resource_ids)})", *resource_ids))

    async def salt(self, resource_id: str) -> bytes:
        """See Chunks."""
        await self._fetched(
            "INSERT INTO resource_keys VALUES (?, ?) ON CONFLICT DO NOTHING", resource_id, os.urandom(SALT_BYTES)
        )
        return (await self.salts([resource_id]))[resource_id]

    async def forget_salt(self, resource_id: str) -> bool:
        """See Chunks. It is gone from the file's free pages and its log, too."""

        def forget() -> bool:
            forgotten = self._execute("DELETE FROM resource_keys WHERE resource_id = ?", resource_id).rowcount == 1
            self._execute("PRAGMA wal_checkpoint(TRUNCATE)")
            return forgotten

        return await self._do(forget)

    async def count_sealed_otherwise(self, key_id: str) -> int:
        """See Chunks."""
        ((count,),) = await self._fetched(_COUNT_OTHER, key_id)
        return int(count)

    async def sealed_otherwise(self, key_id: str, *, after: Position | None, limit: int) -> list[tuple[Position, Row]]:
        """See Chunks."""
        return await self._do(partial(self._sealed_otherwise, key_id, after or ("", "", -1), limit))

    async def reseal(self, row: Row, key_id: str, mac: bytes, data: bytes) -> bool:
        """See Chunks."""
        if (head := row.head) is None:
            outline = (key_id, data, row.session_id, row.key_id, row.data)
            return await self._do(lambda: self._execute(_RESEAL_OUTLINE, *outline).rowcount == 1)
        chunk = (key_id, mac, data, row.session_id, head.path, head.seq, row.key_id, head.mac)
        return await self._do(lambda: self._execute(_RESEAL_FILE, *chunk).rowcount == 1)

    async def close(self) -> None:
        """See Chunks."""
        if not self._closed:
            self._closed = True
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close))
            self._thread.shutdown()

    def _write(self, session_id: str, resource_id: str, change: Change) -> None:
        for path, seq in change.cut.items():
            self._execute(_CUT, session_id, path, seq)
        for chunk in change.add:
            self._execute(_ADD, session_id, *astuple(chunk.head), resource_id, chunk.data)
        if (outline := change.outline) is not None:
            self._execute(_OUTLINE, session_id, *astuple(outline))

    def _sealed_otherwise(self, key_id: str, after: Position, limit: int) -> list[tuple[Position, Row]]:
        found: list[tuple[Position, Row]] = []
        if after[0] != _OUTLINES:
            for *head, session_id, resource_id, data in self._execute(_OTHER_FILES, key_id, *after, limit):
                row = Row(session_id, resource_id, ChunkHead(*head), head[-1], data)
                found.append(((session_id, head[0], head[1]), row))
        past = after[1] if after[0] == _OUTLINES else ""
        for session_id, resource_id, was, data in self._execute(_OTHER_OUTLINES, key_id, past, limit - len(found)):
            found.append(((_OUTLINES, session_id, 0), Row(session_id, resource_id, None, was, data)))
        return found

    def _transaction(self, work: Callable[[], None]) -> None:
        self._execute("BEGIN IMMEDIATE")
        try:
            work()
            self._execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite itself has taken it back where the disk is full
                self._execute("ROLLBACK")
            raise

    def _execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        return self._connection.execute(statement, parameters)

    async def _fetched(self, statement: str, *parameters: Any) -> list[Any]:
        return await self._do(lambda: self._execute(statement, *parameters).fetchall())

    async def _do(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise StoreUnavailable
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise translated(error) from error


_OUTLINES = "\U0010ffff"  # in a position: behind every session


def copy_chunks(file: Path, target: Path) -> set[str]:
    """Copy the file, as it is at one moment, to a new one; which sessions it has. It blocks.

    Whoever has it open goes on meanwhile. The copy needs no file beside it, and is on the disk. Raises StoreUnusable.
    """
    with _usable(target):
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    uri = f"{file.absolute().as_uri()}?mode=ro"
    with _usable(file), closing(sqlite3.connect(uri, uri=True)) as source, closing(sqlite3.connect(target)) as copy:
        _refuse_newer(file, source)
        source.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")
        (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise StoreUnusable(f"{file} is damaged ({' '.join(found.split())}): restore a backup")
        return {session_id for (session_id,) in copy.execute("SELECT DISTINCT sdk_session_id FROM session_files")}


@contextmanager
def _usable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnusable(f"{file} cannot be used ({error.strerror}): see to that") from error
    except sqlite3.Error as error:
        raise StoreUnusable(f"{file} cannot be used: {translated(error)}") from error


def _refuse_newer(file: Path, connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StoreUnusable(
            f"{file} has schema {version} and this program knows {SCHEMA_VERSION}: run the newer version that wrote it"
        )


def _marks(values: Collection[str]) -> str:
    return ", ".join("?" * len(values))
