"""What a transcript tells about its session: the messages, the title, the counts. Nothing of it is stored again.

Everything is read by `Readers`, so that a long history holds up neither turns nor the readers of short ones. Session
IDs are canonical UUIDs from our own table, never anything a caller sent.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from session_sidecar.agent.transcripts import files
from session_sidecar.agent.transcripts.reading.chain import (
    Glimpse,
    TranscriptMessage,
    as_message,
    entries_of,
    glimpse,
    read_whole,
)
from session_sidecar.agent.transcripts.reading.ending import read_ending
from session_sidecar.agent.transcripts.reading.metadata import Metadata, count, outline_of
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.agent.transcripts.transcripts import NOTHING_OF_IT, Transcripts
from session_sidecar.errors import MessageNotFound, SessionAmbiguous, TranscriptMissing

Writer = Callable[[TranscriptMessage], str]
"""How a message is to be given: a function of a module, as it may be called in another process."""

MOST_PAGE_CHARS = 8 * 2**20
_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Asked:
    """Which messages of a conversation: the first `limit`, or those after a message; `backwards` from its end."""

    limit: int
    after: str | None = None
    backwards: bool = False
    compacted: bool = False  # what came before a compaction too


@dataclass(frozen=True, slots=True)
class Page:
    """Some messages, written, always oldest first. `next` is where to go on, or None where there are no more."""

    written: list[str]
    next: str | None


class History:
    """The transcripts below one CLI config directory, for reading. It keeps nothing: make one wherever it is needed."""

    def __init__(self, claude_config: Path, readers: Readers) -> None:
        self._projects = claude_config / "projects"
        self._transcripts = Transcripts(claude_config, readers)
        self._readers = readers

    async def messages(self, session_id: str, asked: Asked, write: Writer) -> Page:
        """A page of the conversation; it ends early where its messages are very large.

        `write` is a function of a module. The messages of a running turn are there as far as the CLI has written them.
        Raises TranscriptMissing, SessionAmbiguous, and MessageNotFound where there is no message `after`.
        """
        await self._transcripts.check()  # a volume that is not mounted is no missing transcript
        page, path = await self._readers.short(self._last_page, session_id, asked, write)
        if page is not None:
            return page
        return await self._readers.whole(_page, [path], asked, write)

    async def metadata(self, session_id: str) -> Metadata:
        """All there is to know, from the whole file."""
        await self._transcripts.check()
        outline, paths = await self._readers.short(self._outline_and_files, session_id)
        return await self._readers.whole(count, paths, outline) if paths else outline

    async def outlines(self, session_ids: Iterable[str]) -> list[Metadata]:
        """What heads and tails of the files tell, in the order of the IDs: for lists."""
        await self._transcripts.check()
        session_ids = list(session_ids)
        found: list[Metadata] = []
        while len(found) < len(session_ids):
            found += await self._readers.short(self._some_outlines, session_ids[len(found) :])
        return found

    async def find(self, session_id: str, message_id: str) -> Glimpse | None:
        """A message of a session, on whatever branch; in a fork also by the ID that its parent knows it by."""
        await self._transcripts.check()
        path = await self._readers.short(self._searched, session_id)
        return await self._readers.whole(_search, [path], message_id) if path else None

    def _last_page(self, session_id: str, asked: Asked, write: Writer) -> tuple[Page | None, Path]:
        """The last page, where the end of the file tells it; and the file."""
        path = self._find(session_id)
        if path is None:
            raise TranscriptMissing(NOTHING_OF_IT)
        if asked.backwards and asked.after is None and not asked.compacted:
            ending = read_ending(path, asked.limit)
            if ending.complete or len(ending.messages) >= asked.limit:
                return _written(ending.messages, asked, write, more=not ending.complete), path
        return None, path

    def _outline_and_files(self, session_id: str) -> tuple[Metadata, list[Path]]:
        """What can be told at once, and what has to be read for the rest."""
        outline = self.outline(session_id)
        path = self._find(session_id) if outline.transcript == "present" else None
        if path is None:
            return outline, []
        return outline, [path, *sorted(path.with_suffix("").glob("subagents/**/*.jsonl"))]

    def _some_outlines(self, session_ids: Sequence[str]) -> list[Metadata]:
        """Those of the first ones, as many as are read in `_SECONDS`: other readers wait no longer than that."""
        found, until = [], time.monotonic() + _SECONDS
        files.look_for(self._projects, session_ids)
        for session_id in session_ids:
            found.append(self.outline(session_id))
            if time.monotonic() > until:
                break
        return found

    def outline(self, session_id: str) -> Metadata:
        """What head and tail of the file tell. It blocks, and needs no reader: the end of a turn waits for nobody."""
        try:
            path = files.recall(self._projects, session_id)
        except SessionAmbiguous:
            return Metadata("ambiguous")
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                file = path.stat()
                return outline_of(path, file.st_ino, file.st_size, file.st_mtime_ns)
        return Metadata()

    def _searched(self, session_id: str) -> Path | None:
        try:
            return files.recall(self._projects, session_id)
        except SessionAmbiguous:
            return None

    def _find(self, session_id: str) -> Path | None:
        return files.find(self._projects, session_id)


# What is done with whole files, in a process of its own where they are long


def _page(files: Sequence[Path], asked: Asked, write: Writer) -> Page:
    return _written(read_whole(files[0], compacted=asked.compacted).messages, asked, write)


def _written(messages: list[TranscriptMessage], asked: Asked, write: Writer, *, more: bool = False) -> Page:
    """The page of `messages`, of which there are `more` where one goes."""
    rest = messages[::-1] if asked.backwards else messages
    if asked.after is not None:
        at = next((i for i, message in enumerate(rest) if message.uuid == asked.after), None)
        if at is None:
            raise MessageNotFound("`after` must be the uuid of a message of this list; take it from `next`.")
        rest = rest[at + 1 :]
    written: list[str] = []
    size = 0
    for message in rest[: asked.limit]:
        written.append(write(message))
        size += len(written[-1])
        if size > MOST_PAGE_CHARS:
            break
    after = rest[len(written) - 1].uuid if more or len(rest) > len(written) else None
    return Page(written[::-1] if asked.backwards else written, after)


def _search(files: Sequence[Path], message_id: str) -> Glimpse | None:
    with files[0].open("rb") as lines:
        for line in lines:
            if message_id.encode() not in line:
                continue
            for entry in entries_of([line]):
                if message_id in (entry["uuid"], entry.get("forked_from")) and "line" in entry:
                    return replace(glimpse(as_message(entry)), uuid=message_id)  # as the parent knows it
    return None
