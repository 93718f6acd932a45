"""What can go wrong with a session map. A message is one line: what is wrong, then what to do about it."""

import sqlite3


class SessionMapError(Exception):
    """The session map could not do this."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class ThreadExists(SessionMapError):
    """This thread already has a session: choose another thread, or remove its mapping first."""


class SessionTaken(SessionMapError):
    """Another thread already has this session: give this thread a session of its own."""


class StoreUnavailable(SessionMapError):
    """The session map is closed: start the program again."""


class StoreUnusable(SessionMapError):
    """The session map cannot be opened: see the message of whoever opened it."""


class StoreInUse(StoreUnusable):
    """Another process has the session map: stop that one first."""


_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY: "another program keeps the database locked: close it there (a shell, a backup)",
    sqlite3.SQLITE_FULL: "the disk is full: make room on it",
    sqlite3.SQLITE_IOERR: "the disk fails to read or write: see that it has room, and look into the system's log",
    sqlite3.SQLITE_READONLY: "the database cannot be written: give this user write permission to it and its directory",
    sqlite3.SQLITE_CANTOPEN: "the database cannot be opened: look at its permissions and the limit of open files",
    sqlite3.SQLITE_CORRUPT: "the database is damaged: stop the program and restore a backup",
    sqlite3.SQLITE_NOTADB: "the database is damaged: stop the program and restore a backup",
}


def translated(error: sqlite3.Error) -> SessionMapError:
    """Say in this package's words what SQLite said: the one place that reads its error codes."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)  # the driver's own errors carry none
    if code == sqlite3.SQLITE_CONSTRAINT_UNIQUE:
        return SessionTaken()
    primary = code & 0xFF  # the rest of it is detail, such as which call to the disk failed
    return StoreUnavailable(_UNAVAILABLE.get(primary) or f"SQLite refuses this, which is a defect: {error}")
