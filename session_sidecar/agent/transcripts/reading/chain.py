"""From the lines of a transcript to its conversation. Damage costs the line that it is in, never the history."""

import functools
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from claude_agent_sdk import SessionKey, SessionStore, SessionStoreEntry, get_session_messages_from_store

from session_sidecar.agent.transcripts.lines import Chain, Entry, linked, parsed

T = TypeVar("T")

# What an entry's place in the chain depends on. The rest stays unparsed in its line until somebody wants to read it: a
# long history is many objects, and the garbage collector stops everybody while it looks through them.
_LINKS = ("type", "subtype", "uuid", "parentUuid", "logicalParentUuid", "timestamp", "isMeta", "isSidechain",
          "isCompactSummary", "agentId", "teamName", "sourceToolAssistantUUID")  # fmt: skip
_BOOKKEEPING = re.compile(r"\s*(<(command-|local-command-|bash-|task-notification>)|\[Request interrupted by user)")
_SHOWN = ("image", "document")
_ANY_SESSION = "00000000-0000-4000-8000-000000000000"
TOKENS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
PREVIEW_CHARS = 200


@dataclass(frozen=True, slots=True)
class TranscriptMessage:
    """One message of a conversation, with what the SDK's own reader leaves out."""

    uuid: str
    type: Literal["user", "assistant"]
    timestamp: str | None
    parent_uuid: str | None  # the message that this one follows; the results of parallel tool calls share theirs
    synthetic: bool  # the CLI's own bookkeeping: nobody has said it
    reply: str | None  # the API reply that it is a part of
    calls: tuple[str, ...]  # of tools, in it
    results: tuple[str, ...]  # of which calls it has the results
    line: Callable[[], bytes]  # of the transcript

    @property
    def message(self) -> dict[str, Any]:
        """The message as the Messages API has it; parsed anew each time."""
        return cast("dict[str, Any]", parsed(self.line())["message"])

    @property
    def text(self) -> str:
        """What is said in it: no thinking, no tool calls, no results."""
        message = self.message
        if isinstance(message.get("content"), str):
            return cast("str", message["content"])
        texts = [block["text"] for block in _blocks(message) if isinstance(block.get("text"), str)]
        return " ".join(texts) or next((f"[{b['type']}]" for b in _blocks(message) if b.get("type") in _SHOWN), "")


@dataclass(frozen=True, slots=True)
class Glimpse:
    """A message for a list: who, when, and how it begins."""

    uuid: str
    type: Literal["user", "assistant"]
    preview: str
    timestamp: str | None


def glimpse(message: TranscriptMessage) -> Glimpse:
    """The message with the beginning of its text, in one line."""
    line = " ".join(message.text[: 2 * PREVIEW_CHARS].split())
    short = line if len(line) <= PREVIEW_CHARS else line[: PREVIEW_CHARS - 1] + "…"
    return Glimpse(message.uuid, message.type, short, message.timestamp)


def read_entries(path: Path, size: int | None = None) -> list[Entry]:
    """The entries in the first `size` bytes of a transcript, in their order: its conversation and the links of it.

    A line that is no entry (torn, corrupt) is left out; a bad byte becomes U+FFFD in its text. Raises
    FileNotFoundError.
    """
    entries, start = [], 0
    with path.open("rb") as lines:
        for line in lines:
            if size is not None and start >= size:
                break
            if (entry := _entry(line if size is None else line[: size - start])) is not None:
                if "message" in entry:
                    entry["line"] = functools.partial(_line, path, start, len(line))
                entries.append(entry)
            start += len(line)
    return entries


@dataclass(frozen=True, slots=True)
class Whole:
    """All of a transcript: its conversation, and the tokens of each API reply in it."""

    messages: list[TranscriptMessage]
    tokens: dict[str, tuple[int, ...]]


