"""Copies of transcripts: what the SDK's `fork_session()` makes, a line at a time and so with next to no memory.

The SDK's own function holds the whole transcript several times over (a gigabyte for 90 MiB), takes six times as long,
and loses messages at a U+2028. tests/test_reading.py compares the two.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from session_sidecar.agent.transcripts.lines import Chain, Entry, linked, parsed, written
from session_sidecar.errors import MessageNotFound

_OF_THE_SOURCE = ("teamName", "agentName", "slug", "sourceToolAssistantUUID")  # a fork does not have them
_BLOCK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy that was made, to make the next one of: when ten forks are asked for at once, nine are plain copies."""

    asked: tuple[object, ...]
    path: Path
    state: tuple[int, int, int]


_last: _Copy | None = None


def copy(files: Sequence[Path], session_id: str, new_id: str, up_to: str, title: str) -> None:
    """Copy a session's transcript, the one of `files`, up to a message into that of the new session, beside it.

    Copies that are made one after the other of an unchanged transcript have their messages' UUIDs in common, as a fork
    that the CLI makes has them with its parent. Raises MessageNotFound, and OSError; no file is left then.
    """
    global _last  # noqa: PLW0603 - only ever a shortcut, and taken only while both files are what they were
    (path,) = files
    new = path.with_name(f"{new_id}.jsonl")
    asked = (path, _state(path.stat()), session_id, up_to, title)
    with _created(new) as file:
        if not (_last and _last.asked == asked and _write_again(file, _last, new_id)):
            file.seek(0)
            file.truncate()
            _write(file, path, session_id, new_id, up_to=up_to, title=title)
    _last = _Copy(asked, new, _state(new.stat()))


def _state(file: os.stat_result) -> tuple[int, int, int]:
    return file.st_size, file.st_ino, file.st_mtime_ns


@contextlib.contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk when the block is left; none if it fails."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", _BLOCK_BYTES) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _write_again(file: BinaryIO, made: _Copy, new_id: str) -> bool:
    """A copy of a copy, if that is still as it was made.

    Its session ID was drawn for it alone, so that is in no message, and nothing else is replaced.
    """
    before, after = made.path.stem.encode(), new_id.encode()
    left = made.state[0]  # what a turn adds meanwhile is not part of it
    with contextlib.suppress(FileNotFoundError), made.path.open("rb", buffering=0) as source:
        if _state(os.fstat(source.fileno())) != made.state:
            return False
        kept = b""  # it may be cut by the end of a block
        while left > 0 and (block := source.read(min(left, _BLOCK_BYTES))):
            left -= len(block)
            block = (kept + block).replace(before, after)
            kept = block[1 - len(before) :]
            file.write(block[: 1 - len(before)])
        file.write(kept)
        return not left
    return False


def _write(file: BinaryIO, path: Path, session_id: str, new_id: str, *, up_to: str, title: str) -> None:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    chain, renamed = Chain(), _Renamed()
    replacements: list[Any] = []
    found = False
    with path.open("rb") as lines:
        for line in lines:
            if b'"content-replacement"' in line:
                replacements += _replacements(line, session_id)
            if found or (entry := linked(line)) is None:
                continue
            parent = chain.parent(entry)
            if entry.get("isSidechain"):
                continue
            found = entry["uuid"] == up_to
            parent = renamed.add(entry, parent)
            if entry["type"] == "progress":
                continue  # only ever shown; what follows it then follows what it followed
            logical = entry.get("logicalParentUuid")
            forked = {
                **entry,
                "uuid": renamed[entry["uuid"]],
                "parentUuid": parent,
                "logicalParentUuid": renamed[logical] if logical else logical,
                "sessionId": new_id,
                # Only the last one is new: by it the CLI knows where to go on.
                "timestamp": now if found else entry.get("timestamp", now),
                "isSidechain": False,
                "forkedFrom": {"sessionId": session_id, "messageUuid": entry["uuid"]},
            }
            for name in _OF_THE_SOURCE:
                forked.pop(name, None)
            _dump(file, forked)
    if not found:
        raise MessageNotFound("The message to cut after is no longer in the transcript. Read it again.")
    common = {"sessionId": new_id, "timestamp": now}
    if replacements:
        note = {"type": "content-replacement", "replacements": replacements}
        _dump(file, note | common | {"uuid": str(uuid.uuid4())})
    _dump(file, {"type": "custom-title", "customTitle": title} | common | {"uuid": str(uuid.uuid4())})


class _Renamed:
    """The new UUIDs of entries, and past which entries a link goes on."""

    def __init__(self) -> None:
        self._new: dict[str, str] = {}
        self._past: dict[str, str | None] = {}

    def __getitem__(self, old: object) -> str | None:
        return self._new.get(old) if isinstance(old, str) else None

    def add(self, entry: Entry, parent: str | None) -> str | None:
        """Give an entry a new UUID; the new one of what it follows."""
        self._new.setdefault(entry["uuid"], str(uuid.uuid4()))
        if parent in self._past:
            parent = self._past[parent]
        if entry["type"] == "progress":
            self._past[entry["uuid"]] = parent
        return self[parent]


def _replacements(line: bytes, session_id: str) -> list[Any]:
    """What the CLI has put in the place of contents that were too long for the model."""
    with contextlib.suppress(ValueError, RecursionError):
        match parsed(line):
            case {"type": "content-replacement", "sessionId": str(of), "replacements": list(made)} if of == session_id:
                return made
    return []


def _dump(file: BinaryIO, entry: Entry) -> None:
    file.write(written(entry))
