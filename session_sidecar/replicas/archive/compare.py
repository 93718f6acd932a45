"""What is to be done to make a session's files and what is stored of them the same, and doing it to the files.

Everything here blocks.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from session_sidecar.agent.transcripts import files
from session_sidecar.replicas.archive.chunks import CHUNK_BYTES, MAIN, Chunk, ChunkHead
from session_sidecar.replicas.archive.local import (
    Moved,
    Stamp,
    files_of,
    matching,
    pieces,
    place_of,
    put,
    remove,
    whole_length,
)
from session_sidecar.replicas.archive.sealing import Seal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Grown:
    """The chunks from `seq` on are to be made of this part of a file."""

    path: str
    file: Path
    seq: int
    start: int
    end: int


def grown(
    config: Path, session_id: str, stored: Sequence[ChunkHead], seen: dict[str, Stamp], seal: Seal
) -> tuple[dict[str, list[ChunkHead]], list[Grown], dict[str, Stamp]]:
    """The chunks that stay, what new ones are to be made of, and the files as they are. Raises Moved."""
    files.check_marked(config)
    kept, grown, stamps = dict[str, list[ChunkHead]](), list[Grown](), dict[str, Stamp]()
    before = by_path(stored)
    with files.saving():
        for path, file in files_of(config / "projects", session_id).items():
            heads = before.get(path, [])
            try:
                stamp = stamps[path] = Stamp.of(file)
                if heads and seen.get(path) == stamp:
                    kept[path] = heads
                    continue
                end = whole_length(file, stamp.size)
                there = [head for head in heads if head.end <= end]
                kept[path] = there = there[: _standing(file, there, seen.get(path), stamp, seal)]
            except FileNotFoundError:
                raise Moved from None
            start = there[-1].end if there else 0
            if end > start or (not there and path != MAIN):
                # Small chunks at the end become part of the new one, or a long session would be a thousand of them.
                while there and there[-1].length <= end - start and end - there[-1].offset <= CHUNK_BYTES:
                    start = there.pop().offset
                grown.append(Grown(path, file, len(there), start, end))
    return kept, grown, stamps


def made(session_id: str, grown: Sequence[Grown], seal: Seal, added: list[ChunkHead]) -> Iterator[Chunk]:
    """The chunks of what has grown, whose heads go to `added`. Raises Moved, OSError, KeyMissing."""
    for part in grown:
        for seq, (offset, data) in enumerate(pieces(part.file, part.start, part.end, CHUNK_BYTES), part.seq):
            chunk = seal.chunk(session_id, part.path, seq, offset, data)
            added.append(chunk.head)
            yield chunk


def missing(config: Path, session_id: str, stored: Sequence[ChunkHead], seal: Seal) -> list[ChunkHead]:
    """The chunks whose bytes are not here."""
    files.check_marked(config)
    here = files_of(config / "projects", session_id)
    missing = list[ChunkHead]()
    with files.saving():
        for path, heads in by_path(stored).items():
            missing += heads[matching(here[path], heads, seal) if path in here else 0 :]
    return missing


def take(
    config: Path, session_id: str, wanted: Sequence[ChunkHead], found: Sequence[Chunk], seal: Seal, *, ours: bool
) -> None:
    """Write what was read into the files. Raises Moved if it is not what was asked for, as somebody writes to it."""
    here = files_of(config / "projects", session_id)
    if len(found) != len(wanted):
        raise Moved
    for head, chunk in zip(wanted, found, strict=True):
        if not _same(head, chunk.head):
            raise Moved
        data = seal.bytes_of(session_id, chunk)
        file = here.get(head.path) or place_of(config / "projects", session_id, head.path, here.get(MAIN))
        with files.saving():
            put(file, head.offset, data, aside=ours and head.path == MAIN)
        here[head.path] = file


def trim(config: Path, session_id: str, stored: Sequence[ChunkHead], *, ours: bool) -> dict[str, Stamp]:
    """Cut off what is not stored and not ours; the files, as far as they are what is stored."""
    seen, lost, ends = {}, 0, {path: heads[-1].end for path, heads in by_path(stored).items()}
    with files.saving():
        for path, file in files_of(config / "projects", session_id).items():
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


def has_main(config: Path, session_id: str) -> bool:
    """Whether a session's transcript is here."""
    files.check_marked(config)
    return files.find(config / "projects", session_id) is not None


def forget(config: Path, session_id: str, seen: dict[str, Stamp]) -> bool:
    """Remove a session's files if they are as they were `seen`; whether they are gone."""
    files.check_marked(config)
    with files.saving():
        here = {path: Stamp.of(file) for path, file in files_of(config / "projects", session_id).items()}
        if any(seen.get(path) != stamp for path, stamp in here.items()):
            return False
        remove(config / "projects", session_id)
    return True


def erase(config: Path, session_id: str) -> None:
    """Remove a session's files. Raises TranscriptsUnavailable."""
    with files.saving():
        remove(config / "projects", session_id)


def by_path(stored: Sequence[ChunkHead]) -> dict[str, list[ChunkHead]]:
    """The chunks of each file."""
    return {path: list(heads) for path, heads in groupby(stored, lambda head: head.path)}


def _standing(file: Path, heads: Sequence[ChunkHead], seen: Stamp | None, now: Stamp, seal: Seal) -> int:
    """How many of the chunks still hold what is in the file.

    Of a file that has grown where it is, the last one is looked at: whatever is taken out before it moves its bytes.
    """
    if heads and seen is not None and seen.inode == now.inode and seen.size <= now.size:
        last = len(heads) - 1
        if matching(file, heads, seal, trusted=last) == len(heads):
            return len(heads)
    return matching(file, heads, seal)


def _same(head: ChunkHead, now: ChunkHead) -> bool:
    """Whether this is still the chunk that was asked for; it may have been sealed anew."""
    place = (head.path, head.seq, head.offset, head.length) == (now.path, now.seq, now.offset, now.length)
    return place and (head.key_id != now.key_id or head.mac == now.mac)
