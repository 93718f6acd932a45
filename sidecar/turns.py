"""All turns of this process. `Turns._run` is the story of one, top to bottom."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator

from session_store import SessionMap, SessionMapError, SessionMapping, ThreadKey
from sidecar.agent import AgentProcess, Agents, Transcripts
from sidecar.claims import Claims
from sidecar.errors import (
    AgentFailed,
    InternalError,
    QueueFull,
    ShuttingDown,
    SidecarError,
    StoreFailed,
    ThreadBusy,
    ThreadExists,
    TooManyTurns,
    TurnInterrupted,
)
from sidecar.events import EventLog
from sidecar.idempotency import Idempotency
from sidecar.planning import Plan, Planner
from sidecar.results import says_session
from sidecar.settings import Settings
from sidecar.turn import UNBEGUN, Turn, TurnRequest
from sidecar.watch import watch_over

logger = logging.getLogger(__name__)


class _Hold:
    """Has a thread for a moment, to change its mapping while no turn runs."""


class Turns:
    """At most one turn runs on a thread; each is a task that is owned here."""

    def __init__(
        self, *, sessions: SessionMap, agents: Agents, transcripts: Transcripts, settings: Settings, model: str
    ) -> None:
        """`model` is what `session` events say answers: `live` or `offline`."""
        self.model = model
        self._sessions = sessions
        self._agents = agents
        self._transcripts = transcripts
        self._planner = Planner(sessions, transcripts)
        self._settings = settings
        self._claims: Claims[Turn | _Hold] = Claims()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended: dict[ThreadKey, Turn] = {}
        self._idempotency = Idempotency()
        self._starts = asyncio.Semaphore(os.cpu_count() or 1)  # more at once only slow each other down
        self._closing = False

    @property
    def closing(self) -> bool:
        """Whether new turns are refused because the sidecar shuts down."""
        return self._closing

    def running(self, key: ThreadKey) -> Turn | None:
        """The turn that has the thread and has not ended."""
        holder = self._claims.holder(key)
        return holder if isinstance(holder, Turn) and not holder.ended.is_set() else None

    def latest(self, key: ThreadKey) -> Turn | None:
        """The running turn, or the one that ended a short while ago."""
        return self.running(key) or self._ended.get(key)

    def begin(self, request: TurnRequest) -> Turn:
        """Begin a turn, or join the one that an earlier attempt began; without waiting for anything.

        Raises ThreadBusy, QueueFull, ThreadExists, TooManyTurns, UnknownAgent, IdempotencyMismatch, ShuttingDown.
        """
        if request.idempotency_key is not None and (earlier := self._idempotency.find(request)):
            return earlier
        if self._closing:
            raise ShuttingDown("No new turns are taken. Try again when it is back.", retry_after=5)
        self._agents.check(request.agent)
        if len(self._tasks) >= self._settings.max_turns:
            raise TooManyTurns(f"{self._settings.max_turns} turns are under way. Try again soon.", retry_after=2)
        self._make_way(request)
        log = EventLog(max_events=self._settings.replay_events, max_bytes=self._settings.replay_bytes)
        turn = Turn(request, log)
        claim = self._claims.enter(request.key, turn, first=request.multitask_strategy == "interrupt")
        task = asyncio.get_running_loop().create_task(self._run(turn, claim), name=f"turn {turn.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._idempotency.keep(turn)
        return turn

    def _make_way(self, request: TurnRequest) -> None:
        """Do what the request says about the turns that are on its thread before it."""
        running, waiting = self.running(request.key), self._claims.waiting(request.key)
        if running is None and not waiting:
            return
        if request.fork_of is not None:
            raise ThreadExists("Choose another `thread_id`; a turn is running on this one.")
        if request.multitask_strategy == "reject":
            raise ThreadBusy(_BUSY, retry_after=1)
        if request.multitask_strategy == "enqueue" and len(waiting) >= self._settings.queue_turns:
            raise QueueFull(f"{len(waiting)} turns wait for this thread already.", retry_after=5)
        if request.multitask_strategy == "interrupt":
            # It goes ahead of those who wait for their turn, but not past one that came to interrupt before it.
            for other in (running, *waiting):
                if isinstance(other, Turn) and (other is running or other.request.multitask_strategy == "interrupt"):
                    other.stop()

    async def fork(self, parent_key: ThreadKey, key: ThreadKey, at: str | None) -> SessionMapping:
        """Branch a thread without a turn: the SDK copies the transcript, no model is called.

        Raises SessionNotFound, ThreadExists, ThreadBusy, SessionMissing, MessageNotFound, UnsafeForkPoint.
        """
        async with self.hold(key):
            parent, point = await self._planner.fork_point(parent_key, key, at, self.running(parent_key))
            session_id = await self._transcripts.fork(parent.sdk_session_id, point)
            return await self._sessions.add(
                key, session_id, parent_thread_id=parent_key.thread_id, parent_message_id=point
            )

    @contextlib.asynccontextmanager
    async def hold(self, key: ThreadKey) -> AsyncIterator[None]:
        """Keep turns off a thread while its mapping is changed. Raises ThreadBusy if one runs."""
        if self.running(key):
            raise ThreadBusy(_BUSY, retry_after=1)
        hold = _Hold()
        try:
            await self._claims.enter(key, hold)
            yield
        finally:
            self._claims.release(key, hold)

    def stop_all(self) -> None:
        """Refuse new turns from now on and ask the running ones to stop."""
        self._closing = True
        for key in self._claims:
            for turn in (self._claims.holder(key), *self._claims.waiting(key)):
                if isinstance(turn, Turn):
                    turn.stop(ShuttingDown("The turn was stopped because the sidecar shuts down."))

    async def close(self) -> None:
        """Stop all turns and wait until each has ended and its process is gone."""
        self.stop_all()
        while self._tasks:
            await asyncio.wait(self._tasks)

    # The story

    async def _run(self, turn: Turn, claim: asyncio.Future[None]) -> None:
        """Claim the thread, look its session up, run the agent, follow its session ID, publish, release."""
        key, plan, process, watch = turn.request.key, None, None, None
        try:
            await self._claimed(turn, claim)
            parent_turn = self.running(turn.request.fork_of) if turn.request.fork_of else None
            plan = await self._planner.plan(turn, parent_turn)
            process = AgentProcess(await self._agents.options(turn.request.agent, key, plan.launch))
            turn.status = "running"
            turn.reached("running")
            watch = asyncio.create_task(watch_over(turn, process, self._settings))
            async with self._starts:
                if not turn.stopping.is_set():
                    turn.last_sign = time.monotonic()
                    await process.start()
            if not turn.stopping.is_set():
                async for message in process.run(turn.request.content):
                    turn.last_sign = time.monotonic()
                    if says_session(message):
                        await self._follow(turn, plan, message["session_id"])
                    turn.take(message)
        except Exception as error:
            turn.error = _told(error, turn)
        finally:
            if turn.result is not None:
                await self._note_end(turn)
                self._publish_end(turn)
            if watch is not None:
                watch.cancel()
                await asyncio.wait([watch])
            if process is not None:
                await process.close()
            if plan is not None and plan.made and turn.status != "completed":
                await self._forget_unbegun(key, plan.launch.session_id)
            if turn.result is None:
                self._publish_end(turn)
            self._claims.release(key, turn)
            exit_status = process.exit_status if process is not None else None
            logger.info("turn", extra={"fields": {**turn.summary(), "exit": exit_status}})

    async def _claimed(self, turn: Turn, claim: asyncio.Future[None]) -> None:
        """Wait in the thread's queue. Raises TurnInterrupted, or the reason, for a turn that is stopped there."""
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

    async def _note_end(self, turn: Turn) -> None:
        """Bump the mapping's version: its transcript has grown."""
        try:
            if turn.session_id is not None:
                await self._sessions.touch(turn.request.key, turn.session_id)
        except Exception:
            # The conversation is safe in the transcript; only the row's time and version stay as they were.
            logger.exception("turn %s: the mapping's version was not bumped", turn.id)

    def _publish_end(self, turn: Turn) -> None:
        """Publish how the turn ended, and keep it a while for those who rejoin it."""
        turn.end()
        key = turn.request.key
        self._ended[key] = turn
        self._idempotency.ended(turn)

        def forget() -> None:
            if self._ended.get(key) is turn:
                del self._ended[key]

        asyncio.get_running_loop().call_later(self._settings.replay_seconds, forget)

    async def _forget_unbegun(self, key: ThreadKey, session_id: str) -> None:
        """Take back a mapping that this turn made, if the SDK never got as far as a transcript."""
        try:
            if await self._transcripts.info(session_id) is None:
                await self._sessions.remove(key, expected=session_id)
        except Exception:
            # The mapping stays; the next turn finds no transcript and starts it under the same session ID.
            logger.exception("the mapping of a turn that never began was not removed")


def _told(error: Exception, turn: Turn) -> SidecarError:
    """What the caller is told of an exception; what is not for callers is logged."""
    if isinstance(error, SidecarError):
        return error
    logger.error("turn %s failed", turn.id, exc_info=error)
    if isinstance(error, SessionMapError):
        return StoreFailed(str(error), retry_after=5)
    return InternalError("The sidecar failed; its server's log has the reason.")


_BUSY = "One turn at a time. Wait for it, stop it, or send `multitask_strategy`: `enqueue` or `interrupt`."
