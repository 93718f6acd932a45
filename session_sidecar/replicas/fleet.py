"""One of several replicas: it has a thread by a lease, and its transcript by what the last holder has stored of it.

A lease is had from before a thread is looked at until all that was written is stored and nothing is at work any more.
Until then the files here are the only ones that have it, so nobody else gets the thread. A lease that could not be
renewed in time is taken for lost: what runs on its thread is stopped, and the database refuses what it still writes.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from weakref import WeakValueDictionary

from session_sidecar.agent.tasks import Tasks
from session_sidecar.agent.transcripts import Revision
from session_sidecar.agent.transcripts.reading.metadata import Metadata
from session_sidecar.errors import HeldElsewhere
from session_sidecar.replicas.archive.outlines import Outlines
from session_sidecar.replicas.leases.keeping import Keeping
from session_sidecar.replicas.outbox import Outbox
from session_sidecar.replicas.tenancy import Occupants, lost
from session_store import SessionMap, SessionMapError, SessionMapping, ThreadKey
from session_store.leases import Holder, LeaseHeld, Leases

SAVE_SECONDS = 1.0  # what the end of a turn waits for its transcript to be stored


class Fleet:
    """The threads that this replica has; see Tenancy. `keeping.Keeping` is what goes on beside these calls."""

    def __init__(self, session_map: SessionMap, leases: Leases, outbox: Outbox, outlines: Outlines) -> None:
        self.map = session_map
        self.leases = leases
        self.outbox = outbox
        self._outlines = outlines
        self._occupants: Occupants | None = None
        self._locks: WeakValueDictionary[ThreadKey, asyncio.Lock] = WeakValueDictionary()
        self.unsure: set[ThreadKey] = set()
        """Threads that others may have written to since this replica had them, whatever their leases say of that: they
        are about to be had, or that was broken off. Nothing of theirs is stored until it has been compared."""
        self._saved: dict[ThreadKey, str] = {}  # the sessions of turns that have ended and not left yet
        self._tasks = Tasks()

    @contextlib.asynccontextmanager
    async def attending(self, occupants: Occupants) -> AsyncIterator[None]:
        """See Tenancy. At the end all is stored and released, as far as that is done before the leases run out."""
        self._occupants = occupants
        async with Keeping(self, occupants):
            yield
        await self._tasks.ended()

    async def enter(self, key: ThreadKey) -> SessionMapping | None:
        """See Tenancy."""
        had, sure = False, key not in self.unsure
        self.unsure.add(key)
        try:
            async with self.changing(key):
                had = self._has(key)
                lease = await self.leases.acquire(key)
        except BaseException as error:
            if sure and (had or isinstance(error, LeaseHeld)):
                self.unsure.discard(key)
            if isinstance(error, LeaseHeld):
                raise HeldElsewhere(key, error.holder.url, live=True) from None  # until its grace is over, too
            raise
        if lease is None:
            self.unsure.discard(key)
            return None
        session_id, ours = lease.mapping.sdk_session_id, lease.was_ours and sure
        try:
            if not ours and self._occupants is not None:
                await self._occupants.drop(key)  # it knows less than what comes now
            if not sure:
                self.outbox.archive.mistrust(session_id)
            self.outbox.use(session_id, key)
            await self.outbox.archive.pull(session_id, key.resource_id, ours=lease.was_ours)
            ours = True
        except BaseException:
            if not (had and lease.was_ours):  # else it has not stored all yet, and `Keeping` comes back to it
                await asyncio.shield(self._tasks.own(self._release(key)))
            raise
        finally:
            if ours:
                self.unsure.discard(key)
        return lease.mapping

    async def leave(self, key: ThreadKey) -> None:
        """See Tenancy."""
        session_id = self._saved.pop(key, None)
        if not self._has(key) or (self._occupants is not None and self._occupants.at_work(key)):
            return
        leaving = self._tasks.own(self._store_all(key, session_id))
        await asyncio.wait([leaving], timeout=SAVE_SECONDS)
        # While it is not stored yet, this replica keeps the thread; `Keeping` comes back to it.
        if leaving.done() and leaving.result():
            await asyncio.wait([self._tasks.own(self._release(key))], timeout=SAVE_SECONDS)

    async def let_go(self, key: ThreadKey) -> None:
        """Store and release a thread that nobody here has any more, while `changing` keeps others off. Never fails."""
        if await self._store_all(key):
            await self._release(key)

    async def save(self, key: ThreadKey, session_id: str, settled: Revision | None) -> bool | None:
        """See Tenancy."""
        self._saved[key] = session_id
        self.outbox.ended(key, session_id, settled)
        saving = self._tasks.own(self.outbox.push(key, session_id))
        await asyncio.wait([saving], timeout=SAVE_SECONDS)
        if saving.done() and saving.result() == "refused":
            raise lost()
        return saving.done() and saving.result() == "stored"

    def settle(self, key: ThreadKey, session_id: str, settled: Revision) -> None:
        """See Tenancy."""
        self.outbox.ended(key, session_id, settled)

    async def look(self, mapping: SessionMapping) -> Revision | None:
        """See Tenancy."""
        key = mapping.key
        if key in self.leases.held():
            return None
        holder = (await self.leases.holders([key])).get(key)
        async with self.changing(key):  # a turn that comes to the thread now waits for the files to be there
            if key not in self.leases.held():
                self.outbox.use(mapping.sdk_session_id, key)
                ours = holder is None or not self._is_another(holder)
                await self.outbox.archive.pull(mapping.sdk_session_id, key.resource_id, ours=ours)
        return Revision(holder.settled) if holder is not None and holder.live else None

    async def outlines(self, mappings: Sequence[SessionMapping]) -> list[Metadata] | None:
        """See Tenancy."""
        return await self._outlines.read([mapping.sdk_session_id for mapping in mappings])

    async def bring(self, key: ThreadKey, session_id: str) -> None:
        """See Tenancy."""
        await self.outbox.archive.pull(session_id, key.resource_id, ours=True)

    async def erase(self, session_id: str) -> None:
        """See Tenancy."""
        await self.outbox.archive.delete(session_id)

    async def running(self, keys: Iterable[ThreadKey]) -> set[ThreadKey]:
        """See Tenancy."""
        keys = list(keys)
        holders = await self.leases.holders(keys) if keys else {}
        return {key for key, holder in holders.items() if holder.live and self._is_another(holder)}

    async def others(self) -> list[str]:
        """See Tenancy."""
        return await self.leases.others()

    async def elsewhere(self, key: ThreadKey) -> HeldElsewhere | None:
        """See Tenancy."""
        holder = (await self.leases.holders([key])).get(key)
        if holder is None or not self._is_another(holder):
            return None
        return HeldElsewhere(key, holder.url, live=holder.live)

    def changing(self, key: ThreadKey) -> asyncio.Lock:
        """For whoever is about to get a lease here, to release one, or to write to a thread's files without one."""
        return self._locks.setdefault(key, asyncio.Lock())

    def _has(self, key: ThreadKey) -> bool:
        """Whether there is a lease to be released: a lost one too, to be forgotten."""
        return key in self.leases.held() or self.leases.fence(key) is not None

    def _is_another(self, holder: Holder) -> bool:
        return holder.replica_id != self.leases.replica_id

    async def _store_all(self, key: ThreadKey, session_id: str | None = None) -> bool:
        """Store what there is of a thread, whose session is looked up if need be; whether it may be released now.

        Never fails.
        """
        if key in self.unsure:
            return True  # whoever has it next compares it
        with contextlib.suppress(SessionMapError):  # the database has logged what it is
            if not session_id:
                if (mapping := await self.map.get(key)) is None:
                    return True
                session_id = mapping.sdk_session_id
            return await self.outbox.push(key, session_id, outline=True) != "late"
        return False

    async def _release(self, key: ThreadKey) -> None:
        with contextlib.suppress(SessionMapError):
            await self.leases.release(key)
