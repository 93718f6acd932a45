"""The SDK's transcripts: whether there is one, where it may be cut, and copies of it.

All of it is in files, so each call here goes to a thread. Session IDs are canonical UUIDs from our own table, never
anything a caller sent.
"""

import asyncio
import contextlib
import functools
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claude_agent_sdk import SDKSessionInfo

from session_sidecar.agent.transcripts import Revision, files
from session_sidecar.agent.transcripts.cut import cut
from session_sidecar.agent.transcripts.fork import copy
from session_sidecar.agent.transcripts.lines import holds
from session_sidecar.agent.transcripts.notes import lines_of
from session_sidecar.agent.transcripts.reading.chain import read_whole
from session_sidecar.agent.transcripts.reading.ending import read_ending
from session_sidecar.agent.transcripts.reading.exchanges import all_exchanges, head, last_exchanges
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.agent.transcripts.relink import lost, relink
from session_sidecar.errors import NotSaved, TranscriptMissing

logger = logging.getLogger(__name__)

# The pauses between looks for a turn's last message: the CLI has written it by the time of the result, if it can.
SAVED_SOON = (0.05, 0.2, 0.5)
SOMETHING = 64 * 2**10  # bytes that a volume must take to be called writable


@dataclass(frozen=True, slots=True)
class TranscriptInfo:
    """A transcript that is there, and how far it has come. It only ever grows."""

    revision: Revision


