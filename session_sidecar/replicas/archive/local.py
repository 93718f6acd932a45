"""A session's files on this machine: which there are, how far they are what is stored, and writing to them.

They are its transcript, and whatever lies in the directory beside it that has its name. Everything here blocks. A file
is only ever cut to a beginning of what is stored, and then appended to: killed at any moment, it is one that the next
pull goes on from.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from session_sidecar.agent.transcripts import files
from session_sidecar.agent.transcripts.lines import tails
from session_sidecar.errors import SealBroken
from session_sidecar.replicas.archive.chunks import MAIN, ChunkHead
from session_sidecar.replicas.archive.sealing import Seal

PULLED = "session-sidecar"
"""The project directory of sessions that came from elsewhere: the CLI resumes from any."""

_TAIL_BYTES = 16 * 2**10


class Moved(Exception):
    """What was being read or written has changed under it: look again."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """By what it is told that nobody has written to a file."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> "Stamp":
        """Look at a file. Raises OSError."""
        found = os.stat(file)
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


def files_of(projects: Path, session_id: str) -> dict[str, Path]:
    """The files of a session by their paths in it, the transcript first. Raises SessionAmbiguous."""
    main = files.find(projects, session_id)
    found = {} if main is None else {MAIN: main}
    for directory in sorted(
        projects.glob(f"*/{session_id}"), key=lambda path: main is not None and path == main.with_suffix("")
    ):
        for place, _, names in os.walk(directory):
            for path in (Path(place, name) for name in names):
                if path.is_file() and not path.is_symlink() and _is_text(path):
                    found[path.relative_to(directory).as_posix()] = path  # that beside the transcript comes last
    return found


def place_of(projects: Path, session_id: str, path: str, main: Path | None) -> Path:
    """Where a file of a session belongs that is not here. Raises SealBroken for a path that leads out of it."""
    main = main or projects / PULLED / f"{session_id}.jsonl"
    if path == MAIN:
        return main
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\0" in path or not parts:
        raise SealBroken(f"Nothing was changed. A stored file of session {session_id} has a path that leads out of it.")
    return main.with_suffix("").joinpath(*parts)


def whole_length(path: Path, size: int) -> int:
    """How many of the first `size` bytes are there for good: of a .jsonl up to the end of its last whole line."""
    if path.suffix != ".jsonl":
        return size
    with path.open("rb") as file:
        for start, tail in tails(file, _TAIL_BYTES, size):
            if (end := tail.rfind(b"\n")) >= 0:
                return start + end + 1
    return 0


def matching(path: Path, heads: Sequence[ChunkHead], seal: Seal, *, trusted: int = 0) -> int:
    """How many of a file's chunks, from the first on, hold what is in the file; the first `trusted` do."""
    with path.open("rb") as file:
        for number in range(trusted, len(heads)):
            data = _bytes_at(file, heads[number].offset, heads[number].length)
            if len(data) < heads[number].length or seal.mac(data, heads[number].key_id) != heads[number].mac:
                return number
    return len(heads)


def pieces(path: Path, start: int, end: int, step: int) -> Iterator[tuple[int, bytes]]:
    """The bytes of a file between two offsets, `step` at a time; of an empty file, nothing once. Raises Moved."""
    try:
        with path.open("rb") as file:
            for offset in range(start, max(end, start + 1), step):
                data = _bytes_at(file, offset, min(step, end - offset))
                if len(data) < min(step, end - offset):
                    raise Moved
                yield offset, data
    except FileNotFoundError:
        raise Moved from None


def put(path: Path, offset: int, data: bytes, *, aside: bool) -> None:
    """Let a file end with these bytes, at this offset; it is made if need be, private, and no shorter than that.

    What it has there already is written over. With `aside`, a copy of the file is kept if that was something else.
    Raises OSError, and Moved where the file is too short.
    """
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if size < offset:
            raise Moved
        was = _bytes_at(file, offset, len(data))
        if aside and was != data[: len(was)]:
            kept = path.with_suffix(f".unreadable-{time.time_ns()}")
            with os.fdopen(os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy:
                file.seek(0)
                shutil.copyfileobj(file, copy)
        file.truncate(offset)
        file.seek(offset)
        file.write(data)


def remove(projects: Path, session_id: str) -> None:
    """Remove a session's files, and the directory they were in if nothing else is. Raises OSError."""
    files.remove(projects, session_id)
    with contextlib.suppress(OSError):
        (projects / PULLED).rmdir()


def _bytes_at(file: BinaryIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    return file.read(length)


def _is_text(path: Path) -> bool:
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        return False  # the CLI writes none, and no database takes it
    return True
