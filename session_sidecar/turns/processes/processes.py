"""The processes that turns take: the one for a turn, and what becomes of it afterwards."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator

from session_sidecar.agent.agents import Agents, Launch
from session_sidecar.agent.processes.pool import Fingerprint, ProcessPool
from session_sidecar.agent.processes.process import AgentProcess, without_session
from session_sidecar.agent.processes.spares import Spare, Spares
from session_sidecar.agent.processes.starts import Starts
from session_sidecar.agent.transcripts import Revision
from session_sidecar.errors import AgentStartFailed, NotConfigured, SidecarError, ThreadBusy
from session_sidecar.turns.deciding.plan import Plan, Seen, make_id
from session_sidecar.turns.turn import Turn
from session_store import SessionMapping, ThreadKey

logger = logging.getLogger(__name__)

PROBE_SECONDS = 5.0  # between two looks at a CLI that has no credentials


class Processes:
    """Agent processes by what a turn needs. Whoever asks for one has the claim on its thread."""

    def __init__(self, agents: Agents, starts: Starts, pool: ProcessPool, spares: Spares) -> None:
        self._agents = agents
        self._starts = starts
        self._pool = pool
        self._spares = spares
        self._probing: asyncio.Task[SidecarError | None] | None = None
        self._probed = -math.inf

    def prepare(self, most: int) -> None:
        """Have spares of the agents there are before anybody asks for one: of the first `most` of them."""
        for agent in self._agents.presets[:most]:
            self._spares.fill(agent)

    async def cli_version(self) -> str:
        """The CLI's version. Raises AgentStartFailed, NotConfigured where none can be started for a turn.

        It is what those that were started have said; where there was none, or none had credentials, one is started.
        """
        await asyncio.to_thread(self._agents.check_cli)
        await self._spares.started()
        problem: SidecarError | None = self._starts.problem
        if self._starts.version is None or (problem and time.monotonic() - self._probed >= PROBE_SECONDS):
            if self._probing is None or self._probing.done():
                self._probing = asyncio.create_task(self._probe(), name="a look at the CLI")
            problem = await asyncio.shield(self._probing)
        if problem is not None:
            raise problem.again()
        return str(self._starts.version)

    async def _probe(self) -> SidecarError | None:
        """Start a CLI, as for the first of the agents, and end it; what keeps it from being of use."""
        agent = next(iter(self._agents.presets), "default")
        process = self._agents.process(agent, self._agents.preset(agent, Launch(make_id())))
        try:
            async with self._starts.room_ahead():
                await self._starts.start_ahead(process)
        except AgentStartFailed as error:
            return error
        except NotConfigured:
            pass  # it is noted; a function may give credentials to each thread
        finally:
            self._probed = time.monotonic()
            await process.close()
        return self._starts.problem

    def on_turn(self, callback: Callable[[ThreadKey, str, AgentProcess], None]) -> None:
        """Have `callback` called when a thread's process begins a turn by itself; see `ProcessPool.on_turn`."""
        self._pool.on_turn = callback

    @contextlib.contextmanager
    def spare(self, turn: Turn, seen: Seen) -> Iterator[Spare | None]:
        """A process that waits for a new session, for a thread that has none. Taken and not used, it goes back."""
        agent = turn.request.agent
        is_new = seen.mapping is None and seen.branching is None
        spare = self._spares.take(agent) if is_new else None
        try:
            yield spare
        finally:
            if spare is not None and not spare.used:
                self._spares.give_back(agent, spare)

    async def get(self, turn: Turn, plan: Plan, spare: Spare | None) -> AgentProcess:
        """The process for this turn: warm, the spare, or a new one that `connect` has yet to start.

        Raises UnknownAgent, AgentMisconfigured, and ThreadBusy where the one there is at work for another agent.
        """
        agent, key = turn.request.agent, turn.request.key
        if spare is not None:
            await self._pool.drop(key)
            spare.used, turn.process_came = True, "spare"
            return spare.process
        options = await self._agents.options(agent, key, plan.launch)
        if plan.outcome == "resumed":
            state = Fingerprint(plan.launch.session_id, plan.version, plan.revision, agent, without_session(options))
            if not self._pool.has(key, state) and turn.request.multitask_strategy != "interrupt":
                self.check_rest(key)
            if warm := self._pool.take(key, state):
                turn.process_came = "warm"
                return warm
        # What is or was connected there has another session, or knows less of this one; two would write to it.
        await self._pool.drop(key)
        turn.process_came = "cold"
        return self._agents.process(agent, options)

    def replenish(self, turn: Turn) -> None:
        """Have a spare again for the one that this turn took; not before its first word, which needs the CPU too."""
        if turn.process_came == "spare":
            self._spares.fill(turn.request.agent)

    async def connect(self, process: AgentProcess) -> None:
        """Start a process that is not connected yet. Raises AgentStartFailed, NotConfigured."""
        if not process.is_alive:
            await self._starts.start(process)

    async def put(
        self, turn: Turn, mapping: SessionMapping | None, saved: Revision | None, process: AgentProcess
    ) -> None:
        """Keep the process for the thread's next turn if it can be trusted with that, else see it gone. Never fails.

        `mapping` is the thread's as the turn has left it, `saved` how far its transcript has come; None where the turn
        did not come to a result, or its process cannot be trusted.
        """
        agent, key = turn.request.agent, turn.request.key
        if (
            mapping is None
            or saved is None
            or not self._pool.keep(
                key, Fingerprint(mapping.sdk_session_id, mapping.version, saved, agent, process.options), process
            )
        ):
            await process.close()
        self._spares.fill(agent)

    async def drop(self, key: ThreadKey) -> None:
        """Close the thread's process, if one is connected, and see it gone: its transcript is about to change."""
        await self._pool.drop(key)

    def of_session(self, session_id: str) -> ThreadKey | None:
        """The thread whose process is kept that is connected to this session."""
        return self._pool.of_session(session_id)

    def has(self, key: ThreadKey) -> bool:
        """Whether a process of the thread is kept, or is just leaving."""
        return self._pool.has_any(key)

    def settled(self, key: ThreadKey) -> Revision | None:
        """Where the last turn ended in the transcript of a thread whose process is at work; else None."""
        state = self._pool.at_work(key)
        return state.revision if state else None

    def take_speaking(self, key: ThreadKey, process: AgentProcess) -> Fingerprint | None:
        """Take a process that has begun a turn by itself, with its state before that; None if another has it by now."""
        return self._pool.take_speaking(key, process)

    def check_rest(self, key: ThreadKey) -> None:
        """Raise ThreadBusy if the thread's process is at work in the background: it is not closed under that."""
        if self._pool.at_work(key):
            raise ThreadBusy(
                "No turn runs, but the agent has tasks in the background. Wait for them, or end them: a message with "
                "`multitask_strategy`: `interrupt`, a deletion with `force=true`.",
                retry_after=5,
            )

    def working_for(self) -> list[ThreadKey]:
        """The threads whose processes are at work in the background, with no turn that runs."""
        return self._pool.working_for()

    def keep_none(self) -> None:
        """Keep no process from here on."""
        self._pool.stop()
        self._spares.stop()

    @property
    def idle(self) -> tuple[int, int]:
        """How many processes wait for a turn: of a thread, and of a new one."""
        return self._pool.resting, self._spares.waiting

    async def stop(self) -> None:
        """Keep no process from here on, and end those that are being started for turns yet to come."""
        self.keep_none()
        await self._starts.stop()

    async def close(self) -> None:
        """Close every process that is kept."""
        if self._probing is not None:
            await asyncio.wait([self._probing])
        await asyncio.gather(self._pool.close(), self._spares.close())
