"""Hints: a thread's process is connected before its message comes."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from session_sidecar.agent.agents import Agents, Launch
from session_sidecar.agent.processes.pool import Fingerprint, ProcessPool
from session_sidecar.agent.processes.process import AgentProcess
from session_sidecar.agent.processes.starts import Starts
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import HeldElsewhere, public_error
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.turns.deciding.exclusion import Exclusion
from session_sidecar.turns.ending import dismiss
from session_store import SessionMap, ThreadKey

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # for what is looked up ahead; an operator's function may hang


class Warming:
    """Hints: a person has opened a thread, so its process is connected before its message comes, if time allows.

    A hint costs no turn anything: one at a time is followed, on a core that no turn wants, in a place that no turn's
    process has. Those beyond what can be kept are forgotten, oldest first.
    """

    def __init__(
        self,
        *,
        session_map: SessionMap,
        tenancy: Tenancy,
        agents: Agents,
        transcripts: Transcripts,
        starts: Starts,
        pool: ProcessPool,
        exclusion: Exclusion,
    ) -> None:
        self._map = session_map
        self._tenancy = tenancy
        self._agents = agents
        self._transcripts = transcripts
        self._starts = starts
        self._pool = pool
        self._exclusion = exclusion
        self._hints: dict[ThreadKey, tuple[str, float]] = {}  # the agent and the time of each, oldest first
        self._following: asyncio.Task[None] | None = None

    def hint(self, key: ThreadKey, agent: str) -> None:
        """Warm a thread up when there is time; asking again does no more."""
        self._hints.pop(key, None)
        self._hints[key] = agent, time.monotonic()
        if len(self._hints) > self._pool.most_warm:
            del self._hints[next(iter(self._hints))]
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow(), name="warming up")

    async def close(self) -> None:
        """Follow no more hints. The pool must have been stopped: it has ended what was being started."""
        self._hints.clear()
        if self._following is not None:
            await dismiss(self._following)

    async def _follow(self) -> None:
        while self._hints:
            key, (agent, hinted) = self._hints.popitem()  # the newest: its person is still there
            try:
                await self._warm_up(key, agent, hinted)
            except HeldElsewhere:
                continue  # its person is answered there
            except Exception as error:
                logger.warning("a thread was not warmed up: %s", public_error(error).detail)

    async def _warm_up(self, key: ThreadKey, agent: str, hinted: float) -> None:
        if not self._pool.has_room(hinted) or await self._process(key, agent) is None:
            return
        async with self._starts.room_ahead():
            if not self._exclusion.is_free(key):
                return  # its message has come
            async with self._exclusion.hold(key), self._having(key):
                # Only now nobody changes what is looked at.
                found = await self._process(key, agent)
                if found is not None and await self._transcripts.relink(found[0].session_id):
                    found = await self._process(key, agent)  # of the transcript as it is now
                if found is None:
                    return
                state, process = found
                await self._pool.drop(key)
                try:
                    await self._starts.start_ahead(process)
                finally:
                    if not self._pool.keep(key, state, process, hinted=hinted):
                        await process.close()

    @contextlib.asynccontextmanager
    async def _having(self, key: ThreadKey) -> AsyncIterator[None]:
        async with asyncio.timeout(LOOK_SECONDS):
            await self._tenancy.enter(key)
        try:
            yield
        finally:
            await self._tenancy.leave(key)

    async def _process(self, key: ThreadKey, agent: str) -> tuple[Fingerprint, AgentProcess] | None:
        """A process for the thread as it is now, not started yet; None where there is one, or nothing to connect to."""
        async with asyncio.timeout(LOOK_SECONDS):
            mapping = await self._map.get(key)
            info = await self._transcripts.info(mapping.sdk_session_id) if mapping else None
            if mapping is None or info is None:
                return None
            session_id = mapping.sdk_session_id
            options = await self._agents.options(agent, key, Launch(session_id, session_id))
        process = self._agents.process(agent, options)
        state = Fingerprint(session_id, mapping.version, info.revision, agent, process.options)
        if self._pool.has(key, state) or self._pool.at_work(key):
            return None
        return state, process
