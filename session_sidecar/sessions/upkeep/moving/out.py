"""What PostgreSQL holds, made into a new home."""

import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial

from session_sidecar.agent.transcripts import files
from session_sidecar.agent.transcripts.copying import sync
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import KeyMissing, SealBroken
from session_sidecar.replicas.archive import compare
from session_sidecar.replicas.archive.sqlite import SqliteChunks
from session_sidecar.replicas.archive.sync import Archive, in_thread
from session_sidecar.sessions.upkeep.moving.places import MoveFailed, Place, Step, opened_database
from session_sidecar.settings import Settings
from session_store import Movable, SessionMapping, open_session_map, walk

_MOST_LOOKS = 5


async def move_out(settings: Settings, *, dry_run: bool = False) -> AsyncGenerator[Step, None]:
    """Make a new home of what is in its setting's database, thread by thread; replicas may go on.

    It has its name when all is in it, and lies beside that as `.name.partial` until then. Where there are keys, its
    transcripts are sealed. Raises MoveFailed, SettingsError, StoreUnusable, StoreUnavailable, TranscriptsUnavailable,
    NotSaved.
    """
    home = settings.home.absolute()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise MoveFailed(f"{home} is there already: name a --home that is not, or is empty")
    if home.is_mount():
        raise MoveFailed(f"{home} is a mount point, which cannot be renamed to: name a directory in it")
    inside = settings.model_copy(update={"home": home.with_name(f".{home.name}.partial"), "database": None})
    refused = 0
    async with AsyncExitStack() as stack:
        place = Place(inside, await opened_database(settings, stack, read_only=True), stack)
        if dry_run:
            async for mapping in walk(place.map):
                stored = await place.chunks.heads(mapping.sdk_session_id)
                yield Step(mapping, "to_move", sum(head.length for head in stored))
            return
        moving = await _moving(inside, place, stack)
        async for mapping in walk(place.map):
            if (step := await moving.step(mapping)) is not None:
                refused += step.outcome == "refused"
                yield step
        await moving.forget_the_deleted()
    if refused:
        raise MoveFailed(
            f"{home} was not made, for want of {refused} threads that could not be read: see to those, or delete them, "
            f"and run this again; it goes on with what is in {inside.home}"
        )
    os.sync()
    inside.home.rename(home)
    sync(home.parent)


async def _moving(inside: Settings, place: Place, stack: AsyncExitStack) -> "_Moving":
    for directory in (inside.home, inside.claude_config, inside.workspace):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    here = await open_session_map(inside.database_url)
    stack.push_async_callback(here.close)
    Transcripts(inside.claude_config, place.readers).prepare()
    own: Archive | None = None
    if place.keyring.first is not None:
        chunks = SqliteChunks.open(inside.transcripts_file)
        stack.push_async_callback(chunks.close)
        own = place.archive_in(chunks)
    return _Moving(place, here, own)


class _Moving:
    def __init__(self, place: Place, here: Movable, own: Archive | None) -> None:
        self._place = place
        self._here = here
        self._own = own  # where what is pulled is sealed

    async def step(self, mapping: SessionMapping) -> Step | None:
        """Move one thread; None if it is gone by now."""
        have = await self._here.get(mapping.key)
        if have == mapping and self._own is not None:
            return Step(mapping, "there")
        if have is not None and have != mapping:  # of an earlier run
            await self._here.remove(have.key)
            await self._forget(have.sdk_session_id)
        holder = (await self._place.map.holders([mapping.key])).get(mapping.key)
        try:
            size = await self._copy(mapping)
        except (KeyMissing, SealBroken) as error:
            return Step(mapping, "refused", why=str(error.detail))
        now = await self._place.map.get(mapping.key)
        if now is None or now.sdk_session_id != mapping.sdk_session_id:
            await self._forget(mapping.sdk_session_id)
            return await self.step(now) if now is not None else None
        if have != mapping:
            await self._here.bring(mapping)
        if holder is not None and holder.live:
            return Step(mapping, "running", size, "it is copied as far as it was stored")
        return Step(mapping, "there" if have == mapping else "moved", size)

    async def forget_the_deleted(self) -> None:
        """Take away again what an earlier run has moved, and is not there any more."""
        async for mapping in walk(self._here):
            found = await self._place.map.get(mapping.key)
            if found is None:
                await self._here.remove(mapping.key)
                await self._forget(mapping.sdk_session_id)

    async def _copy(self, mapping: SessionMapping) -> int:
        """Bring a transcript here, and compare what lies here then with what is stored there; its size."""
        place, session_id = self._place, mapping.sdk_session_id
        if self._own is not None:
            await self._own.delete(session_id)  # half of what an earlier run has brought
        for _ in range(_MOST_LOOKS):
            await place.archive.pull(session_id, mapping.resource_id, ours=False)
            stored, seal = await place.chunks.heads(session_id), await place.seal(mapping.resource_id)
            if not await in_thread(partial(compare.missing, place.config, session_id, stored, seal)):
                break
        else:
            raise MoveFailed(f"session {session_id} changes all the while: run this again")
        if self._own is not None:
            await self._own.push(session_id, mapping.key, None, outline=True)
            await self._own.forget(session_id)
        return sum(head.length for head in stored)

    async def _forget(self, session_id: str) -> None:
        await in_thread(partial(files.remove, self._place.config / "projects", session_id))
        if self._own is not None:
            await self._own.delete(session_id)
