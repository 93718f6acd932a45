"""From the lines of a transcript to its conversation. Damage costs the line that it is in, never the history."""

import asyncio
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from claude_agent_sdk import SessionKey, SessionStore, SessionStoreEntry, get_session_messages_from_store

Entry = dict[str, Any]

# What an entry's place in the chain depends on. The rest stays unparsed in its line until somebody wants to read it: a
# long history is many objects, and the garbage collector stops everybody while it looks through them.
_LINKS = ("type", "subtype", "uuid", "parentUuid", "logicalParentUuid", "timestamp", "isMeta", "isSidechain",
          "isCompactSummary", "agentId", "teamName", "sourceToolAssistantUUID")  # fmt: skip
_LINKED = frozenset({"user", "assistant", "progress", "system", "attachment"})
_BOOKKEEPING = re.compile(r"\s*(<(command-|local-command-|bash-|task-notification>)|\[Request interrupted by user)")
_SHOWN = ("image", "document")
_ANY_SESSION = "00000000-0000-4000-8000-000000000000"
TOKENS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
PREVIEW_CHARS = 200


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, with what the SDK's own reader leaves out."""

    uuid: str
    type: Literal["user", "assistant"]
    timestamp: str | None
    parent_uuid: str | None  # the message that this one follows; the results of parallel tool calls share theirs
    synthetic: bool  # the CLI's own bookkeeping: nobody has said it
    line: bytes  # of the transcript

    @property
    def message(self) -> dict[str, Any]:
        """The message as the Messages API has it; parsed anew each time."""
        return cast("dict[str, Any]", parsed(self.line)["message"])

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


def glimpse(message: Message) -> Glimpse:
    """The message with the beginning of its text, in one line."""
    line = " ".join(message.text[: 2 * PREVIEW_CHARS].split())
    short = line if len(line) <= PREVIEW_CHARS else line[: PREVIEW_CHARS - 1] + "…"
    return Glimpse(message.uuid, message.type, short, message.timestamp)


def read_entries(path: Path) -> list[Entry]:
    """The entries of a transcript that hold the conversation and its links, in the file's order.

    A line that is no entry (torn, corrupt) is left out; a bad byte becomes U+FFFD in its text. It is for a thread: it
    parses a line at a time, so that others get their time in between. Raises FileNotFoundError.
    """
    with path.open("rb") as lines:
        return list(entries_of(lines))


def entries_of(lines: Iterable[bytes]) -> Iterator[Entry]:
    """The entries among `lines`, each cut down to its links, with `line` as it was."""
    for line in lines:
        if b'"uuid"' not in line:
            continue  # the CLI's notes to itself; not worth the parsing
        try:
            whole = parsed(line)
        except (ValueError, RecursionError):
            continue
        if not _is_linked(whole):
            continue
        entry = {name: whole[name] for name in _LINKS if whole.get(name) is not None}
        if whole["type"] in {"user", "assistant"}:
            message = whole.get("message")
            if not isinstance(message, dict):
                continue
            entry["line"] = line
            if isinstance(origin := whole.get("forkedFrom"), dict):
                entry["forked_from"] = origin.get("messageUuid")
            entry["synthetic"] = _is_synthetic(whole, message)
            entry["message"] = _stub(message)
            if isinstance(usage := message.get("usage"), dict):
                entry["usage"] = tuple(_count(usage.get(name)) for name in TOKENS)
        yield entry


def conversation(entries: list[Entry], *, compacted: bool = False) -> list[Message]:
    """The conversation, oldest first, in the SDK's own order: parallel tool results in place, subagents left out.

    A compaction begins it anew with a summary, as it does for the model; with `compacted`, what came before is there
    too.
    """
    mend(entries, compacted=compacted)
    store = cast("SessionStore", _Entries(entries))
    shown = asyncio.run(get_session_messages_from_store(store, _ANY_SESSION))
    by_uuid = {entry["uuid"]: entry for entry in entries}
    uuids = {message.uuid for message in shown}
    messages = []
    for uuid in (message.uuid for message in shown):
        parent, steps = by_uuid[uuid].get("parentUuid"), 0
        while parent is not None and parent not in uuids and steps < len(by_uuid):
            parent, steps = by_uuid[parent].get("parentUuid"), steps + 1
        messages.append(as_message(by_uuid[uuid], parent if parent in uuids else None))
    return messages


def as_message(entry: Entry, parent: str | None = None) -> Message:
    """The message in an entry of a person or the model."""
    timestamp = entry.get("timestamp")
    return Message(
        uuid=entry["uuid"],
        type=entry["type"],
        timestamp=timestamp if isinstance(timestamp, str) else None,
        parent_uuid=parent,
        synthetic=entry["synthetic"],
        line=entry["line"],
    )


def mend(entries: list[Entry], *, compacted: bool = False) -> None:
    """Make one chain of the entries again: across lines that were lost and, if asked for, across compactions.

    Whatever an entry followed, the nearest one that is left is the one before it in the file. Subagents have chains of
    their own.
    """
    linked = [entry for entry in entries if _is_linked(entry)]
    known = {entry["uuid"] for entry in linked}
    before: str | None = None
    for entry in linked:
        parent = entry.get("parentUuid")
        if parent is None and compacted and entry.get("subtype") == "compact_boundary":
            parent = entry.get("logicalParentUuid") or before
        if parent is not None and not (isinstance(parent, str) and parent in known):
            # A summary whose boundary is lost begins the conversation all the same.
            begins = entry.get("isSidechain") or (entry.get("isCompactSummary") and not compacted)
            parent = None if begins else before
        entry["parentUuid"] = parent
        if not entry.get("isSidechain"):
            before = entry["uuid"]


def _is_linked(entry: object) -> bool:
    """Whether this is a link of a chain, and neither a title, a note nor something else altogether."""
    return isinstance(entry, dict) and isinstance(entry.get("uuid"), str) and entry.get("type") in _LINKED


def parsed(line: bytes) -> Any:
    """A line as JSON. Raises ValueError or RecursionError where it is none."""
    return json.loads(line.decode(errors="replace"))


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


class _Entries:
    """Entries already read, in the shape of the SDK's SessionStore, whose public reader builds the message chain."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    async def load(self, key: SessionKey) -> list[SessionStoreEntry]:
        return cast("list[SessionStoreEntry]", self._entries)
