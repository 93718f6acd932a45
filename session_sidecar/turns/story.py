"""The story of one turn: `Story.run`, top to bottom."""

import asyncio
import contextlib
import logging
import time
from typing import Literal

from session_sidecar.agent.agents import Launch
from session_sidecar.agent.messages import Message, is_init, says_session
from session_sidecar.agent.processes.process import AgentProcess, Prompt
from session_sidecar.agent.transcripts import NOTHING, Revision
from session_sidecar.errors import AgentFailed, HeldElsewhere, LeaseLost, SessionNotFound, public_error
from session_sidecar.observe.metrics import Metrics
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.settings import Settings
from session_sidecar.turns.deciding.exclusion import Exclusion
from session_sidecar.turns.deciding.plan import Plan, decide, make_id
from session_sidecar.turns.deciding.planner import Planner
from session_sidecar.turns.ending import Afterwards, dismiss, keep_time, stop_when_asked, unless_stopped
from session_sidecar.turns.feed import Feed
from session_sidecar.turns.processes.processes import Processes
from session_sidecar.turns.replay.keys import Keys
from session_sidecar.turns.replay.replay import Replay
from session_sidecar.turns.turn import Settled, Turn, TurnRequest
from session_store import SessionMap, SessionMapError, ThreadMapped

logger = logging.getLogger(__name__)


class Story:
    """What every turn goes through. Whoever calls it owns the task, and has put the turn on its thread."""

    def __init__(
        self,
        *,
        session_map: SessionMap,
        tenancy: Tenancy,
        exclusion: Exclusion,
        replay: Replay,
        keys: Keys,
        planner: Planner,
        processes: Processes,
        afterwards: Afterwards,
        feed: Feed,
        settings: Settings,
        metrics: Metrics,
        model: Literal["live", "offline"],
    ) -> None:
        """`model` is what `session` events say answers: `live` or `offline`."""
        self.model = model
        self._map = session_map
        self._tenancy = tenancy
        self._exclusion = exclusion
        self._replay = replay
        self._keys = keys
        self._planner = planner
        self._processes = processes
        self._after = afterwards
        self._feed = feed
        self._settings = settings
        self._metrics = metrics

    async def run(self, turn: Turn, claim: asyncio.Future[None]) -> None:
        """Claim the thread, look its session up, run the agent, follow its session ID, publish, release."""
        process, tending = None, []
        try:
            await unless_stopped(turn, claim)
            turn.last_sign = time.monotonic()
            tending.append(self._clock(turn))
            plan, process = await unless_stopped(turn, self._prepare(turn))
            tending.append(self._stopper(turn, process))
            turn.reached("running")
            self._feed.turn_started(turn)
            await self._processes.connect(process)
            if not turn.stopping.is_set():
                await self._converse(turn, plan, process, Prompt(turn.id, turn.request.content))
        except Exception as error:
            self._fail(turn, error)
        finally:
            await self._finish(turn, process, tending)

    async def run_background(self, turn: Turn, claim: asyncio.Future[None], process: AgentProcess) -> None:
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
            self._feed.turn_started(turn)
            plan = Plan(Launch(state.session_id, state.session_id), "resumed", None, settled, version=state.version)
            await self._converse(turn, plan, process, None)
        except Exception as error:
            self._fail(turn, error)
        finally:
            await self._finish(turn, process, tending)

    def _clock(self, turn: Turn) -> asyncio.Task[None]:
        return asyncio.create_task(keep_time(turn, self._settings), name="the turn's clock")

    def _stopper(self, turn: Turn, process: AgentProcess) -> asyncio.Task[None]:
        return asyncio.create_task(stop_when_asked(turn, process, self._settings), name="the turn's end")

    async def _prepare(self, turn: Turn) -> tuple[Plan, AgentProcess]:
        """Look, decide, commit, and take a process."""
        await self._keys.take(turn)
        while True:
            seen = await self._planner.look(turn.request)
            with self._processes.spare(turn, seen) as spare:
                plan = decide(turn.request, seen, spare.session_id if spare else make_id())
                turn.made = plan.launch.session_id if plan.change == "add" else None
                turn.settle(plan.settled)
                with contextlib.suppress(ThreadMapped):  # a turn on another replica was first; this one comes after it
                    await self._planner.commit(turn.request.key, plan)
                    process = await self._processes.get(turn, plan, spare)
                    if turn.process_came == "cold":
                        turn.settle(await self._planner.make_whole(plan))
                    return plan, process

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
                silent = not turn.has_spoken
                self._publish(turn, message)
                if silent and turn.has_spoken:
                    self._processes.replenish(turn)

    def _publish(self, turn: Turn, message: Message) -> None:
        if self._settings.stream_init == "hide" and is_init(message):
            return
        turn.take(message)

    def _take_aside(self, turn: Turn, message: Message) -> None:
        """Publish what the agent says by itself before it comes to the prompt, as a turn of its own."""
        if turn.before is None:
            request = TurnRequest(turn.request.key, "", agent=turn.request.agent)
            turn.before = Turn(request, self._replay.log(), "background")
            if turn.settled is not None:
                turn.before.settle(turn.settled)
            self._replay.keep(turn.before)
            turn.before.announce(message["session_id"], "resumed", None, self.model)
            if turn.stopping.is_set():
                turn.before.stop(turn.stop_reason)
        self._publish(turn.before, message)
        if message["type"] == "result":
            self._end_before(turn)

    def _end_before(self, turn: Turn) -> None:
        if turn.before is not None:
            self._publish_end(turn.before)
            self._note(turn.before)
            turn.before = None

    async def _finish(self, turn: Turn, process: AgentProcess | None, tending: list[asyncio.Task[None]]) -> None:
        """See a turn to its end, and its process idle or gone, before the thread is anybody else's."""
        try:
            for task in tending:
                await dismiss(task)
            self._end_before(turn)
            await self._keys.give_back(turn)
            mapping, saved = None, None
            if turn.result is not None:
                saved = await self._after.saved(turn)
                turn.stored = await self._stored(turn, saved)
                if turn.stored is not False:  # else nothing answers there, and readers wait for their `end`
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
            had_thread = self._exclusion.has_thread(turn)
            try:
                if had_thread:
                    await self._tenancy.leave(turn.request.key)
            finally:
                self._exclusion.leave(turn)
                if had_thread and not isinstance(turn.error, HeldElsewhere):  # where it runs, it is told
                    self._feed.turn_ended(turn)
                self._note(turn, exit=process.exit_status if process is not None else None)
            await self._keys.ended(turn)

    async def _stored(self, turn: Turn, saved: Revision | None) -> bool | None:
        """Whether others can go on from here by now; the turn has failed if they have gone on without it."""
        try:
            return await self._tenancy.save(turn.request.key, turn.session_id or "", saved)
        except LeaseLost as error:
            turn.error = error
            return False

    def _note(self, turn: Turn, **more: object) -> None:
        """Log how a turn has ended, and count it. One that is another replica's is logged and counted there."""
        if isinstance(turn.error, HeldElsewhere):
            return
        summary = turn.summary()
        level = logging.WARNING if turn.status == "failed" else logging.INFO
        logger.log(level, "turn", extra={"fields": {**summary, **more}})
        self._metrics.turn_ended(summary, turn.usage)

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
