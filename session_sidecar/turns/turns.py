"""All turns of this process: begun, joined, stopped, counted, and seen to their end."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Literal, TypeVar

from session_sidecar.agent.agents import Agents
from session_sidecar.agent.processes.process import AgentProcess
from session_sidecar.agent.tasks import Tasks
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import (
    HeldElsewhere,
    SessionNotFound,
    ShuttingDown,
    SidecarError,
    TooManyTurns,
    TooManyTurnsOfResource,
)
from session_sidecar.observe.metrics import Load
from session_sidecar.observe.tracing import in_a_span
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.settings import Settings
from session_sidecar.turns.deciding.exclusion import Exclusion
from session_sidecar.turns.deciding.plan import make_id
from session_sidecar.turns.deciding.planner import Planner
from session_sidecar.turns.feed import Feed
from session_sidecar.turns.processes.occupancy import Occupancy
from session_sidecar.turns.processes.processes import Processes
from session_sidecar.turns.processes.warming import Warming
from session_sidecar.turns.replay.replay import Replay, replay_gone
from session_sidecar.turns.story import Story
from session_sidecar.turns.turn import Turn, TurnRequest
from session_store import SessionMap, SessionMapping, ThreadKey

T = TypeVar("T")


class Turns:
    """At most one turn runs on a thread; each is a task that is owned here."""

    def __init__(
        self,
        *,
        story: Story,
        session_map: SessionMap,
        tenancy: Tenancy,
        agents: Agents,
        transcripts: Transcripts,
        exclusion: Exclusion,
        replay: Replay,
        planner: Planner,
        processes: Processes,
        warming: Warming,
        feed: Feed,
        settings: Settings,
    ) -> None:
        self._story = story
        self._map = session_map
        self._tenancy = tenancy
        self._agents = agents
        self._transcripts = transcripts
        self._exclusion = exclusion
        self._replay = replay
        self._planner = planner
        self._processes = processes
        self._warming = warming
        self._feed = feed
        self._settings = settings
        self._tasks = Tasks()
        self._leaving = Tasks()  # threads that were held are being let go of
        self._closing = False
        self.occupancy = Occupancy(exclusion, processes)
        """What is done on which thread here."""
        processes.on_turn(self._begin_background)

    @property
    def model(self) -> Literal["live", "offline"]:
        """What answers."""
        return self._story.model

    def begin(self, request: TurnRequest) -> Turn:
        """Begin a turn, or join the one that an earlier attempt began; without waiting for anything.

        Raises ThreadBusy, QueueFull, ThreadExists, TooManyTurns, TooManyTurnsOfResource, UnknownAgent,
        IdempotencyMismatch, ReplayGone, ShuttingDown.
        """
        if earlier := self._replay.find(request):
            return earlier
        if self._closing:
            raise ShuttingDown("No new turns are taken. Try again when it is back.", retry_after=5)
        self._agents.check(request.agent)
        self.admit(request.key.resource_id)
        turn = Turn(request, self._replay.log())
        self._tasks.own(in_a_span(turn, request.agent, self._story.run(turn, self._exclusion.enter(turn))))
        self._replay.keep(turn)
        return turn

    def begun(self, request: TurnRequest) -> TurnRequest | None:
        """This request, for the place where an earlier attempt under its key has put it; None where there was none.

        Raises ReplayGone.
        """
        earlier = self._replay.begun(request)
        if earlier is None:
            return None
        names = ("key", "fork_of", "at_message_id", "after_turn")
        return replace(request, **{name: getattr(earlier, name) for name in names})

    async def running(self, keys: Iterable[ThreadKey]) -> set[ThreadKey]:
        """Those of these threads on which a turn runs."""
        keys = set(keys)
        here = {key for key in keys if self._exclusion.running(key) is not None}
        return here | await self._tenancy.running(keys - here)

    async def rejoin(self, key: ThreadKey, turn_id: str | None) -> Turn | None:
        """The turn of this ID, if it is held. Without one: that which runs on a thread, or was the last to end there.

        What the agent says by itself before it comes to the message is said first. Raises HeldElsewhere where another
        replica had the thread last.
        """
        if turn_id is not None and (turn := self._held(key, turn_id)):
            return turn
        if running := self._exclusion.running(key):
            return (running.before or running) if turn_id is None else None
        if elsewhere := await self._tenancy.elsewhere(key):
            raise elsewhere  # what has ended here had ended before that
        return self._replay.latest(key) if turn_id is None else None

    async def again(self, request: TurnRequest, turn_id: str) -> Turn:
        """The turn of this ID, for a reader who comes back with what has begun it; none is begun.

        Raises ReplayGone, IdempotencyMismatch, HeldElsewhere.
        """
        try:
            turn = await self.rejoin(request.key, turn_id)
        except HeldElsewhere as there:
            there.instead = replay_gone(turn_id)
            raise
        return self._replay.again(request, turn, turn_id)

    def _held(self, key: ThreadKey, turn_id: str) -> Turn | None:
        on_thread = self._exclusion.turns(key)
        there = (turn for one in on_thread for turn in (one, one.before) if turn is not None)
        return next((turn for turn in there if turn.id == turn_id), None) or self._replay.named(key, turn_id)

    async def interrupt(self, key: ThreadKey) -> Turn | None:
        """Stop the turn that runs on a thread and wait until it has ended; None where none runs.

        Raises SessionNotFound for a thread that does not exist, HeldElsewhere where another replica has it.
        """
        turn = self._exclusion.running(key)
        if turn is None:
            if (elsewhere := await self._tenancy.elsewhere(key)) and elsewhere.live:
                raise elsewhere
            if await self._map.get(key) is None:
                raise SessionNotFound
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
        self.admit(key.resource_id)
        return await asyncio.shield(self._tasks.own(self._fork(parent_key, key, at)))

    async def _fork(self, parent_key: ThreadKey, key: ThreadKey, at: str | None) -> SessionMapping:
        async with self.hold(key) as afterwards:
            parent, point = await self._planner.fork_point(parent_key, key, at)
            session_id = make_id()
            await self._transcripts.fork(parent.sdk_session_id, point, session_id)
            try:
                copy = await self._transcripts.info(session_id)
                made = await self._map.add(
                    key, session_id, parent_thread_id=parent_key.thread_id, parent_message_id=point
                )
            except Exception:
                await self._transcripts.delete(session_id)
                raise
            if copy is not None:
                self._tenancy.settle(key, session_id, copy.revision)
            afterwards.callback(self._feed.came_to_be, made)
            return made

    def _begin_background(self, key: ThreadKey, agent: str, process: AgentProcess) -> None:
        """Make a turn of the thread of what its process has begun to say by itself."""
        if self._closing:
            return  # the process is about to be closed
        turn = Turn(TurnRequest(key, "", agent=agent), self._replay.log(), "background")
        story = self._story.run_background(turn, self._exclusion.enter(turn), process)
        self._tasks.own(in_a_span(turn, agent, story))

    def warm_up(self, key: ThreadKey, agent: str) -> None:
        """Connect a process to a thread when there is time: its person has just opened it. Raises UnknownAgent."""
        self._agents.check(agent)
        if not self._closing:
            self._warming.hint(key, agent)

    def prepare(self) -> None:
        """Start what waits for the first new threads."""
        self._processes.prepare(self._settings.most_prepared)

    async def cli_version(self) -> str:
        """The version of the CLI that turns are run with. Raises AgentStartFailed, NotConfigured."""
        return await self._processes.cli_version()

    async def check(self) -> None:
        """Return if turns can be run. Raises the SidecarError that says why not, or StoreUnavailable."""
        if self._closing:
            raise ShuttingDown("No new turns are taken.", retry_after=5)
        await self._map.check()
        await self._transcripts.check_saving()
        await self.cli_version()

    @property
    def load(self) -> Load:
        """What there is at the moment."""
        (running, queued), (warm, spare) = self._exclusion.load, self._processes.idle
        working = len(self._processes.working_for())
        return Load(running, queued, warm, spare, working, self._replay.held_bytes)

    def admit(self, resource_id: str) -> None:
        """Return if one more turn may be begun, else raise TooManyTurns or TooManyTurnsOfResource."""
        most = self._settings.max_turns_per_resource
        if most is not None and self._of_resource(resource_id) >= most:
            raise TooManyTurnsOfResource(f"{most} turns of this resource are under way. Try again soon.", retry_after=2)
        if len(self._tasks) + len(self._processes.working_for()) >= self._settings.max_turns:
            raise TooManyTurns(f"{self._settings.max_turns} turns are under way. Try again soon.", retry_after=2)

    def _of_resource(self, resource_id: str) -> int:
        """How many turns of a resource run or wait, and how many of its processes work in the background."""
        turns = sum(len(self._exclusion.turns(key)) for key in self.busy(resource_id))
        return turns + sum(key.resource_id == resource_id for key in self._processes.working_for())

    @contextlib.asynccontextmanager
    async def hold(self, key: ThreadKey, *, stop: SidecarError | None = None) -> AsyncIterator[contextlib.ExitStack]:
        """Keep turns off a thread, and its process closed, while it is changed.

        If one runs or waits there, or the agent is at work in the background: stops it all for the reason `stop`, or
        raises ThreadBusy where there is none. Raises HeldElsewhere where another replica has the thread. What is put on
        the stack is done when the thread is free again, whatever happens: it is for telling what was changed.
        """
        with contextlib.ExitStack() as afterwards:
            async with self._exclusion.hold(key, stop=stop):
                if stop is None:
                    self._processes.check_rest(key)
                await self._processes.drop(key)
                await self._tenancy.enter(key)
                try:
                    yield afterwards
                finally:
                    await asyncio.shield(self._leaving.own(self._tenancy.leave(key)))

    def stop_all(self) -> None:
        """Refuse new turns from now on and ask the running ones to stop."""
        self._closing = True
        self._processes.keep_none()  # Ctrl-C ends those that wait, too: they are not to be replaced
        self._exclusion.stop_all(ShuttingDown("The turn was stopped because the sidecar shuts down."))

    async def close(self) -> None:
        """Stop all turns and wait until each has ended and its process is gone."""
        self.stop_all()
        await self._processes.stop()
        await self._warming.close()
        await self._tasks.ended()
        await self._leaving.ended()
        await self._processes.close()
        self._replay.close()
