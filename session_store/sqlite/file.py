"""The SQLite file itself: whose it is, who may read it, which schema it has.

All of it is settled here, at start, before there is a thread or anything to serve. So it may block, a cancelled start
cannot fall into the middle of it, and a file that is refused is one that nothing has written to. But for damage at the
far end of millions of rows: that is found while it is served, by `damage.py`.
"""

import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from session_store.errors import StoreInUse, StoreUnusable
from session_store.sqlite.connection import OwnedConnection, translated
from session_store.sqlite.damage import damage, damage_within

APPLICATION_ID = 1936028525
SCHEMA_VERSION = 2
OLDEST_SCHEMA = 1  # a file of it is brought up to SCHEMA_VERSION when it is opened, and can be read as it is
LOOK_SECONDS = 0.5  # in which damage is looked for before a file is served: that is all of a million rows
BUSY_TIMEOUT_MS = 2000  # only an operator's shell can be in the way: wait for it, but no longer than a client would

SCHEMA = Path(__file__).parent / "schema.sql"


def open_database(path: str | os.PathLike[str]) -> OwnedConnection:
    """Open the session map at `path`, or make one there; it may be used by any one thread at a time.

    Raises StoreUnusable for a file that is not ours to use, without having changed a byte of it. One that it takes more
    than LOOK_SECONDS to look through is looked through while it is served.
    """
    file = Path(os.path.realpath(path))  # one file has one lock, by whatever links it was reached
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with ExitStack() as undo:
            # First of all: opening and closing the file would drop the locks that another connection of ours has on it.
            lock = _take_lock(file)
            undo.callback(os.close, lock)
            seen = _refuse_unless_ours(file)
            _make_private(file)
            connection = _connect(file)
            undo.callback(connection.close)
            connection.own(file, lock, seen=seen)
            undo.pop_all()
    except OSError as error:
        raise StoreUnusable(
            f"{error.filename or file} cannot be used ({error.strerror}): see to that, or choose another SIDECAR_HOME"
        ) from error
    except sqlite3.Error as error:
        raise StoreUnusable(f"{file} cannot be used: {translated(error)}") from error
    return connection


def open_for_reading(path: str | os.PathLike[str]) -> sqlite3.Connection:
    """Open the session map at `path` beside the process that owns it, without being able to change anything.

    Not in that process itself. Where there is none, SQLite makes its log and leaves it. Raises StoreUnusable.
    """
    file = Path(os.path.realpath(path))
    try:
        with ExitStack() as undo:
            reader = sqlite3.connect(
                f"{file.as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_MS / 1000, check_same_thread=False
            )
            undo.callback(reader.close)
            _refuse_other_schema(file, reader)
            undo.pop_all()
    except sqlite3.Error as error:
        raise StoreUnusable(f"{file} cannot be read: {translated(error)}") from error
    return reader


def copy_database(path: str | os.PathLike[str], target: Path) -> int:
    """Copy the session map at `path`, as it is at one moment, into the new file `target`; how many rows it has.

    Whoever owns it goes on meanwhile. The copy is one file that needs none beside it, and it is on the disk. Raises
    StoreUnusable where the one cannot be read, is damaged or of another schema, or the other cannot be written.
    """
    try:
        with ExitStack() as undo:
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            undo.callback(target.unlink)
            with closing(open_for_reading(path)) as reader, closing(sqlite3.connect(target)) as copy:
                reader.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
                _refuse_damage(Path(path), copy, None)
                (rows,) = copy.execute("SELECT count(*) FROM session_mappings").fetchone()
            undo.pop_all()
            return int(rows)
    except OSError as error:
        raise StoreUnusable(f"{target} cannot be made ({error.strerror})") from error
    except sqlite3.Error as error:
        raise StoreUnusable(f"{path} cannot be copied to {target}: {translated(error)}") from error


@contextmanager
def reserved(path: str | os.PathLike[str]) -> Iterator[Callable[[Path], int]]:
    """Keep everybody from a session map that is not there yet, to make it of a copy; nobody opens it in the block.

    Raises StoreUnusable where there is one, having changed nothing, and StoreInUse where somebody has it.
    """
    file = Path(os.path.realpath(path))
    lock = _take_lock(file)
    try:
        if file.exists():
            raise StoreUnusable(f"{file} is there already: move it away, or choose another SIDECAR_HOME")
        _refuse_unless_ours(file)  # a log that was left of another one would be taken for this one's
        yield lambda copy: copy_database(copy, file)
    finally:
        os.ftruncate(lock, 0)
        os.close(lock)


def _take_lock(file: Path) -> int:
    """Become the one process that has this file open, for as long as the descriptor is.

    The system gives the lock back however the process ends. Programs that it starts do not get the descriptor
    (O_CLOEXEC): a lock lasts until its last holder is gone, and an agent's process may live longer than this one.
    """
    with ExitStack() as undo:
        lock = os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        undo.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUse(
                f"{file} is in use by {_holder(lock)}, and one process owns a SQLite database: "
                "stop that process, or give this one its own SIDECAR_HOME"
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, b"%d" % os.getpid())
        undo.pop_all()
    return lock


def _holder(lock: int) -> str:
    pid = os.pread(lock, 20, 0).decode("ascii", "replace")
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        pass  # somebody else's, but alive
    except (OSError, ValueError, OverflowError):
        return "another process"  # one that has yet to write its number over that of one who was killed
    return f"process {pid}"


def _refuse_unless_ours(file: Path) -> bool:
    """Look at the file without writing to it: neither a byte of its own, nor a file beside it. Whether all was seen."""
    wal, journal = Path(f"{file}-wal"), Path(f"{file}-journal")
    if file.exists() and not file.is_file():
        raise StoreUnusable(f"{file} is not a file: move it away, or choose another SIDECAR_HOME")
    if not _size(file):
        if _size(wal):  # SQLite would throw away what may be the last turns of a file that was moved
            raise StoreUnusable(f"{wal} belongs to a database that is not there: put that back, or move this away too")
        return True
    with file.open("rb") as opened:
        header = opened.read(100)
    if header[:16] != b"SQLite format 3\0" or header[68:72] != APPLICATION_ID.to_bytes(4, "big"):
        raise StoreUnusable(f"{file} is not a session map: move it away, or choose another SIDECAR_HOME")
    if _size(journal):  # it was killed while being made, and opening it takes that back
        return True
    return _read_through(file, through_wal=_size(wal) > 0)


def _read_through(file: Path, *, through_wal: bool) -> bool:
    """Refuse a file of ours that is damaged or of another schema; whether all of it was seen."""
    index = Path(f"{file}-shm")
    had_index = index.exists()
    # Without a log beside it, `immutable` keeps SQLite from making one; with one, the log is part of what to read.
    mode = "mode=ro" if through_wal else "immutable=1"
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?{mode}", uri=True)) as reader:
            version = _refuse_other_schema(file, reader)
            # What is about to be brought up is rewritten: of that all is seen first.
            return _refuse_damage(file, reader, LOOK_SECONDS if version == SCHEMA_VERSION else None)
    except BaseException:
        if not had_index:
            index.unlink(missing_ok=True)  # what a reader of the log has to make
        raise


def _refuse_damage(file: Path, connection: sqlite3.Connection, seconds: float | None) -> bool:
    """Look for so long, None is to the end; whether all was seen."""
    connection.execute("SELECT * FROM session_mappings LIMIT 1")
    found, seen = (damage(connection), True) if seconds is None else damage_within(connection, seconds)
    if found:
        raise StoreUnusable(f"{file} is damaged ({found}): restore a backup, or move it away to start anew")
    return seen


def _refuse_other_schema(file: Path, connection: sqlite3.Connection) -> int:
    """The schema that it has."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise StoreUnusable(
            f"{file} has schema {version} and this program knows {SCHEMA_VERSION}: run the newer version that wrote it"
        )
    if version < OLDEST_SCHEMA:
        raise StoreUnusable(
            f"{file} has schema {version}, which no version of this program writes: "
            "restore a backup, or move it away to start anew"
        )
    return int(version)


def _make_private(file: Path) -> None:
    """See to it that nobody else can read the file, from before there is anything in it."""
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    for kept in (file, Path(f"{file}-wal"), Path(f"{file}-shm")):  # SQLite makes the latter two like the first
        if kept.exists() and stat.S_IMODE(kept.stat().st_mode) & 0o077:
            kept.chmod(0o600)


def _connect(file: Path) -> OwnedConnection:
    with ExitStack() as undo:
        connection = sqlite3.connect(
            file,
            timeout=BUSY_TIMEOUT_MS / 1000,
            isolation_level=None,
            check_same_thread=False,  # made here, then used by the one thread that it is handed to
            factory=OwnedConnection,
        )
        undo.callback(connection.close)
        connection.execute("PRAGMA synchronous = FULL")
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        schema = SCHEMA.read_text(encoding="utf-8")
        if tables:
            _refuse_other_schema(file, connection)
            schema = schema[schema.index("CREATE INDEX") :]  # what the file is too old for is made, once
        # All of the schema or none, its number included. Where none is missing, it shows that the file can be written.
        connection.executescript(f"BEGIN IMMEDIATE; {schema} COMMIT;")
        connection.execute("PRAGMA journal_mode = WAL")  # only now: until here the file itself says whose it is
        undo.pop_all()
    return connection


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
