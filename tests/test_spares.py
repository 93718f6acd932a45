"""When spares are started, given and replaced: the decisions, with processes that only pretend to be."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from typing import cast

import pytest

from session_sidecar.agent.processes.process import AgentProcess
from session_sidecar.agent.processes.spares import Spare, Spares
from session_sidecar.agent.processes.starts import Starts
from session_sidecar.errors import AgentStartFailed


class FakeProcess:
    """A process that starts when it is let, and waits until it is told to go."""

    cli_version = preset = None

    def __init__(self, *, fails: bool = False) -> None:
        self._fails = fails
        self.is_alive = False
        self.gone = asyncio.Event()

    async def start(self, _patience: float | None = None) -> None:
        if self._fails:
            raise AgentStartFailed("It does not.")
        self.is_alive = True

    async def overhear(self) -> str:
        await self.gone.wait()
        return "gone"

    async def end(self) -> None:
        pass

    async def close(self) -> None:
        self.is_alive = False
        self.gone.set()


class Maker:
    """Makes spares of the agents that it knows, and remembers all of them."""

    def __init__(self, *, fail: int = 0) -> None:
        self._fail = fail
        self.made: list[tuple[str, FakeProcess]] = []

    def __call__(self, agent: str) -> Spare | None:
        if agent == "asked every time":
            return None
        process = FakeProcess(fails=len(self.made) < self._fail)
        self.made.append((agent, process))
        return Spare(cast("AgentProcess", process), str(len(self.made)))


@pytest.fixture
async def spares_of() -> AsyncIterator[Callable[..., Spares]]:
    made: list[Spares] = []

    def make(maker: Maker, most: int = 1, idle_seconds: float = 300) -> Spares:
        made.append(Spares(Starts(2), most=most, idle_seconds=idle_seconds, make=maker))
        return made[-1]

    yield make
    for spares in made:
        await spares.close()


Make = Callable[..., Spares]


@pytest.mark.parametrize("most", [0, 1, 3])
async def test_as_many_are_started_as_are_wanted_however_often_it_is_asked(spares_of: Make, most: int) -> None:
    spares = spares_of(maker := Maker(), most)
    for _ in range(5):
        spares.fill("default")
    await spares.started()
    spares.fill("default")
    assert len(maker.made) == most


async def test_each_is_given_once_and_to_its_own_agent(spares_of: Make) -> None:
    spares = spares_of(Maker())
    spares.fill("default")
    spares.fill("other")
    await spares.started()
    assert spares.take("default") is not None
    assert spares.take("default") is None
    assert spares.take("other") is not None


async def test_of_an_agent_that_is_asked_every_time_there_is_none(spares_of: Make) -> None:
    spares = spares_of(maker := Maker())
    spares.fill("asked every time")
    assert maker.made == []
    assert spares.take("asked every time") is None


async def test_one_that_was_not_needed_is_given_to_the_next(spares_of: Make) -> None:
    spares = spares_of(Maker())
    spares.fill("default")
    await spares.started()
    spare = spares.take("default")
    assert spare is not None
    spares.give_back("default", spare)
    assert spares.take("default") is spare


async def test_one_that_comes_back_too_late_is_closed(spares_of: Make) -> None:
    spares = spares_of(maker := Maker())
    spares.fill("default")
    await spares.started()
    first = spares.take("default")
    assert first is not None
    spares.fill("default")
    await spares.started()
    spares.give_back("default", first)
    await maker.made[0][1].gone.wait()
    second = spares.take("default")
    assert second is not None
    assert second is not first


async def test_one_that_has_died_is_given_to_nobody(spares_of: Make) -> None:
    spares = spares_of(maker := Maker())
    spares.fill("default")
    await spares.started()
    maker.made[0][1].is_alive = False
    assert spares.take("default") is None


async def test_one_that_has_waited_for_long_is_replaced(spares_of: Make) -> None:
    spares = spares_of(maker := Maker(), 1, 0.01)
    spares.fill("default")
    await maker.made[0][1].gone.wait()
    await spares.started()
    await maker.made[1][1].gone.wait()


async def test_one_that_dies_as_soon_as_it_is_there_is_not_started_for_ever(spares_of: Make) -> None:
    spares = spares_of(maker := Maker())
    for attempt in itertools.count(1):
        spares.fill("default")
        await spares.started()
        maker.made[-1][1].gone.set()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(maker.made) == attempt
        if attempt == 3:
            break


async def test_one_that_does_not_start_is_tried_again_when_the_next_is_asked_for(spares_of: Make) -> None:
    spares = spares_of(maker := Maker(fail=2))
    for made in (1, 2, 3):
        spares.fill("default")
        await spares.started()
        assert len(maker.made) == made
    assert spares.take("default") is not None


async def test_after_the_end_none_is_started_or_kept(spares_of: Make) -> None:
    spares = spares_of(maker := Maker(), 2)
    spares.fill("default")
    await spares.started()
    taken = spares.take("default")
    assert taken is not None
    await spares.close()
    spares.fill("default")
    spares.give_back("default", taken)
    await spares.close()
    assert len(maker.made) == 2
    assert all(process.gone.is_set() for _, process in maker.made)
