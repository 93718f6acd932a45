"""All turns of this process. `Turns._run` is the story of one, top to bottom."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from session_store import SessionMap, SessionMapping, ThreadKey
from sidecar.agent import Agents, ProcessPool, Transcripts
from sidecar.errors import (
    AgentFailed,
    ShuttingDown,
    SidecarError,
    TooManyTurns,
    TurnInterrupted,
)
from sidecar.events import EventLog
from sidecar.idempotency import Idempotency
from sidecar.planning import Plan, Planner
from sidecar.processes import Processes
from sidecar.results import says_session
from sidecar.settings import Settings
from sidecar.threads import Threads
from sidecar.told import told
from sidecar.turn import UNBEGUN, Turn, TurnRequest
from sidecar.watch import watch_over

logger = logging.getLogger(__name__)


class Turns:
    """At most one turn runs on a thread; each is a task that is owned here."""

    def __init__(
        self,
        *,
        sessions: SessionMap,
        agents: Agents,
        transcripts: Transcripts,
        pool: ProcessPool,
        settings: Settings,
        model: str,
    ) -> None:
        """`model` is what `session` events say answers: `live` or `offline`."""
        self.model = model
        self._sessions = sessions
        self._agents = agents
        self._transcripts = transcripts
        self._processes = Processes(agents, transcripts, pool)
        self._planner = Planner(sessions, transcripts)
        self._settings = settings
        self.threads = Threads(queue_turns=settings.queue_turns, replay_seconds=settings.replay_seconds)
        self._tasks: set[asyncio.Task[None]] = set()
        self._idempotency = Idempotency()
        self._closing = False

    @property
    def closing(self) -> bool:
        """Whether new turns are refused because the sidecar shuts down."""
        return self._closing

    def begin(self, request: TurnRequest) -> Turn:
        """Begin a turn, or join the one that an earlier attempt began; without waiting for anything.

        Raises ThreadBusy, QueueFull, ThreadExists, TooManyTurns, UnknownAgent, IdempotencyMismatch, ShuttingDown.
        """
        if request.idempotency_key is not None and (earlier := self._idempotency.find(request)):
            return earlier
        if self._closing:
            raise ShuttingDown("No new turns are taken. Try again when it is back.", retry_after=5)
        self._agents.check(request.agent)
        self._admit()
        log = EventLog(max_events=self._settings.replay_events, max_bytes=self._settings.replay_bytes)
        turn = Turn(request, log)
        self._own(self._run(turn, self.threads.enter(turn)))
        self._idempotency.keep(turn)
        return turn

    async def fork(self, parent_key: ThreadKey, key: ThreadKey, at: str | None) -> SessionMapping:
        """Branch a thread without a turn: the SDK copies the transcript, no model is called.

        Raises SessionNotFound, ThreadExists, ThreadBusy, SessionMissing, MessageNotFound, UnsafeForkPoint.
        """
        async with self.hold(key):
            parent, point = await self._planner.fork_point(parent_key, key, at, self.threads.running(parent_key))
            session_id = await self._transcripts.fork(parent.sdk_session_id, point)
            return await self._sessions.add(
                key, session_id, parent_thread_id=parent_key.thread_id, parent_message_id=point
            )

    def warm_up(self, mapping: SessionMapping, agent: str) -> None:
        """Connect a process to a thread in the background: its person has just opened it.

        Nothing happens if the thread is in use. Raises UnknownAgent, and TooManyTurns beyond the limit of turns.
        """
        self._agents.check(agent)
        if not self.threads.is_free(mapping.key) or self._closing:
            return
        self._admit()
        self._own(self._warm_up(mapping.key, agent))

    async def _warm_up(self, key: ThreadKey, agent: str) -> None:
        try:
            async with self.threads.hold(key):
                if (mapping := await self._sessions.get(key)) is not None:
                    await self._processes.warm_up(mapping, agent)
        except Exception as error:
            logger.warning("a thread was not warmed up: %s", told(error).detail)

    def _admit(self) -> None:
        if len(self._tasks) >= self._settings.max_turns:
            raise TooManyTurns(f"{self._settings.max_turns} turns are under way. Try again soon.", retry_after=2)

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextlib.asynccontextmanager
    async def hold(self, key: ThreadKey, *, stop: SidecarError | None = None) -> AsyncIterator[None]:
        """Keep turns off a thread, and its process closed, while it is changed.

        If one runs or waits there: stops them all for the reason `stop`, or raises ThreadBusy where there is none.
        """
        async with self.threads.hold(key, stop=stop):
            await self._processes.drop(key)
            yield

    def stop_all(self) -> None:
        """Refuse new turns from now on and ask the running ones to stop."""
        self._closing = True
        self.threads.stop_all(ShuttingDown("The turn was stopped because the sidecar shuts down."))

    async def close(self) -> None:
        """Stop all turns and wait until each has ended and its process is gone."""
        self.stop_all()
        await self._processes.stop()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._processes.close()

    # The story

    async def _run(self, turn: Turn, claim: asyncio.Future[None]) -> None:
        """Claim the thread, look its session up, run the agent, follow its session ID, publish, release."""
        key, plan, process, watch, mapping = turn.request.key, None, None, None, None
        try:
            await self._claimed(turn, claim)
            parent_turn = self.threads.running(turn.request.fork_of) if turn.request.fork_of else None
            with self._processes.offer(turn) as offer:
                plan = await self._planner.plan(turn, parent_turn, offer.new_id)
                process = await self._processes.get(turn, plan, offer.spare)
            turn.status = "running"
            turn.reached("running")
            watch = asyncio.create_task(watch_over(turn, process, self._settings))
            await self._processes.connect(process)
            if not turn.stopping.is_set():
                async with contextlib.aclosing(process.run(turn.request.content)) as messages:
                    async for message in messages:
                        turn.last_sign = time.monotonic()
                        if says_session(message):
                            await self._follow(turn, plan, message["session_id"])
                        turn.take(message)
        except Exception as error:
            turn.error = told(error)
            if turn.error is not error:
                logger.exception("turn %s failed", turn.id)
        finally:
            try:
                if watch is not None:
                    watch.cancel()
                    await asyncio.wait([watch])
                if turn.result is not None:
                    mapping = await self._note_end(turn)
                    self._publish_end(turn)
                if process is not None:
                    await self._processes.put(turn, mapping, process)
                if plan is not None and plan.made and turn.status != "completed":
                    await self._forget_unbegun(key, plan.launch.session_id)
                if turn.result is None:
                    self._publish_end(turn)
            finally:
                self.threads.leave(turn)
                exit_status = process.exit_status if process is not None else None
                logger.info("turn", extra={"fields": {**turn.summary(), "exit": exit_status}})

    async def _claimed(self, turn: Turn, claim: asyncio.Future[None]) -> None:
        """Wait in the thread's queue. Raises TurnInterrupted, or the reason, for a turn that is stopped there."""
        if not claim.done():
            stopping = asyncio.ensure_future(turn.stopping.wait())
            try:
                await asyncio.wait((claim, stopping), return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
        if turn.stopping.is_set():
            raise turn.stop_reason or TurnInterrupted(UNBEGUN)

    async def _follow(self, turn: Turn, plan: Plan, session_id: str) -> None:
        """Take the session ID that the SDK reports: the expected one first, then wherever it moves to."""
        if turn.session_id is None:
            if session_id != plan.launch.session_id:
                raise AgentFailed("The agent's process opened another session than the thread's. Nothing was changed.")
            turn.announce(session_id, plan.outcome, plan.replaced, self.model)
        elif session_id != turn.session_id:
            before = turn.session_id
            await self._sessions.replace(turn.request.key, session_id, expected=before)
            turn.announce(session_id, "reset", before, self.model)

    async def _note_end(self, turn: Turn) -> SessionMapping | None:
        """Bump the mapping's version: its transcript has grown. The mapping then, if it is still the turn's."""
        try:
            if turn.session_id is not None:
                return await self._sessions.touch(turn.request.key, turn.session_id)
        except Exception:
            # The conversation is safe in the transcript; only the row's time and version stay as they were.
            logger.exception("turn %s: the mapping's version was not bumped", turn.id)
        return None

    def _publish_end(self, turn: Turn) -> None:
        """Publish how the turn ended, and keep it a while for those who rejoin it."""
        turn.end()
        self._idempotency.ended(turn)
        self.threads.remember(turn)

    async def _forget_unbegun(self, key: ThreadKey, session_id: str) -> None:
        """Take back a mapping that this turn made, if the SDK never got as far as a transcript."""
        try:
            if await self._transcripts.info(session_id) is None:
                await self._sessions.remove(key, expected=session_id)
        except Exception:
            # The mapping stays; the next turn finds no transcript and starts it under the same session ID.
            logger.exception("the mapping of a turn that never began was not removed")
