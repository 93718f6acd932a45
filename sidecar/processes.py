"""The process for a turn: one that is ready where there is one, else a new one; and what becomes of it afterwards."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from session_store import SessionMapping, ThreadKey
from sidecar.agent import AgentProcess, Agents, Fingerprint, Launch, ProcessPool, Spare, Transcripts, without_session
from sidecar.errors import SidecarError
from sidecar.planning import Plan, make_id
from sidecar.turn import Turn

logger = logging.getLogger(__name__)


class SpareOffer:
    """A connected process for a thread that turns out to be new, with the session ID that it was started for."""

    def __init__(self, take: Callable[[], Spare | None]) -> None:
        self._take = take
        self.spare: Spare | None = None

    def new_id(self) -> str:
        """A session ID for a new thread: the spare's, where there is one, or one that nobody has."""
        self.spare = self._take()
        return self.spare.session_id if self.spare else make_id()


class Processes:
    """Agent processes by what a turn needs. Whoever asks for one has the claim on its thread."""

    def __init__(self, agents: Agents, transcripts: Transcripts, pool: ProcessPool) -> None:
        self._agents = agents
        self._transcripts = transcripts
        self._pool = pool

    @contextlib.contextmanager
    def offer(self, turn: Turn) -> Iterator[SpareOffer]:
        """A process that waits for a new session, in case the thread has none. Taken and not used, it goes back."""
        agent = turn.request.agent
        offer = SpareOffer(lambda: self._pool.take_spare(agent))
        try:
            yield offer
        finally:
            if offer.spare is not None and not offer.spare.used:
                self._pool.give_back(agent, offer.spare)

    async def get(self, turn: Turn, plan: Plan, spare: Spare | None) -> AgentProcess:
        """The process for this turn: warm, the spare, or a new one that `connect` has yet to start.

        Raises UnknownAgent and AgentMisconfigured.
        """
        agent, key = turn.request.agent, turn.request.key
        if spare is not None and spare.session_id == plan.launch.session_id:
            await self._pool.drop(key)
            spare.used = True
            return spare.process
        options = await self._agents.options(agent, key, plan.launch)
        state = Fingerprint(plan.launch.session_id, plan.version, turn.transcript_size, without_session(options))
        if plan.outcome == "resumed" and (warm := self._pool.take(key, state)):
            return warm
        # What is or was connected there has another session, or knows less of this one; two would write to it.
        await self._pool.drop(key)
        return AgentProcess(options)

    async def connect(self, process: AgentProcess) -> None:
        """Start a process that is not connected yet. Raises AgentStartFailed."""
        if not process.is_alive:
            await self._pool.start(process)

    async def put(self, turn: Turn, mapping: SessionMapping | None, process: AgentProcess) -> None:
        """Keep the process for the thread's next turn if it can be trusted with that, else see it gone.

        `mapping` is the thread's as the turn has left it, None where the turn did not come to a result. Never fails.
        """
        if mapping is None or not await self._keep(turn, mapping, process):
            await process.close()
        await self._refill(turn.request.agent, turn.request.key)

    async def warm_up(self, mapping: SessionMapping, agent: str) -> None:
        """Connect a process to a thread's session before its next message comes, unless one is there."""
        key, session_id = mapping.key, mapping.sdk_session_id
        info = await self._transcripts.info(session_id)
        if info is None:
            return
        options = await self._agents.options(agent, key, Launch(session_id, session_id))
        state = Fingerprint(session_id, mapping.version, info.size, without_session(options))
        if self._pool.has(key, state):
            return
        await self._pool.drop(key)
        process = AgentProcess(options)
        try:
            await self._pool.start_ahead(process)
        finally:
            if not self._pool.keep(key, state, process):
                await process.close()

    async def drop(self, key: ThreadKey) -> None:
        """Close the thread's process, if one is connected, and see it gone: its transcript is about to change."""
        await self._pool.drop(key)

    async def stop(self) -> None:
        """Keep no process from here on, and end those that are being started for turns yet to come."""
        await self._pool.stop()

    async def close(self) -> None:
        """Close every process that is kept."""
        await self._pool.close()

    async def _keep(self, turn: Turn, mapping: SessionMapping, process: AgentProcess) -> bool:
        if turn.status not in ("completed", "interrupted") or not self._pool.most_warm:
            return False
        try:
            info = await self._transcripts.info(mapping.sdk_session_id)
            # As they are now: an operator's function may give others for the next turn.
            options = await self._agents.options(turn.request.agent, turn.request.key, Launch(""))
        except SidecarError:  # a volume that is not mounted, a function that fails: the next turn tells
            return False
        except Exception:  # a volume that is there and cannot be read
            logger.exception("the process of a turn that has ended is not kept")
            return False
        if info is None:
            return False
        state = Fingerprint(mapping.sdk_session_id, mapping.version, info.size, without_session(options))
        return self._pool.keep(turn.request.key, state, process)

    async def _refill(self, agent: str, key: ThreadKey) -> None:
        """Have a spare ready for the next new thread; only of agents that are the same for every thread."""
        if self._agents.is_preset(agent) and self._pool.wants_spare(agent):
            session_id = make_id()
            options = await self._agents.options(agent, key, Launch(session_id))
            self._pool.refill(agent, Spare(AgentProcess(options), session_id))
