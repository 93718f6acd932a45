"""The words of the archive, and what any keeper of it promises. A keeper knows bytes and their places, no contents."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from session_store import ThreadKey

MAIN = ""
"""The path of a session's transcript; others are relative to the session's directory: `subagents/agent-a1.jsonl`."""

ERASED_SECONDS = 30 * 86400.0
"""For so long it is told that a session was deleted: a replica that is away for longer keeps its copy."""

CHUNK_BYTES = 2**18
"""What a chunk holds at most, before it is sealed."""


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """Which bytes of which file a chunk holds, and a hash of them: what there is to know without reading it."""

    path: str
    seq: int  # 0, 1, 2 … in each file, without a gap
    offset: int  # of its first byte, where the chunk before it ends
    length: int  # before it was sealed
    mac: bytes
    key_id: str | None  # None: not sealed

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk with its bytes, sealed if its head names a key."""

    head: ChunkHead
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SealedOutline:
    """What lists show of a session, sealed if it names a key."""

    resource_id: str
    key_id: str | None
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Change:
    """What one push changes, all of it or nothing."""

    cut: Mapping[str, int]
    """For each path the seq from which on its chunks are deleted; 0 takes the file away."""
    add: Iterator[Chunk]
    """The chunks to be added after that. It blocks: go through it in a thread. What it raises undoes the change."""
    settled: int | None = None
    """Bytes of the main file at the end of the last completed turn, if a turn has just ended."""
    outline: SealedOutline | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A chunk (or an outline, whose `head` is None) with whose it is: for what goes through all there is."""

    session_id: str
    resource_id: str
    head: ChunkHead | None
    key_id: str | None
    data: bytes = field(repr=False)


Position = tuple[str, str, int]
"""Of a row, in the order of all of them: its session, path and seq. An outline is behind the chunks of all sessions."""


class Chunks(Protocol):
    """Keeps the files of sessions. Every call is atomic; any may raise StoreUnavailable."""

    async def heads(self, session_id: str) -> list[ChunkHead]:
        """The heads of all chunks of a session, by path and seq."""
        ...

    async def read(self, session_id: str, wanted: Sequence[ChunkHead]) -> list[Chunk]:
        """Some chunks as they are now, by path and seq, without those that are gone. Ask for few: all are held."""
        ...

    async def write(self, session_id: str, key: ThreadKey, fence: int | None, change: Change) -> bool:
        """Make a change if the fence is still that of the thread, else give False and change nothing.

        A keeper that only one process has knows no fences.
        """
        ...

    async def delete(self, session_id: str) -> None:
        """Remove a session's chunks and its outline."""
        ...

    async def erased(self, seconds: float) -> list[str]:
        """The sessions that were deleted in the last so many seconds, of `ERASED_SECONDS` at most.

        Whoever else has copies of them removes those.
        """
        ...

    async def outlines(self, session_ids: Collection[str]) -> dict[str, SealedOutline]:
        """The outlines of those sessions that have one."""
        ...

    async def salts(self, resource_ids: Collection[str]) -> dict[str, bytes]:
        """The salts of those resources that have one: their keys are made with it."""
        ...

    async def salt(self, resource_id: str) -> bytes:
        """The salt of a resource, made at random where there was none."""
        ...

    async def forget_salt(self, resource_id: str) -> bool:
        """Remove a resource's salt: nothing that is sealed for it can be read any more, by anyone.

        Whether it did: a keeper that several replicas use leaves it where a thread of the resource is mapped.
        """
        ...

    async def count_sealed_otherwise(self, key_id: str) -> int:
        """How many rows are not sealed with this key, the plain ones among them."""
        ...

    async def sealed_otherwise(self, key_id: str, *, after: Position | None, limit: int) -> list[tuple[Position, Row]]:
        """The next rows that are not sealed with this key."""
        ...

    async def reseal(self, row: Row, key_id: str, mac: bytes, data: bytes) -> bool:
        """Put a row sealed anew in the place of what it was; False, if it is no longer that."""
        ...

    async def close(self) -> None:
        """Finish what was begun and give everything back."""
        ...
