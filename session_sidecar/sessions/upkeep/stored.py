"""What is stored of a home's conversations elsewhere than in its transcripts: sealed in the home, or in PostgreSQL."""

from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from session_sidecar.replicas.archive.chunks import MAIN, Chunks
from session_sidecar.replicas.archive.sealing import Keyring
from session_sidecar.replicas.archive.sqlite import SqliteChunks
from session_sidecar.replicas.leases.identity import replica_of
from session_sidecar.settings import Settings
from session_store import (
    Leases,
    SessionMap,
    SessionMapping,
    StoreInUse,
    open_session_map,
    open_shared_session_map,
    walk,
)

if TYPE_CHECKING:
    from session_store.postgres import PostgresSessionMap


class Stored:
    """Looks up what is stored of a home's conversations, and with which keys."""

    def __init__(self, chunks: Chunks | None, keyring: Keyring, leases: Leases | None = None) -> None:
        """Without `chunks`, nothing is stored but the transcripts; with `leases`, several replicas store."""
        self._chunks = chunks
        self._keyring = keyring
        self._leases = leases
        self.locked: Counter[str] = Counter()
        """The IDs of keys that are not there, and how many of the conversations that were looked up need each."""

    @property
    def of_several(self) -> bool:
        """Whether other replicas store here, too."""
        return self._leases is not None

    async def has(self, row: SessionMapping) -> bool:
        """Whether a transcript is stored, or a replica has the thread, which is to store it."""
        if self._chunks is None:
            return False
        stored = [head for head in await self._chunks.heads(row.sdk_session_id) if head.path == MAIN]
        self.locked.update({head.key_id for head in stored if head.key_id and head.key_id not in self._keyring})
        if stored or self._leases is None:
            return bool(stored)
        holder = (await self._leases.holders([row.key])).get(row.key)
        return holder is not None and holder.live


async def opened(settings: Settings, stack: AsyncExitStack, *, change: bool) -> tuple[SessionMap, Stored, str | None]:
    """A home's session map, what is stored of it, and who runs the home, if anybody does.

    It is ours alone if nobody does. Raises StoreInUse if somebody does and it is to be changed; StoreUnusable,
    SettingsError.
    """
    keyring = Keyring.of_setting(settings.encryption_keys or None)
    in_use: str | None = None
    if settings.database is not None:
        try:
            stack.enter_context(replica_of(settings.home.absolute()))
        except StoreInUse as error:
            if change:
                raise
            in_use = str(error)
        shared, of_all = await opened_shared(settings, stack)
        return shared, Stored(of_all, keyring, shared), in_use
    try:
        session_map = await open_session_map(settings.database_url)
    except StoreInUse as error:
        if change:
            raise
        in_use = str(error)
        session_map = await open_session_map(settings.database_url, read_only=True)
    stack.push_async_callback(session_map.close)
    if not settings.transcripts_file.exists():
        return session_map, Stored(None, keyring), in_use
    chunks = SqliteChunks.peek(settings.transcripts_file)
    stack.push_async_callback(chunks.close)
    return session_map, Stored(chunks, keyring), in_use


async def opened_shared(settings: Settings, stack: AsyncExitStack) -> "tuple[PostgresSessionMap, Chunks]":
    """The database of the replicas, as it is, without being one of them. Raises StoreUnusable."""
    shared = await open_shared_session_map(settings.database_url, read_only=True)
    stack.push_async_callback(shared.close)
    from session_sidecar.replicas.archive.postgres import PostgresChunks  # noqa: PLC0415 - an extra that not everybody has

    return shared, PostgresChunks(shared.database, shared.replica_id)


async def sessions_beside(settings: Settings) -> set[str]:
    """The sessions of a home's own session map where it uses PostgreSQL: they may be yet to be imported."""
    if settings.database is None or not settings.database_file.exists():
        return set()
    session_map = await open_session_map(f"sqlite://{settings.database_file}", read_only=True)
    try:
        return {row.sdk_session_id async for row in walk(session_map)}
    finally:
        await session_map.close()
