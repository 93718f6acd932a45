"""Which processes are kept, used again and closed: the pool's decisions, with processes that only pretend to be."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import pytest
from claude_agent_sdk import ClaudeAgentOptions

from session_sidecar.agent.processes.pool import Fingerprint, ProcessPool
from session_sidecar.agent.processes.process import AgentProcess
from session_store import ThreadKey

OPTIONS = ClaudeAgentOptions()
MIB = 2**20


class FakeProcess:
    """A process that is connected, and says what it is told to say."""

    def __init__(self, *, alive: bool = True, at_work: bool = False, speaks: bool = False, mib: int = 100) -> None:
        self.is_alive, self.at_work, self.speaks = alive, at_work, speaks
        self.mib = mib
        self.weighed = asyncio.Event()
        self.closed = asyncio.Event()
        self.news: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def glance(self) -> None:
        pass

    async def overhear(self) -> str:
        news = await asyncio.shield(self.news)
        self.news = asyncio.get_running_loop().create_future()
        return news

    async def own_bytes(self) -> int:
        self.weighed.set()
        return self.mib * MIB

    async def close(self) -> None:
        self.is_alive = False
        self.closed.set()


def real(process: FakeProcess) -> AgentProcess:
    return cast("AgentProcess", process)


def key(name: str) -> ThreadKey:
    return ThreadKey(name, "alice")


def state(session_id: str = "s", **fields: Any) -> Fingerprint:
    given = {"version": 1, "revision": 100, "agent": "default", "options": OPTIONS, **fields}
    return Fingerprint(session_id, **given)


async def some_steps(steps: int) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)


@pytest.fixture
async def make() -> AsyncIterator[Callable[..., ProcessPool]]:
    made: list[ProcessPool] = []

    def make(warm: int = 100, memory: int | None = None) -> ProcessPool:
        made.append(ProcessPool(warm=warm, memory=memory, idle_seconds=300, work_seconds=300))
        return made[-1]

    yield make
    for pool in made:
        await pool.close()


Make = Callable[..., ProcessPool]


async def test_a_process_is_used_again_if_everything_is_as_it_was(make: Make) -> None:
    pool, process = make(2), FakeProcess()
    assert pool.keep(key("a"), state(), real(process))
    assert pool.take(key("a"), state()) is real(process)
    assert pool.take(key("a"), state()) is None  # it is taken


@pytest.mark.parametrize(
    "other",
    [
        {"session_id": "other"},
        {"version": 2},
        {"revision": 101},
        {"revision": 99},
        {"agent": "other"},
        {"options": ClaudeAgentOptions(model="other")},
    ],
    ids=lambda other: str(next(iter(other))),
)
async def test_a_doubt_closes_it(make: Make, other: dict[str, Any]) -> None:
    pool, process = make(2), FakeProcess()
    pool.keep(key("a"), state(), real(process))
    assert pool.take(key("a"), state(**other)) is None
    await pool.drop(key("a"))
    assert process.closed.is_set()


@pytest.mark.parametrize("steps", range(6))
async def test_the_last_that_a_taken_process_says_is_not_laid_to_the_next_one(make: Make, steps: int) -> None:
    pool, first, second = make(2), FakeProcess(), FakeProcess()
    pool.keep(key("a"), state(), real(first))
    await some_steps(5)
    first.news.set_result("gone")
    await some_steps(steps)  # of the event loop, before somebody takes it
    pool.take(key("a"), state())
    pool.keep(key("a"), state(), real(second))
    await some_steps(10)
    assert pool.has(key("a"), state())
    assert not second.closed.is_set()


@pytest.mark.parametrize(("revision", "taken"), [(100, True), (150, True), (99, False)])
async def test_what_is_at_work_may_have_written_more_but_not_less(make: Make, revision: int, taken: bool) -> None:
    pool, process = make(2), FakeProcess(at_work=True)
    pool.keep(key("a"), state(), real(process))
    assert (pool.take(key("a"), state(revision=revision)) is not None) == taken


async def test_one_that_has_died_is_not_used_nor_kept(make: Make) -> None:
    pool, process = make(2), FakeProcess()
    pool.keep(key("a"), state(), real(process))
    process.is_alive = False
    assert pool.take(key("a"), state()) is None
    assert not pool.keep(key("b"), state(), real(FakeProcess(alive=False)))


async def test_the_least_recently_used_makes_room(make: Make) -> None:
    pool, processes = make(2), [FakeProcess() for _ in range(3)]
    for name, process in zip("abc", processes, strict=True):
        assert pool.keep(key(name), state(name), real(process))
    await pool.drop(key("a"))
    assert [process.closed.is_set() for process in processes] == [True, False, False]


async def keep_all(pool: ProcessPool, processes: dict[str, FakeProcess]) -> set[str]:
    """Keep one after another, each once the one before was weighed; the names of those that are kept in the end."""
    for name, process in processes.items():
        assert pool.keep(key(name), state(name), real(process))
        await process.weighed.wait()
        await asyncio.sleep(0)  # what is decided on that
    return {name for name in processes if pool.has(key(name), state(name))}


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ((100, 100, 100, 100, 100), "abcde"),
        ((100, 100, 100, 100, 101), "bcde"),
        ((300, 100, 100), "abc"),
        ((300, 100, 150), "bc"),
        ((100, 100, 450), "c"),
        ((100, 100, 501), "ab"),  # all the others would make room for nothing
    ],
    ids=str,
)
async def test_the_least_recently_used_make_room_until_what_each_takes_fits(
    make: Make, sizes: tuple[int, ...], kept: str
) -> None:
    pool = make(memory=500 * MIB)
    assert await keep_all(pool, {n: FakeProcess(mib=mib) for n, mib in zip("abcde", sizes, strict=False)}) == set(kept)


@pytest.mark.parametrize(("warm", "memory", "kept"), [(2, 500, "bc"), (3, 250, "bc"), (3, 300, "abc")])
async def test_of_a_number_and_a_size_the_tighter_one_counts(make: Make, warm: int, memory: int, kept: str) -> None:
    assert await keep_all(make(warm, memory * MIB), {name: FakeProcess() for name in "abc"}) == set(kept)


async def test_what_is_at_work_is_weighed_when_it_comes_to_rest(make: Make) -> None:
    pool, working = make(memory=250 * MIB), FakeProcess(at_work=True, mib=200)
    pool.keep(key("a"), state("a"), real(working))
    assert await keep_all(pool, {name: FakeProcess() for name in "bc"}) == {"b", "c"}
    working.at_work = False
    working.news.set_result("rest")
    await working.closed.wait()  # it was kept first
    assert pool.resting == 2


@pytest.mark.parametrize(("memory", "mib", "kept"), [(300, 100, "ab"), (200, 100, "a"), (300, 250, "a")])
async def test_a_hint_takes_no_memory_from_what_a_turn_has_had(make: Make, memory: int, mib: int, kept: str) -> None:
    pool, hinted = make(memory=memory * MIB), FakeProcess(mib=mib)
    await keep_all(pool, {"a": FakeProcess()})
    if pool.keep(key("b"), state("b"), real(hinted), hinted=1.0):
        await hinted.weighed.wait()
        await asyncio.sleep(0)
    assert {name for name in "ab" if pool.has(key(name), state(name))} == set(kept)


async def test_none_that_is_at_work_makes_room_or_takes_any(make: Make) -> None:
    pool, working, resting = make(1), FakeProcess(at_work=True), FakeProcess()
    assert pool.keep(key("a"), state("a"), real(working))
    assert pool.keep(key("b"), state("b"), real(resting))
    assert pool.take(key("a"), state("a")) is real(working)
    assert pool.take(key("b"), state("b")) is real(resting)


async def test_without_places_only_what_is_at_work_is_kept(make: Make) -> None:
    pool = make(0)
    assert not pool.keep(key("a"), state(), real(FakeProcess()))
    assert pool.keep(key("b"), state(), real(FakeProcess(at_work=True)))
    assert pool.working_for() == [key("b")]


@pytest.mark.parametrize(
    ("earlier", "kept"), [(None, False), (1.0, True), (3.0, False)], ids=["used", "older", "newer"]
)
async def test_a_hint_takes_the_place_of_older_hints_alone(make: Make, earlier: float | None, kept: bool) -> None:
    pool = make(1)
    pool.keep(key("a"), state("a"), real(FakeProcess()), hinted=earlier)
    assert pool.has_room(2.0) == kept
    assert pool.keep(key("b"), state("b"), real(FakeProcess()), hinted=2.0) == kept


async def test_one_that_speaks_by_itself_is_given_with_its_state_before_that(make: Make) -> None:
    pool, process = make(1), FakeProcess(at_work=True)
    heard: asyncio.Future[ThreadKey] = asyncio.get_running_loop().create_future()
    pool.on_turn = lambda key, _agent, _process: heard.set_result(key)
    pool.keep(key("a"), state("a"), real(process))
    process.speaks = True
    process.news.set_result("turn")
    assert await heard == key("a")
    assert pool.take_speaking(key("a"), real(process)) == state("a")
    assert pool.take_speaking(key("a"), real(process)) is None


async def test_one_that_has_come_to_rest_counts_again(make: Make) -> None:
    pool, working, resting = make(1), FakeProcess(at_work=True), FakeProcess()
    pool.keep(key("a"), state("a"), real(working))
    pool.keep(key("b"), state("b"), real(resting))
    working.at_work = False
    working.news.set_result("rest")
    await working.closed.wait()  # it was kept first
    assert pool.take(key("b"), state("b")) is real(resting)


async def test_one_that_ends_by_itself_is_seen_to(make: Make) -> None:
    pool, process = make(1), FakeProcess()
    pool.keep(key("a"), state(), real(process))
    process.news.set_result("gone")
    await process.closed.wait()
    assert pool.take(key("a"), state()) is None


async def test_after_the_end_nothing_is_kept(make: Make) -> None:
    pool, process = make(1), FakeProcess()
    pool.keep(key("a"), state(), real(process))
    await pool.close()
    assert process.closed.is_set()
    assert not pool.keep(key("b"), state(), real(FakeProcess()))