def read_whole(path: Path, *, size: int | None = None, compacted: bool = False) -> Whole:
    """The first `size` bytes of a transcript, or all of it. The last one is remembered: most readers want a next page.

    Raises FileNotFoundError.
    """
    file = path.stat()
    return _read_whole(path, size, compacted, file.st_ino, file.st_size, file.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read_whole(path: Path, size: int | None, compacted: bool, *_state: int) -> Whole:
    entries = read_entries(path, size)
    return Whole(conversation(entries, compacted=compacted), tokens(entries))


def tokens(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Tokens by API reply. A reply is split into an entry a content block, and the last one has its final count."""
    return {str(e["message"].get("id") or e["uuid"]): e["usage"] for e in entries if "usage" in e}


def entries_of(lines: Iterable[bytes]) -> Iterator[Entry]:
    """The entries among `lines`, each cut down to its links; `line` gives it as it was."""
    for line in lines:
        if (entry := _entry(line)) is not None:
            if "message" in entry:
                entry["line"] = functools.partial(bytes, line)
            yield entry


def _entry(line: bytes) -> Entry | None:
    whole = linked(line)
    if whole is None:
        return None
    entry = {name: whole[name] for name in _LINKS if whole.get(name) is not None}
    if whole["type"] in {"user", "assistant"}:
        message = whole.get("message")
        if not isinstance(message, dict):
            return None
        if isinstance(origin := whole.get("forkedFrom"), dict):
            entry["forked_from"] = origin.get("messageUuid")
        entry["synthetic"] = _is_synthetic(whole, message)
        entry["message"] = _stub(message)
        if isinstance(usage := message.get("usage"), dict):
            entry["usage"] = tuple(_count(usage.get(name)) for name in TOKENS)
    return entry


def _line(path: Path, start: int, size: int) -> bytes:
    """A line of a file, read when somebody wants it: together they may be hundreds of megabytes."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def conversation(entries: list[Entry], *, compacted: bool = False) -> list[TranscriptMessage]:
    """The conversation, oldest first, in the SDK's own order: parallel tool results in place, subagents left out.

    A compaction begins it anew with a summary, as it does for the model; with `compacted`, what came before is there
    too.
    """
    entries = mend(entries, compacted=compacted)
    store = cast("SessionStore", _Entries(entries))
    shown = _at_once(get_session_messages_from_store(store, _ANY_SESSION))
    by_uuid = {entry["uuid"]: entry for entry in entries}
    uuids = {message.uuid for message in shown}
    messages = []
    for uuid in (message.uuid for message in shown):
        parent, steps = by_uuid[uuid].get("parentUuid"), 0
        while parent is not None and parent not in uuids and steps < len(by_uuid):
            parent, steps = by_uuid[parent].get("parentUuid"), steps + 1
        messages.append(as_message(by_uuid[uuid], parent if parent in uuids else None))
    return messages


def as_message(entry: Entry, parent: str | None = None) -> TranscriptMessage:
    """The message in an entry of a person or the model."""
    timestamp = entry.get("timestamp")
    return TranscriptMessage(
        uuid=entry["uuid"],
        type=entry["type"],
        timestamp=timestamp if isinstance(timestamp, str) else None,
        parent_uuid=parent,
        synthetic=entry["synthetic"],
        reply=entry["message"].get("id"),
        calls=block_ids(entry, "tool_use", "id"),
        results=block_ids(entry, "tool_result", "tool_use_id"),
        line=entry["line"],
    )


def mend(entries: Iterable[Entry], *, compacted: bool = False) -> list[Entry]:
    """The entries as one chain; see `Chain`."""
    chain = Chain(compacted=compacted)
    return [{**entry, "parentUuid": chain.parent(entry)} for entry in entries]


def block_ids(entry: Entry, kind: str, name: str) -> tuple[str, ...]:
    """The IDs in an entry's content blocks of a kind."""
    return tuple(str(block.get(name)) for block in _blocks(entry.get("message", {})) if block.get("type") == kind)


def _stub(message: dict[str, Any]) -> dict[str, Any]:
    """What the SDK's reader looks at: the API reply that a message is part of, its tool calls and their results."""
    stub = {"id": message["id"]} if "id" in message else {}
    calls = [
        {name: block[name] for name in ("type", "id", "tool_use_id") if name in block}
        for block in _blocks(message)
        if block.get("type") in {"tool_use", "tool_result"}
    ]
    return {**stub, "content": calls} if calls else stub


def _is_synthetic(entry: Entry, message: dict[str, Any]) -> bool:
    """Whether the CLI wrote this itself. A prompt that only looks like it says in `promptSource` whose it is."""
    if entry["type"] == "assistant":
        return bool(message.get("model") == "<synthetic>")  # such as the text of an API error
    if entry.get("isMeta") or entry.get("isCompactSummary"):
        return True
    if source := entry.get("promptSource"):
        return bool(source == "system")
    content = message.get("content")
    first = content if isinstance(content, str) else next(iter(_blocks(message)), {}).get("text")
    return isinstance(first, str) and _BOOKKEEPING.match(first) is not None


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [block for block in content if isinstance(block, dict)] if isinstance(content, list) else []


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _at_once(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine comes to that waits for nothing: an event loop for that would cost more than the work."""
    try:
        work.send(None)
    except StopIteration as done:
        return cast("T", done.value)
    raise AssertionError("the SDK waited for something")


class _Entries:
    """Entries already read, in the shape of the SDK's SessionStore, whose public reader builds the message chain."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    async def load(self, key: SessionKey) -> list[SessionStoreEntry]:
        return cast("list[SessionStoreEntry]", self._entries)
