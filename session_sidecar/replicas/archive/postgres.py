"""The archive in the database that several replicas share: what is written is fenced by the lease on its thread."""

import asyncio
import os
from collections.abc import Collection, Sequence
from dataclasses import astuple
from itertools import islice
from typing import Any

from session_sidecar.replicas.archive.chunks import (
    ERASED_SECONDS,
    Change,
    Chunk,
    ChunkHead,
    Position,
    Row,
    SealedOutline,
)
from session_sidecar.replicas.archive.sealing import SALT_BYTES
from session_store import ThreadKey
from session_store.postgres.database import Connection, Database

_HEAD = "path, seq, off, len, mac, key_id"
_CHUNK = f"sdk_session_id, {_HEAD}, resource_id, data"

# All of it is ours; the row is locked, so that nobody gets the thread before this has been committed.
_FENCED = """
SELECT 1 FROM session_mappings
WHERE resource_id = %(resource_id)s AND thread_id = %(thread_id)s AND holder = %(me)s AND fence = %(fence)s FOR UPDATE
"""
_SETTLED = """
UPDATE session_mappings SET settled = CASE sdk_session_id WHEN %(session_id)s THEN %(settled)s ELSE settled END
WHERE resource_id = %(resource_id)s AND thread_id = %(thread_id)s AND holder = %(me)s AND fence = %(fence)s RETURNING 1
"""
_HEADS = f"SELECT {_HEAD} FROM session_files WHERE sdk_session_id = %(session_id)s ORDER BY path, seq"  # noqa: S608
_READ = f"""
SELECT {_HEAD}, data FROM session_files JOIN unnest(%(paths)s::text[], %(seqs)s::int[]) AS wanted (path, seq)
    USING (path, seq)
WHERE sdk_session_id = %(session_id)s ORDER BY path, seq
"""  # noqa: S608
_CUT = "DELETE FROM session_files WHERE sdk_session_id = %s AND path = %s AND seq >= %s"
_ADD = f"INSERT INTO session_files ({_CHUNK}) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)"  # noqa: S608
_OUTLINE = """
INSERT INTO session_outlines (sdk_session_id, resource_id, key_id, data) VALUES (%s, %s, %s, %s)
ON CONFLICT (sdk_session_id) DO UPDATE
SET resource_id = excluded.resource_id, key_id = excluded.key_id, data = excluded.data
"""
_DELETE = """
WITH outline AS (DELETE FROM session_outlines WHERE sdk_session_id = %(session_id)s), noted AS (
    INSERT INTO erased_sessions (sdk_session_id, erased_at) VALUES (%(session_id)s, clock_timestamp())
    ON CONFLICT (sdk_session_id) DO UPDATE SET erased_at = excluded.erased_at
)
DELETE FROM session_files WHERE sdk_session_id = %(session_id)s
"""
# Those that every replica has long heard of are forgotten.
_ERASED = """
WITH forgotten AS (
    DELETE FROM erased_sessions WHERE erased_at < clock_timestamp() - make_interval(secs => %(longest)s)
)
SELECT sdk_session_id FROM erased_sessions WHERE erased_at > clock_timestamp() - make_interval(secs => %(seconds)s)
"""
_OUTLINES = """
SELECT sdk_session_id, resource_id, key_id, data FROM session_outlines WHERE sdk_session_id = ANY(%(session_ids)s)
"""
_SALTS = "SELECT resource_id, salt FROM resource_keys WHERE resource_id = ANY(%(resource_ids)s)"
_ADD_SALT = "INSERT INTO resource_keys (resource_id, salt) VALUES (%(resource_id)s, %(salt)s) ON CONFLICT DO NOTHING"
# Nobody may map a thread between the look and the deletion: what it says would be sealed with a key that is gone.
_NO_NEW_THREAD = "SET LOCAL lock_timeout = 3000; LOCK TABLE session_mappings IN SHARE MODE"
_FORGET_SALT = """
DELETE FROM resource_keys WHERE resource_id = %(resource_id)s
    AND NOT EXISTS (SELECT 1 FROM session_mappings WHERE resource_id = %(resource_id)s)
RETURNING 1
"""
_MAPPED = "SELECT 1 FROM session_mappings WHERE sdk_session_id = %(session_id)s"

