"""The leases of a replica: columns of the mappings' own rows, so that a write and its fence are one statement."""

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from session_store.errors import StoreUnavailable
from session_store.leases import (
    GRACE_SECONDS,
    SEEN_WITHIN_SECONDS,
    TTL_SECONDS,
    Holder,
    Lease,
    LeaseHeld,
    boot_time,
)
from session_store.mapping import SessionMapping, ThreadKey, moment
from session_store.postgres.database import Database, Parameters
from session_store.postgres.pages import COLUMNS
from session_store.postgres.turn_keys import PostgresTurnKeys

T = TypeVar("T")
Rows = list[tuple[Any, ...]]

KEY = "resource_id = %(resource_id)s AND thread_id = %(thread_id)s"
LEASED = "clock_timestamp() + make_interval(secs => %(ttl)s)"
CHANGED = ", ".join(f"changed.{column}" for column in COLUMNS.split(", "))

# All that change a row lock it first: what they decide by is then what they change, and no older state of it.
ACQUIRE = f"""
WITH was AS (
    SELECT resource_id, thread_id, holder, lease_until > clock_timestamp() AS live,
        coalesce(holder = %(me)s, FALSE) AS was_ours,
        CASE
            WHEN holder = %(me)s OR lease_until IS NULL THEN 'ours'
            WHEN lease_until > clock_timestamp() THEN 'theirs'
            WHEN contested_at IS NULL THEN 'contested'
            WHEN contested_at + make_interval(secs => %(grace)s) > clock_timestamp() THEN 'theirs'
            ELSE 'ours'
        END AS outcome
    FROM session_mappings WHERE {KEY} FOR UPDATE
), changed AS (
    UPDATE session_mappings AS mapping SET
        holder = CASE outcome WHEN 'ours' THEN %(me)s ELSE mapping.holder END,
        fence = CASE
            WHEN outcome = 'contested' OR was_ours AND mapping.fence = %(fence)s THEN mapping.fence
            ELSE nextval('fences')
        END,
        lease_until = CASE outcome WHEN 'ours' THEN {LEASED} ELSE mapping.lease_until END,
        contested_at = CASE outcome WHEN 'contested' THEN clock_timestamp() END
    FROM was WHERE mapping.resource_id = was.resource_id AND mapping.thread_id = was.thread_id AND outcome <> 'theirs'
    RETURNING mapping.*
)
SELECT outcome = 'ours', was.holder, url, live, was_ours, fence, settled, {CHANGED}
FROM was LEFT JOIN changed ON TRUE LEFT JOIN replicas ON id = was.holder
"""  # noqa: S608 - all of it is ours

RENEW = f"""
UPDATE session_mappings AS mapping SET lease_until = {LEASED}, contested_at = NULL
FROM unnest(%(resource_ids)s::text[], %(thread_ids)s::text[], %(fences)s::bigint[])
    AS held (resource_id, thread_id, fence)
WHERE mapping.resource_id = held.resource_id AND mapping.thread_id = held.thread_id
    AND mapping.fence = held.fence AND holder = %(me)s AND lease_until IS NOT NULL
RETURNING mapping.thread_id, mapping.resource_id, mapping.fence
"""  # noqa: S608 - all of it is ours

RELEASE = f"""
UPDATE session_mappings SET lease_until = NULL, contested_at = NULL
WHERE {KEY} AND holder = %(me)s AND fence = %(fence)s
RETURNING fence
"""  # noqa: S608 - all of it is ours

HOLDERS = """
SELECT thread_id, resource_id, holder, url, coalesce(lease_until > clock_timestamp(), FALSE), settled
FROM unnest(%(resource_ids)s::text[], %(thread_ids)s::text[]) AS asked (resource_id, thread_id)
    JOIN session_mappings USING (resource_id, thread_id) LEFT JOIN replicas ON id = holder
WHERE holder IS NOT NULL
"""

LEFT_BEHIND = """
SELECT thread_id, resource_id FROM session_mappings WHERE holder = %(me)s AND lease_until IS NOT NULL
"""

REGISTER = """
INSERT INTO replicas VALUES (%(me)s, %(url)s, now())
ON CONFLICT (id) DO UPDATE SET url = excluded.url, seen_at = excluded.seen_at
RETURNING id
"""

SEEN = """
UPDATE replicas SET seen_at = now() WHERE id = %(me)s RETURNING id
"""

# An address may be had by one replica after another, and by a stranger after the last one.
OTHERS = """
SELECT DISTINCT url FROM replicas
WHERE url IS NOT NULL AND url IS DISTINCT FROM (SELECT url FROM replicas WHERE id = %(me)s)
    AND seen_at > now() - make_interval(secs => %(seen_within)s)
"""


