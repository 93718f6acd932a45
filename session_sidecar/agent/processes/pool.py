"""Warm processes: those that stay connected to their session between two turns.

Starting the CLI is most of a cold turn. A connected process does not notice what others write to its session, so it is
used again only if nothing has changed since it fell idle; a doubt costs a cold start, never a turn.

One that is at work in the background is kept as long as that takes, whatever is kept otherwise.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

from claude_agent_sdk import ClaudeAgentOptions

from session_sidecar.agent.processes.process import AgentProcess
from session_sidecar.agent.tasks import Tasks
from session_sidecar.agent.transcripts import Revision
from session_sidecar.settings import CLI_BYTES
from session_store import ThreadKey


@dataclass(frozen=True)
class Fingerprint:
    """What must be as it was for a warm process to be used: the mapping, the transcript, the agent's options.

    `revision` is also where the thread's last settled turn ended: what a process at work has written since is beyond.
    """

    session_id: str
    version: int
    revision: Revision
    agent: str
    options: ClaudeAgentOptions

    def fits(self, now: "Fingerprint", *, growing: bool) -> bool:
        """Whether everything is as it was; with `growing`, the transcript may have become longer."""
        same = self.revision <= now.revision if growing else self.revision == now.revision
        return same and dataclasses.replace(self, revision=now.revision) == now


@dataclass(eq=False)
class _Warm:
    """A process that is connected to a thread's session, and what watches it.

    Until a turn has had it, `hinted` is when it was hinted at. `size` is what it took when it fell idle, in bytes, once
    that is known.
    """

    process: AgentProcess
    state: Fingerprint
    hinted: float | None
    size: int = 0
    watch: asyncio.Task[None] = field(init=False)


class ProcessPool:
    """Idle processes, bounded in number, memory and time. Each is watched by a task that is owned here."""

    def __init__(self, *, warm: int, memory: int | None, idle_seconds: float, work_seconds: float) -> None:
        """Keep up to `warm` sessions connected, in up to `memory` bytes, if these are bounded.

        One that nobody used for `idle_seconds` is closed, and one that is at work after `work_seconds`.
        """
        self._most_warm = warm
        self._most_bytes = memory
        self._idle_seconds = idle_seconds
        self._work_seconds = work_seconds
        self._warm: dict[ThreadKey, _Warm] = {}  # least recently used first
        self._leaving: dict[asyncio.Task[None], ThreadKey] = {}  # what closes a thread's process
        self._tasks = Tasks()
        self._closing = False
        self.on_turn: Callable[[ThreadKey, str, AgentProcess], None] = lambda *_: None
        """Called with its agent when a thread's process begins a turn by itself; `take_speaking` then gives it."""

    @property
    def most_warm(self) -> int:
        """How many sessions may stay connected; about so many where memory bounds them."""
        return self._most_warm if self._most_bytes is None else min(self._most_warm, self._most_bytes // CLI_BYTES)

    def working_for(self) -> list[ThreadKey]:
        """The threads whose processes are at work in the background."""
        return [key for key, warm in self._warm.items() if warm.process.at_work]

    @property
    def resting(self) -> int:
        """How many processes are connected and idle."""
        return len(self._resting())

    def take(self, key: ThreadKey, now: Fingerprint) -> AgentProcess | None:
        """The process that is connected to this thread's session, if everything is as it was; else it is closed."""
        if not self.has(key, now):
            self._close_warm(key)
            return None
        return self._pop(key).process

    def take_speaking(self, key: ThreadKey, process: AgentProcess) -> Fingerprint | None:
        """Take a thread's process that has begun a turn by itself: its state before that, or None if it is not so."""
        if key not in self._warm or self._warm[key].process is not process or not process.speaks:
            return None
        return self._pop(key).state

    def has(self, key: ThreadKey, now: Fingerprint) -> bool:
        """Whether a process waits for exactly this, or works on it in the background and may be asked meanwhile."""
        if key not in self._warm:
            return False
        process = self._warm[key].process
        process.glance()
        return process.is_alive and self._warm[key].state.fits(now, growing=process.at_work)

    def of_session(self, session_id: str) -> ThreadKey | None:
        """The thread whose process is connected to this session, if there is one."""
        return next((key for key, warm in self._warm.items() if warm.state.session_id == session_id), None)

    def has_any(self, key: ThreadKey) -> bool:
        """Whether a process is connected to this thread's session, or is just leaving it."""
        return key in self._warm or key in self._leaving.values()

    def at_work(self, key: ThreadKey) -> Fingerprint | None:
        """What was settled of a thread whose process is at work in the background; None where none is."""
        if key not in self._warm:
            return None
        self._warm[key].process.glance()
        return self._warm[key].state if self._warm[key].process.at_work else None

    def has_room(self, hinted: float) -> bool:
        """Whether a process that was hinted at then could be kept: beside what turns have had and newer hints."""
        closable = self._closable(hinted)
        return self._fits([key for key in self._resting() if key not in closable], more=1, more_bytes=CLI_BYTES)

    def keep(self, key: ThreadKey, state: Fingerprint, process: AgentProcess, *, hinted: float | None = None) -> bool:
        """Keep a process that has just fallen idle; whether it was kept.

        The least recently used makes room, but none that is at work; and for one that is only hinted at, those alone
        that were hinted at earlier.
        """
        if self._closing or not process.is_alive or (self._most_warm == 0 and not process.at_work):
            return False
        self._close_warm(key)
        if not process.at_work:
            if hinted is not None and not self.has_room(hinted):
                return False
            self._make_room(self._closable(hinted), more=1)
        self._warm[key] = warm = _Warm(process, state, hinted)
        warm.watch = self._tasks.own(self._attend(key, warm))
        return True

    async def drop(self, key: ThreadKey) -> None:
        """See every process of a thread gone: the one that is kept for it, and those that are leaving already."""
        self._close_warm(key)
        if leaving := [task for task, whose in self._leaving.items() if whose == key]:
            await asyncio.wait(leaving)

    def _resting(self) -> list[ThreadKey]:
        """The threads whose process is not at work, least recently used first."""
        return [key for key, warm in self._warm.items() if not warm.process.at_work]

    def _closable(self, hinted: float | None) -> list[ThreadKey]:
        """Those among them that make room: for what was hinted at then, or for what a turn has had."""
        found = ((key, self._warm[key].hinted) for key in self._resting())
        return [key for key, at in found if hinted is None or (at is not None and at < hinted)]

    def _fits(self, keys: Collection[ThreadKey], *, more: int = 0, more_bytes: int = 0) -> bool:
        """Whether these can be kept, and so many more."""
        if len(keys) + more > self._most_warm:
            return False
        if self._most_bytes is None:
            return True
        return sum(self._warm[key].size for key in keys) + more_bytes <= self._most_bytes

    def _make_room(self, closable: Collection[ThreadKey], *, more: int = 0) -> None:
        """Close these, the first ones first, until those that are not at work can be kept, and so many more."""
        resting = dict.fromkeys(self._resting())
        for key in closable:
            if self._fits(resting, more=more):
                return
            del resting[key]
            self._close_warm(key)

    def _pop(self, key: ThreadKey) -> _Warm:
        warm = self._warm.pop(key)
        warm.watch.cancel()
        return warm

    def _close_warm(self, key: ThreadKey) -> None:
        """Close a thread's process, if it has one; `drop` waits for it."""
        if key not in self._warm:
            return
        closing = self._tasks.own(self._pop(key).process.close())
        self._leaving[closing] = key
        closing.add_done_callback(self._leaving.pop)

    async def _attend(self, key: ThreadKey, warm: _Warm) -> None:
        """Stay with a process that no turn has: until it has been unused for long, has ended, or speaks by itself.

        Whoever takes it cancels this, and no news is acted upon after that.
        """
        process = warm.process
        while True:
            if not process.at_work:
                await self._settle(key, warm)
            patience = self._work_seconds if process.at_work else self._idle_seconds
            news: Literal["turn", "rest", "gone"] = "gone"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    news = await process.overhear()
            if news == "turn":
                self.on_turn(key, warm.state.agent, process)
                return
            if news == "gone":
                self._close_warm(key)
                return

    async def _settle(self, key: ThreadKey, warm: _Warm) -> None:
        """Count in a process that has come to rest; what is too much is closed, and this one too if it must be."""
        if self._most_bytes is not None:
            warm.size = await warm.process.own_bytes()
            if warm.size > self._most_bytes:  # all the others would make room for nothing
                self._close_warm(key)
                return
        closable = self._closable(warm.hinted)
        self._make_room(closable if key in closable else [*closable, key])

    def stop(self) -> None:
        """Keep nothing from here on."""
        self._closing = True

    async def close(self) -> None:
        """Close every process and see it gone; none is kept from here on."""
        self.stop()
        idle = list(self._warm.values())
        self._warm.clear()
        for one in idle:
            one.watch.cancel()
        await asyncio.gather(*(one.process.close() for one in idle))
        await self._tasks.ended()
