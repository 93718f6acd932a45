"""The rules of leases once more, in memory and with a clock that tests move: what PostgreSQL's are compared with."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from session_store import Holder, Lease, LeaseHeld, LeaseLost, SessionMapping, ThreadKey, ThreadMapped
from session_store.leases import GRACE_SECONDS, TTL_SECONDS

_THEN = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class Row:
    """One mapping, and who has it."""

    mapping: SessionMapping
    holder: str
    fence: int
    until: float | None
    contested: float | None = None


@dataclass
class Rows:
    """What the replicas of a fleet share."""

    now: float = 0
    fence: int = 0
    rows: dict[ThreadKey, Row] = field(default_factory=dict)
    urls: dict[str, str | None] = field(default_factory=dict)

    def next_fence(self) -> int:
        """One that was never given before."""
        self.fence += 1
        return self.fence


class LeasesInMemory:
    """Leases, and as much of the SessionMap as writes, of one replica."""

    def __init__(
        self, shared: Rows, replica_id: str, *, ttl: float = TTL_SECONDS, grace: float = GRACE_SECONDS
    ) -> None:
        """All replicas of a fleet get the same rows."""
        self._shared, self.replica_id, self.seconds, self._grace = shared, replica_id, ttl, grace
        self._fences: dict[ThreadKey, int] = {}
        self._until: dict[ThreadKey, float] = {}

    async def acquire(self, key: ThreadKey) -> Lease | None:
        """See Leases."""
        row, now = self._shared.rows.get(key), self._shared.now
        if row is None:
            return None
        was_ours = row.holder == self.replica_id
        if not was_ours and row.until is not None:
            if row.until <= now and row.contested is None:
                row.contested = now
                raise LeaseHeld(self._holder(row))
            if row.contested is None or row.contested + self._grace > now:
                raise LeaseHeld(self._holder(row))
        if not was_ours or row.fence != self._fences.get(key):
            row.fence = self._shared.next_fence()
        row.holder, row.contested = self.replica_id, None
        self._lease(key, row)
        return Lease(row.mapping, row.fence, was_ours, 0)

    async def renew(self) -> set[ThreadKey]:
        """See Leases."""
        lost = set()
        for key in list(self._until):
            row = self._shared.rows.get(key)
            if row is not None and self._is_ours(key, row) and row.until is not None:
                row.contested = None
                self._lease(key, row)
            else:
                del self._until[key]
                lost.add(key)
        return lost

    async def release(self, key: ThreadKey) -> None:
        """See Leases."""
        row = self._shared.rows.get(key)
        if row is not None and self._is_ours(key, row):
            row.until = row.contested = None
        self._forget(key)

    async def holders(self, keys: Iterable[ThreadKey]) -> dict[ThreadKey, Holder]:
        """See Leases."""
        return {key: self._holder(self._shared.rows[key]) for key in keys if key in self._shared.rows}

    def held(self) -> dict[ThreadKey, float]:
        """See Leases; by the clock of the tests."""
        return dict(self._until)

    def fence(self, key: ThreadKey) -> int | None:
        """See Leases."""
        return self._fences.get(key)

    async def left_behind(self) -> list[ThreadKey]:
        """See Leases."""
        ours = (
            key for key, row in self._shared.rows.items() if row.holder == self.replica_id and row.until is not None
        )
        return [key for key in ours if key not in self._fences]

    async def register(self, url: str | None) -> None:
        """See Leases."""
        self._shared.urls[self.replica_id] = url

    async def seen(self) -> None:
        """See Leases."""

    async def others(self) -> list[str]:
        """See Leases."""
        ours = self._shared.urls.get(self.replica_id)
        return list({url for url in self._shared.urls.values() if url not in (None, ours)})

    async def add(self, key: ThreadKey, sdk_session_id: str) -> SessionMapping:
        """See SessionMap."""
        if key in self._shared.rows:
            raise ThreadMapped
        mapping = SessionMapping(key.thread_id, key.resource_id, sdk_session_id, None, None, 0, _THEN, _THEN)
        row = self._shared.rows[key] = Row(mapping, self.replica_id, self._shared.next_fence(), None)
        self._lease(key, row)
        return mapping

    async def touch(self, key: ThreadKey, sdk_session_id: str) -> SessionMapping | None:
        """See SessionMap."""
        row = self._writable(key)
        if row is None or row.mapping.sdk_session_id != sdk_session_id:
            return None
        row.mapping = replace(row.mapping, version=row.mapping.version + 1)
        return row.mapping

    async def remove(self, key: ThreadKey) -> SessionMapping | None:
        """See SessionMap."""
        row = self._writable(key)
        if row is None:
            return None
        del self._shared.rows[key]
        self._forget(key)
        return row.mapping

    def _writable(self, key: ThreadKey) -> Row | None:
        row = self._shared.rows.get(key)
        if row is None:
            return None
        if key in self._fences:
            if not self._is_ours(key, row):
                raise LeaseLost
        elif row.holder != self.replica_id and self._holder(row).live:
            raise LeaseHeld(self._holder(row))
        return row

    def _is_ours(self, key: ThreadKey, row: Row) -> bool:
        return row.holder == self.replica_id and row.fence == self._fences.get(key)

    def _holder(self, row: Row) -> Holder:
        live = row.until is not None and row.until > self._shared.now
        return Holder(row.holder, self._shared.urls.get(row.holder), live)

    def _lease(self, key: ThreadKey, row: Row) -> None:
        self._fences[key] = row.fence
        self._until[key] = row.until = self._shared.now + self.seconds

    def _forget(self, key: ThreadKey) -> None:
        self._fences.pop(key, None)
        self._until.pop(key, None)
