"""The SDK's transcripts: whether there is one, where it may be cut, and copies of it.

The SDK's own functions are synchronous and read `CLAUDE_CONFIG_DIR` from this process's environment, so each call here
goes to a thread. Session IDs are canonical UUIDs from our own table, never anything a caller sent.
"""

import asyncio
import functools
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from claude_agent_sdk import (
    SessionKey,
    SessionMessage,
    SessionStore,
    SessionStoreEntry,
    fork_session_via_store,
    get_session_messages_from_store,
)

from sidecar.agent import files
from sidecar.agent.chain import mend, parsed
from sidecar.errors import MessageNotFound, NotSaved, SessionMissing, TranscriptsUnavailable, UnsafeForkPoint

# The pauses between looks for a turn's last message: the CLI has written it by the time of the result, if it can.
SAVED_SOON = (0.05, 0.2, 0.5)
TAIL_BYTES = 16 * 2**10
SOMETHING = 64 * 2**10  # bytes that a volume must take to be called writable


@dataclass(frozen=True, slots=True)
class TranscriptInfo:
    """A transcript that is there, and how large it is in bytes. It only ever grows."""

    size: int


class Transcripts:
    """The transcripts below one CLI config directory."""

    def __init__(self, claude_config: Path) -> None:
        """`claude_config` must be this process's `CLAUDE_CONFIG_DIR` too: the SDK's functions read that."""
        self._projects = claude_config / "projects"
        self._marker = claude_config / "session-sidecar.txt"
        self._unsaved = False  # the last turn that ended was not

    def prepare(self) -> None:
        """Mark the directory as the one that goes with a session map that has just been made."""
        self._marker.write_text(_MARKER, encoding="utf-8")

    async def check(self) -> None:
        """Raise TranscriptsUnavailable if this is not the directory that goes with the session map.

        An unmounted volume looks like a directory without transcripts; every thread would be begun anew.
        """
        await asyncio.to_thread(self._check)

    async def info(self, session_id: str) -> TranscriptInfo | None:
        """What is known of a session's transcript, or None where the SDK could not resume it.

        Raises SessionAmbiguous, TranscriptsUnavailable.
        """
        return await asyncio.to_thread(self._info, session_id)

    async def saved(self, session_id: str, message_id: str | None) -> TranscriptInfo | None:
        """The same for a turn that has just ended: None, too, if its last message is not in the file.

        The CLI does not say when it cannot write. `check_saving` raises from then on until something can be saved.
        """
        info = await asyncio.to_thread(self._saved, session_id, message_id)
        for pause in SAVED_SOON:
            if info is not None or message_id is None:
                break
            await asyncio.sleep(pause)
            info = await asyncio.to_thread(self._saved, session_id, message_id)
        self._unsaved = info is None and message_id is not None
        return info

    async def check_saving(self) -> None:
        """Raise NotSaved if the last turn was not saved and nothing can be; TranscriptsUnavailable as `check` does."""
        await self.check()
        if self._unsaved:
            try:
                await asyncio.to_thread(self._write_something)
            except OSError as error:
                raise NotSaved(
                    f"{self._projects} takes no writes ({error.strerror}): turns that end now are lost at the next "
                    "start. Make room there, or mount it writable.",
                    retry_after=30,
                ) from None
            self._unsaved = False

    async def fork_point(self, session_id: str, at: str | None, *, size: int | None = None) -> str:
        """The UUID of the last message a fork is to hold: the end of the API reply that `at` belongs to, or the end.

        `size` is where the last completed turn ended, in bytes; what a running turn has added is left out.
        Raises SessionMissing, SessionAmbiguous, MessageNotFound, and UnsafeForkPoint where a tool call would be cut
        from its result.
        """
        return await asyncio.to_thread(self._fork_point, session_id, at, size)

    async def fork(self, session_id: str, up_to: str) -> str:
        """Copy a transcript up to the message `up_to`, without the model; the new session's ID.

        Raises SessionMissing, SessionAmbiguous, NotSaved, TranscriptsUnavailable; no copy is left then.
        """
        return await asyncio.to_thread(self._fork, session_id, up_to)

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

    def _check(self) -> None:
        if not self._marker.exists():
            raise TranscriptsUnavailable(
                f"Nothing was changed. Mount {self._marker.parent}; if its transcripts are really lost, "
                f"put an empty {self._marker.name} there to begin anew.",
                retry_after=30,
            )

    def _info(self, session_id: str) -> TranscriptInfo | None:
        self._check()
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

    def _saved(self, session_id: str, message_id: str | None) -> TranscriptInfo | None:
        path = self._find(session_id)
        if message_id is not None and (path is None or not _ends_with(path, message_id)):
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
            found = files.everything_of(self._projects, session_id)
            for path in found:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        return bool(found)

    def _fork(self, session_id: str, up_to: str) -> str:
        path = self._find(session_id)
        if path is None:
            raise SessionMissing(_GONE)
        # Not the SDK's fork_session(): that takes U+2028 in a message for the end of a line and drops what it breaks.
        store = cast("SessionStore", _Entries(self._read(session_id, None), path.parent))
        return asyncio.run(fork_session_via_store(store, session_id, up_to_message_id=up_to)).session_id

    def _fork_point(self, session_id: str, at: str | None, size: int | None) -> str:
        messages = self._messages(session_id, size)
        if at is None:
            if not messages:
                raise UnsafeForkPoint("This session has no completed turn yet. Fork it when its first one has ended.")
            return messages[-1].uuid
        index = next((i for i, message in enumerate(messages) if message.uuid == at), None)
        if index is None:
            raise MessageNotFound(
                "`at_message_id` must be the uuid of a message of a completed answer in this session."
            )
        if messages[index].type == "assistant":
            reply = _api_reply(messages[index])
            index = max(i for i, m in enumerate(messages) if m.type == "assistant" and _api_reply(m) == reply)
        elif not any(block.get("type") == "tool_result" for block in _blocks(messages[index])):
            raise UnsafeForkPoint("This message is a prompt. Name a message of the answer before it, or after it.")
        calls = {b["id"] for m in messages[: index + 1] for b in _blocks(m) if b.get("type") == "tool_use"}
        results = {
            b["tool_use_id"] for m in messages[: index + 1] for b in _blocks(m) if b.get("type") == "tool_result"
        }
        if calls - results:
            raise UnsafeForkPoint(
                "Cut there, a tool call would be without its result. Name a message after the result."
            )
        return messages[index].uuid

    def _messages(self, session_id: str, size: int | None) -> list[SessionMessage]:
        """The conversation in the first `size` bytes, oldest first, in the SDK's own order."""
        if size == 0:
            return []  # its first turn is running
        store = cast("SessionStore", _Entries(self._read(session_id, size)))
        return asyncio.run(get_session_messages_from_store(store, session_id))

    def _find(self, session_id: str) -> Path | None:
        return files.find(self._projects, session_id)

    def _read(self, session_id: str, size: int | None) -> list[SessionStoreEntry]:
        path = self._find(session_id)
        if path is None:
            raise SessionMissing(_GONE)
        entries = []
        for line in path.read_bytes()[:size].split(b"\n"):
            try:
                entries.append(parsed(line))
            except (ValueError, RecursionError):
                continue  # a torn or corrupt line costs that line
        mend(entries)
        return entries


