"""The words of the session map, and what any keeper of it promises."""

from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from session_store.turn_keys import TurnKeys

_BATCH = 200
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST_MOMENT = 2**63 - 1
"""The largest time, in microseconds, that a position can have."""


@dataclass(frozen=True, slots=True)
class ThreadKey:
    """A conversation under the names of the chat backend: a thread, and the resource that owns it."""

    thread_id: str
    resource_id: str


@dataclass(frozen=True, slots=True)
class Cursor:
    """A position in a list of mappings: just behind the row that was created then, under that key."""

    created_at_us: int
    thread_id: str
    resource_id: str = ""  # only the list of all resources looks at it

    def __post_init__(self) -> None:
        """Refuse (ValueError) a time that no row can have; cursors come back from clients."""
        if not 0 <= self.created_at_us <= LAST_MOMENT:
            raise ValueError("created_at_us is out of range")


@dataclass(frozen=True, slots=True)
class SessionMapping:
    """One row: the session behind a thread, where the thread was forked from, and how often the row has changed."""

    thread_id: str
    resource_id: str
    sdk_session_id: str
    parent_thread_id: str | None
    parent_message_id: str | None
    version: int
    created_at: datetime
    updated_at: datetime

    @property
    def key(self) -> ThreadKey:
        """The pair of names that this mapping is found by."""
        return ThreadKey(self.thread_id, self.resource_id)

    @property
    def cursor(self) -> Cursor:
        """The position of this row: a page after it goes on with the next one."""
        return Cursor(microseconds(self.created_at), self.thread_id, self.resource_id)


def moment(microseconds: int) -> datetime:
    """Give the UTC time so many microseconds after the epoch, exactly: no float in between."""
    return _EPOCH + timedelta(microseconds=microseconds)


def microseconds(moment: datetime) -> int:
    """Give the microseconds after the epoch of a time that `moment` gave."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def columns_of(mapping: SessionMapping) -> dict[str, Any]:
    """Give what a row of a database has of a mapping, by the names of its columns."""
    times = {"created_at": microseconds(mapping.created_at), "updated_at": microseconds(mapping.updated_at)}
    return asdict(mapping) | times


class SessionMap(Protocol):
    """Keeps `(thread_id, resource_id) -> sdk_session_id`, durably: what a call returned has survived a power cut.

    Every call is atomic and sees all earlier ones. Cancelling the caller never leaves a call half done: it has happened
    or it has not, and the next call works. IDs compare byte for byte. Any call may raise StoreUnavailable.
    """

    @property
    def turn_keys(self) -> TurnKeys:
        """The idempotency keys, which are kept beside the mappings and closed with them."""
        ...

    async def get(self, key: ThreadKey) -> SessionMapping | None:
        """Look a thread up; None if it is not mapped."""
        ...

    async def add(
        self,
        key: ThreadKey,
        sdk_session_id: str,
        *,
        parent_thread_id: str | None = None,
        parent_message_id: str | None = None,
    ) -> SessionMapping:
        """Map a thread that is not mapped yet, at version 0.

        Raises ThreadMapped if it is mapped (to whatever session), SessionMapped if another thread has the session.
        """
        ...

    async def replace(self, key: ThreadKey, sdk_session_id: str, *, expected: str) -> SessionMapping | None:
        """Point a thread at another session, but only if it still points to `expected`; None if it does not.

        Bumps `version` and `updated_at`. Raises SessionMapped if another thread has the new session.
        """
        ...

    async def touch(self, key: ThreadKey, sdk_session_id: str) -> SessionMapping | None:
        """Note the end of a turn: bump `version` and `updated_at`, but only if the thread still has this session."""
        ...

    async def remove(
        self, key: ThreadKey, *, expected: str | None = None, version: int | None = None
    ) -> SessionMapping | None:
        """Forget a thread, and return what was forgotten.

        Only if it points to `expected` and has this `version`, where these are given.
        """
        ...

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
        """List up to `limit` (at least 1) of a resource's mappings by creation, newest first unless told otherwise.

        Without a resource, those of all of them; a parent cannot be given then, as it is one resource's thread.
        `after` is the `cursor` of the last row of the page before; that row need not exist any more. Rows that are
        there all the while are listed exactly once, whatever is added, changed or removed between two pages.
        The prefix is plain text, compared byte for byte. A parent narrows the list to the forks of that thread.
        """
        ...

    async def check(self) -> None:
        """Return if the map can be used, else raise StoreUnavailable. After a failure it must have been written to."""
        ...

    async def close(self) -> None:
        """Finish what was begun and give everything back. May be called again, from anywhere, and must be called once.

        Every other call raises StoreUnavailable from here on.
        """
        ...


class Movable(SessionMap, Protocol):
    """A SessionMap that mappings can be brought to from another one, as they are there."""

    async def bring(self, mapping: SessionMapping, *, settled: int = 0) -> None:
        """Map a thread that is not mapped, with the version and the times of a mapping, and whom it was forked from.

        `settled` is the size of its transcript. Raises ThreadMapped, SessionMapped.
        """
        ...


async def walk(session_map: SessionMap) -> AsyncIterator[SessionMapping]:
    """All mappings, the oldest first: a thread comes before its forks. Raises StoreUnavailable."""
    after = None
    while rows := await session_map.page(None, limit=_BATCH, after=after, descending=False):
        for row in rows:
            yield row
        after = rows[-1].cursor
