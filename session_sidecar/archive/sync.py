"""Push and pull: between the files that a CLI writes on this machine and the chunks of them that are stored.

The files are a cache, and the outbox: what was not pushed yet is in them alone. What is stored is compared by hashes;
that a transcript only grows is promised by nobody.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from session_sidecar.agent.transcripts import files
from session_sidecar.archive import local
from session_sidecar.archive.chunks import CHUNK_BYTES, MAIN, Change, Chunk, ChunkHead, Chunks
from session_sidecar.archive.local import Moved, Stamp
from session_sidecar.archive.outlines import Outlines
from session_sidecar.archive.sealing import Keyring, Seal
from session_sidecar.errors import TranscriptMissing, TranscriptsUnavailable
from session_store import ThreadKey
from session_store.leases import LeaseLost

logger = logging.getLogger(__name__)

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
    seen: dict[str, Stamp] = field(default_factory=dict)  # the files as they were when they were what is stored


@dataclass(frozen=True, slots=True)
class _Grown:
    """The chunks from `seq` on are to be made of this part of a file."""

    path: str
    file: Path
    seq: int
    start: int
    end: int


class Archive:
    """The transcripts below one CLI config directory, and where they are stored. Use it in one event loop."""

    def __init__(self, claude_config: Path, chunks: Chunks, keyring: Keyring, outlines: Outlines) -> None:
        self._config = claude_config
        self._projects = claude_config / "projects"
        self._chunks = chunks
        self._keyring = keyring
        self._outlines = outlines
        self._sessions: dict[str, _Session] = {}

    async def push(self, session_id: str, key: ThreadKey, fence: int | None, *, settled: int | None = None) -> None:
        """Store what is new in a session's files, under the fence of the lease on its thread.

        A running CLI may go on writing: what is stored ends with a whole line. At the end of a turn `settled` is the
        size of its transcript then, and the outline is stored with it. What has not been pulled here is pulled first,
        as our own. Raises LeaseLost if another has the thread, having stored nothing; TranscriptMissing if a
        turn has ended and its transcript is not here; TranscriptsUnavailable, NotSaved, KeyMissing, SealBroken,
        StoreUnavailable.
        """
        session = self._session(session_id)
        async with session.lock:
            for _ in range(_MOST_LOOKS):
                try:
                    await self._push(session, session_id, key, fence, settled)
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

    async def forget(self, session_id: str) -> bool:
        """Remove a session's files from this machine, if all of it is stored; False if it is not known to be.

        No process may have the session, and nobody may be about to read it. Raises TranscriptsUnavailable, NotSaved.
        """
        session = self._session(session_id)
        async with session.lock:
            if not session.whole or session.stored is None:
                return False
            gone = await _in_thread(partial(self._forget, session_id, session))
            if gone:
                session.whole = False
            return gone

    async def delete(self, session_id: str) -> None:
        """Remove what is stored of a session; its files here are left to whoever removes those."""
        session = self._session(session_id)
        async with session.lock:
            session.whole, session.stored, session.seen = False, None, {}
            await self._chunks.delete(session_id)

    # --- push

    async def _push(
        self, session: _Session, session_id: str, key: ThreadKey, fence: int | None, settled: int | None
    ) -> None:
        if not session.whole:
            await self._pull(session, session_id, key.resource_id, ours=True)
        if session.stored is None:
            session.seen = {}
            session.stored = await self._chunks.heads(session_id)
        seal = await self._seal(session, key.resource_id, writing=True)
        stored = session.stored
        look = partial(self._grown, session_id, stored, session.seen, seal)
        kept, grown, seen = await _in_thread(look)
        if MAIN not in seen:
            session.whole = not any(head.path == MAIN for head in stored)  # else it is lost here: nothing is deleted
            if settled is not None:
                raise TranscriptMissing("The transcript of this turn is not there, so it cannot be stored.")
            return
        if settled is not None and settled > seen[MAIN].size:
            raise TranscriptMissing(
                "The transcript is shorter than at the end of this turn, so the turn cannot be stored."
            )
        stands = {path: len(heads) for path, heads in kept.items()}
        cuts = {path: stands.get(path, 0) for path, heads in _by_path(stored).items() if stands.get(path) != len(heads)}
        if not cuts and not grown and settled is None:
            session.seen = seen
            return
        outline = await self._outlines.sealed(session_id, key.resource_id, seal) if settled is not None else None
        added: list[ChunkHead] = []
        session.stored = None
        change = Change(cuts, _made(session_id, grown, seal, added), settled, outline)
        if not await self._chunks.write(session_id, key, fence, change):
            session.whole = False
            raise LeaseLost
        session.stored = sorted([*(h for heads in kept.values() for h in heads), *added], key=lambda h: (h.path, h.seq))
        session.seen = seen

    def _grown(
        self, session_id: str, stored: Sequence[ChunkHead], seen: dict[str, Stamp], seal: Seal
    ) -> tuple[dict[str, list[ChunkHead]], list[_Grown], dict[str, Stamp]]:
        """The chunks that stay, what new ones are made of, and the files as they are."""
        files.check_marked(self._config)
        kept, grown, stamps = dict[str, list[ChunkHead]](), list[_Grown](), dict[str, Stamp]()
        before = _by_path(stored)
        with files.saving():
            for path, file in local.files_of(self._projects, session_id).items():
                heads = before.get(path, [])
                try:
                    stamp = stamps[path] = Stamp.of(file)
                    if heads and seen.get(path) == stamp:
                        kept[path] = heads
                        continue
                    end = local.whole_length(file, stamp.size)
                    there = [head for head in heads if head.end <= end]
                    kept[path] = there = there[: _standing(file, there, seen.get(path), stamp, seal)]
                except FileNotFoundError:
                    raise Moved from None
                start = there[-1].end if there else 0
                if end > start or (not there and path != MAIN):
                    # Small chunks at the end become part of the new one, or a long session would be a thousand of them.
                    while there and there[-1].length <= end - start and end - there[-1].offset <= CHUNK_BYTES:
                        start = there.pop().offset
                    grown.append(_Grown(path, file, len(there), start, end))
        return kept, grown, stamps

    # --- pull

    async def _pull(self, session: _Session, session_id: str, resource_id: str, *, ours: bool) -> None:
        if ours and session.whole and await _in_thread(partial(self._has_main, session_id)):
            return
        session.whole, session.stored, session.seen = False, None, {}
        for _ in range(_MOST_LOOKS):
            try:
                stored = await self._chunks.heads(session_id)
                seal = await self._seal(session, resource_id)
                for batch in _batches(await _in_thread(partial(self._missing, session_id, stored, seal))):
                    found = await self._chunks.read(session_id, batch)
                    await _in_thread(partial(self._put, session_id, batch, found, seal, ours))
                session.seen = await _in_thread(partial(self._trim, session_id, stored, ours))
            except Moved:
                continue
            session.whole, session.stored = True, stored
            return
        raise TranscriptsUnavailable(_RESTLESS, retry_after=5)

    def _has_main(self, session_id: str) -> bool:
        files.check_marked(self._config)
        return files.find(self._projects, session_id) is not None

    def _missing(self, session_id: str, stored: Sequence[ChunkHead], seal: Seal) -> list[ChunkHead]:
        """The chunks whose bytes are not here."""
        files.check_marked(self._config)
        here = local.files_of(self._projects, session_id)
        missing = list[ChunkHead]()
        with files.saving():
            for path, heads in _by_path(stored).items():
                missing += heads[local.matching(here[path], heads, seal) if path in here else 0 :]
        return missing

    def _put(
        self, session_id: str, wanted: Sequence[ChunkHead], found: Sequence[Chunk], seal: Seal, ours: bool
    ) -> None:
        here = local.files_of(self._projects, session_id)
        if len(found) != len(wanted):
            raise Moved
        for head, chunk in zip(wanted, found, strict=True):
            if not _same(head, chunk.head):
                raise Moved
            data = seal.bytes_of(session_id, chunk)
            file = here.get(head.path) or local.place_of(self._projects, session_id, head.path, here.get(MAIN))
            with files.saving():
                local.put(file, head.offset, data, aside=ours and head.path == MAIN)
            here[head.path] = file

    def _trim(self, session_id: str, stored: Sequence[ChunkHead], ours: bool) -> dict[str, Stamp]:
        """Cut off what is not stored and not ours; the files, as far as they are what is stored."""
        seen, lost, ends = {}, 0, {path: heads[-1].end for path, heads in _by_path(stored).items()}
        with files.saving():
            for path, file in local.files_of(self._projects, session_id).items():
                stamp, end = Stamp.of(file), ends.get(path)
                if not ours and (end is None or stamp.size > end):
                    lost += stamp.size - (end or 0)
                    if end is None:
                        file.unlink()
                    else:
                        os.truncate(file, end)
                        stamp = Stamp.of(file)
                if end is not None:
                    seen[path] = Stamp(stamp.inode, end, stamp.mtime_ns)
        if lost:
            logger.warning("session %s: cut off %d bytes that are not stored, as another goes on without them",
                           session_id, lost)  # fmt: skip
        return seen

    def _forget(self, session_id: str, session: _Session) -> bool:
        files.check_marked(self._config)
        with files.saving():
            here = {path: Stamp.of(file) for path, file in local.files_of(self._projects, session_id).items()}
            if any(session.seen.get(path) != stamp for path, stamp in here.items()):
                return False
            local.remove(self._projects, session_id)
        return True

    async def _seal(self, session: _Session, resource_id: str, *, writing: bool = False) -> Seal:
        """The session's, made when it is first used: another session of the resource may find another salt."""
        if session.seal is None or (writing and not session.seal.can_write):
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


