"""What both ways of moving have: the threads of a map, what became of each, and the database with its transcripts."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from session_sidecar.agent.transcripts.reading.history import History
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.replicas.archive.chunks import Chunks
from session_sidecar.replicas.archive.outlines import Outlines
from session_sidecar.replicas.archive.postgres import PostgresChunks
from session_sidecar.replicas.archive.sealing import Keyring, Seal
from session_sidecar.replicas.archive.sync import Archive
from session_sidecar.settings import Settings
from session_store import SessionMapping, open_shared_session_map
from session_store.postgres import PostgresSessionMap


class MoveFailed(Exception):
    """It could not be done, or not all of it; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one thread.

    It was moved, or would be (`to_move`); it was there already; it was moved while a turn was `running`, as far as that
    was stored; or it was `refused`, and `why` says what is in the way.
    """

    mapping: SessionMapping
    outcome: Literal["moved", "to_move", "there", "running", "refused"]
    bytes: int = 0
    why: str | None = None

    def plain(self) -> dict[str, Any]:
        """The step for JSON."""
        told = {name: getattr(self.mapping, name) for name in ("thread_id", "resource_id", "sdk_session_id")}
        return {**told, "outcome": self.outcome, "bytes": self.bytes, "why": self.why}


class Place:
    """The database, and what of a home's config directory is to be the same as what is in it."""

    def __init__(self, settings: Settings, shared: PostgresSessionMap, stack: AsyncExitStack) -> None:
        """`stack` closes what this opens."""
        self.config = settings.claude_config
        self.map = shared
        self.chunks = PostgresChunks(shared.database, shared.replica_id)
        self.keyring = Keyring.of_setting(settings.encryption_keys or None)
        self.readers = Readers()
        stack.push_async_callback(self.readers.close)
        self._history = History(self.config, self.readers)
        self.outlines = Outlines(self.chunks, self.keyring, self._history)
        self.archive = Archive(self.config, self.chunks, self.keyring, self.outlines)

    def archive_in(self, chunks: Chunks) -> Archive:
        """The same transcripts as the home itself has them stored."""
        return Archive(self.config, chunks, self.keyring, Outlines(chunks, self.keyring, self._history))

    async def seal(self, resource_id: str, *, writing: bool = False) -> Seal:
        """What opens a resource's transcripts; and seals them, where it is for writing."""
        if writing and self.keyring.first is not None:
            return self.keyring.seal_of(resource_id, await self.chunks.salt(resource_id))
        return self.keyring.seal_of(resource_id, (await self.chunks.salts([resource_id])).get(resource_id))


async def opened_database(settings: Settings, stack: AsyncExitStack, *, read_only: bool) -> PostgresSessionMap:
    """The setting's database. Raises StoreUnusable, StoreMissing where nothing is in it yet and it is only read."""
    if settings.database is None:
        raise MoveFailed("which database? Name one: --database postgresql://…, or SIDECAR_DATABASE")
    shared = await open_shared_session_map(settings.database, read_only=read_only)
    stack.push_async_callback(shared.close)
    return shared


def stored_in(home: Settings) -> Path | None:
    """The file of what a home has sealed, if it has any."""
    return home.transcripts_file if home.transcripts_file.exists() else None
