"""Push and pull: between the files that a CLI writes on this machine and the chunks of them that are stored.

The files are a cache, and the outbox: what was not pushed yet is in them alone. What is stored is compared by hashes;
that a transcript only grows is promised by nobody.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from session_sidecar.agent.transcripts.files import all_sessions
from session_sidecar.errors import TranscriptMissing, TranscriptsUnavailable
from session_sidecar.replicas.archive import compare
from session_sidecar.replicas.archive.chunks import CHUNK_BYTES, MAIN, Change, ChunkHead, Chunks
from session_sidecar.replicas.archive.local import Moved, Stamp
from session_sidecar.replicas.archive.outlines import Outlines
from session_sidecar.replicas.archive.sealing import Keyring, Seal
from session_store import ThreadKey
from session_store.leases import LeaseLost

T = TypeVar("T")

_BATCH_BYTES = 8 * CHUNK_BYTES  # read from the database at once
_MOST_LOOKS = 3
_MOST_REMEMBERED = 1_000


@dataclass(slots=True, eq=False)
class _Session:
    """What is remembered of a session, so that the next push reads what was appended and nothing else."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    whole: bool = False  # all that is stored was here, and only this machine has changed it since
    stored: list[ChunkHead] | None = None  # None: nobody knows, as after a push that failed
    seal: Seal | None = None
    refusal: Callable[[], Exception] | None = None  # why nothing is to be pushed until it has been pulled
    seen: dict[str, Stamp] = field(default_factory=dict)  # the files as they were when they were what is stored


