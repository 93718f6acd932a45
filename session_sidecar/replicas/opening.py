"""Where the sidecar's state is: in its home alone, or in a database that has the transcripts too."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from session_sidecar.agent.transcripts.reading.history import History
from session_sidecar.replicas.tenancy import Alone, Tenancy
from session_sidecar.settings import Settings
from session_store import SessionMap, SessionMapError, open_session_map, open_shared_session_map

if TYPE_CHECKING:
    from session_sidecar.replicas.archive.chunks import Chunks
    from session_store.leases import Leases

    Opened = tuple[SessionMap, Leases, Chunks]

Observe = Callable[[str, float], object]
LEAVE_SECONDS = 2.0


async def opened(
    settings: Settings, stack: AsyncExitStack, history: History, observe: Observe
) -> tuple[SessionMap, Tenancy]:
    """The session map and who has its threads, for as long as `stack` is open; this home is then ours alone.

    `observe` is told of the map's statements. Raises StoreUnusable, SettingsError.
    """
    if settings.database is None and settings.encryption_keys is None:
        own = await open_session_map(settings.database_url, observe=observe)
        stack.push_async_callback(own.close)
        return own, Alone(own)
    # What only a database with transcripts in it needs is loaded only for one.
    from session_sidecar.replicas.archive.outlines import Outlines  # noqa: PLC0415
    from session_sidecar.replicas.archive.sealing import Keyring  # noqa: PLC0415
    from session_sidecar.replicas.archive.sync import Archive  # noqa: PLC0415
    from session_sidecar.replicas.fleet import Fleet  # noqa: PLC0415
    from session_sidecar.replicas.outbox import Outbox  # noqa: PLC0415

    keyring = Keyring.of_setting(settings.encryption_keys or None)
    session_map, leases, chunks = await (_of_one if settings.database is None else _of_many)(settings, stack, observe)
    outlines = Outlines(chunks, keyring, history)
    archive = Archive(settings.claude_config, chunks, keyring, outlines)
    outbox = Outbox(archive, leases, keeps_files=keyring.first is None)
    return session_map, Fleet(session_map, leases, outbox, outlines)


async def _of_one(settings: Settings, stack: AsyncExitStack, observe: Observe) -> "Opened":
    from session_sidecar.replicas.archive.sqlite import SqliteChunks  # noqa: PLC0415
    from session_sidecar.replicas.leases.sole import SoleLeases  # noqa: PLC0415

    session_map = await open_session_map(settings.database_url, observe=observe)
    stack.push_async_callback(session_map.close)
    chunks = SqliteChunks.open(settings.transcripts_file)
    stack.push_async_callback(chunks.close)
    return session_map, SoleLeases(session_map), chunks


async def _of_many(settings: Settings, stack: AsyncExitStack, observe: Observe) -> "Opened":
    from session_sidecar.replicas.archive.postgres import PostgresChunks  # noqa: PLC0415
    from session_sidecar.replicas.leases.identity import replica_of  # noqa: PLC0415

    replica_id = stack.enter_context(replica_of(settings.home.absolute()))
    shared = await open_shared_session_map(
        settings.database_url, replica_id=replica_id, lease_seconds=settings.lease_seconds, observe=observe
    )
    stack.push_async_callback(shared.close)
    await shared.register(settings.replica_url)

    async def leave() -> None:
        with suppress(SessionMapError, TimeoutError):
            async with asyncio.timeout(LEAVE_SECONDS):
                await shared.register(None)

    stack.push_async_callback(leave)  # nobody is to look for it here any more
    return shared, shared, PostgresChunks(shared.database, replica_id)