class Transcripts:
    """The transcripts below one CLI config directory."""

    def __init__(self, claude_config: Path, readers: Readers) -> None:
        self._projects = claude_config / "projects"
        self._readers = readers
        self._config = claude_config

    def prepare(self) -> None:
        """Mark the directory as the one that goes with a session map that has just been made."""
        (self._config / files.MARKER).write_text(_MARKER, encoding="utf-8")

    async def check(self) -> None:
        """Raise TranscriptsUnavailable if this is not the directory that goes with the session map."""
        await asyncio.to_thread(files.check_marked, self._config)

    async def info(self, session_id: str) -> TranscriptInfo | None:
        """What is known of a session's transcript, or None where the SDK could not resume it.

        Raises SessionAmbiguous, TranscriptsUnavailable.
        """
        return await asyncio.to_thread(self._info, session_id)

    async def saved(
        self, session_id: str, message_id: str | None, *, prompt_id: str, after: Revision
    ) -> TranscriptInfo | None:
        """The same for a turn that has just ended: None, too, if its last message is not in the file, or its prompt.

        `after` is where the turn before it ended. The CLI does not say when it cannot write, and goes on from
        what it remembers.
        """
        look = functools.partial(self._saved, session_id, message_id, prompt_id, after)
        info = await asyncio.to_thread(look)
        for pause in SAVED_SOON:
            if info is not None or message_id is None:
                break
            await asyncio.sleep(pause)
            info = await asyncio.to_thread(look)
        return info

    async def check_saving(self) -> None:
        """Raise NotSaved if nothing can be written where transcripts are; TranscriptsUnavailable as `check` does."""
        await self.check()
        try:
            await asyncio.to_thread(self._write_something)
        except OSError as error:
            raise NotSaved(
                f"{self._projects} takes no writes ({error.strerror}): turns that end now are lost at the next "
                "start. Make room there, or mount it writable.",
                retry_after=30,
            ) from None

    async def fork_point(self, session_id: str, at: str | None, *, end: Revision | None = None) -> str:
        """The UUID of the last message a fork is to hold: the end of the API reply that `at` belongs to, or the end.

        `end` is where the last completed turn ended; what a running turn has added is left out.
        Raises TranscriptMissing, SessionAmbiguous, MessageNotFound, and UnsafeForkPoint where a tool call would be cut
        from its result.
        """
        point, path = await self._readers.short(self._fork_point, session_id, at, end)
        if point is not None:
            return point
        return await self._readers.whole(_cut_whole, [path], at, end)

    async def head(self, session_id: str) -> str | None:
        """The UUID of the last prompt of a person's in a session; None where there is none, or no transcript.

        Raises SessionAmbiguous.
        """
        found, sure, path = await self._readers.short(self._head, session_id)
        return found if sure or path is None else await self._readers.whole(_head_of_all, [path])

    async def relink(self, session_id: str) -> bool:
        """Tie to its conversation again what has lost its link, ahead of a CLI that goes on from the session.

        Whether there was anything. Raises SessionAmbiguous, NotSaved, TranscriptsUnavailable.
        """
        mended = await self._readers.short(self._relink, session_id)
        if mended:
            logger.warning("session %s: lost links of its transcript that are mended: %d", session_id, mended)
        return mended > 0

    async def is_whole(self, session_id: str) -> bool:
        """Whether nothing near the end of a transcript has lost its link: a CLI that forks it finds all of it.

        Raises SessionAmbiguous.
        """
        return await self._readers.short(self._is_whole, session_id)

    async def fork_title(self, session_id: str) -> str | None:
        """What a fork of a session is called that has a title, as the SDK calls its copies; None if it has none.

        Raises TranscriptMissing, SessionAmbiguous.
        """
        _, info = await self._readers.short(self._to_fork, session_id)
        return _title_of_fork(info.custom_title) if info.custom_title else None

    async def fork(self, session_id: str, up_to: str, new_id: str) -> None:
        """Copy a transcript up to the message `up_to` into that of the session `new_id`, without the model.

        Raises TranscriptMissing, SessionAmbiguous, NotSaved, TranscriptsUnavailable; no copy is left then.
        """
        path, info = await self._readers.short(self._to_fork, session_id)
        title = _title_of_fork(info.custom_title or info.first_prompt or "Forked session")
        try:
            with files.saving():
                await self._readers.whole(copy, [path], session_id, new_id, up_to, title)
        except BaseException:
            with contextlib.suppress(OSError):  # there is none, or on a read-only volume none can have been made
                path.with_name(f"{new_id}.jsonl").unlink()  # of a process that was ended over it
            raise

    async def describe(self, session_id: str, changes: dict[str, str | None]) -> None:
        """Set the `title` or the `tag`, or both, or nothing; a tag of None takes it away.

        Only while no process has the session: it would write its own over them when it ends. ValueError tells of a
        tag of nothing but invisible characters. Raises TranscriptMissing, SessionAmbiguous, NotSaved.
        """
        await self.check()  # a volume that is not mounted is no missing transcript
        lines = await lines_of(session_id, changes)
        await self._readers.short(self._append, session_id, lines)

    async def delete(self, session_id: str) -> bool:
        """Remove a transcript, those of its subagents and what was set aside of it; whether there was anything.

        Of a session that has two, both. Raises TranscriptsUnavailable.
        """
        return await asyncio.to_thread(self._delete, session_id)

    async def set_aside(self, session_id: str) -> None:
        """Rename a file that the SDK cannot resume, so that its session ID can be used again. It is kept.

        Raises NotSaved, TranscriptsUnavailable.
        """
        await asyncio.to_thread(self._set_aside, session_id)

    def _info(self, session_id: str) -> TranscriptInfo | None:
        files.check_marked(self._config)
        path = self._find(session_id)
        if path is None:
            return None
        try:
            file = path.stat()
        except FileNotFoundError:
            return None
        return _look(path, file.st_ino, file.st_size, file.st_mtime_ns)

    def _set_aside(self, session_id: str) -> None:
        with files.saving():
            for path in files.everything_of(self._projects, session_id):
                if path.suffix == ".jsonl":  # an empty one too
                    path.rename(path.with_suffix(f".unreadable-{time.time_ns()}"))

    def _saved(self, session_id: str, message_id: str | None, prompt_id: str, size: int) -> TranscriptInfo | None:
        path = self._find(session_id)
        if message_id is not None and (path is None or not holds(path, message_id, prompt_id, size)):
            return None
        return self._info(session_id)

    def _write_something(self) -> None:
        self._projects.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=self._projects) as file:
            file.write(bytes(SOMETHING))
            file.flush()
            os.fsync(file.fileno())

    def _delete(self, session_id: str) -> bool:
        # Not the SDK's delete_session(): that leaves a second file, an empty one, and what was set aside.
        with files.saving():
            return files.remove(self._projects, session_id)

    def _fork_point(self, session_id: str, at: str | None, size: int | None) -> tuple[str | None, Path]:
        """The message to cut after, where the end of the file tells it; and the file."""
        path = self._find(session_id)
        if path is None:
            raise TranscriptMissing(_GONE)
        ending = read_ending(path, 1, size=size)
        if ending.complete or any(at in (None, message.uuid) for message in ending.messages):
            return cut(ending.messages, at), path
        return None, path

    def _head(self, session_id: str) -> tuple[str | None, bool, Path | None]:
        """The last prompt as far as the end of the file tells it, whether that is sure, and the file."""
        path = self._find(session_id)
        if path is None:
            return None, True, None
        found, complete = last_exchanges(path, 1)
        name = head(found)
        return name, complete or name is not None, path

    def _relink(self, session_id: str) -> int:
        path = self._find(session_id)
        with contextlib.suppress(FileNotFoundError):
            return relink(path) if path is not None else 0
        return 0

    def _is_whole(self, session_id: str) -> bool:
        path = self._find(session_id)
        with contextlib.suppress(FileNotFoundError):
            return path is None or not lost(path)
        return True

    def _append(self, session_id: str, lines: bytes) -> None:
        path = self._find(session_id)
        if path is None or files.session_info(path) is None:
            raise TranscriptMissing(NOTHING_OF_IT)
        files.append(path, lines)

    def _to_fork(self, session_id: str) -> tuple[Path, SDKSessionInfo]:
        """The file to copy, and what is known of it."""
        path = self._find(session_id)
        info = files.session_info(path) if path is not None else None
        if path is None or info is None:
            raise TranscriptMissing(_GONE)
        return path, info

    def _find(self, session_id: str) -> Path | None:
        return files.find(self._projects, session_id)


def _title_of_fork(title: str) -> str:
    return f"{title} (fork)"


@functools.lru_cache(maxsize=1024)
def _look(path: Path, *_state: int) -> TranscriptInfo | None:
    """What the SDK says of a transcript; remembered while the file's state is the same, as between two turns it is."""
    info = files.session_info(path)
    return TranscriptInfo(Revision(info.file_size or 0)) if info is not None else None


def _cut_whole(paths: Sequence[Path], at: str | None, size: int | None) -> str:
    return cut(read_whole(paths[0], size=size).messages, at)


def _head_of_all(paths: Sequence[Path]) -> str | None:
    return head(all_exchanges(paths, None))


_MARKER = """\
session-sidecar looks for this file to tell the transcripts beside it from an empty mount point.
Without it no turn is run, so that no thread is taken for one whose transcript is lost.
"""
_GONE = "Its transcript is not there. Fork another thread, or start anew."
NOTHING_OF_IT = "Its transcript is not there, so neither are its messages, its title and its tag."
