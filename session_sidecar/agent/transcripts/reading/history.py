"""What a transcript tells about its session: the messages, the title, the counts. Nothing of it is stored again.

Everything is read by `Readers`, so that a long history holds up neither turns nor the readers of short ones. Session
IDs are canonical UUIDs from our own table, never anything a caller sent.
"""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from claude_agent_sdk import (
    InMemorySessionStore,
    SessionKey,
    project_key_for_directory,
    rename_session_via_store,
    tag_session_via_store,
)

from session_sidecar.agent.transcripts import files
from session_sidecar.agent.transcripts.lines import tails
from session_sidecar.agent.transcripts.reading.chain import (
    TOKENS,
    Glimpse,
    TranscriptMessage,
    as_message,
    entries_of,
    glimpse,
    read_entries,
    read_whole,
    tokens,
)
from session_sidecar.agent.transcripts.reading.ending import read_ending
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import MessageNotFound, SessionAmbiguous, TranscriptMissing

Writer = Callable[[TranscriptMessage], str]
"""How a message is to be given: a function of a module, as it may be called in another process."""

MOST_PAGE_CHARS = 8 * 2**20
_TAIL_BYTES = 64 * 2**10
_MOST_TAIL_BYTES = 2**20
_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is known of a session beside its messages; all of it empty where the SDK has no transcript to resume.

    `ambiguous` is a session with two transcripts: which one is right, a person has to say.
    `message_count` and `usage` need the whole file and are None where only its head and tail were read.
    `message_count` is that of the messages since the last compaction, as the history gives them by default. `usage`
    is the tokens of all API replies in this session's files, its subagents' and those before a compaction among them;
    a fork's is that of the history it inherited and its own, so the sum over a family counts the common part again.
    """

    transcript: Literal["present", "missing", "ambiguous"] = "missing"
    title: str | None = None
    first_prompt: str | None = None
    tag: str | None = None
    message_count: int | None = None
    last_message: Glimpse | None = None
    usage: dict[str, int] | None = None
    size_bytes: int | None = None


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
        return await self._readers.whole(_count, paths, outline) if paths else outline

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

    async def describe(self, session_id: str, changes: dict[str, str | None]) -> None:
        """Set the `title` or the `tag`, or both, or nothing; a tag of None takes it away.

        Only while no process has the session: it would write its own over them when it ends. ValueError tells of a
        tag of nothing but invisible characters. Raises TranscriptMissing, SessionAmbiguous, NotSaved.
        """
        await self._transcripts.check()
        lines = await _lines(session_id, changes)
        await self._readers.short(self._describe, session_id, lines)

    def _describe(self, session_id: str, lines: bytes) -> None:
        path = self._find(session_id)
        if path is None or files.session_info(path) is None:
            raise TranscriptMissing(_GONE)
        with files.appended(path):
            files.end_line(path)
            with path.open("ab") as file:
                file.write(lines)

    def _last_page(self, session_id: str, asked: Asked, write: Writer) -> tuple[Page | None, Path]:
        """The last page, where the end of the file tells it; and the file."""
        path = self._find(session_id)
        if path is None:
            raise TranscriptMissing(_GONE)
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
                return _outline(path, file.st_ino, file.st_size, file.st_mtime_ns)
        return Metadata()

    def _searched(self, session_id: str) -> Path | None:
        try:
            return files.recall(self._projects, session_id)
        except SessionAmbiguous:
            return None

    def _find(self, session_id: str) -> Path | None:
        return files.find(self._projects, session_id)


async def _lines(session_id: str, changes: dict[str, str | None]) -> bytes:
    """What the SDK would append to a transcript. Raises ValueError as its functions do.

    Those that append themselves look for the file by this process's CLAUDE_CONFIG_DIR, which an application around this
    one may have for itself.
    """
    notes = InMemorySessionStore()
    if "tag" in changes:
        await tag_session_via_store(notes, session_id, changes["tag"])
    if (title := changes.get("title")) is not None:
        await rename_session_via_store(notes, session_id, title)
    entries = notes.get_entries(SessionKey(project_key=project_key_for_directory(), session_id=session_id))
    return b"".join(json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in entries)


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


def _count(files: Sequence[Path], outline: Metadata) -> Metadata:
    path, *subagents = files
    whole = read_whole(path)
    spent = dict(whole.tokens)
    for file in subagents:
        spent |= tokens(read_entries(file))
    return replace(
        outline,
        message_count=len(whole.messages),
        last_message=_last(whole.messages),
        usage={name: sum(counts[i] for counts in spent.values()) for i, name in enumerate(TOKENS)},
    )


def _search(files: Sequence[Path], message_id: str) -> Glimpse | None:
    with files[0].open("rb") as lines:
        for line in lines:
            if message_id.encode() not in line:
                continue
            for entry in entries_of([line]):
                if message_id in (entry["uuid"], entry.get("forked_from")) and "line" in entry:
                    return replace(glimpse(as_message(entry)), uuid=message_id)  # as the parent knows it
    return None


def _last(messages: list[TranscriptMessage]) -> Glimpse | None:
    """The newest message in which something is said."""
    return next((glimpse(m) for m in reversed(messages) if not m.synthetic and m.text), None)


@functools.lru_cache(maxsize=2048)
def _outline(path: Path, *_state: int) -> Metadata:
    """What head and tail of a file tell; remembered while the file's state is the same."""
    info = files.session_info(path)
    if info is None:
        return Metadata()
    return Metadata(
        transcript="present",
        title=info.custom_title,
        first_prompt=info.first_prompt,
        tag=info.tag,
        last_message=_last_in_tail(path),
        size_bytes=info.file_size,
    )


def _last_in_tail(path: Path) -> Glimpse | None:
    """The newest message in which something is said, if it is near enough to the end of the file."""
    with path.open("rb") as file:
        last = None
        for start, tail in tails(file, _TAIL_BYTES, os.fstat(file.fileno()).st_size):
            lines = tail.split(b"\n")[1 if start else 0 :]  # not a cut one
            said = [as_message(e) for e in entries_of(lines) if "line" in e and not e.get("isSidechain")]
            if (last := _last(said)) or len(tail) >= _MOST_TAIL_BYTES:
                break
        return last


_GONE = "Its transcript is not there, so neither are its messages, its title and its tag."
