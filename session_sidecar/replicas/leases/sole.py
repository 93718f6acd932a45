"""The leases of the only replica there is: it has every thread, for ever."""

import math
from collections.abc import Iterable

from session_store import SessionMap, ThreadKey
from session_store.leases import Holder, Lease


class SoleLeases:
    """See Leases. Nobody else can have a thread of a database that one process owns."""

    replica_id = "sole"
    seconds = math.inf

    def __init__(self, session_map: SessionMap) -> None:
        self._map = session_map
        self._held: set[ThreadKey] = set()

    async def acquire(self, key: ThreadKey) -> Lease | None:
        """See Leases."""
        mapping = await self._map.get(key)
        self._held.add(key)  # one that is about to be mapped, too
        return Lease(mapping, fence=0, was_ours=True, settled=0) if mapping is not None else None

    async def renew(self) -> set[ThreadKey]:
        """See Leases."""
        return set()

    async def release(self, key: ThreadKey) -> None:
        """See Leases."""
        self._held.discard(key)

    def held(self) -> dict[ThreadKey, float]:
        """See Leases."""
        return dict.fromkeys(self._held, math.inf)

    def fence(self, key: ThreadKey) -> int | None:
        """See Leases."""
        return None

    async def left_behind(self) -> list[ThreadKey]:
        """See Leases."""
        return []

    async def holders(self, keys: Iterable[ThreadKey]) -> dict[ThreadKey, Holder]:
        """See Leases. What lies here was written by nobody else, so a reader leaves what is not stored yet."""
        return {key: Holder(self.replica_id, url=None, live=False) for key in keys}

    async def others(self) -> list[str]:
        """See Leases."""
        return []

    async def seen(self) -> None:
        """See Leases."""

    async def register(self, url: str | None) -> None:
        """See Leases."""
