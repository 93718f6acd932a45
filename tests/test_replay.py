"""What can be read again is held in one budget of memory; the least recently used goes first; nothing runs twice."""

import asyncio
import gc
import time
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from session_sidecar.errors import AgentFailed, IdempotencyMismatch, ReplayGone
from session_sidecar.settings import Settings
from session_sidecar.turns.replay.keys import KEY_SECONDS
from session_sidecar.turns.replay.replay import MAX_KEYS, SWEEP_SECONDS, Replay
from session_sidecar.turns.turn import Turn, TurnRequest
from session_store import ThreadKey
from tests.faults import Behaviour, FaultyModel
from tests.modes import WARM
from tests.server import SECONDS, Sidecar
from tests.test_soak import resources

MIB = 2**20
SESSION = "eb142690-0d5b-4f5e-9d3b-3f4d1c3f6a11"

Make = Callable[..., Sidecar]


@pytest.fixture
async def held() -> AsyncIterator[Callable[..., Replay]]:
    """Make a replay of some settings."""
    made: list[Replay] = []

    def make(**settings: Any) -> Replay:
        made.append(Replay(Settings(**settings)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def asked(thread: str = "t", key: str | None = None, content: Any = "Hello") -> TurnRequest:
    return TurnRequest(ThreadKey(thread, "alice"), content, idempotency_key=key)


def begun(held: Replay, request: TurnRequest) -> Turn:
    """A turn that runs."""
    turn = Turn(request, held.log())
    held.keep(turn)
    turn.announce(SESSION, "started", None, "live")
    return turn


def says(turn: Turn, text: str) -> None:
    """The agent's next delta."""
    delta = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}
    turn.take({"type": "stream_event", "event": delta})


def ended(held: Replay, turn: Turn, text: str = "Hello, Ada") -> Turn:
    """A turn that has come to its result."""
    turn.take({"type": "result", "is_error": False, "result": text})
    turn.end()
    held.ended(turn)
    return turn


def a_turn(held: Replay, thread: str = "t", key: str | None = None, *, size: int = 10) -> Turn:
    """A turn from beginning to end that answers with so many characters, as the CLI does: in three messages."""
    turn = begun(held, asked(thread, key))
    says(turn, "x" * size)
    turn.take({"type": "assistant", "message": {"content": [{"type": "text", "text": "x" * size}]}})
    return ended(held, turn, "x" * size)


def first(turn: Turn) -> bool:
    """Whether a turn still has its first event."""
    try:
        turn.log.check(after=0)
    except ReplayGone:
        return False
    return True


async def gone(turn: weakref.ref[Turn]) -> None:
    """Wait until nobody has a turn any more."""
    found, there = asyncio.Event(), turn()
    if there is not None:
        weakref.finalize(there, found.set)
        del there
        async with asyncio.timeout(SECONDS):
            await found.wait()


# The budget


@pytest.mark.long
@pytest.mark.parametrize(("count", "deltas", "size"), [(2000, 0, 10), (60, 0, 1_000_000), (200, 100, 10)])
async def test_what_ended_turns_take_in_memory_is_what_is_counted_of_them(
    held: Callable[..., Replay], count: int, deltas: int, size: int
) -> None:
    budget = 6 * MIB
    some = held(replay_bytes_total=budget)
    turns: list[weakref.ref[Turn]] = []
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(count):
            turn = begun(some, asked(f"t{number}", f"k{number}" if number % 2 else None))
            for _ in range(deltas):
                says(turn, "word ")
            says(turn, "x" * size)
            turn.take({"type": "assistant", "message": {"content": [{"type": "text", "text": "x" * size}]}})
            turns.append(weakref.ref(ended(some, turn, "x" * size)))
            del turn
        used, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    alive = [turn for turn in turns if turn() is not None]
    assert 0 < len(alive) < count
    assert alive == turns[-len(alive) :]
    keys = 600 * count  # and this test's own list
    assert budget * 0.7 < used < budget * 1.1 + keys
    assert most < budget * 1.1 + keys + 6 * size  # while a message is framed


async def test_of_3000_ended_turns_with_a_key_only_those_within_the_budget_are_alive_and_no_key_runs_twice(
    held: Callable[..., Replay],
) -> None:
    some = held(replay_bytes_total=MIB)
    turns = [weakref.ref(a_turn(some, f"t{number}", f"k{number}", size=1000)) for number in range(3000)]
    alive = [number for number, turn in enumerate(turns) if turn() is not None]
    assert len(alive) < 1000
    assert alive == list(range(alive[0], 3000))
    for number, there in enumerate(turns):
        request = asked(f"t{number}", f"k{number}")
        if number in alive:
            assert some.find(request) is there()
        else:
            with pytest.raises(ReplayGone, match="no longer held"):
                some.find(request)
            with pytest.raises(IdempotencyMismatch):
                some.find(asked(f"t{number}", f"k{number}", "Another"))


async def test_the_least_recently_used_goes_first(held: Callable[..., Replay]) -> None:
    some = held(replay_bytes_total=100_000)
    for name in "abc":
        a_turn(some, name, f"key-{name}", size=7000)
    assert some.latest(ThreadKey("a", "alice"))
    assert some.find(asked("b", "key-b"))
    a_turn(some, "d", size=7000)
    assert [name for name in "abcd" if some.latest(ThreadKey(name, "alice"))] == ["a", "b", "d"]
    with pytest.raises(ReplayGone):
        some.find(asked("c", "key-c"))


async def test_running_turns_drive_out_the_ended_ones_and_then_the_largest_loses_its_oldest_events(
    held: Callable[..., Replay],
) -> None:
    some = held(replay_bytes_total=100_000)
    a_turn(some, "ended", size=7000)
    small, large = begun(some, asked("small")), begun(some, asked("large"))
    says(small, "x" * 10_000)
    for _ in range(3):
        says(large, "x" * 10_000)
    assert some.latest(ThreadKey("ended", "alice"))
    for _ in range(12):
        says(large, "x" * 10_000)
        assert small.log.size + large.log.size < 100_000
    assert some.latest(ThreadKey("ended", "alice")) is None
    assert first(small)
    assert not first(large)
    assert large.log.size > 60_000  # it was not cut further than it had to be


async def test_where_all_are_at_their_two_newest_events_these_are_held_and_no_more(
    held: Callable[..., Replay],
) -> None:
    some = held(replay_bytes_total=1024)
    turns = [begun(some, asked(f"t{number}")) for number in range(3)]
    for turn in turns:
        for _ in range(10):
            says(turn, "x" * 1000)
    assert all(2000 < turn.log.size < 3000 for turn in turns)


async def test_an_ended_turn_that_is_being_read_stays_and_is_counted_until_its_reader_has_left(
    held: Callable[..., Replay],
) -> None:
    some = held(replay_bytes_total=100_000, replay_seconds=0)
    turn = begun(some, asked("read"))
    with turn.reader():
        for _ in range(8):
            says(turn, "x" * 8000)
        ended(some, turn)
        other = begun(some, asked("other"))
        for _ in range(8):
            says(other, "x" * 8000)
            assert turn.log.size + other.log.size < 100_000
        assert turn.log.newest("end")
        assert other.log.size < 60_000
    there = weakref.ref(turn)
    del turn
    await gone(there)
    for _ in range(8):
        says(other, "x" * 8000)
    assert other.log.size > 80_000  # it has the room to itself


async def test_an_ended_turn_keeps_nothing_of_its_message_nor_of_how_it_failed(held: Callable[..., Replay]) -> None:
    def fail(message: bytes) -> None:
        raise AgentFailed(f"The agent's process ended after {len(message)} bytes.")

    some = held()
    tracemalloc.start()
    try:
        turn = begun(some, asked("t", "key", content="x" * 5_000_000))
        try:
            fail(b"x" * 5_000_000)
        except AgentFailed as error:
            turn.error = error
        turn.end()
        some.ended(turn)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    with pytest.raises(IdempotencyMismatch):
        some.find(asked("t", "key", content="x" * 4_999_999))
    assert some.find(asked("t", "key", content="x" * 5_000_000)) is turn
    for _ in range(2):
        turn.session = None  # as of one that never began
        with pytest.raises(AgentFailed, match="ended after 5000000 bytes") as told:
            await turn.wait_until_begun()
        assert told.value is not turn.error


# Keys


@pytest.mark.parametrize(
    "other",
    [
        asked("t", "k", "Another"),
        asked("other", "k"),
        asked("t", "k", [{"type": "text", "text": "Hello"}]),
        TurnRequest(ThreadKey("t", "alice"), "Hello", idempotency_key="k", agent="other"),
        TurnRequest(ThreadKey("t", "alice"), "Hello", idempotency_key="k", fork_of=ThreadKey("p", "alice")),
    ],
)
async def test_a_key_is_for_one_body(held: Callable[..., Replay], other: TurnRequest) -> None:
    some = held()
    turn = a_turn(some, "t", "k")
    with pytest.raises(IdempotencyMismatch):
        some.find(other)
    again = TurnRequest(ThreadKey("t", "alice"), "Hello", idempotency_key="k", request_id="another")
    assert some.find(again) is turn


@pytest.mark.long
async def test_beyond_the_most_keys_the_oldest_ended_one_is_forgotten_and_its_turn_with_it(
    held: Callable[..., Replay],
) -> None:
    some = held(replay_seconds=0)
    running = begun(some, asked("running", "first"))
    turns = [weakref.ref(a_turn(some, f"t{number}", f"k{number}", size=1)) for number in range(MAX_KEYS)]
    assert some.find(asked("running", "first")) is running
    assert some.find(asked("t0", "k0")) is None
    assert turns[0]() is None
    assert some.find(asked("t1", "k1")) is turns[1]()


async def test_a_key_and_its_turn_are_forgotten_after_their_time(held: Callable[..., Replay]) -> None:
    some = held(replay_seconds=0)
    turn = begun(some, asked("t", "key"))
    turn.times["end"] = time.monotonic() - KEY_SECONDS - 1  # it ended so long ago
    there = weakref.ref(ended(some, turn))
    del turn
    assert some.find(asked("t", "key"))
    await gone(there)
    assert some.find(asked("t", "key")) is None


async def test_the_turns_of_a_thread_are_each_found_by_their_id_and_forgotten_after_their_time(
    held: Callable[..., Replay],
) -> None:
    some, key = held(replay_seconds=SWEEP_SECONDS / 2), ThreadKey("t", "alice")
    turns = [a_turn(some) for _ in range(2)]
    assert [some.named(key, turn.id) for turn in turns] == turns
    assert some.named(ThreadKey("other", "alice"), turns[0].id) is None
    assert some.latest(key) is turns[1]
    there, turn_id = [weakref.ref(turn) for turn in turns], turns[0].id
    turns.clear()
    for turn in there:
        await gone(turn)
    assert some.latest(key) is some.named(key, turn_id) is None


async def test_what_ended_on_a_thread_that_is_forgotten_is_gone_but_its_keys_are_still_used(
    held: Callable[..., Replay],
) -> None:
    some = held()
    turns = [weakref.ref(a_turn(some, "t", key)) for key in ("one", "two", None)]
    other = a_turn(some, "other")
    some.forget(ThreadKey("t", "alice"))
    assert [turn() for turn in turns] == [None] * 3
    assert some.latest(ThreadKey("t", "alice")) is None
    for key in ("one", "two"):
        with pytest.raises(ReplayGone):
            some.find(asked("t", key))
    assert some.latest(ThreadKey("other", "alice")) is other


# Over HTTP


async def test_a_retry_of_a_turn_that_is_not_held_any_more_is_told_so_and_runs_nothing(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    async with a_sidecar(SIDECAR_REPLAY_BYTES_TOTAL="100000") as sidecar:
        first = await sidecar.chat(thread, "Hello", idempotency_key="k")
        await sidecar.say(f"{thread}-b", "[[big 40000]]")
        again = await sidecar.chat(thread, "Hello", idempotency_key="k")
        assert (again.status_code, again.json()["code"]) == (410, "replay_gone")
        assert again.json()["turn_id"] == first.json()["session"]["turn_id"]
        other = await sidecar.chat(thread, "Another", idempotency_key="k")
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
        async with sidecar.rejoin(thread) as none:
            assert none.response.status_code == 204
        assert len(model.requests) == 2


async def test_a_turn_that_is_larger_than_the_whole_budget_reaches_those_who_wait_for_it(
    a_sidecar: Make, thread: str
) -> None:
    async with a_sidecar(SIDECAR_REPLAY_BYTES_TOTAL="1024") as sidecar:
        assert len(await sidecar.say(thread, "[[big 100000]]")) == 100_000


@pytest.mark.smoke
async def test_an_answer_that_was_stopped_is_replayed_with_its_part(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async def ask() -> Any:
        return (await sidecar.chat(thread, "[[hold 3]]", idempotency_key=thread)).json()

    asking = asyncio.create_task(ask())
    await (await model.requested()).holding()
    await sidecar.post("/v1/chat/interrupt", thread)
    answer = await asking
    assert (answer["status"], answer["result"]["type"]) == ("interrupted", "result")
    assert await ask() == answer


@pytest.mark.smoke
async def test_a_deleted_thread_leaves_nothing_to_replay_and_its_keys_run_nothing(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    await sidecar.chat(thread, "My name is Ada", idempotency_key=thread)
    params = {"thread_id": thread, "resource_id": "alice"}
    assert (await sidecar.http.delete("/v1/session", params=params)).status_code == 204
    again = await sidecar.chat(thread, "My name is Ada", idempotency_key=thread)
    assert (again.status_code, again.json()["code"]) == (410, "replay_gone")
    async with sidecar.rejoin(thread) as none:
        assert none.response.status_code == 204
    assert len(model.requests) == 1
    assert (await sidecar.session(thread)).status_code == 404


@pytest.mark.long
@pytest.mark.quiet
async def test_answers_of_8_mb_take_no_more_memory_than_the_budget(a_sidecar: Make, model: FaultyModel) -> None:
    size, budget, handling = 8_000_000, 32 * MIB, 120 * MIB
    async with a_sidecar(SIDECAR_REPLAY_BYTES_TOTAL=str(budget), **WARM) as sidecar:
        model.default = Behaviour(text="x" * size)
        base = resources(sidecar.process.pid)[2] * 1024
        for number in range(8):
            key = {"idempotency_key": f"k{number}"} if number % 2 else {}
            answer = await sidecar.chat(f"t{number}", "Hello", **key)
            assert len(answer.json()["text"]) == size
            assert resources(sidecar.process.pid)[2] * 1024 < base + budget + handling
            model.requests.clear()
