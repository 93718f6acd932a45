"""What is done ourselves, for speed, where the SDK has a function for it: the same comes of both."""

import asyncio
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from claude_agent_sdk import SessionStore, SessionStoreEntry, fork_session, get_session_messages_from_store

from session_sidecar.agent.transcripts.fork import copy
from session_sidecar.agent.transcripts.reading.chain import conversation as read
from session_sidecar.agent.transcripts.reading.chain import entries_of
from session_sidecar.agent.transcripts.reading.ending import ending
from tests.conversations import conversation, damaged

SEEDS = range(40)
SESSION = "11111111-1111-4111-8111-111111111111"


class Entries:
    """A SessionStore that holds one transcript."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._entries = [json.loads(line) for line in lines]

    async def load(self, key: object) -> list[SessionStoreEntry]:
        return cast("list[SessionStoreEntry]", self._entries)


async def test_the_conversation_is_the_sdks() -> None:
    for seed in SEEDS:
        lines = conversation(seed)
        theirs = await get_session_messages_from_store(cast("SessionStore", Entries(lines)), SESSION)
        ours = await asyncio.to_thread(read, list(entries_of(lines)))
        assert [(m.uuid, m.type, m.message) for m in ours] == [(m.uuid, m.type, m.message) for m in theirs], seed


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "damaged"])
async def test_the_end_of_a_conversation_is_that_of_the_whole_wherever_it_is_cut(whole: bool) -> None:
    def compare() -> tuple[int, int]:
        cuts = told_something = 0
        for seed in SEEDS:
            lines = conversation(seed) if whole else damaged(conversation(seed), seed)
            entries = [list(entries_of([line])) for line in lines]  # one of a line, or none
            for end in {len(lines), len(lines) - seed % 7}:  # the last turn may be under way
                all_of_it = read(list(itertools.chain(*entries[:end])))
                for start in range(end):
                    found = ending(list(itertools.chain(*entries[start:end])))
                    messages = found.messages
                    assert messages == all_of_it[len(all_of_it) - len(messages) :], (seed, start, end)
                    assert not found.complete or messages == all_of_it, (seed, start, end)
                    cuts, told_something = cuts + 1, told_something + bool(messages)
        return cuts, told_something

    cuts, told_something = await asyncio.to_thread(compare)
    assert told_something > cuts * (0.25 if whole else 0.05), f"only {told_something} of {cuts} told anything"


def forked(path: Path) -> list[dict[str, Any]]:
    """A fork's entries with what is drawn or dated anew each time replaced by what stands for it."""
    entries: list[dict[str, Any]] = [json.loads(line) for line in path.read_bytes().splitlines()]
    places = {entry["uuid"]: f"entry {number}" for number, entry in enumerate(entries)}
    for entry in entries:
        for name in ("uuid", "parentUuid", "logicalParentUuid"):
            entry[name] = places.get(entry.get(name, ""), entry.get(name))
        entry["sessionId"] = entry["sessionId"].replace(path.stem, "the fork's")
        if not entry["timestamp"].startswith("2026-01-01"):
            entry["timestamp"] = "now"
    return entries


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_a_copy_is_what_the_sdks_fork_makes(again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    directory = tmp_path / "projects" / "p"
    directory.mkdir(parents=True)
    for seed in SEEDS:
        # Without the line separators, at which the SDK's function loses messages.
        lines = [line.replace("\u2028".encode(), b"").replace(b"\\u2028", b"") for line in conversation(seed)]
        session = json.loads(lines[0])["sessionId"]
        path = directory / f"{session}.jsonl"
        path.write_bytes(b"".join(lines))
        links = [e for e in map(json.loads, lines) if e["type"] in ("user", "assistant") and not e["isSidechain"]]
        if not links:
            continue
        up_to = links[seed % len(links)]["uuid"]
        theirs = directory / f"{fork_session(session, up_to_message_id=up_to, title='T').session_id}.jsonl"
        new = [SESSION, SESSION.replace("1", "2")]
        for name in new[: 1 + again]:
            copy([path], session, name, up_to, "T")
        ours = directory / f"{new[again]}.jsonl"
        expected, found = forked(theirs), forked(ours)
        assert found == expected, seed
        for name in new[: 1 + again]:
            (directory / f"{name}.jsonl").unlink()
