"""Keys: sealing anew what is stored, with the first of them; and forgetting one resource's for good."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from session_sidecar.agent.transcripts import files
from session_sidecar.agent.transcripts.reading.history import History
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.errors import KeyMissing, SealBroken, SessionAmbiguous, TranscriptMissing
from session_sidecar.replicas.archive.chunks import Chunks
from session_sidecar.replicas.archive.local import files_of
from session_sidecar.replicas.archive.outlines import Outlines
from session_sidecar.replicas.archive.rotation import rotate
from session_sidecar.replicas.archive.sealing import Keyring
from session_sidecar.replicas.archive.sqlite import SqliteChunks
from session_sidecar.replicas.archive.sync import Archive, in_thread
from session_sidecar.sessions.upkeep.stored import opened_shared
from session_sidecar.settings import Settings
from session_store import SessionMap, StoreInUse, open_session_map, walk


class KeyRefused(Exception):
    """It was not done; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Rotated:
    """How far it is. First `taken_in` grows, then `resealed`."""

    taken_in: int = 0
    """Conversations that lay here plain, and are sealed now; only a home of its own has such."""
    resealed: int = 0
    """Chunks that another key had sealed, or none, out of `of`."""
    of: int = 0
    unreadable: int = 0
    """Chunks that do not open; they are as they were."""
    why: dict[str, str] = field(default_factory=dict)
    """By session: why some of it does not open, or was not taken in."""
    plain: int = 0
    """Transcripts that lie here plain all the same, as no thread has them, or a running sidecar has."""
    in_use: str | None = None
    """Who runs this home, if anybody does: then what lies here plain is left to him."""


async def seal_anew(settings: Settings) -> AsyncGenerator[Rotated, None]:
    """Seal with the first key what is stored under another or under none, beside whoever runs, and say how far it is.

    In a home where no sidecar runs, transcripts that lie there plain are taken in first. Whoever stops and begins again
    goes on where it was. Raises KeyRefused, SettingsError, StoreUnusable, StoreUnavailable, TranscriptsUnavailable.
    """
    if settings.encryption_keys is None:
        raise KeyRefused("there are no keys to seal with: set SIDECAR_ENCRYPTION_KEYS as the sidecar has it")
    keyring = Keyring.of_setting(settings.encryption_keys)
    async with AsyncExitStack() as stack:
        progress = Rotated()
        if settings.database is not None:
            _, chunks = await opened_shared(settings, stack)
        else:
            _check_home(settings)
            session_map: SessionMap | None = None
            try:
                session_map = await open_session_map(settings.database_url)
                stack.push_async_callback(session_map.close)
            except StoreInUse as error:
                if not settings.transcripts_file.exists():
                    raise  # it has no keys
                progress = Rotated(in_use=str(error))
            chunks = SqliteChunks.open(settings.transcripts_file)
            stack.push_async_callback(chunks.close)
            if session_map is not None:
                async for progress in _take_in(settings, session_map, chunks, keyring, stack):
                    yield progress
            progress = replace(progress, plain=len(files.all_sessions(settings.claude_config)))
        async for step in rotate(chunks, keyring):
            yield replace(
                progress,
                resealed=step.done,
                of=step.of,
                unreadable=step.unreadable,
                why=progress.why | dict(step.why),
            )


async def _take_in(
    settings: Settings, session_map: SessionMap, chunks: Chunks, keyring: Keyring, stack: AsyncExitStack
) -> AsyncGenerator[Rotated, None]:
    """Store what lies in a home and is not stored yet, or not all of it, and remove it there."""
    files.check_marked(settings.claude_config)
    readers = Readers()
    stack.push_async_callback(readers.close)
    outlines = Outlines(chunks, keyring, History(settings.claude_config, readers))
    archive = Archive(settings.claude_config, chunks, keyring, outlines)
    taken_in, why = 0, dict[str, str]()
    async for mapping in walk(session_map):
        session_id = mapping.sdk_session_id
        try:
            if not await in_thread(partial(files_of, settings.claude_config / "projects", session_id)):
                continue
            await archive.push(session_id, mapping.key, None, outline=True)
            taken_in += await archive.forget(session_id)
        except (KeyMissing, SealBroken, SessionAmbiguous, TranscriptMissing) as error:
            why[session_id] = str(error.detail)
        yield Rotated(taken_in=taken_in, why=dict(why))


async def forget_key(settings: Settings, resource_id: str) -> bool:
    """Forget what a resource's keys are made with: none of its conversations can be read again. Whether it had any.

    Raises KeyRefused while a thread of it is mapped; StoreInUse for a home where a sidecar runs, StoreUnusable,
    StoreUnavailable.
    """
    async with AsyncExitStack() as stack:
        if settings.database is not None:
            session_map: SessionMap
            session_map, chunks = await opened_shared(settings, stack)
        else:
            _check_home(settings)
            session_map = await open_session_map(settings.database_url)
            stack.push_async_callback(session_map.close)
            if not settings.transcripts_file.exists():
                return False
            chunks = SqliteChunks.open(settings.transcripts_file)
            stack.push_async_callback(chunks.close)
        if not await session_map.page(resource_id, limit=1) and await chunks.forget_salt(resource_id):
            return True
        if await session_map.page(resource_id, limit=1):
            raise KeyRefused(f"{resource_id!r} has threads: delete them first, with their transcripts")
        return False


def _check_home(settings: Settings) -> None:
    if not settings.database_file.exists():
        raise KeyRefused(f"there is no {settings.database_file}: no sidecar has run here, so name another --home")
