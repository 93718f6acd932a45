"""What goes on beside a fleet's turns: leases are renewed, what is written is stored, what is done with is let go."""

import asyncio
import contextlib
import logging
import math
from types import TracebackType
from typing import TYPE_CHECKING, Self

from session_sidecar.agent.tasks import Tasks
from session_sidecar.errors import SidecarError
from session_sidecar.replicas.tenancy import Occupants
from session_store import SessionMapError, ThreadKey, walk
from session_store.leases import SEEN_SECONDS, boot_time

if TYPE_CHECKING:
    from session_sidecar.replicas.fleet import Fleet

logger = logging.getLogger(__name__)

ERASED_SECONDS = SEEN_SECONDS  # between two questions for what others have deleted
OVERLAP_SECONDS = 60.0  # asked for twice rather than not at all
STORE_SECONDS = 2.0  # between two looks for what was written since the last one
RENEWALS = 3  # while a lease lasts
RETRY_SECONDS = 0.5  # after a renewal that failed
UNUSED_SECONDS = 30.0  # after which nobody reads any more what was brought here to be read
LAST_SECONDS = 5.0  # at the end, to take away what is stored


class Keeping:
    """Keeps what a fleet has here, for as long as the block lasts; at its end everything is stored and released."""

    def __init__(self, fleet: "Fleet", occupants: Occupants) -> None:
        self._fleet = fleet
        self._leases = fleet.leases
        self._outbox = fleet.outbox
        self._occupants = occupants
        self._tasks = Tasks()

    async def __aenter__(self) -> Self:
        self._renewing = self._tasks.own(self._keep_renewing())
        self._storing = self._tasks.own(self._keep_storing())
        self._recovering = self._tasks.own(self._keep_recovering())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._storing.cancel()
        self._recovering.cancel()
        await asyncio.wait([self._storing, self._recovering])
        last = [self._tasks.own(self._fleet.let_go(key)) for key in self._leases.held()]
        if last:
            await asyncio.wait(last, timeout=self._leases.seconds)  # after that, others wait for them no more
        for task in (self._renewing, *last):
            task.cancel()
        await self._tasks.ended()
        with contextlib.suppress(SessionMapError, TimeoutError):  # what is left is seen to at the next start
            async with asyncio.timeout(LAST_SECONDS):
                for session_id, key in self._outbox.unused(0):
                    if key not in self._leases.held():
                        await self._forget(session_id, key)

    async def _keep_renewing(self) -> None:
        """Renew all leases a few times while they last. Those that are lost, or not renewed in time, are given up."""
        renewal: asyncio.Task[set[ThreadKey]] | None = None
        given_up = set[ThreadKey]()  # those that have run out, and may yet be renewed if nobody else wants them
        while True:
            pause, lost = 0.0, set[ThreadKey]()
            renewal = renewal or self._tasks.own(self._leases.renew())
            await asyncio.wait([renewal], timeout=RETRY_SECONDS)  # one that hangs is not broken off: it is seconds
            if renewal.done():
                if error := renewal.exception():
                    pause = RETRY_SECONDS
                    if not isinstance(error, SessionMapError):
                        logger.error("renewing leases failed", exc_info=error)
                else:
                    lost, pause = renewal.result(), self._leases.seconds / RENEWALS
                renewal = None
            run_out = {key for key, until in self._leases.held().items() if until <= boot_time()}
            lost, given_up = lost | run_out - given_up, run_out
            for key in lost:
                fields = {"thread_id": key.thread_id, "resource_id": key.resource_id}
                logger.error("the lease on a thread is lost", extra={"fields": fields})
                self._tasks.own(self._occupants.lose(key))  # a process that ends slowly holds up no renewal
            await asyncio.sleep(pause)

    async def _keep_storing(self) -> None:
        asked = -math.inf
        while True:
            try:
                if (now := boot_time()) >= asked + ERASED_SECONDS:
                    await self._leases.seen()
                    await self._remove_erased(now - asked + OVERLAP_SECONDS)
                    asked = now
                await asyncio.gather(*(self._store(key) for key in self._leases.held()))
                await self._forget_unused()
            except SessionMapError:
                pass  # the database has logged what it is
            except Exception:
                logger.exception("storing what was written failed")
            await asyncio.sleep(STORE_SECONDS)

    async def _store(self, key: ThreadKey) -> None:
        """Store what a turn has written so far; release what nobody here has any more."""
        async with self._fleet.changing(key):
            if self._occupants.is_free(key) and not self._occupants.at_work(key):
                await self._fleet.let_go(key)
                return
        if key in self._fleet.unsure:
            return  # what is here may be older than what is stored
        if (mapping := await self._fleet.map.get(key)) is not None and key not in self._fleet.unsure:
            await self._outbox.push(key, mapping.sdk_session_id)

    async def _keep_recovering(self) -> None:
        """Do it once, however long the database is away. Whoever has one of these threads is waited for."""
        while True:
            try:
                return await self._recover()
            except SessionMapError:
                pass  # the database has logged what it is
            except Exception:
                logger.exception("storing what an earlier life has left failed")
            await asyncio.sleep(STORE_SECONDS)

    async def _recover(self) -> None:
        """Store what an earlier life has left here: its leases tell of which threads, or the files that were to go."""
        left = await self._leases.left_behind()
        if not self._outbox.keeps_files:
            left += await self._with_files()
        for key in left:
            async with self._occupants.pause(key):
                if key in self._leases.held():
                    continue
                try:
                    await self._fleet.enter(key)
                    await self._fleet.let_go(key)
                except SidecarError as error:  # another replica has it by now; or it cannot be read, by nobody
                    logger.warning("what was left of a thread is not stored: %s", error.detail)

    async def _with_files(self) -> list[ThreadKey]:
        here = await self._outbox.archive.sessions_here()
        return [row.key async for row in walk(self._fleet.map) if row.sdk_session_id in here] if here else []

    async def _remove_erased(self, seconds: float) -> None:
        """Remove what is here of sessions that another replica has deleted."""
        erased = await self._outbox.archive.erased(seconds)
        for session_id in (await self._outbox.archive.sessions_here()).intersection(erased) if erased else ():
            if (key := self._occupants.has_session(session_id)) is not None:
                await self._occupants.drop(key)
            await self._outbox.archive.remove(session_id)

    async def _forget_unused(self) -> None:
        for session_id, key in self._outbox.unused(UNUSED_SECONDS):
            if not self._occupants.is_free(key):
                continue
            async with self._occupants.pause(key):
                if key in self._leases.held() or self._occupants.has_process(key):
                    continue
                await self._forget(session_id, key)

    async def _forget(self, session_id: str, key: ThreadKey) -> None:
        """Take a session's files away. A process that was kept has added to them as it ended: that is stored first."""
        if await self._outbox.forget(session_id):
            return
        self._outbox.use(session_id, key)  # if it does not succeed now, it is not tried again at once
        with contextlib.suppress(SidecarError):
            await self._fleet.enter(key)
            await self._fleet.let_go(key)
            await self._outbox.forget(session_id)
