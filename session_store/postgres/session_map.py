"""The session map in one PostgreSQL database that several replicas share.

Whatever writes is one statement that commits by itself, and carries the fence of the lease that this replica has.
"""

from typing import Any, Self

from session_store.errors import ThreadMapped
from session_store.leases import GRACE_SECONDS, TTL_SECONDS, Holder, LeaseHeld, LeaseLost, boot_time
from session_store.mapping import LAST_MOMENT, Cursor, SessionMapping, ThreadKey, columns_of
from session_store.postgres import pages
from session_store.postgres.database import Database
from session_store.postgres.leases import CHANGED, KEY, LEASED, PostgresLeases, mapping_of, of
from session_store.postgres.pages import COLUMNS

NOW = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"

GET = f"SELECT {COLUMNS} FROM session_mappings WHERE {KEY}"  # noqa: S608 - all of it is ours, here and below

ADD = f"""
WITH clock AS MATERIALIZED (SELECT {NOW} AS now)
INSERT INTO session_mappings ({COLUMNS}, holder, fence, lease_until)
SELECT %(thread_id)s, %(resource_id)s, %(sdk_session_id)s, %(parent_thread_id)s, %(parent_message_id)s, 0, now, now,
    %(me)s::uuid, nextval('fences'), {LEASED}
FROM clock
ON CONFLICT (resource_id, thread_id) DO NOTHING
RETURNING fence, {COLUMNS}
"""  # noqa: S608

# Nobody has ever had it.
BRING = f"""
INSERT INTO session_mappings ({COLUMNS}, fence, settled)
VALUES (%(thread_id)s, %(resource_id)s, %(sdk_session_id)s, %(parent_thread_id)s, %(parent_message_id)s, %(version)s,
    %(created_at)s, %(updated_at)s, nextval('fences'), %(settled)s)
ON CONFLICT (resource_id, thread_id) DO NOTHING
RETURNING fence
"""  # noqa: S608

# Without a lease, one writes to what nobody else has.
_WAS = f"""
WITH was AS (
    SELECT resource_id, thread_id, holder, lease_until > clock_timestamp() AS live,
        CASE WHEN %(fence)s::bigint IS NULL
            THEN coalesce(holder = %(me)s OR NOT lease_until > clock_timestamp(), TRUE)
            ELSE coalesce(holder = %(me)s AND fence = %(fence)s, FALSE)
        END AS ours
    FROM session_mappings WHERE {KEY} FOR UPDATE
), changed AS (
"""  # noqa: S608
_SAME = "mapping.resource_id = was.resource_id AND mapping.thread_id = was.thread_id AND ours"
_CHANGED = f"""
    RETURNING mapping.*
)
SELECT ours, was.holder, url, live, {CHANGED}
FROM was LEFT JOIN changed ON TRUE LEFT JOIN replicas ON id = was.holder
"""  # noqa: S608

# A clock that was set back must not make a row look older than it was. Of another transcript, nothing is settled yet.
REPLACE = f"""{_WAS}
    UPDATE session_mappings AS mapping SET sdk_session_id = %(sdk_session_id)s, version = version + 1,
        updated_at = greatest(updated_at, {NOW}),
        settled = CASE sdk_session_id WHEN %(sdk_session_id)s THEN settled ELSE 0 END
    FROM was WHERE {_SAME} AND sdk_session_id = %(expected)s
{_CHANGED}"""  # noqa: S608

REMOVE = f"""{_WAS}
    DELETE FROM session_mappings AS mapping USING was WHERE {_SAME}
        AND sdk_session_id = coalesce(%(expected)s, sdk_session_id) AND version = coalesce(%(version)s, version)
{_CHANGED}"""  # noqa: S608


