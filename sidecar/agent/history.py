"""What a transcript tells about its session: the messages, the title, the counts. Nothing of it is stored again.

Whole files are read in a few threads of their own: a long history then neither stops the event loop nor takes the
threads that turns need. Session IDs are canonical UUIDs from our own table, never anything a caller sent.
"""

import asyncio
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from claude_agent_sdk import rename_session, tag_session

from sidecar.agent import files
from sidecar.agent.chain import (
    TOKENS,
    Entry,
    Glimpse,
    Message,
    as_message,
    conversation,
    entries_of,
    glimpse,
    read_entries,
)
from sidecar.agent.transcripts import Transcripts
from sidecar.errors import SessionAmbiguous, SessionMissing

T = TypeVar("T")

# Two, so that one very long history does not hold up all the short ones; more would only fight for the interpreter.
_READERS = ThreadPoolExecutor(max_workers=2, thread_name_prefix="history")
_TAIL_BYTES = 64 * 2**10
_MOST_TAIL_BYTES = 2**20


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


class History:
    """The transcripts below one CLI config directory, for reading. It keeps nothing: make one wherever it is needed."""

    def __init__(self, claude_config: Path) -> None:
        """`claude_config` must be this process's `CLAUDE_CONFIG_DIR` too: the SDK's functions read that."""
        self._projects = claude_config / "projects"
        self._transcripts = Transcripts(claude_config)

    async def messages(self, session_id: str, *, compacted: bool = False) -> list[Message]:
        """The conversation, oldest first; with `compacted`, what came before a compaction too.

        The messages of a running turn are there as far as the CLI has written them. Raises SessionMissing,
        SessionAmbiguous.
        """
        return await self._read(lambda: conversation(self._entries(session_id), compacted=compacted))

    async def metadata(self, session_id: str) -> Metadata:
        """All there is to know, from the whole file."""
        return await self._read(lambda: self._metadata(session_id))

    async def outlines(self, session_ids: Iterable[str]) -> list[Metadata]:
        """What heads and tails of the files tell, in the order of the IDs: for lists."""
        return await self._read(lambda: self._outlines(list(session_ids)))

    async def find(self, session_id: str, message_id: str) -> Glimpse | None:
        """A message of a session, on whatever branch; in a fork also by the ID that its parent knows it by."""
        return await self._read(lambda: self._search(session_id, message_id))

    async def describe(self, session_id: str, changes: dict[str, str | None]) -> None:
        """Set the `title` or the `tag`, or both, or nothing; a tag of None takes it away.

        Only while no process has the session: it would write its own over them when it ends. ValueError tells of a
        tag of nothing but invisible characters. Raises SessionMissing, SessionAmbiguous, NotSaved.
        """
        await self._read(lambda: self._describe(session_id, changes))

    async def _read(self, work: Callable[[], T]) -> T:
        await self._transcripts.check()  # a volume that is not mounted is no missing transcript
        return await in_reader(work)

    def _describe(self, session_id: str, changes: dict[str, str | None]) -> None:
        path = self._find(session_id)
        if path is None or files.session_info(path) is None:
            raise SessionMissing(_GONE)
        with files.appended(path):  # the SDK's functions find the same file: it is the only one
            _end_line(path)
            if "tag" in changes:
                tag_session(session_id, changes["tag"])
            if (title := changes.get("title")) is not None:
                rename_session(session_id, title)

    def _metadata(self, session_id: str) -> Metadata:
        try:
            path = self._find(session_id)
        except SessionAmbiguous:
            return Metadata("ambiguous")
        info = files.session_info(path) if path is not None else None
        if info is None or path is None:
            return Metadata()
        entries = read_entries(path)
        spent = _usage(entries)
        for file in sorted(path.with_suffix("").glob("subagents/**/*.jsonl")):
            spent |= _usage(read_entries(file))
        messages = conversation(entries)
        return Metadata(
            transcript="present",
            title=info.custom_title,
            first_prompt=info.first_prompt,
            tag=info.tag,
            message_count=len(messages),
            last_message=_last(messages),
            usage={name: sum(tokens[i] for tokens in spent.values()) for i, name in enumerate(TOKENS)},
            size_bytes=info.file_size,
        )

    def _outlines(self, session_ids: list[str]) -> list[Metadata]:
        files.look_for(self._projects, session_ids)
        return [self._outline(session_id) for session_id in session_ids]

    def _outline(self, session_id: str) -> Metadata:
        try:
            path = files.recall(self._projects, session_id)
        except SessionAmbiguous:
            return Metadata("ambiguous")
        info = files.session_info(path) if path is not None else None
        if info is None or path is None:
            return Metadata()
        return Metadata(
            transcript="present",
            title=info.custom_title,
            first_prompt=info.first_prompt,
            tag=info.tag,
            last_message=_last_in_tail(path),
            size_bytes=info.file_size,
        )

    def _search(self, session_id: str, message_id: str) -> Glimpse | None:
        try:
            path = files.recall(self._projects, session_id)
        except SessionAmbiguous:
            return None
        if path is None:
            return None
        with path.open("rb") as lines:
            for line in lines:
                if message_id.encode() not in line:
                    continue
                for entry in entries_of([line]):
                    if message_id in (entry["uuid"], entry.get("forked_from")) and "line" in entry:
                        return glimpse(as_message(entry))
        return None

    def _entries(self, session_id: str) -> list[Entry]:
        path = self._find(session_id)
        if path is None:
            raise SessionMissing(_GONE)
        return read_entries(path)

    def _find(self, session_id: str) -> Path | None:
        return files.find(self._projects, session_id)


async def in_reader(work: Callable[[], T]) -> T:
    """Do what takes long in one of the threads for it."""
    return await asyncio.get_running_loop().run_in_executor(_READERS, work)


def _usage(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Tokens by API reply. A reply is split into an entry a content block, and the last one has its final count."""
    return {str(e["message"].get("id") or e["uuid"]): e["usage"] for e in entries if "usage" in e}


def _last(messages: list[Message]) -> Glimpse | None:
    """The newest message in which something is said."""
    return next((glimpse(m) for m in reversed(messages) if not m.synthetic and m.text), None)


def _last_in_tail(path: Path) -> Glimpse | None:
    """The newest message in which something is said, if it is near enough to the end of the file."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, _TAIL_BYTES
        while True:
            file.seek(max(0, size - length))
            lines = file.read(length).split(b"\n")[1 if length < size else 0 :]  # not a cut one
            said = [as_message(e) for e in entries_of(lines) if "line" in e and not e.get("isSidechain")]
            if (last := _last(said)) or length >= min(size, _MOST_TAIL_BYTES):
                return last
            length *= 4


def _end_line(path: Path) -> None:
    """End a line that a crash has torn, or what is appended would become part of it and be lost."""
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


_GONE = "Its transcript is not there, so neither are its messages, its title and its tag."