class Archive:
    """The transcripts below one CLI config directory, and where they are stored. Use it in one event loop."""

    def __init__(self, claude_config: Path, chunks: Chunks, keyring: Keyring, outlines: Outlines) -> None:
        self._config = claude_config
        self._chunks = chunks
        self._keyring = keyring
        self._outlines = outlines
        self._sessions: dict[str, _Session] = {}

    async def push(
        self,
        session_id: str,
        key: ThreadKey,
        fence: int | None,
        *,
        settled: int | None = None,
        outline: bool = False,
    ) -> None:
        """Store what is new in a session's files, under the fence of the lease on its thread.

        A running CLI may go on writing: what is stored ends with a whole line. At the end of a turn `settled` is the
        size of its transcript then, and the outline is stored with it; with `outline` that is too, where anything is
        new. What has not been pulled here is pulled first,
        as our own. Raises, with nothing stored, LeaseLost if another has the thread, and TranscriptMissing if the
        transcript is gone from here (both again until it was pulled) or ends before the turn does;
        TranscriptsUnavailable, NotSaved, KeyMissing, SealBroken, StoreUnavailable.
        """
        session = self._session(session_id)
        async with session.lock:
            for _ in range(_MOST_LOOKS):
                try:
                    await self._push(session, session_id, key, fence, settled, outline=outline)
                except Moved:
                    session.seen = {}
                else:
                    return
        raise TranscriptsUnavailable(_RESTLESS, retry_after=5)

    async def pull(self, session_id: str, resource_id: str, *, ours: bool) -> None:
        """Bring a session's files to what is stored. No process may have the session.

        With `ours`, nobody else has written to it since this machine did: what is longer here stays, to be pushed.
        Else it is cut to what is stored, as another has gone on from there. Where both differ, what is stored is taken,
        and of our own transcript a copy is set aside. Raises as `push` does.
        """
        session = self._session(session_id)
        async with session.lock:
            await self._pull(session, session_id, resource_id, ours=ours)

    def mistrust(self, session_id: str) -> None:
        """Rely on nothing that is remembered of a session: the next push or pull compares it with what is stored."""
        self._session(session_id).whole = False

    async def forget(self, session_id: str) -> bool:
        """Remove a session's files from this machine, if all of it is known to be stored; whether none is left.

        No process may have the session, and nobody may be about to read it. Raises TranscriptsUnavailable, NotSaved.
        """
        session = self._session(session_id)
        async with session.lock:
            stored = session.seen if session.whole and session.stored is not None else {}
            gone = await in_thread(partial(compare.forget, self._config, session_id, stored))
            if gone:
                session.whole = False
            return gone

    async def erased(self, seconds: float) -> list[str]:
        """The sessions that any replica has deleted in the last so many seconds; see `remove`."""
        return await self._chunks.erased(seconds)

    async def remove(self, session_id: str) -> None:
        """Remove the files of a session that is stored no more. No process may have it."""
        session = self._session(session_id)
        async with session.lock:
            if not await self._chunks.heads(session_id):
                await in_thread(partial(compare.erase, self._config, session_id))
                self._sessions.pop(session_id, None)

    async def sessions_here(self) -> set[str]:
        """The sessions that have a transcript on this machine."""
        return set(await in_thread(partial(all_sessions, self._config)))

    async def delete(self, session_id: str) -> None:
        """Remove what is stored of a session; its files here are left to whoever removes those."""
        session = self._session(session_id)
        async with session.lock:
            session.whole, session.stored, session.seen, session.seal = False, None, {}, None
            await self._chunks.delete(session_id)

    # --- push

    async def _push(
        self,
        session: _Session,
        session_id: str,
        key: ThreadKey,
        fence: int | None,
        settled: int | None,
        *,
        outline: bool,
    ) -> None:
        if session.refusal is not None:
            raise session.refusal()
        if not session.whole:
            await self._pull(session, session_id, key.resource_id, ours=True)
        if session.stored is None:
            session.seen = {}
            session.stored = await self._chunks.heads(session_id)
        seal = await self._seal(session, key.resource_id, writing=True)
        stored = session.stored
        look = partial(compare.grown, self._config, session_id, stored, session.seen, seal)
        kept, grown, seen = await in_thread(look)
        if MAIN not in seen and any(head.path == MAIN for head in stored):
            session.refusal = _lost  # a CLI that goes on would begin the file anew, with what is stored not in it
            raise _lost()
        if settled is not None and (MAIN not in seen or settled > seen[MAIN].size):
            raise _lost()
        if MAIN not in seen:
            return
        stands = {path: len(heads) for path, heads in kept.items()}
        cuts = {
            path: stands.get(path, 0)
            for path, heads in compare.by_path(stored).items()
            if stands.get(path) != len(heads)
        }
        if not cuts and not grown and settled is None:
            session.seen = seen
            return
        shown = settled is not None or outline
        sealed = await self._outlines.sealed(session_id, key.resource_id, seal) if shown else None
        added: list[ChunkHead] = []
        session.stored = None
        change = Change(cuts, compare.made(session_id, grown, seal, added), settled, sealed)
        if not await self._chunks.write(session_id, key, fence, change):
            session.refusal = LeaseLost
            raise LeaseLost
        session.stored = sorted([*(h for heads in kept.values() for h in heads), *added], key=lambda h: (h.path, h.seq))
        session.seen = seen

    # --- pull

    async def _pull(self, session: _Session, session_id: str, resource_id: str, *, ours: bool) -> None:
        if (
            ours
            and session.whole
            and session.refusal is None
            and await in_thread(partial(compare.has_main, self._config, session_id))
        ):
            return
        session.whole, session.stored, session.seen, session.seal = False, None, {}, None
        for _ in range(_MOST_LOOKS):
            try:
                stored = await self._chunks.heads(session_id)
                seal = await self._seal(session, resource_id)
                for batch in batches(await in_thread(partial(compare.missing, self._config, session_id, stored, seal))):
                    found = await self._chunks.read(session_id, batch)
                    await in_thread(partial(compare.take, self._config, session_id, batch, found, seal, ours=ours))
                session.seen = await in_thread(partial(compare.trim, self._config, session_id, stored, ours=ours))
            except Moved:
                continue
            session.whole, session.stored, session.refusal = True, stored, None
            return
        raise TranscriptsUnavailable(_RESTLESS, retry_after=5)

    async def _seal(self, session: _Session, resource_id: str, *, writing: bool = False) -> Seal:
        """The session's, made when it is first used: another session of the resource may find another salt."""
        if session.seal is None or session.seal.resource_id != resource_id or (writing and not session.seal.can_write):
            salt = None
            if self._keyring.first is not None:
                salt = (await self._chunks.salts([resource_id])).get(resource_id)
                if salt is None and writing:
                    salt = await self._chunks.salt(resource_id)
            session.seal = self._keyring.seal_of(resource_id, salt)
        return session.seal

    def _session(self, session_id: str) -> _Session:
        session = self._sessions.pop(session_id, None) or _Session()
        self._sessions[session_id] = session  # the most recently used is the last
        if len(self._sessions) > _MOST_REMEMBERED:
            idle = (name for name, other in self._sessions.items() if other is not session and not other.lock.locked())
            if (oldest := next(idle, None)) is not None:
                del self._sessions[oldest]
        return session


def batches(heads: Sequence[ChunkHead]) -> Iterator[list[ChunkHead]]:
    """Chunks in such portions as may be read at once."""
    batch, size = list[ChunkHead](), 0
    for head in heads:
        if batch and size + head.length > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(head)
        size += head.length
    if batch:
        yield batch


async def in_thread(work: Callable[[], T]) -> T:
    """Do what blocks, to its end: nobody may begin with the same files while a cancelled caller's thread has them."""
    done = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        while not done.done():
            await asyncio.wait([done])
        raise


def _lost() -> Exception:
    return TranscriptMissing("The transcript of this turn is not there, so it cannot be stored.")


_RESTLESS = "Nothing was lost. Somebody else goes on changing this transcript. Try again."
