"""The connection to the SQLite file that one process owns: it gives back the lock, and notices if its files go."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from session_store.errors import SessionMapError, SessionMapped, StoreUnavailable
from session_store.sqlite.damage import Look


class OwnedConnection(sqlite3.Connection):
    """A connection that holds the lock on its file: closing the one gives back the other, in that order.

    It answers only while its files are the ones at their paths. SQLite itself goes on in files that were deleted or
    moved away: what it commits there is gone at the next start, and a shell that opens the new ones meanwhile shares no
    lock with it, so that the two destroy each other's pages.
    """

    _lock: int | None = None
    _look: Look | None = None
    _files: dict[str, tuple[int, int]] | None = None  # device and inode; the first is the database itself

    def own(self, file: Path, lock: int, *, seen: bool) -> None:
        """Take over the lock, and from here on watch the files that are open.

        Unless all of the file was `seen`, a thread looks through it: nothing is answered once it has found damage.
        """
        self.execute("SELECT * FROM session_mappings LIMIT 1")  # only this opens the log and its index
        files = (f"{file}", f"{file}-wal", f"{file}-shm")
        self._files = {path: _identity(path) for path in files} | {f"{file}.lock": _identity(lock)}
        self._lock = lock
        if not seen:
            self._look = Look(file)
            self._look.start()

    def execute(self, statement: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Run a statement; its `fetchall` raises StoreUnavailable where what it did was done to files that are gone."""
        return self.cursor(_OwnedCursor).execute(statement, parameters)

    def check_files(self) -> None:
        """Return if the files that are open are those at their paths, and not known to be damaged.

        Else raise StoreUnavailable.
        """
        moved = self._moved()
        if moved is not None:
            path, what = moved
            if path != next(iter(self._files or {})):
                raise StoreUnavailable(f"{path} {what}: start the program again")
            # Else the log would be taken for that of whichever database comes here, and overwrite it.
            with suppress(sqlite3.Error):
                super().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            raise StoreUnavailable(
                f"{path} {what}: move it back, or stop the program, restore a backup and start it again"
            )
        if self._look is not None and (found := self._look.found):
            raise translated(found) if isinstance(found, sqlite3.Error) else StoreUnavailable(found)

    @property
    def is_whole(self) -> bool:
        """Whether `check_files` returns. Any thread may ask that at any time."""
        return self._moved() is None and (self._look is None or self._look.found is None)

    def _moved(self) -> tuple[str, str] | None:
        """The first of the files that are open which is not at its path, and what is the matter with it.

        A stat each, a microsecond or two. An inode that is open is not given to another file meanwhile.
        """
        for path, opened in (self._files or {}).items():
            try:
                if _identity(path) != opened:
                    return path, "is no longer the file that was opened"
            except OSError as error:
                return path, f"cannot be found any more ({error.strerror})"
        return None

    def close(self) -> None:
        """Close the database, then let the next one have it."""
        if self._look is not None:
            self._look.stop()
        with suppress(StoreUnavailable):
            self.check_files()
        super().close()
        lock, self._lock = self._lock, None
        if lock is not None:
            os.ftruncate(lock, 0)  # what stays in the file is only ever the name of one who holds it, or was killed
            os.close(lock)


class _OwnedCursor(sqlite3.Cursor):
    """Looks at the files before a statement, so that nothing is written for nobody, and behind what it committed."""

    connection: OwnedConnection

    def execute(self, statement: str, parameters: Any = (), /) -> Self:
        self.connection.check_files()
        return super().execute(statement, parameters)

    def fetchall(self) -> list[Any]:
        rows = super().fetchall()
        self.connection.check_files()
        return rows


def _identity(file: str | int) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_dev, found.st_ino


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
        return SessionMapped()
    primary = code & 0xFF  # the rest of it is detail, such as which call to the disk failed
    return StoreUnavailable(_UNAVAILABLE.get(primary) or f"SQLite refuses this, which is a defect: {error}")
