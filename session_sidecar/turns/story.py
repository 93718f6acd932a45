"""All turns of this process. `Turns._run` is the story of one, top to bottom."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, Literal, TypeVar

from session_sidecar.agent.agents import Agents, Launch
from session_sidecar.agent.messages import Message, says_session
from session_sidecar.agent.process import AgentProcess, Prompt
from session_sidecar.agent.transcripts import NOTHING
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import (
    AgentFailed,
    SessionNotFound,
    ShuttingDown,
    SidecarError,
    TooManyTurns,
    public_error,
)
from session_sidecar.settings import Settings
from session_sidecar.turns.ending import Afterwards, dismiss, keep_time, stop_when_asked, unless_stopped
from session_sidecar.turns.exclusion import Exclusion
from session_sidecar.turns.plan import Plan, Planner, decide, make_id
from session_sidecar.turns.processes import Processes
from session_sidecar.turns.replay import Replay
from session_sidecar.turns.turn import Settled, Turn, TurnRequest
from session_sidecar.turns.warming import Warming
from session_store import SessionMap, SessionMapError, SessionMapping, ThreadKey

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Turns:
    """At most one turn runs on a thread; each is a task that is owned here."""

    def __init__(
        self,
        *,
        session_map: SessionMap,
        agents: Agents,
        transcripts: Transcripts,
        exclusion: Exclusion,
        replay: Replay,
        planner: Planner,
        processes: Processes,
        afterwards: Afterwards,
        warming: Warming,
        settings: Settings,
        model: Literal["live", "offline"],
    ) -> None:
        """`model` is what `session` events say answers: `live` or `offline`."""
        self.model = model
        self._map = session_map
        self._agents = agents
        self._transcripts = transcripts
        self._exclusion = exclusion
        self._replay = replay
        self._planner = planner
        self._processes = processes
        self._after = afterwards
        self._warming = warming
        self._settings = settings
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False
        processes.on_turn(self._begin_background)

    def begin(self, request: TurnRequest) -> Turn:
        """Begin a turn, or join the one that an earlier attempt began; without waiting for anything.

        Raises ThreadBusy, QueueFull, ThreadExists, TooManyTurns, UnknownAgent, IdempotencyMismatch, ReplayGone,
        ShuttingDown.
        """
        if earlier := self._replay.find(request):
            return earlier
        if self._closing:
            raise ShuttingDown("No new turns are taken. Try again when it is back.", retry_after=5)
        self._agents.check(request.agent)
        self._admit()
        turn = Turn(request, self._replay.log())
        self._own(self._run(turn, self._exclusion.enter(turn)))
        self._replay.keep(turn)
        return turn

    async def running(self, keys: Iterable[ThreadKey]) -> set[ThreadKey]:
        """Those of these threads on which a turn runs."""
        return {key for key in keys if self._exclusion.running(key) is not None}

    async def rejoin(self, key: ThreadKey, turn_id: str | None) -> Turn | None:
        """The turn of this ID, or any, that runs on a thread or is about the last to have ended there; None without.

        What the agent says by itself before it comes to the message is said first.
        """
        running = self._exclusion.running(key)
        there = (running and running.before, running, running or self._replay.latest(key))
        return next((turn for turn in there if turn is not None and turn_id in (None, turn.id)), None)

    async def interrupt(self, key: ThreadKey) -> Turn | None:
        """Stop the turn that runs on a thread and wait until it has ended; None where none runs.

        Raises SessionNotFound for a thread that does not exist.
        """
        turn = self._exclusion.running(key)
        if turn is None:
            if await self._map.get(key) is None:
                raise SessionNotFound("There is no such thread of this resource, so nothing to interrupt.")
            return None
        turn.stop()
        await turn.ended.wait()
        return turn

    def busy(self, resource_id: str) -> list[ThreadKey]:
        """The threads of a resource that turns run on or wait for."""
        return [key for key in self._exclusion.busy() if key.resource_id == resource_id]

    def forget(self, key: ThreadKey) -> None:
        """Let nobody read again what ended on a thread, which was deleted."""
        self._replay.forget(key)

    async def fork(self, parent_key: ThreadKey, key: ThreadKey, at: str | None) -> SessionMapping:
        """Branch a thread without a turn: the SDK copies the transcript, no model is called.

        Like a turn it is counted, and goes on without whoever asked for it. Raises SessionNotFound, ThreadExists,
        ThreadBusy, TranscriptMissing, SessionAmbiguous, MessageNotFound, UnsafeForkPoint, TooManyTurns, NotSaved,
        TranscriptsUnavailable, ShuttingDown. No copy is left then, nor where the session map fails.
        """
        if self._closing:
            raise ShuttingDown("Nothing was forked. Try again when it is back.", retry_after=5)
        self._admit()
        return await asyncio.shield(self._own(self._fork(parent_key, key, at)))

    async def _fork(self, parent_key: ThreadKey, key: ThreadKey, at: str | None) -> SessionMapping:
        async with self.hold(key):
            parent, point = await self._planner.fork_point(parent_key, key, at)
            session_id = await self._transcripts.fork(parent.sdk_session_id, point)
            try:
                return await self._map.add(
                    key, session_id, parent_thread_id=parent_key.thread_id, parent_message_id=point
                )
            except Exception:
                await self._transcripts.delete(session_id)
                raise

    def warm_up(self, key: ThreadKey, agent: str) -> None:
        """Connect a process to a thread when there is time: its person has just opened it. Raises UnknownAgent."""
        self._agents.check(agent)
        if not self._closing:
            self._warming.hint(key, agent)

    async def check(self) -> None:
        """Return if turns can be run. Raises the SidecarError that says why not, or StoreUnavailable."""
        if self._closing:
            raise ShuttingDown("No new turns are taken.", retry_after=5)
        await self._map.check()
        await self._transcripts.check_saving()

    def _admit(self) -> None:
        if len(self._tasks) + self._processes.working >= self._settings.max_turns:
            raise TooManyTurns(f"{self._settings.max_turns} turns are under way. Try again soon.", retry_after=2)

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @contextlib.asynccontextmanager
    async def hold(self, key: ThreadKey, *, stop: SidecarError | None = None) -> AsyncIterator[None]:
        """Keep turns off a thread, and its process closed, while it is changed.

        If one runs or waits there, or the agent is at work in the background: stops it all for the reason `stop`, or
        raises ThreadBusy where there is none.
        """
        async with self._exclusion.hold(key, stop=stop):
            if stop is None:
                self._processes.check_rest(key)
            await self._processes.drop(key)
            yield

    def stop_all(self) -> None:
        """Refuse new turns from now on and ask the running ones to stop."""
        self._closing = True
        self._exclusion.stop_all(ShuttingDown("The turn was stopped because the sidecar shuts down."))

    async def close(self) -> None:
        """Stop all turns and wait until each has ended and its process is gone."""
        self.stop_all()
        await self._processes.stop()
        await self._warming.close()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._processes.close()
        self._replay.close()

    # The story

    async def _run(self, turn: Turn, claim: asyncio.Future[None]) -> None:
        """Claim the thread, look its session up, run the agent, follow its session ID, publish, release."""
        process, tending = None, []
        try:
            await unless_stopped(turn, claim)
            turn.last_sign = time.monotonic()
            tending.append(self._clock(turn))
            plan, process = await unless_stopped(turn, self._prepare(turn))
            tending.append(self._stopper(turn, process))
            turn.reached("running")
            await self._processes.connect(process)
            if not turn.stopping.is_set():
                await self._converse(turn, plan, process, Prompt(turn.id, turn.request.content))
        except Exception as error:
            self._fail(turn, error)
        finally:
            await self._finish(turn, process, tending)

    async def _run_background(self, turn: Turn, claim: asyncio.Future[None], process: AgentProcess) -> None:
        """The same for a turn that the agent has begun by itself: its process and its session are known."""
        await claim
        state = self._processes.take_speaking(turn.request.key, process)
        if state is None:  # a message came first, and its turn has told this one
            self._exclusion.leave(turn)
            return
        self._replay.keep(turn)
        tending = [self._clock(turn), self._stopper(turn, process)]
        try:
            turn.last_sign = time.monotonic()
            settled, turn.process_came = Settled(state.session_id, state.revision), "warm"
            turn.settle(settled)
            turn.reached("running")
            plan = Plan(Launch(state.session_id, state.session_id), "resumed", None, settled, version=state.version)
            await self._converse(turn, plan, process, None)
        except Exception as error:
            self._fail(turn, error)
        finally:
            await self._finish(turn, process, tending)

    def _begin_background(self, key: ThreadKey, agent: str, process: AgentProcess) -> None:
        """Make a turn of the thread of what its process has begun to say by itself."""
        if self._closing:
            return  # the process is about to be closed
        turn = Turn(TurnRequest(key, "", agent=agent), self._replay.log(), "background")
        self._own(self._run_background(turn, self._exclusion.enter(turn), process))

    def _clock(self, turn: Turn) -> asyncio.Task[None]:
        return asyncio.create_task(keep_time(turn, self._settings), name="the turn's clock")

    def _stopper(self, turn: Turn, process: AgentProcess) -> asyncio.Task[None]:
        return asyncio.create_task(stop_when_asked(turn, process, self._settings), name="the turn's end")

    async def _prepare(self, turn: Turn) -> tuple[Plan, AgentProcess]:
        """Look, decide, commit, and take a process."""
        seen = await self._planner.look(turn.request)
        with self._processes.spare(turn, seen) as spare:
            plan = decide(turn.request, seen, spare.session_id if spare else make_id())
            if plan.change == "add":
                turn.made = plan.launch.session_id
            turn.settle(plan.settled)
            await self._planner.commit(turn.request.key, plan)
            return plan, await self._processes.get(turn, plan, spare)

    async def _converse(self, turn: Turn, plan: Plan, process: AgentProcess, prompt: Prompt | None) -> None:
        """Give the prompt and publish what is said, to the result."""
        turn.status = "running"
        async with contextlib.aclosing(process.run(prompt)) as messages:
            async for mine, message in messages:
                turn.last_sign = time.monotonic()
                if not mine:
                    self._take_aside(turn, message)
                    continue
                if says_session(message):
                    await self._follow(turn, plan, message["session_id"])
                turn.take(message)

    def _take_aside(self, turn: Turn, message: Message) -> None:
        """Publish what the agent says by itself before it comes to the prompt, as a turn of its own."""
        if turn.before is None:
            request = TurnRequest(turn.request.key, "", agent=turn.request.agent)
            turn.before = Turn(request, self._replay.log(), "background")
            self._replay.keep(turn.before)
            turn.before.announce(message["session_id"], "resumed", None, self.model)
            if turn.stopping.is_set():
                turn.before.stop(turn.stop_reason)
        turn.before.take(message)
        if message["type"] == "result":
            self._end_before(turn)

    def _end_before(self, turn: Turn) -> None:
        if turn.before is not None:
            self._publish_end(turn.before)
            logger.info("turn", extra={"fields": turn.before.summary()})
            turn.before = None

    async def _finish(self, turn: Turn, process: AgentProcess | None, tending: list[asyncio.Task[None]]) -> None:
        """See a turn to its end, and its process idle or gone, before the thread is anybody else's."""
        try:
            for task in tending:
                await dismiss(task)
            self._end_before(turn)
            mapping, saved = None, None
            if turn.result is not None:
                saved = await self._after.saved(turn)
                mapping = await self._after.note_end(turn)
                self._publish_end(turn)
            if process is not None:
                fit = turn.status in ("completed", "interrupted") or process.at_work
                await self._processes.put(turn, mapping, saved if fit else None, process)
            await self._after.forget_unbegun(turn)
        except Exception:
            logger.exception("the end of turn %s failed", turn.id)
        finally:
            if not turn.ended.is_set():
                self._publish_end(turn)
            self._exclusion.leave(turn)
            exit_status = process.exit_status if process is not None else None
            logger.info("turn", extra={"fields": {**turn.summary(), "exit": exit_status}})

    def _fail(self, turn: Turn, error: Exception) -> None:
        turn.error = public_error(error)
        if turn.error is not error and not isinstance(error, SessionMapError):  # the map has logged what it is
            logger.error("turn %s failed", turn.id, exc_info=error)

    async def _follow(self, turn: Turn, plan: Plan, session_id: str) -> None:
        """Take the session ID that the SDK reports: the expected one first, then wherever it moves to."""
        if turn.session_id is None:
            if session_id != plan.launch.session_id:
                raise AgentFailed("The agent's process opened another session than the thread's. Nothing was changed.")
            turn.announce(session_id, plan.outcome, plan.replaced, self.model)
        elif session_id != turn.session_id:
            before = turn.session_id
            turn.settle(Settled(session_id, NOTHING))
            if await self._map.replace(turn.request.key, session_id, expected=before) is None:
                raise SessionNotFound("The thread was deleted or changed by other hands while its turn ran.")
            turn.announce(session_id, "reset", before, self.model)

    def _publish_end(self, turn: Turn) -> None:
        """Publish how the turn ended, and keep it a while for those who rejoin it."""
        turn.end()
        self._replay.ended(turn)
