"""Processes kept ready: warm ones that stay connected to their session, and spares that wait for a new one.

Starting the CLI is most of a cold turn. A connected process does not notice what others write to its session, so it is
used again only if nothing has changed since it fell idle; a doubt costs a cold start, never a turn.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claude_agent_sdk import ClaudeAgentOptions

from session_store import ThreadKey
from sidecar.agent.process import AgentProcess
from sidecar.errors import AgentStartFailed, SidecarError

logger = logging.getLogger(__name__)

MOST_WARM = 32
BYTES_EACH = 130 * 2**20  # what a connected CLI takes of its own, and some


@dataclass(frozen=True)
class Fingerprint:
    """What must be as it was for a warm process to be used: the mapping, the transcript's size, the agent's options."""

    session_id: str
    version: int
    size: int
    options: ClaudeAgentOptions


@dataclass(eq=False)
class _Idle:
    """A connected process that nobody uses."""

    process: AgentProcess
    watch: asyncio.Task[None]


@dataclass(eq=False)
class Spare:
    """A connected process without a prompt, and the session ID that it was started for."""

    process: AgentProcess
    session_id: str
    used: bool = False


class ProcessPool:
    """Idle processes, bounded in number and in time. Each is watched by a task that is owned here."""

    def __init__(self, *, warm: int | None, spares: int, idle_seconds: float) -> None:
        """Keep up to `warm` sessions connected (None: by this machine's memory) and `spares` processes an agent.

        One that nobody used for `idle_seconds` is closed.
        """
        self._most_warm = warm_by_memory() if warm is None else warm
        self._most_spares = spares
        self._idle_seconds = idle_seconds
        self._warm: dict[ThreadKey, tuple[Fingerprint, _Idle]] = {}  # least recently used first
        self._spares: dict[str, dict[Spare, _Idle]] = {}
        self._leaving: dict[asyncio.Task[None], ThreadKey] = {}  # what closes a thread's process
        self._ahead: dict[AgentProcess, str | None] = {}  # starting with no turn that waits; a spare's with its agent
        self._starts = asyncio.Semaphore(os.cpu_count() or 1)  # more at once only slow each other down
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    @property
    def most_warm(self) -> int:
        """How many sessions may stay connected."""
        return self._most_warm

    async def start(self, process: AgentProcess) -> None:
        """Start a process when a core is free for it, in the order of asking. Raises AgentStartFailed.

        One that is told to end while it waits fails at once.
        """
        free = asyncio.ensure_future(self._starts.acquire())
        ended = asyncio.ensure_future(process.ended.wait())
        try:
            await asyncio.wait((free, ended), return_when=asyncio.FIRST_COMPLETED)
            await process.start()
        finally:
            ended.cancel()
            if not free.cancel():
                self._starts.release()

    async def start_ahead(self, process: AgentProcess, spare_of: str | None = None) -> None:
        """Start a process that no turn waits for; it is ended in mid-start if need be. Raises AgentStartFailed."""
        self._ahead[process] = spare_of
        try:
            if self._closing:
                raise AgentStartFailed("The sidecar is shutting down.")
            await self.start(process)
        finally:
            del self._ahead[process]

    # Warm sessions

    def take(self, key: ThreadKey, fingerprint: Fingerprint) -> AgentProcess | None:
        """The process that is connected to this thread's session, if everything is as it was; else it is closed."""
        if not self.has(key, fingerprint):
            self._close_warm(key)
            return None
        _, idle = self._warm.pop(key)
        idle.watch.cancel()
        return idle.process

    def has(self, key: ThreadKey, fingerprint: Fingerprint) -> bool:
        """Whether a process waits for exactly this, and has done nothing else since."""
        if key not in self._warm or self._warm[key][0] != fingerprint:
            return False
        process = self._warm[key][1].process
        return process.is_alive and not process.has_spoken

    def keep(self, key: ThreadKey, fingerprint: Fingerprint, process: AgentProcess) -> bool:
        """Keep a process that has just fallen idle; whether it was kept. The least recently used makes room."""
        if self._closing or not self._most_warm or not process.is_alive:
            return False
        self._close_warm(key)
        while len(self._warm) >= self._most_warm:
            self._close_warm(next(iter(self._warm)))
        self._warm[key] = (fingerprint, self._idle(process, lambda: self._close_warm(key)))
        return True

    async def drop(self, key: ThreadKey) -> None:
        """See every process of a thread gone: the one that is kept for it, and those that are leaving already."""
        self._close_warm(key)
        if leaving := [task for task, whose in self._leaving.items() if whose == key]:
            await asyncio.wait(leaving)

    def _close_warm(self, key: ThreadKey) -> None:
        """Close a thread's process, if it has one; `drop` waits for it."""
        _, idle = self._warm.pop(key, (None, None))
        if idle is None:
            return
        idle.watch.cancel()
        closing = self._own(idle.process.close())
        self._leaving[closing] = key
        closing.add_done_callback(self._leaving.pop)

    # Spares

    def take_spare(self, agent: str) -> Spare | None:
        """A connected process for a new session of this agent."""
        waiting = self._spares.get(agent, {})
        while waiting:
            spare, idle = waiting.popitem()
            idle.watch.cancel()
            if spare.process.is_alive:
                return spare
            self._own(spare.process.close())
        return None

    def give_back(self, agent: str, spare: Spare) -> None:
        """Take back a spare that was not needed."""
        if not self.wants_spare(agent):
            self._own(spare.process.close())
        else:
            waiting = self._spares.setdefault(agent, {})

            def close() -> None:
                if waiting.pop(spare, None):
                    self._own(spare.process.close())

            waiting[spare] = self._idle(spare.process, close)

    def wants_spare(self, agent: str) -> bool:
        """Whether this agent has fewer spares than it may, those that are being started included."""
        there = len(self._spares.get(agent, {})) + list(self._ahead.values()).count(agent)
        return not self._closing and there < self._most_spares

    def refill(self, agent: str, spare: Spare) -> None:
        """Start a spare, which is not started yet, in the background."""
        self._ahead[spare.process] = agent  # before the task is: another turn may end first
        self._own(self._refill(agent, spare))

    async def stop(self) -> None:
        """Keep nothing from here on, and end what is being started ahead: one that hangs would be waited for."""
        self._closing = True
        await asyncio.gather(*(process.end() for process in self._ahead))

    async def close(self) -> None:
        """Close every process and see it gone; none is kept from here on."""
        await self.stop()
        idle = [idle for _, idle in self._warm.values()]
        idle += [idle for waiting in self._spares.values() for idle in waiting.values()]
        self._warm.clear()
        self._spares.clear()
        for one in idle:
            one.watch.cancel()
        await asyncio.gather(*(one.process.close() for one in idle))
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _refill(self, agent: str, spare: Spare) -> None:
        try:
            await self.start_ahead(spare.process, agent)
        except SidecarError as error:
            logger.warning("a spare process of agent %s did not start: %s", agent, error.detail)
            await spare.process.close()
        else:
            self.give_back(agent, spare)

    def _idle(self, process: AgentProcess, close: Callable[[], object]) -> _Idle:
        """A process that is closed when it has been unused for long, or has ended by itself."""

        async def watch() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait_for_exit(), self._idle_seconds)
            close()

        return _Idle(process, self._own(watch()))

    def _own(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def without_session(options: ClaudeAgentOptions) -> ClaudeAgentOptions:
    """Options as they are of every session of an agent, to be compared."""
    return dataclasses.replace(
        options, session_id=None, resume=None, fork_session=False, resume_session_at=None, stderr=None
    )


def warm_by_memory() -> int:
    """How many sessions to keep connected: in a quarter of the memory there is, and at most `MOST_WARM`."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit, or none that can be read
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(MOST_WARM, memory // 4 // BYTES_EACH)
