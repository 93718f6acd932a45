"""Whether a SQLite file is damaged: looked for in all of it, for as long as a start may take, or beside who uses it."""

import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

BUSY_SECONDS = 2.0


def damage(connection: sqlite3.Connection) -> str | None:
    """What is wrong with the file, None if nothing is: a third of a second for a million rows. Raises sqlite3.Error."""
    (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    return None if found == "ok" else " ".join(found.split())


def damage_within(connection: sqlite3.Connection, seconds: float) -> tuple[str | None, bool]:
    """What is found to be wrong in so many seconds, and whether all of the file was seen. Raises sqlite3.Error."""
    if not seconds:
        return None, False  # a timer would come at some time, and something be seen until then
    timer = threading.Timer(seconds, connection.interrupt)
    timer.start()
    try:
        return damage(connection), True
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return None, False
    finally:
        timer.cancel()
        timer.join()


class Look(threading.Thread):
    """Looks through a file while its owner uses it; the file's log is not begun anew until the end of it."""

    def __init__(self, file: Path) -> None:
        """It has yet to be started. Raises sqlite3.Error."""
        super().__init__(name="a look through the session map")
        uri = f"{file.as_uri()}?mode=ro"
        self._reader = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
        self._stopped = threading.Event()
        self.found: str | sqlite3.Error | None = None
        """What is wrong and what to do, once that is known; or what keeps it from being known."""

    def run(self) -> None:
        """Look, unless it is stopped."""
        with closing(self._reader):
            while not self._stopped.is_set():
                try:
                    if detail := damage(self._reader):
                        self.found = f"the database is damaged ({detail}): stop the program and restore a backup"
                except sqlite3.Error as error:
                    if error.sqlite_errorcode in (sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_BUSY):
                        continue  # a shell that has it for itself is waited for
                    self.found = error
                return

    def stop(self) -> None:
        """Break it off and see it ended: some milliseconds, or BUSY_SECONDS."""
        self._stopped.set()
        while self.is_alive():
            with suppress(sqlite3.ProgrammingError):  # it is through, and has closed it
                self._reader.interrupt()  # this is lost on one that has yet to begin
            self.join(0.01)
