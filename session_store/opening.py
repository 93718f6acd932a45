"""Which keeper of the session map is meant."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from session_store.errors import StoreUnusable
from session_store.leases import GRACE_SECONDS, TTL_SECONDS
from session_store.mapping import Movable
from session_store.sqlite import SqliteSessionMap
from session_store.sqlite.file import copy_database, reserved

if TYPE_CHECKING:
    from session_store.postgres import PostgresSessionMap

_SQLITE = "sqlite://"
_POSTGRES = ("postgresql://", "postgres://")


async def open_session_map(
    url: str,
    *,
    read_only: bool = False,
    observe: Callable[[str, float], object] = lambda *_: None,
) -> Movable:
    """Open the session map at `sqlite://` and an absolute path, or at a URL of libpq; it is made if it is not there.

    With `read_only`, beside the process that owns it. Raises StoreUnusable, having changed nothing. `observe` is told
    after each statement of what kind it was (get, add, replace, remove, page, check, take_key and so on) and how many
    seconds it took. A password in the URL is never shown.
    """
    if url.startswith(_POSTGRES):
        return await open_shared_session_map(url, read_only=read_only, observe=observe)
    path = _path(url)
    return await (SqliteSessionMap.peek(path, observe) if read_only else SqliteSessionMap.open(path, observe))


async def open_shared_session_map(
    url: str,
    *,
    replica_id: str | None = None,
    lease_seconds: float = TTL_SECONDS,
    read_only: bool = False,
    observe: Callable[[str, float], object] = lambda *_: None,
) -> "PostgresSessionMap":
    """Open the session map in PostgreSQL, which keeps Leases too: for the replica of this ID, each for so long.

    Else as `open_session_map`. Raises StoreUnusable.
    """
    try:
        from session_store.postgres import PostgresSessionMap  # noqa: PLC0415 - an extra that not everybody has
    except ImportError as missing:
        raise StoreUnusable("PostgreSQL needs an extra: pip install 'session-sidecar[postgres]'.") from missing
    grace = lease_seconds * GRACE_SECONDS / TTL_SECONDS
    shared = await PostgresSessionMap.open(
        url, replica_id=replica_id, read_only=read_only, ttl=lease_seconds, grace=grace
    )
    shared.observe = observe
    return shared


def back_up_session_map(url: str, copy: Path) -> int:
    """Copy the session map at `url`, as it is at one moment, to a new file; how many mappings it holds.

    It blocks, and whoever has the map open goes on meanwhile. Raises StoreUnusable.
    """
    return copy_database(_path(url), copy)


def reserved_session_map(url: str) -> AbstractContextManager[Callable[[Path], int]]:
    """Keep everybody from a session map that is not there yet; what the block gets makes it of such a copy.

    Raises StoreUnusable where there is one, having changed nothing, and StoreInUse where somebody has it.
    """
    return reserved(_path(url))


def _path(url: str) -> str:
    if url.startswith(_POSTGRES):
        raise StoreUnusable("PostgreSQL has tools of its own for this: use pg_dump and pg_restore.")
    if not url.startswith(_SQLITE):
        raise StoreUnusable("This is no URL of a session map: write sqlite:// and an absolute path, or postgresql://….")
    return url.removeprefix(_SQLITE)
