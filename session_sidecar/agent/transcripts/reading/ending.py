"""The end of a conversation, read from the end of its transcript: a page of it does not need the other 90 MiB."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from session_sidecar.agent.transcripts.lines import Entry, tails
from session_sidecar.agent.transcripts.reading.chain import TranscriptMessage, block_ids, conversation, entries_of
from session_sidecar.agent.transcripts.reading.readers import SHORT_BYTES

_FIRST_BYTES = 2**17


class Ending(NamedTuple):
    """The last messages of a conversation, oldest first, and whether there are no others."""

    messages: list[TranscriptMessage]
    complete: bool


def read_ending(
    path: Path, enough: int, *, size: int | None = None, count: Callable[[list[TranscriptMessage]], int] = len
) -> Ending:
    """At least the last messages in the first `size` bytes of a transcript that `count` for `enough`, as all give them.

    Fewer, or none, where `SHORT_BYTES` do not tell. Raises FileNotFoundError.
    """
    with path.open("rb") as file:
        whole = os.fstat(file.fileno()).st_size
        found = Ending([], False)
        for start, tail in tails(file, _FIRST_BYTES, whole if size is None else min(size, whole)):
            lines = tail.split(b"\n")
            entries = list(entries_of(lines[1:] if start else lines))  # not a cut one
            found = ending(entries) if start else Ending(conversation(entries), True)
            if found.complete or count(found.messages) >= enough or len(tail) >= SHORT_BYTES:
                break
        return found


def ending(entries: list[Entry]) -> Ending:
    """The end of a conversation, as far as the last entries of its transcript tell it for certain.

    Each message is just what `conversation` of all entries gives. What is relied on: an entry comes after those that
    it names, IDs are used once, and a reply and the results of its calls come before the next prompt. So the CLI
    writes.
    """
    said = [entry for entry in entries if "message" in entry]
    if not said or any(said[-1].get(name) for name in ("isMeta", "isSidechain", "teamName")):
        return Ending([], False)  # the SDK may take another message for the last
    before: dict[str, Entry] = {}
    outside = set()
    main = 0
    for entry in entries:
        if entry["uuid"] in before:
            return Ending([], False)
        parent, main = entry.get("parentUuid"), main + (not entry.get("isSidechain"))
        if parent is not None and (not isinstance(parent, str) or parent not in before):
            outside.add(entry["uuid"])
            if not entry.get("isSidechain") and main > 1:
                return Ending([], False)  # is it before these, or lost?
        elif not _answers(entry, before.get(parent or "")):
            return Ending([], False)  # the SDK may look further back for the call
        before[entry["uuid"]] = entry
    messages = conversation(entries)
    if not messages or _root(before, messages[0].uuid) not in outside:
        return Ending(messages, bool(messages))
    prompt = next((i for i, m in enumerate(messages) if m.type == "user" and not m.results), len(messages))
    certain = messages[prompt + 1 :]  # a reply before it may have begun outside
    return Ending([], False) if any(m.parent_uuid is None for m in certain) else Ending(certain, False)


def _root(entries: dict[str, Entry], uuid: str) -> str:
    """Where the chain that leads to an entry begins."""
    while isinstance(parent := entries[uuid].get("parentUuid"), str) and parent in entries:
        uuid = parent
    return uuid


def _answers(entry: Entry, call: Entry | None) -> bool:
    """Whether what results of tools an entry has, if any, are those of calls in the entry that it follows."""
    results = block_ids(entry, "tool_result", "tool_use_id")
    source = entry.get("sourceToolAssistantUUID")
    return not results or (
        call is not None and set(results) <= set(block_ids(call, "tool_use", "id")) and source in (None, call["uuid"])
    )
