"""The session map: which agent session each thread of a resource belongs to. It knows no HTTP and no SDK."""

from session_store.errors import (
    SessionMapError,
    SessionMapped,
    StoreInUse,
    StoreMissing,
    StoreUnavailable,
    StoreUnusable,
    ThreadMapped,
)
from session_store.leases import Holder, Lease, LeaseHeld, LeaseLost, Leases
from session_store.mapping import Cursor, Movable, SessionMap, SessionMapping, ThreadKey, walk
from session_store.opening import back_up_session_map, open_session_map, open_shared_session_map, reserved_session_map
from session_store.turn_keys import TakenKey, TurnKeys, turn_key

__all__ = [
    "Cursor",
    "Holder",
    "Lease",
    "LeaseHeld",
    "LeaseLost",
    "Leases",
    "Movable",
    "SessionMap",
    "SessionMapError",
    "SessionMapped",
    "SessionMapping",
    "StoreInUse",
    "StoreMissing",
    "StoreUnavailable",
    "StoreUnusable",
    "TakenKey",
    "ThreadKey",
    "ThreadMapped",
    "TurnKeys",
    "back_up_session_map",
    "open_session_map",
    "open_shared_session_map",
    "reserved_session_map",
    "turn_key",
    "walk",
]