_COUNT_OTHER = """
SELECT (SELECT count(*) FROM session_files WHERE key_id IS DISTINCT FROM %(key_id)s)
    + (SELECT count(*) FROM session_outlines WHERE key_id IS DISTINCT FROM %(key_id)s)
"""
_OTHER_FILES = f"""
SELECT {_HEAD}, sdk_session_id, resource_id, data FROM session_files
WHERE key_id IS DISTINCT FROM %(key_id)s AND (sdk_session_id, path, seq) > (%(session_id)s, %(path)s, %(seq)s)
ORDER BY sdk_session_id, path, seq LIMIT %(limit)s
"""  # noqa: S608
_OTHER_OUTLINES = """
SELECT sdk_session_id, resource_id, key_id, data FROM session_outlines
WHERE key_id IS DISTINCT FROM %(key_id)s AND sdk_session_id > %(session_id)s ORDER BY sdk_session_id LIMIT %(limit)s
"""
_RESEAL_FILE = """
UPDATE session_files SET key_id = %(key_id)s, mac = %(mac)s, data = %(data)s
WHERE sdk_session_id = %(session_id)s AND path = %(path)s AND seq = %(seq)s
    AND key_id IS NOT DISTINCT FROM %(old_key_id)s AND mac = %(old_mac)s
RETURNING 1
"""
_RESEAL_OUTLINE = """
UPDATE session_outlines SET key_id = %(key_id)s, data = %(data)s
WHERE sdk_session_id = %(session_id)s AND key_id IS NOT DISTINCT FROM %(old_key_id)s AND data = %(old_data)s
RETURNING 1
"""

_AT_ONCE = 8  # chunks that are made and held before they are sent
_BEHIND = "\U0010ffff"  # in a position: an outline, behind every session's chunks


