"""What PostgreSQL, and libpq, say when something is wrong: one line each of what it is and what to do about it."""

import psycopg
from psycopg import conninfo, errors
from psycopg_pool import PoolTimeout

from session_store.errors import SessionMapError, SessionMapped, StoreUnavailable, StoreUnusable

_ADDRESS = "write postgresql://user:password@host:port/database, and %-encode what is special in the password"


def check_url(url: str) -> None:
    """Refuse (StoreUnusable) what libpq would quote in an error, with a piece of the password perhaps."""
    try:
        parts = conninfo.conninfo_to_dict(url)
    except psycopg.Error:
        raise StoreUnusable(f"This is no URL of a PostgreSQL database: {_ADDRESS}.") from None
    ports = str(parts.get("port") or "").replace(",", "")
    if (ports and not ports.isdecimal()) or any("@" in str(parts.get(part) or "") for part in ("host", "dbname")):
        raise StoreUnusable(f"This URL of a PostgreSQL database cannot be taken apart: {_ADDRESS}.")


SESSION_IS_MAPPED = "session_mappings_sdk_session_id_key"
_CUT = "the connection to the database was cut: see that it runs, and its log"
_UNAVAILABLE = {  # by SQLSTATE, or by its class
    "08": _CUT,
    "25006": "the database can only be read, as a standby: connect to the primary",
    "25P03": "a transaction was kept waiting for too long and the database ended it: try again",
    "28": "the database refuses this user: correct the user and the password in its URL",
    "3D": "there is no such database: make it, or correct its name in the URL",
    "42501": "the user may not do this in the database: grant it what it needs on the tables",
    "42P01": "the tables are gone from the database: restore a backup and start the program again",
    "53100": "the database's disk is full: make room on it",
    "53200": "the database is out of memory: look into its log",
    "53300": "the database has no connection left: raise its max_connections, or put a pooler before it",
    "55P03": "somebody else has long kept a lock in the database: try again",
    "57014": "the database has cancelled this, as it took too long: look into its log",
    "57P01": "the database is being stopped: start it again",
    "57P02": "the database has crashed: look into its log",
    "57P03": "the database cannot be used yet: it is starting or stopping",
    "58": "the database's disk fails to read or write: look into its log",
    "XX": "the database is damaged, or has a defect: look into its log",
}


def translated(error: psycopg.Error) -> SessionMapError:
    """Say in this package's words what PostgreSQL or its driver said: the one place that reads their errors."""
    if isinstance(error, errors.UniqueViolation) and error.diag.constraint_name == SESSION_IS_MAPPED:
        return SessionMapped()
    said = next(iter(f"{error}".splitlines()), type(error).__name__).strip()
    if isinstance(error, psycopg.DataError):
        return SessionMapError(f"PostgreSQL cannot keep this text: {said}")
    state = error.sqlstate or ""
    known = _UNAVAILABLE.get(state) or _UNAVAILABLE.get(state[:2])
    if isinstance(error, PoolTimeout):
        known = "all connections to the database have long been in use: try again"
    elif isinstance(error, psycopg.OperationalError) and not state:  # of libpq, which has no states
        connecting = said.startswith(("connection ", "failed to resolve"))
        known = f"the database cannot be reached ({said}): start it, or correct its URL" if connecting else _CUT
    return StoreUnavailable(known or f"PostgreSQL refuses this, which is a defect: {said}")
