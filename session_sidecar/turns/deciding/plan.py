"""Which session a turn is for: `decide` is pure, and its value is the plan. `planner` looks and commits."""

import uuid
from dataclasses import dataclass
from typing import Literal

from session_sidecar.agent.agents import Launch
from session_sidecar.agent.transcripts import NOTHING, Revision
from session_sidecar.agent.transcripts.transcripts import TranscriptInfo
from session_sidecar.errors import (
    TranscriptMissing,
)
from session_sidecar.turns.turn import Outcome, Settled, TurnRequest
from session_store import SessionMapping


@dataclass(frozen=True, slots=True)
class Branching:
    """Where a fork leaves its parent: after a message of the parent's session; and what it is called, if that is.

    `torn` is a parent that has lost a line: a CLI that forked it would begin behind that.
    """

    parent_thread_id: str
    session_id: str
    message_id: str
    title: str | None = None
    torn: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """What there is for a turn: the thread's mapping, its transcript if that can be resumed, and where it branches.

    `settled` is where the last turn ended, if the thread's process has been at work since then.
    """

    mapping: SessionMapping | None = None
    transcript: TranscriptInfo | None = None
    settled: Revision | None = None
    branching: Branching | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a turn launches, and what has to be changed before that.

    `add` a mapping, `replace` the session of the one there is, or set the file of a session `aside`: the CLI takes no
    session ID whose file exists, and a crash can leave one that has no message in it yet. `copied` is where the session
    that is resumed is to be copied from.
    """

    launch: Launch
    outcome: Outcome
    change: Literal["add", "replace", "aside"] | None
    settled: Settled  # where the turn before ended
    replaced: str | None = None
    version: int = 0  # of the mapping, for a session that is resumed
    revision: Revision = NOTHING  # of its transcript
    parent_thread_id: str | None = None
    copied: Branching | None = None


def decide(request: TurnRequest, seen: Seen, new_id: str) -> Plan:
    """The plan for what was asked for and what there is; `new_id` is the ID of a session that is made.

    Raises TranscriptMissing.
    """
    mapping, branching = seen.mapping, seen.branching
    if mapping is None:
        parent = branching.parent_thread_id if branching else None
        outcome: Outcome = "forked" if branching else "started"
        return Plan(
            _begun(new_id, branching),
            outcome,
            "add",
            Settled(new_id, NOTHING),
            parent_thread_id=parent,
            copied=_copied(branching),
        )
    session_id = mapping.sdk_session_id
    if seen.transcript is not None:
        revision = seen.transcript.revision
        settled = Settled(session_id, revision if seen.settled is None else seen.settled)
        return Plan(
            Launch(session_id, session_id), "resumed", None, settled, version=mapping.version, revision=revision
        )
    if request.if_missing == "fail":
        raise TranscriptMissing("The mapping is untouched. Restore the transcript, or send `if_missing: restart`.")
    if mapping.version > 0:
        return Plan(Launch(new_id), "restarted", "replace", Settled(new_id, NOTHING), replaced=session_id)
    # A session that never had a completed turn keeps its ID.
    outcome = "forked" if branching else "restarted"
    launch = _begun(session_id, branching)
    return Plan(launch, outcome, "aside", Settled(session_id, NOTHING), copied=_copied(branching))


def _begun(session_id: str, branching: Branching | None) -> Launch:
    if branching is None:
        return Launch(session_id)
    if branching.torn:
        return Launch(session_id, session_id)
    return Launch(session_id, branching.session_id, branching.message_id, branching.title)


def _copied(branching: Branching | None) -> Branching | None:
    return branching if branching is not None and branching.torn else None


def make_id() -> str:
    """A session ID that nobody has."""
    return str(uuid.uuid4())
