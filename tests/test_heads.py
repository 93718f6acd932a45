"""Where a message of a chat goes, as a table: on with a thread, into a branch, or nowhere."""

from typing import Any

import pytest

from session_sidecar.errors import MessageNotFound, SidecarError, ThreadBusy
from session_sidecar.sessions.heads import Known, Place, Thread, decide


def thread(name: str, *exchanges: str, **more: Any) -> Thread:
    """A thread with these exchanges; one that the agent has begun by itself is written with a star."""
    known = [Known(one.rstrip("*"), f"end of {one.rstrip('*')}", asked=not one.endswith("*")) for one in exchanges]
    return Thread(name, known, **more)


def branch(name: str, at: str) -> Place:
    return Place(name, at=f"end of {at}", is_branch=True)


NEW = Place("t", "")
ANEW = Place("t", is_branch=True)
LONG = thread("t", "a", "b")
FORK = thread("t~1", "a", "c")

# What there is of the chat `t`, the exchanges before the message as its client knows them, and where it goes.
TABLE: dict[str, tuple[list[Thread], str, Place | type[SidecarError]]] = {
    "a new chat": ([], "", NEW),
    "a thread that never had a turn": ([thread("t")], "", NEW),
    "the first turn is still running": ([thread("t", running="a")], "", NEW),
    "on with the thread": ([LONG], "b a", Place("t", "b")),
    "the first message edited": ([LONG], "", ANEW),
    "the first message edited while a turn runs": ([thread("t", "a", running="b")], "", ANEW),
    "a later one edited, or its answer regenerated": ([LONG], "a", branch("t", "a")),
    "on with a branch": ([LONG, FORK], "c a", Place("t~1", "c")),
    "edited where both have what came before": ([LONG, FORK], "a", branch("t", "a")),
    "the one that is preferred comes first": ([FORK, LONG], "a", branch("t~1", "a")),
    "two threads end alike": ([LONG, thread("copy", "a", "b")], "b", Place("t", "b")),
    "one of the two has gone on": ([thread("t", "a", "b", "c"), thread("copy", "a", "b")], "b", Place("copy", "b")),
    "a message that got no answer is known by nobody": ([LONG], "mine b a", Place("t", "b")),
    "one that got none, but whose turn was run": ([thread("t", "a", "mine", "b")], "lost a", branch("t", "a")),
    "what the agent said by itself is no other head": ([thread("t", "a", "x*")], "a", Place("t", "a")),
    "on behind what it said by itself": ([thread("t", "a", "x*")], "x a", Place("t", "a")),
    "edited behind it": ([thread("t", "a", "x*", "b")], "x a", branch("t", "x")),
    "it says something by itself": ([thread("t", "a", running="a")], "a", Place("t", "a")),
    "behind the turn that runs": ([thread("t", "a", running="b")], "b a", Place("t", "b")),
    "behind another turn that runs": ([thread("t", "a", running="b")], "a", ThreadBusy),
    "before a turn that runs": ([thread("t", "a", "b", running="c")], "a", branch("t", "a")),
    "nothing is known": ([LONG], "other", MessageNotFound),
    "nothing is there": ([], "other", MessageNotFound),
    "the transcript is lost": ([thread("t", lost=True)], "a", Place("t")),
    "a branch's is lost": ([LONG, thread("t~1", lost=True)], "b", Place("t", "b")),
    "a branch's is lost, and nothing is known": ([LONG, thread("t~1", lost=True)], "other", MessageNotFound),
}


@pytest.mark.parametrize("row", TABLE)
def test_where_a_message_goes(row: str) -> None:
    threads, parents, where = TABLE[row]
    names = parents.split()
    if isinstance(where, Place):
        assert decide("t", threads, names, answered=bool(names)) == where
    else:
        with pytest.raises(where):
            decide("t", threads, names, answered=bool(names))


@pytest.mark.parametrize("strategy", ["enqueue", "interrupt"])
def test_who_does_not_want_to_be_refused_has_a_branch_beside_what_runs_unseen(strategy: Any) -> None:
    threads = [thread("t", "a", running="b")]
    assert decide("t", threads, ["a"], answered=True, strategy=strategy) == branch("t", "a")
    assert decide("t", threads, ["b", "a"], answered=True, strategy=strategy) == Place("t", "b")


def test_messages_that_nobody_has_answered_begin_a_chat() -> None:
    assert decide("t", [], ["mine"], answered=False) == NEW
    assert decide("t", [LONG], ["mine"], answered=False) == ANEW