class PostgresSessionMap(PostgresLeases):
    """A SessionMap, and the Leases on its threads, in a database that others use too."""

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        replica_id: str | None = None,
        read_only: bool = False,
        ttl: float = TTL_SECONDS,
        grace: float = GRACE_SECONDS,
    ) -> Self:
        """Connect to the database at `url`, and make or migrate its tables. Raises StoreUnusable.

        With `read_only` they have to be there. Whoever gets the map must close it.
        """
        return cls(await Database.open(url, read_only=read_only), replica_id, ttl=ttl, grace=grace)

    async def get(self, key: ThreadKey) -> SessionMapping | None:
        """See SessionMap."""
        rows = await self._rows("get", GET, of(key))
        return mapping_of(rows[0]) if rows else None

    async def add(
        self,
        key: ThreadKey,
        sdk_session_id: str,
        *,
        parent_thread_id: str | None = None,
        parent_message_id: str | None = None,
    ) -> SessionMapping:
        """See SessionMap. The thread is leased by this replica from the start."""
        return await self._leasing(
            key,
            self._add(
                key,
                sdk_session_id=sdk_session_id,
                parent_thread_id=parent_thread_id,
                parent_message_id=parent_message_id,
            ),
        )

    async def replace(self, key: ThreadKey, sdk_session_id: str, *, expected: str) -> SessionMapping | None:
        """See SessionMap. Raises LeaseLost, or LeaseHeld where this replica has no lease and another one has."""
        return await self._changed("replace", REPLACE, key, sdk_session_id=sdk_session_id, expected=expected)

    async def touch(self, key: ThreadKey, sdk_session_id: str) -> SessionMapping | None:
        """See SessionMap and `replace`."""
        return await self.replace(key, sdk_session_id, expected=sdk_session_id)

    async def remove(
        self, key: ThreadKey, *, expected: str | None = None, version: int | None = None
    ) -> SessionMapping | None:
        """See SessionMap and `replace`. Its lease is gone with it."""
        removed = await self._changed("remove", REMOVE, key, expected=expected, version=version)
        if removed is not None:
            self._until.pop(key, None)
            self._fences.pop(key, None)
        return removed

    async def page(
        self,
        resource_id: str | None,
        *,
        limit: int,
        after: Cursor | None = None,
        descending: bool = True,
        thread_id_prefix: str | None = None,
        parent_thread_id: str | None = None,
    ) -> list[SessionMapping]:
        """See SessionMap."""
        if limit < 1:
            raise ValueError("limit must be at least 1")
        if parent_thread_id is not None and resource_id is None:
            raise ValueError("a parent needs its resource")
        start = after or Cursor(LAST_MOMENT if descending else 0, "")
        parameters = {
            "resource_id": resource_id,
            "created_at": start.created_at_us,
            "after_thread_id": start.thread_id,
            "after_resource_id": start.resource_id,
            "prefix": thread_id_prefix,
            "beyond": pages.beyond(thread_id_prefix) if thread_id_prefix else None,
            "parent_thread_id": parent_thread_id,
            "limit": limit,
        }
        whose: pages.Of = "all" if resource_id is None else "one" if parent_thread_id is None else "forks"
        way = pages.page_of_nearby if thread_id_prefix else pages.page
        rows = await self._rows("page", way(whose, descending=descending), parameters)
        if thread_id_prefix and len(rows) < limit:
            ((begin_so,),) = await self._rows("page", pages.count(whose), parameters)
            way = pages.page_by_sort if begin_so <= pages.FEW else pages.page_of_many
            rows = await self._rows("page", way(whose, descending=descending), parameters)
        return [mapping_of(row) for row in rows]

    async def bring(self, mapping: SessionMapping, *, settled: int = 0) -> None:
        """See Movable. No replica has its lease."""
        if not await self._rows("add", BRING, columns_of(mapping) | {"settled": settled}, writes=True):
            raise ThreadMapped

    async def check(self) -> None:
        """See SessionMap."""
        with self._observed("check"):
            await self.database.check()

    async def close(self) -> None:
        """See SessionMap. What it still has is not released: it runs out, or is this replica's again at once."""
        await self.database.close()

    async def _add(self, key: ThreadKey, **parameters: str | None) -> SessionMapping:
        sent = boot_time()
        rows = await self._fetched("add", ADD, of(key) | parameters, writes=True)
        if not rows:
            raise ThreadMapped
        ((fence, *columns),) = rows
        self._note_lease(key, fence, sent)
        return mapping_of(columns)

    async def _changed(self, kind: str, statement: str, key: ThreadKey, **parameters: Any) -> SessionMapping | None:
        fence = self._fences.get(key)
        rows = await self._rows(kind, statement, of(key) | {"fence": fence} | parameters, writes=True)
        if not rows:
            return None
        ((ours, holder, url, live, *columns),) = rows
        if not ours:
            raise LeaseLost if fence is not None else LeaseHeld(Holder(str(holder), url, bool(live)))
        return mapping_of(columns) if columns[0] is not None else None
