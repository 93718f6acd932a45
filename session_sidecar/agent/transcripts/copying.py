"""Copies of a home's files for backups: private, on the disk when they are made, and without half a line.

The CLI goes on writing meanwhile. It appends to a transcript, so a copy is what the transcript was at some moment, but
for a line that was just being written.
"""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from session_sidecar.agent.transcripts.files import MARKER
from session_sidecar.agent.transcripts.lines import TAIL_BYTES, tails

CONVERSATIONS = ("projects", "file-history", "plans", "tasks", "todos", "teams", "uploads", "agent-memory")
"""What the CLI keeps of conversations in its config directory: transcripts, and what is told of elsewhere in them."""

SETTINGS = ("settings.json", "CLAUDE.md", "agents", "commands", "skills", "rules", "output-styles", "workflows")
"""What an operator keeps there. The rest are logins (`.credentials.json`, `.claude.json`), processes and caches."""

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is in a directory and below it."""

    files: int
    bytes: int

    @classmethod
    def of(cls, *directories: Path) -> "Size":
        """Count regular files. Raises OSError."""
        sizes = [
            file.stat().st_size
            for directory in directories
            for path, _, names in os.walk(directory, onerror=_raise_unless_gone)
            for name in names
            if (file := Path(path, name)).is_file() and not file.is_symlink()
        ]
        return cls(len(sizes), sum(sizes))


def copy_config(source: Path, target: Path) -> None:
    """Copy what conversations are made of, and the operator's settings, from one config directory into another.

    The file that marks the directory as whole comes last: without it no turn is run there. What is in `target` already
    stays. A link is followed, unless it leads to what is copied anyway. Raises OSError.
    """
    copied = [os.path.realpath(source)]

    def follow(link: Path) -> bool:
        real = os.path.realpath(link)
        new = not any(Path(real).is_relative_to(directory) for directory in copied)
        copied.append(real)
        return new

    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in (*CONVERSATIONS, *SETTINGS):
        _copy(source / name, target / name, _whole_lines, follow)
    sync(target)
    _copy(source / MARKER, target / MARKER, _as_it_is)
    sync(target)


def unmark(claude_config: Path) -> None:
    """See that no turn is run with a config directory before `copy_config` has brought all that is to be there."""
    (claude_config / MARKER).unlink(missing_ok=True)


def copy_files(source: Path, target: Path) -> None:
    """Copy a directory of anything, but for sockets and devices; links stay links. Raises OSError."""
    _copy(source, target, _as_it_is)


def write(path: Path, text: str) -> None:
    """Write a new file, private and on the disk. Raises OSError."""
    with _created(path, 0) as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def sync(directory: Path) -> None:
    """See that the names in a directory are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def left_out(claude_config: Path) -> list[str]:
    """What there is in a config directory that `copy_config` leaves where it is."""
    return sorted({path.name for path in claude_config.iterdir()} - {*CONVERSATIONS, *SETTINGS, MARKER})


def _copy(
    source: Path,
    target: Path,
    finish: Callable[[BinaryIO, Path], None],
    follow: Callable[[Path], bool] | None = None,
) -> None:
    """Copy a file, a link or a directory. What is deleted meanwhile is not copied, and not missed."""
    with contextlib.suppress(FileNotFoundError):
        if source.is_symlink():
            if follow is None:
                with contextlib.suppress(FileExistsError):
                    target.symlink_to(source.readlink())
                return
            if not follow(source):
                return
        mode = source.stat().st_mode
        if stat.S_ISDIR(mode):
            target.mkdir(mode=0o700, exist_ok=True)
            for name in os.listdir(source):
                _copy(source / name, target / name, finish, follow)
            sync(target)
        elif stat.S_ISREG(mode):
            _copy_file(source, target, finish)


def _copy_file(source: Path, target: Path, finish: Callable[[BinaryIO, Path], None]) -> None:
    with source.open("rb") as file:
        now = os.fstat(file.fileno())
        with contextlib.suppress(FileExistsError), _created(target, now.st_mode & 0o700) as copy:
            shutil.copyfileobj(file, copy, _BLOCK_BYTES)
            finish(copy, source)
            copy.flush()
            os.utime(copy.fileno(), ns=(now.st_atime_ns, now.st_mtime_ns))  # the SDK tells by it when it was last used
            os.fsync(copy.fileno())


@contextlib.contextmanager
def _created(path: Path, mode: int) -> Iterator[BinaryIO]:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode | 0o600), "w+b") as file:
        yield file


def _as_it_is(copy: BinaryIO, source: Path) -> None:
    """Leave a copy as it was read."""


def _whole_lines(copy: BinaryIO, source: Path) -> None:
    """Cut what is half of a line off the end of a transcript, or end a line that only lacks its end."""
    if source.suffix != ".jsonl":
        return
    size = copy.seek(0, os.SEEK_END)
    last = b""
    for _, tail in tails(copy, TAIL_BYTES, size):
        _, found, last = tail.rpartition(b"\n")
        if found:
            break
    if not last:
        return
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        copy.truncate(size - len(last))
    else:
        copy.seek(0, os.SEEK_END)
        copy.write(b"\n")


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