class PostgresLeases:
    """Leases in the rows of session_mappings, and which of them this replica has."""

    def __init__(
        self,
        database: Database,
        replica_id: str | None = None,
        *,
        ttl: float = TTL_SECONDS,
        grace: float = GRACE_SECONDS,
    ) -> None:
        """`replica_id` is a UUID that outlives this process; without one, all that it has is lost with it."""
        self.database = database
        self.replica_id = replica_id or str(uuid.uuid4())
        self.observe: Callable[[str, float], object] = lambda *_: None
        """Told after each statement of what kind it was, and how many seconds it took."""
        self.turn_keys = PostgresTurnKeys(self._rows)
        self._of_leases = {"me": self.replica_id, "ttl": ttl, "grace": grace}
        self._ttl = ttl
        self._fences: dict[ThreadKey, int] = {}  # of lost ones too: what they still write must be refused
        self._until: dict[ThreadKey, float] = {}  # of those that are held

    async def acquire(self, key: ThreadKey) -> Lease | None:
        """See Leases."""
        return await self._leasing(key, self._acquire(key))

    async def renew(self) -> set[ThreadKey]:
        """See Leases."""
        fences = {key: self._fences[key] for key in self._until}
        if not fences:
            return set()
        sent = boot_time()
        rows = await self._rows("renew", RENEW, {"fences": list(fences.values())} | _columns(fences), writes=True)
        renewed = {ThreadKey(thread_id, resource_id): fence for thread_id, resource_id, fence in rows}
        # Whatever was acquired or released meanwhile is as that call says.
        as_sent = {key for key, fence in fences.items() if key in self._until and self._fences.get(key) == fence}
        self._until.update(dict.fromkeys(as_sent & renewed.keys(), sent + self._ttl))
        lost = as_sent - renewed.keys()
        for key in lost:
            del self._until[key]
        return lost

    async def release(self, key: ThreadKey) -> None:
        """See Leases."""
        self._until.pop(key, None)
        fence = self._fences.pop(key, None)
        if fence is not None:
            await self._rows("release", RELEASE, of(key) | {"fence": fence}, writes=True)

    async def holders(self, keys: Iterable[ThreadKey]) -> dict[ThreadKey, Holder]:
        """See Leases."""
        rows = await self._rows("holders", HOLDERS, _columns(keys))
        return {
            ThreadKey(thread_id, resource_id): Holder(str(holder), url, live, settled)
            for thread_id, resource_id, holder, url, live, settled in rows
        }

    @property
    def seconds(self) -> float:
        """See Leases."""
        return self._ttl

    def fence(self, key: ThreadKey) -> int | None:
        """See Leases."""
        return self._fences.get(key)

    async def left_behind(self) -> list[ThreadKey]:
        """See Leases."""
        rows = await self._rows("left_behind", LEFT_BEHIND, {})
        return [key for key in (ThreadKey(*row) for row in rows) if key not in self._fences]

    def held(self) -> dict[ThreadKey, float]:
        """See Leases."""
        return dict(self._until)

    async def register(self, url: str | None) -> None:
        """See Leases."""
        await self._rows("register", REGISTER, {"url": url}, writes=True)

    async def others(self) -> list[str]:
        """See Leases."""
        return [url for (url,) in await self._rows("others", OTHERS, {"seen_within": SEEN_WITHIN_SECONDS})]

    async def seen(self) -> None:
        """See Leases."""
        await self._rows("seen", SEEN, {}, writes=True)

    async def _acquire(self, key: ThreadKey) -> Lease | None:
        sent = boot_time()
        rows = await self._fetched("acquire", ACQUIRE, of(key) | {"fence": self._fences.get(key)}, writes=True)
        if not rows:
            return None
        ((ours, holder, url, live, was_ours, fence, settled, *columns),) = rows
        if not ours:
            raise LeaseHeld(Holder(str(holder), url, bool(live)))
        self._note_lease(key, fence, sent)
        return Lease(mapping_of(columns), fence, was_ours, settled)

    async def _leasing(self, key: ThreadKey, call: Coroutine[Any, Any, T]) -> T:
        """The result of what leases a thread. One that nobody waits for any more is given back."""
        before = key in self._fences
        try:
            return await self.database.finished(call)
        except asyncio.CancelledError:
            if not before:
                with suppress(StoreUnavailable):
                    await self.release(key)
            raise

    def _note_lease(self, key: ThreadKey, fence: int, sent: float) -> None:
        self._fences[key] = fence
        self._until[key] = sent + self._ttl

    async def _rows(self, kind: str, statement: str, parameters: Parameters, *, writes: bool = False) -> Rows:
        return await self.database.finished(self._fetched(kind, statement, parameters, writes=writes))

    async def _fetched(self, kind: str, statement: str, parameters: Parameters, *, writes: bool = False) -> Rows:
        with self._observed(kind):
            return await self.database.fetched(statement, {**self._of_leases, **parameters}, writes=writes)

    @contextmanager
    def _observed(self, kind: str) -> Iterator[None]:
        asked = time.perf_counter()
        try:
            yield
        finally:
            self.observe(kind, time.perf_counter() - asked)


def of(key: ThreadKey) -> dict[str, Any]:
    """The parameters that KEY needs."""
    return {"thread_id": key.thread_id, "resource_id": key.resource_id}


def mapping_of(columns: Any) -> SessionMapping:
    """The mapping in such columns of a row as COLUMNS names."""
    return SessionMapping(*columns[:-2], *map(moment, columns[-2:]))  # the last two are times


def _columns(keys: Iterable[ThreadKey]) -> dict[str, Any]:
    keys = list(keys)
    return {"thread_ids": [key.thread_id for key in keys], "resource_ids": [key.resource_id for key in keys]}
