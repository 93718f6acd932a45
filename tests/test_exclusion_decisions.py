"""Who may have a thread, as a table: what is on it, how the next one asks, and what becomes of both."""

import asyncio
from typing import Literal

import pytest

from session_sidecar.errors import QueueFull, ShuttingDown, ThreadBusy, ThreadDeleted, ThreadExists
from session_sidecar.turns.deciding.exclusion import Exclusion
from session_sidecar.turns.events import EventLog
from session_sidecar.turns.turn import Turn, TurnRequest
from session_store import ThreadKey

KEY = ThreadKey("t1", "alice")
Strategy = Literal["reject", "enqueue", "interrupt"]


def turn(strategy: Strategy = "reject", *, fork: bool = False, background: bool = False) -> Turn:
    request = TurnRequest(KEY, "", multitask_strategy=strategy, fork_of=ThreadKey("t0", "alice") if fork else None)
    return Turn(request, EventLog(max_events=10, max_bytes=1000), "background" if background else "message")


@pytest.mark.parametrize("strategy", ["reject", "enqueue", "interrupt"])
async def test_a_free_thread_is_had_at_once(strategy: Strategy) -> None:
    exclusion, first = Exclusion(queue_turns=2), turn(strategy)
    assert exclusion.enter(first).done()
    assert exclusion.running(KEY) is first
    assert not exclusion.is_free(KEY)


@pytest.mark.parametrize(
    ("next_one", "refusal"),
    [(turn, ThreadBusy), (lambda: turn("enqueue", fork=True), ThreadExists)],
    ids=["one that would not wait", "the first turn of a branch"],
)
async def test_a_busy_one_is_refused_to(next_one: type[Turn], refusal: type[Exception]) -> None:
    exclusion, first = Exclusion(queue_turns=2), turn()
    exclusion.enter(first)
    with pytest.raises(refusal):
        exclusion.enter(next_one())  # type: ignore[call-arg]
    assert exclusion.turns(KEY) == [first]
    assert not first.stopping.is_set()


async def test_those_that_wait_come_in_their_order_and_no_more_than_may() -> None:
    exclusion, turns = Exclusion(queue_turns=2), [turn("enqueue") for _ in range(3)]
    had = [exclusion.enter(one) for one in turns]
    with pytest.raises(QueueFull):
        exclusion.enter(turn("enqueue"))
    for number, one in enumerate(turns):
        assert [future.done() for future in had] == [True] * (number + 1) + [False] * (2 - number)
        exclusion.leave(one)
    assert exclusion.is_free(KEY)


async def test_an_interrupt_stops_the_running_one_and_earlier_interrupts_and_goes_ahead_of_the_others() -> None:
    exclusion = Exclusion(queue_turns=8)
    running, waiting, earlier, last = turn(), turn("enqueue"), turn("interrupt"), turn("interrupt")
    for one in (running, waiting, earlier, last):
        exclusion.enter(one)
    assert [one.stopping.is_set() for one in (running, waiting, earlier, last)] == [True, False, True, False]
    exclusion.leave(running)
    assert exclusion.running(KEY) is last
    exclusion.leave(last)
    assert exclusion.running(KEY) is earlier  # it finds that it was stopped, and leaves
    exclusion.leave(earlier)
    assert exclusion.running(KEY) is waiting


async def test_what_the_agent_says_by_itself_is_never_refused() -> None:
    exclusion = Exclusion(queue_turns=0)
    exclusion.enter(turn())
    assert not exclusion.enter(turn(background=True)).done()


async def test_a_turn_that_leaves_the_queue_is_not_waited_for() -> None:
    exclusion, first, second, third = Exclusion(queue_turns=8), turn(), turn("enqueue"), turn("enqueue")
    for one in (first, second, third):
        exclusion.enter(one)
    exclusion.leave(second)
    exclusion.leave(first)
    assert exclusion.running(KEY) is third


async def test_a_hold_keeps_turns_off_and_is_refused_where_one_runs() -> None:
    exclusion, first = Exclusion(queue_turns=8), turn("enqueue")
    async with exclusion.hold(KEY):
        assert not exclusion.enter(first).done()
        assert exclusion.running(KEY) is None
    assert exclusion.running(KEY) is first
    with pytest.raises(ThreadBusy):
        async with exclusion.hold(KEY):
            pass


async def test_nobody_passes_a_hold_that_waits() -> None:
    exclusion, first, interrupting = Exclusion(queue_turns=8), turn(), turn("interrupt")
    exclusion.enter(first)

    async def delete() -> Turn | None:
        async with exclusion.hold(KEY, stop=ThreadDeleted("It was deleted.")):
            return exclusion.running(KEY)

    deleting = asyncio.create_task(delete())
    await first.stopping.wait()
    assert isinstance(first.stop_reason, ThreadDeleted)
    had = exclusion.enter(interrupting)
    exclusion.leave(first)
    assert not had.done()
    assert await deleting is None
    assert exclusion.running(KEY) is interrupting


async def test_all_turns_are_stopped_for_one_reason() -> None:
    exclusion, turns = Exclusion(queue_turns=8), [turn("enqueue") for _ in range(3)]
    for one in turns:
        exclusion.enter(one)
    exclusion.stop_all(ShuttingDown("It shuts down."))
    assert all(isinstance(one.stop_reason, ShuttingDown) for one in turns)
    assert exclusion.busy() == [KEY]
