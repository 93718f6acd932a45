"""Which keeper of the session map is meant."""

from session_store.errors import StoreUnusable
from session_store.mapping import SessionMap
from session_store.sqlite import SqliteSessionMap

_SQLITE = "sqlite://"


async def open_session_map(url: str, *, read_only: bool = False) -> SessionMap:
    """Open the session map at `sqlite://` and an absolute path; it is made if it is not there.

    With `read_only`, beside the process that owns it. Raises StoreUnusable, having changed nothing.
    """
    if not url.startswith(_SQLITE):
        raise StoreUnusable("This is no URL of a session map: write sqlite:// and an absolute path.")
    path = url.removeprefix(_SQLITE)
    return await (SqliteSessionMap.peek(path) if read_only else SqliteSessionMap.open(path))
