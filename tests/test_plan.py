"""Which session a turn is for, as a table: what there is and what is asked, and what is done then."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from session_sidecar.agent.agents import Launch
from session_sidecar.agent.transcripts import NOTHING, Revision
from session_sidecar.agent.transcripts.transcripts import TranscriptInfo
from session_sidecar.errors import TranscriptMissing
from session_sidecar.turns.deciding.plan import Branching, Plan, Seen, decide
from session_sidecar.turns.turn import Settled, TurnRequest
from session_store import SessionMapping, ThreadKey

KEY = ThreadKey("t1", "alice")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PARENT = Branching("t0", "parent", "m9", "Tea (fork)")
TORN = replace(PARENT, torn=True)
MESSAGE = TurnRequest(KEY, "Hello")
FORK = TurnRequest(KEY, "Hello", fork_of=ThreadKey("t0", "alice"))
STRICT = TurnRequest(KEY, "Hello", if_missing="fail")


def mapped(version: int = 3, **fields: Any) -> SessionMapping:
    given = {"parent_thread_id": None, "parent_message_id": None, "created_at": NOW, "updated_at": NOW, **fields}
    return SessionMapping("t1", "alice", "old", version=version, **given)


THERE = Revision(100)
HUNDRED = TranscriptInfo(THERE)

TABLE: dict[str, tuple[TurnRequest, Seen, Plan]] = {
    "a new thread begins a session": (
        MESSAGE,
        Seen(),
        Plan(Launch("new"), "started", "add", Settled("new", NOTHING)),
    ),
    "a fork begins one that leaves its parent's": (
        FORK,
        Seen(branching=PARENT),
        Plan(
            Launch("new", "parent", "m9", "Tea (fork)"), "forked", "add", Settled("new", NOTHING), parent_thread_id="t0"
        ),
    ),
    "a fork of a parent that has lost a line goes on from a copy": (
        FORK,
        Seen(branching=TORN),
        Plan(Launch("new", "new"), "forked", "add", Settled("new", NOTHING), parent_thread_id="t0", copied=TORN),
    ),
    "a known thread goes on with its own": (
        MESSAGE,
        Seen(mapped(), HUNDRED),
        Plan(
            Launch("old", "old"),
            "resumed",
            None,
            Settled("old", THERE),
            version=3,
            revision=THERE,
        ),
    ),
    "one at work in the background is settled where its last turn ended": (
        MESSAGE,
        Seen(mapped(), HUNDRED, settled=Revision(60)),
        Plan(Launch("old", "old"), "resumed", None, Settled("old", Revision(60)), version=3, revision=THERE),
    ),
    "one whose first turn did not complete goes on too": (
        MESSAGE,
        Seen(mapped(0), HUNDRED),
        Plan(
            Launch("old", "old"),
            "resumed",
            None,
            Settled("old", THERE),
            version=0,
            revision=THERE,
        ),
    ),
    "one whose transcript is lost gets a new session": (
        MESSAGE,
        Seen(mapped()),
        Plan(Launch("new"), "restarted", "replace", Settled("new", NOTHING), replaced="old"),
    ),
    "one that never had a transcript keeps its ID": (
        MESSAGE,
        Seen(mapped(0)),
        Plan(Launch("old"), "restarted", "aside", Settled("old", NOTHING)),
    ),
    "a fork that never had one is forked again": (
        MESSAGE,
        Seen(mapped(0, parent_thread_id="t0", parent_message_id="m9"), branching=PARENT),
        Plan(Launch("old", "parent", "m9", "Tea (fork)"), "forked", "aside", Settled("old", NOTHING)),
    ),
    "and from a copy if its parent has lost a line": (
        MESSAGE,
        Seen(mapped(0, parent_thread_id="t0", parent_message_id="m9"), branching=TORN),
        Plan(Launch("old", "old"), "forked", "aside", Settled("old", NOTHING), copied=TORN),
    ),
    "a fork that never had one, and whose parent is gone, begins anew": (
        MESSAGE,
        Seen(mapped(0, parent_thread_id="t0", parent_message_id="m9")),
        Plan(Launch("old"), "restarted", "aside", Settled("old", NOTHING)),
    ),
    "who wants no restart goes on where there is a transcript": (
        STRICT,
        Seen(mapped(), HUNDRED),
        Plan(
            Launch("old", "old"),
            "resumed",
            None,
            Settled("old", THERE),
            version=3,
            revision=THERE,
        ),
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_the_plan_for_a_turn(case: str) -> None:
    request, seen, plan = TABLE[case]
    assert decide(request, seen, "new") == plan


@pytest.mark.parametrize("version", [0, 3])
def test_who_wants_no_restart_is_told_that_the_transcript_is_missing(version: int) -> None:
    with pytest.raises(TranscriptMissing, match="mapping is untouched"):
        decide(STRICT, Seen(mapped(version)), "new")