def _standing(file: Path, heads: Sequence[ChunkHead], seen: Stamp | None, now: Stamp, seal: Seal) -> int:
    """How many of the chunks still hold what is in the file.

    Of a file that has grown where it is, the last one is looked at: whatever is taken out before it moves its bytes.
    """
    if heads and seen is not None and seen.inode == now.inode and seen.size <= now.size:
        last = len(heads) - 1
        if local.matching(file, heads, seal, trusted=last) == len(heads):
            return len(heads)
    return local.matching(file, heads, seal)


def _made(session_id: str, grown: Sequence[_Grown], seal: Seal, added: list[ChunkHead]) -> Iterator[Chunk]:
    for part in grown:
        for seq, (offset, data) in enumerate(local.pieces(part.file, part.start, part.end, CHUNK_BYTES), part.seq):
            chunk = seal.chunk(session_id, part.path, seq, offset, data)
            added.append(chunk.head)
            yield chunk


def _same(head: ChunkHead, now: ChunkHead) -> bool:
    """Whether this is still the chunk that was asked for; it may have been sealed anew."""
    place = (head.path, head.seq, head.offset, head.length) == (now.path, now.seq, now.offset, now.length)
    return place and (head.key_id != now.key_id or head.mac == now.mac)


def _by_path(stored: Sequence[ChunkHead]) -> dict[str, list[ChunkHead]]:
    return {path: list(heads) for path, heads in groupby(stored, lambda head: head.path)}


def _batches(heads: Sequence[ChunkHead]) -> Iterator[list[ChunkHead]]:
    batch, size = list[ChunkHead](), 0
    for head in heads:
        if batch and size + head.length > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(head)
        size += head.length
    if batch:
        yield batch


async def _in_thread(work: Callable[[], T]) -> T:
    """Do what blocks, to its end: nobody may begin with the same files while a cancelled caller's thread has them."""
    done = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        while not done.done():
            await asyncio.wait([done])
        raise


_RESTLESS = "Nothing was lost. Somebody else goes on changing this transcript. Try again."