def _ends_with(path: Path, message_id: str) -> bool:
    """Whether a message is among the last of a transcript, as a whole line."""
    with path.open("rb") as file:
        size, length = os.fstat(file.fileno()).st_size, TAIL_BYTES
        while True:
            file.seek(max(0, size - length))
            _, found, rest = file.read().rpartition(f'"uuid":"{message_id}"'.encode())
            if found or length >= size:
                return bool(found) and b"\n" in rest
            length *= 8


@functools.lru_cache(maxsize=1024)
def _look(path: Path, *_state: int) -> TranscriptInfo | None:
    """What the SDK says of a transcript; remembered while the file's state is the same, as between two turns it is."""
    info = files.session_info(path)
    return TranscriptInfo(size=info.file_size or 0) if info is not None else None


class _Entries:
    """Entries already read, in the shape of a SessionStore: what the SDK's public readers and copier work on."""

    def __init__(self, entries: list[SessionStoreEntry], directory: Path | None = None) -> None:
        self._entries = entries
        self._directory = directory

    async def load(self, key: SessionKey) -> list[SessionStoreEntry]:
        return self._entries

    async def append(self, key: SessionKey, entries: list[SessionStoreEntry]) -> None:
        """Write a new transcript beside the one that was read."""
        assert self._directory is not None  # noqa: S101 - given by whoever copies
        lines = [json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries]
        with files.created(self._directory / f"{key['session_id']}.jsonl") as file:
            file.writelines(lines)


_MARKER = """\
session-sidecar looks for this file to tell the transcripts beside it from an empty mount point.
Without it no turn is run, so that no thread is taken for one whose transcript is lost.
"""
_GONE = "Its transcript is not there. Fork another thread, or start anew."


def _api_reply(message: SessionMessage) -> object:
    """What the entries of one API reply share: the CLI writes an entry for each of its content blocks."""
    return cast("dict[str, Any]", message.message).get("id")


def _blocks(message: SessionMessage) -> list[dict[str, Any]]:
    content = cast("dict[str, Any]", message.message).get("content")
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []
