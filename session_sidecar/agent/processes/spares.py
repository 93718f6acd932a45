"""Spares: connected processes that wait for new threads, so that the first turn of one does not wait for a CLI."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from session_sidecar.agent.agents import Agents, Launch
from session_sidecar.agent.processes.process import AgentProcess
from session_sidecar.agent.processes.starts import AHEAD_SECONDS, Starts
from session_sidecar.agent.tasks import Tasks
from session_sidecar.errors import SidecarError

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Spare:
    """A connected process without a prompt, and the session ID that it was started for."""

    process: AgentProcess
    session_id: str
    used: bool = False


def maker(agents: Agents) -> Callable[[str], Spare | None]:
    """What makes spares of agents that are the same for every thread, and no others."""

    def make(agent: str) -> Spare | None:
        if agent not in agents.presets:
            return None
        session_id = str(uuid.uuid4())
        return Spare(agents.process(agent, agents.preset(agent, Launch(session_id))), session_id)

    return make


class Spares:
    """So many spares an agent, from its first `fill` on: what leaves is replaced. Each is watched by a task of ours."""

    def __init__(self, starts: Starts, *, most: int, idle_seconds: float, make: Callable[[str], Spare | None]) -> None:
        """Keep `most` spares an agent; one that nobody took for `idle_seconds` is replaced by a fresh one.

        `make` gives one of an agent that is not started yet; None for an agent that is not the same for every thread.
        """
        self._starts = starts
        self._most = most
        self._idle_seconds = idle_seconds
        self._make = make
        self._waiting: dict[str, dict[Spare, asyncio.Task[None]]] = {}  # each with what watches it
        self._starting: list[str] = []  # the agent of each
        self._tasks = Tasks()
        self._closing = False

    def take(self, agent: str) -> Spare | None:
        """A connected process for a new session of this agent."""
        waiting = self._waiting.get(agent, {})
        while waiting:
            spare, watch = waiting.popitem()
            watch.cancel()
            if spare.process.is_alive:
                return spare
            self._tasks.own(spare.process.close())
        return None

    @property
    def waiting(self) -> int:
        """How many are connected, of all agents."""
        return sum(map(len, self._waiting.values()))

    def give_back(self, agent: str, spare: Spare) -> None:
        """Take back a spare that was not needed."""
        if self._wants(agent):
            self._waiting.setdefault(agent, {})[spare] = self._tasks.own(self._attend(agent, spare))
        else:
            self._tasks.own(spare.process.close())

    def fill(self, agent: str) -> None:
        """Start what this agent lacks, in the background."""
        while self._wants(agent) and (spare := self._make(agent)) is not None:
            self._starting.append(agent)
            self._tasks.own(self._start(agent, spare))

    async def started(self) -> None:
        """Wait until none is being started."""
        while self._starting:
            await self._tasks.one_ended()

    def stop(self) -> None:
        """Keep none from here on."""
        self._closing = True

    async def close(self) -> None:
        """Close every spare and see it gone."""
        self.stop()
        there = [spare for waiting in self._waiting.values() for spare in waiting]
        for waiting in self._waiting.values():
            for watch in waiting.values():
                watch.cancel()
        self._waiting.clear()
        await asyncio.gather(*(spare.process.close() for spare in there))
        await self._tasks.ended()

    def _wants(self, agent: str) -> bool:
        """Whether this agent has fewer than it may, those that are being started included."""
        return not self._closing and len(self._waiting.get(agent, ())) + self._starting.count(agent) < self._most

    async def _start(self, agent: str, spare: Spare) -> None:
        try:
            async with self._starts.room_ahead():
                await self._starts.start_ahead(spare.process)
        except SidecarError as error:
            level = logging.DEBUG if self._closing else logging.WARNING
            logger.log(level, "a spare process of agent %s did not start: %s", agent, error.detail)
            await spare.process.close()
            return
        finally:
            self._starting.remove(agent)
        self.give_back(agent, spare)

    async def _attend(self, agent: str, spare: Spare) -> None:
        """Stay with a spare until it has waited for long, or has ended, and replace it then."""
        since = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._idle_seconds):
                await spare.process.overhear()
        self._waiting[agent].pop(spare)
        # One that ends as soon as it is there would be replaced for ever; the next turn tries again.
        if asyncio.get_running_loop().time() - since >= min(AHEAD_SECONDS, self._idle_seconds):
            self.fill(agent)
        await spare.process.close()
