"""The lines of a transcript: which of them are links of its chain, and the chain made whole where lines are lost."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

Entry = dict[str, Any]

TAIL_BYTES = 16 * 2**10
"""What is read of the end of a file at first."""

_LINKED = frozenset({"user", "assistant", "progress", "system", "attachment"})


def tails(file: BinaryIO, first: int, end: int) -> Iterator[tuple[int, bytes]]:
    """The last bytes before `end`, each with where they begin: `first` of them, then four times as many, up to all."""
    length = first
    while True:
        start = max(0, end - length)
        file.seek(start)
        yield start, file.read(end - start)
        if not start:
            return
        length *= 4


def is_in(path: Path, name: str, end: int) -> bool:
    """Whether an entry is in the first `end` bytes of a transcript, most likely near their end."""
    with path.open("rb") as file:
        return any(f'"uuid":"{name}"'.encode() in tail for _, tail in tails(file, TAIL_BYTES, end))


def holds(path: Path, message_id: str, prompt_id: str, size: int) -> bool:
    """Whether a message is in a transcript, and all that leads to it from its prompt, beyond the first `size` bytes.

    It is looked for from the end, as far as the prompt. A command of the operator's is kept under another UUID than its
    prompt's: it leads to what was there before.
    """
    before: str | None = message_id
    with path.open("rb") as file:
        for start, tail in tails(file, TAIL_BYTES, os.fstat(file.fileno()).st_size):
            lines = tail.splitlines(keepends=True)[1 if start else 0 :]  # not a cut one
            entries = [entry for line in lines if line.endswith(b"\n") and (entry := linked(line))]
            parents = {entry["uuid"]: entry.get("parentUuid") for entry in entries}
            before = message_id
            while before in parents:
                if before == prompt_id:
                    return True
                before = parents.pop(before)
            if start <= size:
                break
    return before is None or (before != message_id and is_in(path, before, size))


def written(entry: Entry) -> bytes:
    """An entry as a line."""
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def parsed(line: bytes) -> Any:
    """A line as JSON. Raises ValueError or RecursionError where it is none."""
    return json.loads(line.decode(errors="replace"))


def linked(line: bytes) -> Entry | None:
    """The entry in a line, if it is a link of a chain, and neither torn, nor a title, a note or something else."""
    if b'"uuid"' not in line:
        return None  # the CLI's notes to itself; not worth the parsing
    try:
        entry = parsed(line)
    except (ValueError, RecursionError):
        return None
    return entry if is_linked(entry) else None


def is_linked(entry: object) -> bool:
    """Whether this is a link of a chain."""
    return isinstance(entry, dict) and isinstance(entry.get("uuid"), str) and entry.get("type") in _LINKED


class Chain:
    """One chain again of the entries of a file, in its order: across lost lines and, if asked for, compactions.

    Whatever an entry followed, the nearest one that is left is the one before it in the file. Subagents have chains of
    their own.
    """

    def __init__(self, *, compacted: bool = False) -> None:
        self._compacted = compacted
        self._known: set[str] = set()
        self._before: str | None = None

    def parent(self, entry: Entry) -> str | None:
        """What the next entry of the file follows."""
        parent = entry.get("parentUuid")
        if parent is None and self._compacted and entry.get("subtype") == "compact_boundary":
            parent = entry.get("logicalParentUuid") or self._before
        if parent is not None and not (isinstance(parent, str) and parent in self._known):
            # A summary whose boundary is lost begins the conversation all the same.
            begins = entry.get("isSidechain") or (entry.get("isCompactSummary") and not self._compacted)
            parent = None if begins else self._before
        again = entry["uuid"] in self._known  # as the CLI writes what a full disk has taken only a part of
        self._known.add(entry["uuid"])
        if not entry.get("isSidechain") and not again:
            self._before = entry["uuid"]
        return parent
