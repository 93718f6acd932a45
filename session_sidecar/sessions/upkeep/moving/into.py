"""A home's mappings and transcripts, taken into PostgreSQL."""

import contextlib
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial
from itertools import islice

from session_sidecar.agent.transcripts.files import check_marked
from session_sidecar.errors import KeyMissing, SealBroken, SessionAmbiguous
from session_sidecar.replicas.archive import compare
from session_sidecar.replicas.archive.chunks import MAIN, Change, ChunkHead, Chunks
from session_sidecar.replicas.archive.local import files_of
from session_sidecar.replicas.archive.sealing import Seal
from session_sidecar.replicas.archive.sqlite import SqliteChunks
from session_sidecar.replicas.archive.sync import Archive, batches, in_thread
from session_sidecar.replicas.leases.identity import replica_of
from session_sidecar.sessions.upkeep.moving.places import MoveFailed, Place, Step, opened_database, stored_in
from session_sidecar.settings import Settings
from session_store import SessionMapped, SessionMapping, StoreMissing, ThreadMapped, open_session_map, walk

_AT_ONCE = 32  # chunks of a transaction: 8 MiB


async def move_in(settings: Settings, *, dry_run: bool = False) -> AsyncGenerator[Step, None]:
    """Take what a home holds into its setting's database, thread by thread; nobody uses the home meanwhile.

    Raises MoveFailed, SettingsError, StoreUnusable, StoreInUse, StoreUnavailable, TranscriptsUnavailable.
    """
    if not settings.database_file.exists():
        raise MoveFailed(f"there is no {settings.database_file}: no sidecar has run here, so name another --home")
    check_marked(settings.claude_config)
    async with AsyncExitStack() as stack:
        here = await open_session_map(f"sqlite://{settings.database_file}")
        stack.push_async_callback(here.close)
        if (settings.home / "replica").exists():
            stack.enter_context(replica_of(settings.home))
        stored: SqliteChunks | None = None
        if (file := stored_in(settings)) is not None:
            stored = SqliteChunks.peek(file) if dry_run else SqliteChunks.open(file)
            stack.push_async_callback(stored.close)
        there: Place | None = None
        with contextlib.suppress(StoreMissing):  # nothing was ever in it, and a dry run leaves it so
            there = Place(settings, await opened_database(settings, stack, read_only=dry_run), stack)
        own = there.archive_in(stored) if there is not None and stored is not None else None
        async for mapping in walk(here):
            found = await there.map.get(mapping.key) if there is not None else None
            if found is not None and found.sdk_session_id != mapping.sdk_session_id:
                yield Step(mapping, "refused", why="this thread has another session there: delete one of the two")
                continue
            try:
                if found == mapping:
                    yield Step(mapping, "there")
                elif dry_run or there is None:
                    size = await _size(settings, stored, mapping.sdk_session_id)
                    yield Step(mapping, "to_move" if found is None else "there", size)
                else:
                    yield await _step(there, own, mapping, found)
            except (KeyMissing, SealBroken, SessionAmbiguous) as error:
                yield Step(mapping, "refused", why=str(error.detail))
            except ThreadMapped:
                yield Step(mapping, "refused", why="this thread was mapped there just now: run this again")
            except SessionMapped:
                yield Step(mapping, "refused", why="another thread has this session there: delete one of the two")


async def _step(there: Place, own: Archive | None, mapping: SessionMapping, found: SessionMapping | None) -> Step:
    if own is not None:
        await own.pull(mapping.sdk_session_id, mapping.resource_id, ours=True)
    try:
        if found is None:
            return await _move(there, mapping)
        if await _is_there(there, mapping):
            return Step(mapping, "there")  # and has gone on there
        return Step(mapping, "refused", why="it has gone on here since it was moved: delete it there to move it again")
    finally:
        if own is not None and there.keyring.first is not None:
            await own.forget(mapping.sdk_session_id)


async def _move(there: Place, mapping: SessionMapping) -> Step:
    """Store a transcript, compare what is stored with it, then map its thread."""
    session_id = mapping.sdk_session_id
    seal = await there.seal(mapping.resource_id, writing=True)
    stored = await there.chunks.heads(session_id)
    look = partial(compare.grown, there.config, session_id, stored, {}, seal)
    kept, grown, seen = await in_thread(look)
    stands = {path: len(heads) for path, heads in kept.items()}
    before = {path: len(heads) for path, heads in compare.by_path(stored).items()}
    cuts = {path: stands.get(path, 0) for path, count in before.items() if stands.get(path) != count}
    outline = await there.outlines.sealed(session_id, mapping.resource_id, seal) if seen else None
    added = list[ChunkHead]()
    made = compare.made(session_id, grown, seal, added)
    change = Change(cuts, islice(made, _AT_ONCE), outline=outline)
    while True:
        before_this = len(added)
        if not await there.chunks.fill(session_id, mapping.resource_id, change):
            raise SessionMapped
        if len(added) - before_this < _AT_ONCE:
            break
        change = Change({}, islice(made, _AT_ONCE))
    heads = await there.chunks.heads(session_id)
    await _verify(there, session_id, heads, seal)
    ends = {head.path: head.end for head in heads}
    await there.map.bring(mapping, settled=ends.get(MAIN, 0))
    return Step(mapping, "moved", sum(ends.values()))


async def _verify(there: Place, session_id: str, heads: list[ChunkHead], seal: Seal) -> None:
    """Read back what was stored: each chunk opens, is what its hash says, and its hash is that of the file here."""
    for batch in batches(heads):
        found = await there.chunks.read(session_id, batch)
        if [chunk.head for chunk in found] != batch:
            raise MoveFailed(_CHANGED.format(session_id))
        for chunk in found:
            if seal.mac(seal.bytes_of(session_id, chunk), chunk.head.key_id) != chunk.head.mac:
                raise MoveFailed(_CHANGED.format(session_id))
    kept, grown, _ = await in_thread(partial(compare.grown, there.config, session_id, heads, {}, seal))
    if grown or sum(map(len, kept.values())) != len(heads):
        raise MoveFailed(_CHANGED.format(session_id))


async def _is_there(there: Place, mapping: SessionMapping) -> bool:
    """Whether all that is here of a transcript is stored as well, where more may have been added to it."""
    session_id = mapping.sdk_session_id
    seal = await there.seal(mapping.resource_id)
    stored = await there.chunks.heads(session_id)
    _, grown, _ = await in_thread(partial(compare.grown, there.config, session_id, stored, {}, seal))
    for part in grown:
        over = [head for head in stored if head.path == part.path and head.end > part.start and head.offset < part.end]
        at = part.start
        for batch in batches(over):
            for chunk in await there.chunks.read(session_id, batch):
                data = seal.bytes_of(session_id, chunk)[at - chunk.head.offset : part.end - chunk.head.offset]
                with part.file.open("rb") as file:
                    file.seek(at)
                    if file.read(len(data)) != data:
                        return False
                at += len(data)
        if at < part.end:
            return False
    return True


async def _size(settings: Settings, stored: Chunks | None, session_id: str) -> int:
    """How many bytes a session has, here or sealed."""
    here = files_of(settings.claude_config / "projects", session_id)
    if not here and stored is not None:
        return sum(head.length for head in await stored.heads(session_id))
    return sum(file.stat().st_size for file in here.values())


_CHANGED = (
    "what was stored of session {} is not what lies here, so its thread was not mapped: see that nobody writes to it, "
    "and run this again"
)
