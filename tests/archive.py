"""Machines that share an archive: each with a config directory of its own, as replicas have."""

import contextlib
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from session_sidecar.agent.transcripts.files import MARKER
from session_sidecar.agent.transcripts.reading.history import History
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.replicas.archive.chunks import MAIN, Chunks
from session_sidecar.replicas.archive.local import files_of
from session_sidecar.replicas.archive.outlines import Outlines
from session_sidecar.replicas.archive.postgres import PostgresChunks
from session_sidecar.replicas.archive.sealing import KEY_BYTES, Keyring
from session_sidecar.replicas.archive.sqlite import SqliteChunks
from session_sidecar.replicas.archive.sync import Archive
from session_store import ThreadKey
from session_store.postgres import PostgresSessionMap

KEY = ThreadKey("t1", "alice")
RING = Keyring({"k1": os.urandom(KEY_BYTES)})
PLAIN = Keyring()


def a_session() -> str:
    """The ID of a session that nobody has."""
    return str(uuid.uuid4())


@dataclass(frozen=True)
class Keeper:
    """Where chunks are kept, and what KEY's thread is written with."""

    chunks: Chunks
    fence: int | None
    leases: PostgresSessionMap | None = None


@contextlib.asynccontextmanager
async def in_sqlite(file: Path) -> AsyncIterator[Keeper]:
    """A file of SQLite."""
    chunks = SqliteChunks.open(file)
    try:
        yield Keeper(chunks, None)
    finally:
        await chunks.close()


@contextlib.asynccontextmanager
async def in_postgres(url: str) -> AsyncIterator[Keeper]:
    """A database of PostgreSQL, with KEY's thread leased."""
    leases = await PostgresSessionMap.open(url)
    try:
        await leases.add(KEY, a_session())
        lease = await leases.acquire(KEY)
        assert lease is not None
        yield Keeper(PostgresChunks(leases.database, leases.replica_id), lease.fence, leases)
    finally:
        await leases.close()


class Machine:
    """One machine's config directory, and the archive as a sidecar there has it."""

    def __init__(self, config: Path, kept: Keeper, ring: Keyring, readers: Readers) -> None:
        config.mkdir(parents=True, exist_ok=True)
        (config / MARKER).touch()
        self.config = config
        self.projects = config / "projects"
        self.chunks, self.fence, self._ring = kept.chunks, kept.fence, ring
        self.outlines = Outlines(kept.chunks, ring, History(config, readers))
        self.start_again()

    def start_again(self) -> None:
        """Forget what only the process knew."""
        self.archive = Archive(self.config, self.chunks, self._ring, self.outlines)

    def path(self, session: str, path: str = MAIN) -> Path:
        """Where a file of a session is, or would be put by a CLI."""
        main = files_of(self.projects, session).get(MAIN, self.projects / "-workspace" / f"{session}.jsonl")
        return main.with_suffix("") / path if path else main

    def write(self, session: str, data: bytes, path: str = MAIN) -> Path:
        """Write a file of a session anew, where it is, as some code of the CLI does."""
        file = self.path(session, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return file

    def append(self, session: str, data: bytes, path: str = MAIN) -> Path:
        """Append to a file, as the CLI mostly does."""
        file = self.path(session, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as opened:
            opened.write(data)
        return file

    def files(self, session: str) -> dict[str, bytes]:
        """All files of a session."""
        return {path: file.read_bytes() for path, file in files_of(self.projects, session).items()}
