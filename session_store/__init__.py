"""The session map: which agent session each thread of a resource belongs to. It knows no HTTP and no SDK."""

from session_store.errors import (
    SessionMapError,
    SessionTaken,
    StoreInUse,
    StoreUnavailable,
    StoreUnusable,
    ThreadExists,
)
from session_store.mapping import Cursor, SessionMap, SessionMapping, ThreadKey
from session_store.sqlite import SqliteSessionMap

__all__ = [
    "Cursor",
    "SessionMap",
    "SessionMapError",
    "SessionMapping",
    "SessionTaken",
    "SqliteSessionMap",
    "StoreInUse",
    "StoreUnavailable",
    "StoreUnusable",
    "ThreadExists",
    "ThreadKey",
]