class PostgresChunks:
    """Chunks in PostgreSQL. The database stays open for whoever else uses it."""

    def __init__(self, database: Database, replica_id: str) -> None:
        """`replica_id` is by whose leases this writes."""
        self._database = database
        self._me = replica_id

    async def heads(self, session_id: str) -> list[ChunkHead]:
        """See Chunks."""
        return [ChunkHead(*row) for row in await self._rows(_HEADS, session_id=session_id)]

    async def read(self, session_id: str, wanted: Sequence[ChunkHead]) -> list[Chunk]:
        """See Chunks."""
        paths, seqs = [head.path for head in wanted], [head.seq for head in wanted]
        rows = await self._rows(_READ, session_id=session_id, paths=paths, seqs=seqs)
        return [Chunk(ChunkHead(*row[:-1]), row[-1]) for row in rows]

    async def write(self, session_id: str, key: ThreadKey, fence: int | None, change: Change) -> bool:
        """See Chunks. Without a fence nothing is written."""
        of = {"resource_id": key.resource_id, "thread_id": key.thread_id, "me": self._me, "fence": fence}
        lock = _FENCED if change.settled is None else _SETTLED
        async with self._database.transaction() as connection:
            held = await connection.execute(lock.encode(), {**of, "session_id": session_id, "settled": change.settled})
            if await held.fetchone() is None:
                return False
            await _change(connection, session_id, key.resource_id, change)
        return True

    async def fill(self, session_id: str, resource_id: str, change: Change) -> bool:
        """Make a change to a session that no thread has yet, so that no fence guards it; False if one has it."""
        async with self._database.transaction() as connection:
            mapped = await connection.execute(_MAPPED.encode(), {"session_id": session_id})
            if await mapped.fetchone() is not None:
                return False
            await _change(connection, session_id, resource_id, change)
        return True

    async def delete(self, session_id: str) -> None:
        """See Chunks."""
        await self._rows(_DELETE, session_id=session_id)

    async def erased(self, seconds: float) -> list[str]:
        """See Chunks."""
        rows = await self._rows(_ERASED, seconds=min(seconds, ERASED_SECONDS), longest=ERASED_SECONDS)
        return [session_id for (session_id,) in rows]

    async def outlines(self, session_ids: Collection[str]) -> dict[str, SealedOutline]:
        """See Chunks."""
        rows = await self._rows(_OUTLINES, session_ids=list(session_ids))
        return {session_id: SealedOutline(*rest) for session_id, *rest in rows}

    async def salts(self, resource_ids: Collection[str]) -> dict[str, bytes]:
        """See Chunks."""
        return dict(await self._rows(_SALTS, resource_ids=list(resource_ids)))

    async def salt(self, resource_id: str) -> bytes:
        """See Chunks."""
        await self._rows(_ADD_SALT, resource_id=resource_id, salt=os.urandom(SALT_BYTES))
        return (await self.salts([resource_id]))[resource_id]

    async def forget_salt(self, resource_id: str) -> bool:
        """See Chunks. The server's own old row versions, its log and its backups keep it until they are gone."""
        async with self._database.transaction() as connection:
            await connection.execute(_NO_NEW_THREAD.encode())
            forgotten = await connection.execute(_FORGET_SALT.encode(), {"resource_id": resource_id})
            return await forgotten.fetchone() is not None

    async def count_sealed_otherwise(self, key_id: str) -> int:
        """See Chunks."""
        ((count,),) = await self._rows(_COUNT_OTHER, key_id=key_id)
        return int(count)

    async def sealed_otherwise(self, key_id: str, *, after: Position | None, limit: int) -> list[tuple[Position, Row]]:
        """See Chunks."""
        session_id, path, seq = after or ("", "", -1)
        found: list[tuple[Position, Row]] = []
        if session_id != _BEHIND:
            asked = {"key_id": key_id, "session_id": session_id, "path": path, "seq": seq, "limit": limit}
            for *head, name, resource_id, data in await self._rows(_OTHER_FILES, **asked):
                found.append(((name, head[0], head[1]), Row(name, resource_id, ChunkHead(*head), head[-1], data)))
        if len(found) < limit:
            past = path if session_id == _BEHIND else ""
            rest = await self._rows(_OTHER_OUTLINES, key_id=key_id, session_id=past, limit=limit - len(found))
            found += [((_BEHIND, name, 0), Row(name, whose, None, was, data)) for name, whose, was, data in rest]
        return found

    async def reseal(self, row: Row, key_id: str, mac: bytes, data: bytes) -> bool:
        """See Chunks."""
        new = {"session_id": row.session_id, "key_id": key_id, "mac": mac, "data": data, "old_key_id": row.key_id}
        if (head := row.head) is None:
            return bool(await self._rows(_RESEAL_OUTLINE, **new, old_data=row.data))
        return bool(await self._rows(_RESEAL_FILE, **new, path=head.path, seq=head.seq, old_mac=head.mac))

    async def close(self) -> None:
        """See Chunks. There is nothing that is not the database's."""

    async def _rows(self, statement: str, **parameters: Any) -> list[tuple[Any, ...]]:
        return await self._database.rows(statement, parameters, binary=True)


async def _change(connection: Connection, session_id: str, resource_id: str, change: Change) -> None:
    for path, seq in change.cut.items():
        await connection.execute(_CUT.encode(), (session_id, path, seq))
    while chunks := await asyncio.to_thread(lambda: list(islice(change.add, _AT_ONCE))):
        for chunk in chunks:
            await connection.execute(_ADD.encode(), (session_id, *astuple(chunk.head), resource_id, chunk.data))
    if (outline := change.outline) is not None:
        await connection.execute(_OUTLINE.encode(), (session_id, *astuple(outline)))
