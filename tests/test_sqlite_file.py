"""What the SQLite file promises beyond the contract: whose it is, who may read it, what a crash leaves behind."""

import asyncio
import os
import re
import shutil
import signal
import sqlite3
import stat
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from session_store import (
    SessionMapping,
    StoreInUse,
    StoreUnavailable,
    StoreUnusable,
    ThreadKey,
    back_up_session_map,
    open_session_map,
    reserved_session_map,
    turn_key,
)
from session_store.sqlite import SqliteSessionMap, database, pages, session_map
from session_store.sqlite import file as sqlite_file
from session_store.sqlite.connection import translated
from session_store.sqlite.damage import Look

KEY = ThreadKey("t1", "alice")
HOT_JOURNAL = bytes.fromhex("d9d505f920a163d7 00000000 12345678 00000000 00000200 00001000").ljust(512, b"\0")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "sidecar.db"


@pytest.fixture
async def sessions(file: Path) -> AsyncIterator[SqliteSessionMap]:
    opened = await SqliteSessionMap.open(file)
    yield opened
    await opened.close()


async def reopens(file: Path) -> None:
    """The file can be opened, and works."""
    async with AsyncExitStack() as stack:
        opened = await SqliteSessionMap.open(file)
        stack.push_async_callback(opened.close)
        await opened.remove(ThreadKey("any", "body"))
        await opened.add(ThreadKey("any", "body"), "any session")


async def refusal(file: Path) -> str:
    """The one line with which the file is refused. What is opened all the same is closed: a failure must not hang."""
    with pytest.raises(StoreUnusable) as refused:
        await (await SqliteSessionMap.open(file)).close()
    assert "\n" not in str(refused.value)
    return str(refused.value)


@contextmanager
def plain(file: Path) -> Iterator[sqlite3.Connection]:
    """A look at the file as any SQLite program has it, waiting for nobody."""
    with closing(sqlite3.connect(file, isolation_level=None, timeout=0)) as connection:
        yield connection


def looks() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, Look)]


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def ours(file: Path, rows: int = 400) -> None:
    """Make a session map with so many threads in it."""
    sqlite_file.open_database(file).close()
    with plain(file) as connection:
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO session_mappings VALUES (?, 'alice', ?, NULL, NULL, 0, 0, 0)",
            ((f"thread {n}", f"session {n} {'x' * 100}") for n in range(rows)),
        )
        connection.execute("COMMIT")


def foreign(file: Path) -> None:
    file.parent.mkdir()
    with plain(file) as connection:
        connection.execute("CREATE TABLE session_mappings (theirs TEXT)")


# Who may read it, and how safe it is


async def test_nobody_else_can_read_what_is_written(file: Path) -> None:
    before = os.umask(0)
    try:
        async with AsyncExitStack() as stack:
            opened = await SqliteSessionMap.open(file)
            stack.push_async_callback(opened.close)
            await opened.add(KEY, "s1")
            modes = {kept.name: mode(kept) for kept in file.parent.iterdir()}
    finally:
        os.umask(before)
    assert mode(file.parent) == 0o700
    assert modes == dict.fromkeys(("sidecar.db", "sidecar.db-wal", "sidecar.db-shm", "sidecar.db.lock"), 0o600)


async def test_a_file_that_others_could_read_is_made_private(file: Path) -> None:
    ours(file)
    os.chmod(file, 0o644)
    await reopens(file)
    assert mode(file) == 0o600


async def test_a_write_is_on_the_disk_before_it_is_answered(sessions: SqliteSessionMap, file: Path) -> None:
    assert await asked(sessions, "PRAGMA synchronous") == 2  # FULL
    assert await asked(sessions, "PRAGMA busy_timeout") == sqlite_file.BUSY_TIMEOUT_MS
    with plain(file) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def asked(sessions: SqliteSessionMap, pragma: str) -> object:
    rows = list(await sessions._database.connection.execute_fetchall(pragma))
    return rows[0][0]


async def test_the_file_says_whose_it_is_and_which_schema_it_has(sessions: SqliteSessionMap, file: Path) -> None:
    with plain(file) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (sqlite_file.APPLICATION_ID,)
        assert connection.execute("PRAGMA user_version").fetchone() == (sqlite_file.SCHEMA_VERSION,)


NAMES = ("resource_id", "created_at", "after_thread_id", "after_resource_id", "parent_thread_id", "prefix", "beyond")
PARAMETERS = dict.fromkeys((*NAMES, "limit"), 1)


def plan_of(file: Path, statement: str) -> list[str]:
    with plain(file) as connection:
        steps = connection.execute(f"EXPLAIN QUERY PLAN {statement}", PARAMETERS).fetchall()
    return [step[3] for step in steps]


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize(
    ("of", "index", "position"),
    [
        ("one", "session_mappings_by_age", "(created_at,thread_id)"),
        ("forks", "session_mappings_by_parent", "(created_at,thread_id)"),
        ("all", "session_mappings_by_age_of_all", "(created_at,resource_id,thread_id)"),
    ],
)
def test_a_page_is_one_walk_along_an_index(
    file: Path, of: pages.Of, index: str, position: str, *, descending: bool
) -> None:
    ours(file, rows=0)
    (step,) = plan_of(file, pages.page(of, descending=descending))  # a second step would be a sort
    assert f"USING INDEX {index} (" in step
    assert position in step, "a page would start at the beginning"
    # With a prefix, the keys come from the index alone, and what is sorted is one page.
    looked_up, _, step, sort = plan_of(file, pages.page_by_walk(of, descending=descending))
    assert "USING PRIMARY KEY (resource_id=? AND thread_id=?)" in looked_up
    assert f"USING COVERING INDEX {index} (" in step
    assert position in step
    assert sort == "USE TEMP B-TREE FOR ORDER BY"


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize(
    ("of", "names"),
    [
        ("one", "PRIMARY KEY (resource_id=? AND thread_id>? AND thread_id<?)"),
        ("all", "COVERING INDEX session_mappings_by_thread (thread_id>? AND thread_id<?)"),
    ],
)
def test_few_that_begin_alike_are_found_along_their_names(
    file: Path, of: pages.Of, names: str, *, descending: bool
) -> None:
    ours(file, rows=0)
    assert f"SEARCH session_mappings USING {names}" in plan_of(file, pages.page_by_sort(of, descending=descending))
    assert f"SEARCH session_mappings USING {names}" in plan_of(file, pages.count(of))


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize(("nearby", "few"), [(100, 100), (3, 100), (3, 3)])
async def test_whichever_way_a_prefix_is_found_its_pages_give_every_row_once(
    sessions: SqliteSessionMap, monkeypatch: pytest.MonkeyPatch, nearby: int, few: int, *, descending: bool
) -> None:
    monkeypatch.setattr(pages, "NEARBY", nearby)
    monkeypatch.setattr(pages, "FEW", few)
    rows = []
    for n, name in enumerate(
        ["b", "a1", "\U0010ffff", "a", "a\U0010ffff", "A", "a2", "b2", "a3", "\u00e1", "a4", "b3"]
    ):
        for resource in ("alice", "bob"):
            key = ThreadKey(name, resource)
            rows.append(await sessions.add(key, f"{name} {resource}", parent_thread_id="p" if n % 2 else None))
    for of, parent in ((None, None), ("alice", None), ("alice", "p")):
        expected = [
            row
            for row in (rows[::-1] if descending else rows)
            if of in (None, row.resource_id)
            and parent in (None, row.parent_thread_id)
            and row.thread_id.startswith("a")
        ]
        listed: list[SessionMapping] = []
        after = None
        while page := await sessions.page(
            of, limit=2, after=after, descending=descending, thread_id_prefix="a", parent_thread_id=parent
        ):
            listed += page
            after = page[-1].cursor
        assert listed == expected


@pytest.mark.long
@pytest.mark.quiet
async def test_a_prefix_among_a_million_threads_takes_no_more_than_50_ms(file: Path) -> None:
    sqlite_file.open_database(file).close()
    with plain(file) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO session_mappings VALUES (?, 'alice', ?, NULL, NULL, 0, ?, 0)",
            ((million(n), f"session {n}", n) for n in range(1_000_000)),
        )
        connection.execute("COMMIT")
    async with AsyncExitStack() as stack:
        sessions = await SqliteSessionMap.open(file)
        stack.push_async_callback(sessions.close)
        for look in looks():
            look.join()  # it costs CPU, too, where this machine took too long to see all at start
        for resource in ("alice", None):
            for prefix, count in (("none", 0), ("oldest", 3), ("newest", 3), ("year", 51), ("thread", 51), ("t", 51)):
                for descending in (True, False):
                    took = []
                    for _ in range(5):
                        before = time.process_time()  # what it costs, however much else this machine has to do
                        page = await sessions.page(resource, limit=51, thread_id_prefix=prefix, descending=descending)
                        took.append((time.process_time() - before) * 1000)
                        assert len(page) == count
                    assert statistics.median(took) <= 50, (resource, prefix, descending)


def million(n: int) -> str:
    """The name of the nth thread: some at either end are rare, and one in thirty, all of them old, are of some year."""
    if n < 3:
        return f"oldest {n}"
    if n < 33_000:
        return f"year {n}"
    return f"newest {n}" if n >= 999_997 else f"thread {n}"


async def test_a_file_from_before_an_index_gets_it_when_it_is_opened(file: Path) -> None:
    ours(file)
    with plain(file) as connection:
        connection.execute("DROP INDEX session_mappings_by_thread")
        version = connection.execute("PRAGMA user_version").fetchone()
    await reopens(file)
    with plain(file) as connection:
        assert connection.execute("PRAGMA index_info(session_mappings_by_thread)").fetchall()
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA user_version").fetchone() == version  # the program of then can still have it
        assert len(connection.execute("SELECT 1 FROM session_mappings").fetchall()) == 401


async def test_threads_of_one_instant_are_listed_once_by_name(
    sessions: SqliteSessionMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_map, "_now", lambda: 1_700_000_000_123_457)
    for name in "cadb":
        await sessions.add(ThreadKey(name, "alice"), name)
    for descending, names in ((True, "dcba"), (False, "abcd")):
        first = await sessions.page("alice", limit=2, descending=descending)
        rest = await sessions.page("alice", limit=2, descending=descending, after=first[-1].cursor)
        assert "".join(row.thread_id for row in first + rest) == names
        assert first[0].created_at.isoformat() == "2023-11-14T22:13:20.123457+00:00"


async def test_a_clock_that_was_set_back_makes_nothing_older(
    sessions: SqliteSessionMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = await sessions.add(KEY, "s1")
    monkeypatch.setattr(session_map, "_now", lambda: 1)
    touched = await sessions.touch(KEY, "s1")
    assert touched is not None
    assert touched.updated_at == added.updated_at


# What stands in the way of a call


async def test_a_call_given_up_while_it_waits_leaves_no_transaction_open(
    sessions: SqliteSessionMap, file: Path
) -> None:
    with plain(file) as other:
        other.execute("BEGIN IMMEDIATE")
        calls = [asyncio.create_task(sessions.add(ThreadKey(f"t{n}", "alice"), f"s{n}")) for n in range(3)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        other.execute("ROLLBACK")
        assert [row.thread_id for row in await sessions.page("alice", limit=9)] == ["t2", "t1", "t0"]
        other.execute("BEGIN IMMEDIATE")  # which an open transaction would refuse


async def test_a_database_locked_for_too_long_is_an_error_that_passes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_MS", 20)
    async with AsyncExitStack() as stack:
        sessions = await SqliteSessionMap.open(file)
        stack.push_async_callback(sessions.close)
        with plain(file) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreUnavailable, match="another program keeps the database locked"):
                await sessions.add(KEY, "s1")
            assert await sessions.get(KEY) is None
        await sessions.add(KEY, "s1")


async def test_a_full_disk_is_an_error_that_passes(sessions: SqliteSessionMap) -> None:
    await sessions.add(KEY, "s1")
    await asked(sessions, "PRAGMA max_page_count = 1")  # SQLite says the same as when the disk has no room
    with pytest.raises(StoreUnavailable, match="disk is full"):
        await sessions.add(ThreadKey("t2", "alice"), "s" * 10_000)
    await sessions.check()
    assert await sessions.get(ThreadKey("t2", "alice")) is None
    await asked(sessions, "PRAGMA max_page_count = 1000000")
    await sessions.add(ThreadKey("t2", "alice"), "s" * 10_000)


def test_a_failing_disk_is_told_from_the_rest_by_whichever_call_failed() -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    assert "disk fails to read or write" in str(translated(error))


# Files that go while they are in use

DATABASE, BESIDE = "move it back, or stop the program, restore a backup and start it again", "start the program again"
LOST = [("", DATABASE), ("-wal", BESIDE), ("-shm", BESIDE), (".lock", BESIDE)]


@pytest.mark.parametrize(("suffix", "todo"), LOST)
async def test_a_file_that_goes_while_it_is_in_use_stops_every_call_until_it_is_back(
    sessions: SqliteSessionMap, file: Path, caplog: pytest.LogCaptureFixture, suffix: str, todo: str
) -> None:
    caplog.set_level("INFO", database.__name__)
    lost, away = Path(f"{file}{suffix}"), file.with_name("away")
    added = await sessions.add(KEY, "s1")
    lost.rename(away)
    for what in ("cannot be found any more (No such file or directory)", "is no longer the file that was opened"):
        for call in every_call(sessions):
            with pytest.raises(StoreUnavailable, match=re.escape(f"{lost} {what}: {todo}")):
                await call
        lost.write_bytes(away.read_bytes())
    away.rename(lost)
    await sessions.check()
    assert await sessions.page("alice", limit=9) == [added]
    await sessions.add(ThreadKey("t2", "alice"), "s2")
    levels = [record.levelname for record in caplog.records if record.name == database.__name__]
    assert levels == ["ERROR", "ERROR", "INFO"]  # one for each thing that was wrong, however many calls met it


def every_call(sessions: SqliteSessionMap) -> list[Awaitable[object]]:
    return [
        sessions.get(KEY),
        sessions.add(ThreadKey("t2", "alice"), "s2"),
        sessions.touch(KEY, "s1"),
        sessions.remove(KEY),
        sessions.page("alice", limit=1),
        sessions.check(),
    ]


@pytest.mark.parametrize("suffix", ["", "-wal"])
async def test_a_write_is_not_answered_if_its_file_goes_before_it_is_committed(
    sessions: SqliteSessionMap, file: Path, suffix: str
) -> None:
    await sessions.add(KEY, "s1")
    await sessions._database.connection.set_trace_callback(lambda _: Path(f"{file}{suffix}").unlink(missing_ok=True))
    with pytest.raises(StoreUnavailable, match="cannot be found any more"):
        await sessions.add(ThreadKey("t2", "alice"), "s2")


async def test_a_backup_that_is_put_in_place_too_early_is_not_written_over_by_the_log_of_what_was_there(
    file: Path,
) -> None:
    backup = file.with_name("backup.db")
    async with AsyncExitStack() as stack:
        sessions = await SqliteSessionMap.open(file)
        stack.push_async_callback(sessions.close)
        await sessions.add(KEY, "s1")
        with plain(file) as connection:
            connection.execute("VACUUM INTO ?", (str(backup),))
        for n in range(50):
            await sessions.add(ThreadKey(f"later {n}", "alice"), f"s {n}")
        file.rename(file.with_name("away.db"))
        backup.rename(file)
        with pytest.raises(StoreUnavailable, match="no longer the file"):
            await sessions.check()
    restored = await SqliteSessionMap.open(file)
    try:
        assert [row.thread_id for row in await restored.page("alice", limit=99)] == [KEY.thread_id]
        await restored.add(ThreadKey("t2", "alice"), "s2")
    finally:
        await restored.close()
    with plain(file.with_name("away.db")) as moved:  # nor has it lost what was answered
        assert moved.execute("SELECT count(*) FROM session_mappings").fetchone() == (51,)


# Files that are not ours to use


def text(file: Path) -> None:
    file.parent.mkdir()
    file.write_text("Dear diary,\n" * 1000)


def foreign_in_use(file: Path) -> None:
    live = file.with_name("live")
    foreign(file)
    file.rename(live)
    with plain(live) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("INSERT INTO session_mappings VALUES ('mine')")
        copy(live, file)


def copy(live: Path, file: Path) -> None:
    """Leave of a database that is open what a killed process leaves."""
    for suffix in ("", "-wal"):
        Path(f"{file}{suffix}").write_bytes(Path(f"{live}{suffix}").read_bytes())


def empty_foreign(file: Path) -> None:
    file.parent.mkdir()
    with plain(file) as connection:
        connection.execute("VACUUM")


def cut_in_half(file: Path) -> None:
    ours(file)
    os.truncate(file, file.stat().st_size // 2)


def cut_in_the_header(file: Path) -> None:
    ours(file)
    os.truncate(file, 50)


def garbage_in_the_middle(file: Path) -> None:
    ours(file)
    spoil_the_middle(file)


def spoil_the_middle(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2 // 4096 * 4096)
        opened.write(b"\xa5" * 4096)


def numbered_by_other_hands(file: Path, number: int) -> None:
    ours(file)
    with plain(file) as connection:
        connection.execute(f"PRAGMA user_version = {number}")


def newer_in_the_log(file: Path) -> None:
    live = file.with_name("live")
    ours(live)
    with plain(live) as connection:
        connection.execute("PRAGMA user_version = 3")
        copy(live, file)


def without_its_table(file: Path) -> None:
    ours(file)
    with plain(file) as connection:
        connection.execute("ALTER TABLE session_mappings RENAME TO other")


def log_without_database(file: Path) -> None:
    newer_in_the_log(file)
    file.unlink()


def directory(file: Path) -> None:
    file.mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (text, "is not a session map: move it away"),
        (foreign, "is not a session map: move it away"),
        (foreign_in_use, "is not a session map: move it away"),
        (empty_foreign, "is not a session map: move it away"),
        (cut_in_the_header, "is not a session map: move it away"),
        (cut_in_half, "damaged: stop the program and restore a backup"),
        (garbage_in_the_middle, r"is damaged \(.*\): restore a backup"),
        (without_its_table, "no such table"),
        (partial(numbered_by_other_hands, number=3), "has schema 3 and this program knows 2: run the newer version"),
        (partial(numbered_by_other_hands, number=0), "has schema 0, which no version of this program writes: restore"),
        (partial(numbered_by_other_hands, number=-1), "has schema -1, which no version of this program writes: res"),
        (newer_in_the_log, "has schema 3 and this program knows 2: run the newer version"),
        (log_without_database, "sidecar.db-wal belongs to a database that is not there: put that back"),
        (directory, "is not a file: move it away"),
    ],
)
async def test_a_file_that_is_not_ours_to_use_is_refused_untouched(
    file: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(file)
    before = everything_in(file.parent)
    said = await refusal(file)
    assert re.search(reason, said)
    assert str(file) in said
    assert everything_in(file.parent) == before


# Files that are too large to be looked through at start


@pytest.fixture(scope="module")
def _large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("large") / "sidecar.db"
    ours(file, 150_000)
    return file


@pytest.fixture
def large(_large: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of which the look at start, for which there is no time here, sees nothing but the beginning."""
    file.parent.mkdir()
    shutil.copyfile(_large, file)
    monkeypatch.setattr(sqlite_file, "LOOK_SECONDS", 0)
    return file


@pytest.mark.long
async def test_damage_that_is_found_after_the_start_stops_every_call_and_nothing_more_is_written(large: Path) -> None:
    spoil_the_middle(large)
    sessions = await SqliteSessionMap.open(large)
    try:
        for look in looks():
            look.join()
        before = large.read_bytes(), Path(f"{large}-wal").read_bytes()
        for call in (sessions.get(KEY), sessions.add(KEY, "s1"), sessions.page("alice", limit=1), sessions.check()):
            with pytest.raises(StoreUnavailable, match=r"is damaged \(.*\): stop the program and restore a backup"):
                await call
        assert (large.read_bytes(), Path(f"{large}-wal").read_bytes()) == before
    finally:
        await sessions.close()


async def test_damage_at_the_beginning_of_a_large_file_is_refused_at_start(large: Path) -> None:
    for spoil in (partial(os.truncate, large, large.stat().st_size // 2), partial(large.write_bytes, b"\0" * 4096)):
        spoil()
        await refusal(large)


async def test_a_large_file_that_is_sound_is_looked_through_while_it_is_used(large: Path) -> None:
    sessions = await SqliteSessionMap.open(large)
    try:
        (look,) = looks()
        await sessions.add(KEY, "s1")
        look.join()
        await sessions.touch(KEY, "s1")
    finally:
        await sessions.close()


async def test_a_close_breaks_off_the_look_through_a_large_file(large: Path) -> None:
    for _ in range(20):  # at whatever moment of it
        await reopens(large)
        assert not looks()


async def test_a_large_file_of_an_earlier_schema_is_looked_through_before_it_is_brought_up(large: Path) -> None:
    with plain(large) as connection:
        connection.executescript("DROP TABLE turn_keys; PRAGMA user_version = 1;")
    spoil_the_middle(large)
    before = everything_in(large.parent)
    assert re.search(r"is damaged \(.*\): restore a backup", await refusal(large))
    assert everything_in(large.parent) == before


def everything_in(home: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        kept.name: (kept.stat().st_mode, kept.stat().st_mtime_ns, kept.read_bytes() if kept.is_file() else b"")
        for kept in home.iterdir()
        if kept.suffix != ".lock"
    }


async def test_a_home_that_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    assert re.search(r"taken.* cannot be used \(.*\): see to that", await refusal(tmp_path / "taken" / "sidecar.db"))


async def test_an_empty_file_becomes_ours(file: Path) -> None:
    ours(file)
    os.truncate(file, 0)
    await reopens(file)


async def test_odd_characters_in_the_path_are_only_characters(tmp_path: Path) -> None:
    file = tmp_path / "50%3F? #1 'ü'" / "side?car.db"
    await reopens(file)
    await reopens(file)
    assert file.exists()


async def test_a_refused_or_abandoned_start_leaves_no_thread_and_no_lock(file: Path) -> None:
    before = set(threading.enumerate())
    text(file)
    await refusal(file)
    os.unlink(file)
    for steps in range(6):
        start = asyncio.create_task(SqliteSessionMap.open(file))
        for _ in range(steps):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait([start])
        if not start.cancelled():
            await start.result().close()
    for thread in set(threading.enumerate()) - before:
        thread.join(3)
        assert not thread.is_alive()
    await reopens(file)


# Files of an earlier schema

SCHEMA_1 = """
PRAGMA application_id = 1936028525;
PRAGMA user_version = 1;
CREATE TABLE session_mappings (
    thread_id         TEXT    NOT NULL,
    resource_id       TEXT    NOT NULL,
    sdk_session_id    TEXT    NOT NULL UNIQUE,
    parent_thread_id  TEXT, -- null unless forked; the parent has the same resource
    parent_message_id TEXT, -- null unless forked at a message
    version           INTEGER NOT NULL DEFAULT 0,
    created_at        INTEGER NOT NULL,
    updated_at        INTEGER NOT NULL,
    PRIMARY KEY (resource_id, thread_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS session_mappings_by_age ON session_mappings (resource_id, created_at, thread_id);
CREATE INDEX IF NOT EXISTS session_mappings_by_age_of_all ON session_mappings (created_at, resource_id, thread_id);
CREATE INDEX IF NOT EXISTS session_mappings_by_parent
    ON session_mappings (resource_id, parent_thread_id, created_at, thread_id)
    WHERE parent_thread_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS session_mappings_by_thread ON session_mappings (thread_id, resource_id, created_at);
"""


def of_schema_1(file: Path) -> None:
    """Make a file as the program made it that knew schema 1, with a thread in it."""
    file.parent.mkdir(exist_ok=True)
    with plain(file) as connection:
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA_1} COMMIT;")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("INSERT INTO session_mappings VALUES ('t1', 'alice', 's1', NULL, NULL, 7, 1, 2)")


def schema_of(file: Path) -> tuple[int, set[str]]:
    """The number of a file's schema, and the tables and indexes that it has."""
    with plain(file) as connection:
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return version, {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}


async def comes_up(file: Path) -> None:
    """A file that was of schema 1 is opened, is what a new one is, and has kept its thread."""
    sessions = await SqliteSessionMap.open(file)
    try:
        mapping = await sessions.get(KEY)
        assert mapping is not None
        assert (mapping.sdk_session_id, mapping.version) == ("s1", 7)
        assert await sessions.turn_keys.take(turn_key("alice", "k"), b"asked", "turn", seconds=60) is None
    finally:
        await sessions.close()
    new = file.with_name("new.db")
    if not new.exists():
        sqlite_file.open_database(new).close()
    assert schema_of(file) == schema_of(new)


async def test_a_file_of_schema_1_is_brought_up_and_keeps_its_threads(file: Path) -> None:
    of_schema_1(file)
    assert schema_of(file)[0] == 1
    await comes_up(file)


async def test_a_file_of_schema_1_is_read_as_it_is(file: Path) -> None:
    of_schema_1(file)
    sessions = await open_session_map(f"sqlite://{file}", read_only=True)
    try:
        assert await sessions.get(KEY) is not None
        await sessions.check()
    finally:
        await sessions.close()
    assert schema_of(file)[0] == 1


async def test_a_backup_of_schema_1_can_be_made_and_restored(file: Path) -> None:
    of_schema_1(file)
    copy, restored = file.with_name("copy.db"), file.with_name("restored.db")
    assert back_up_session_map(f"sqlite://{file}", copy) == 1
    with reserved_session_map(f"sqlite://{restored}") as make:
        assert make(copy) == 1
    assert schema_of(restored)[0] == 1
    await comes_up(restored)


async def test_a_file_of_schema_1_whose_log_was_left_by_a_crash_is_brought_up(file: Path) -> None:
    live = file.with_name("live")
    of_schema_1(live)
    with plain(live) as connection:
        connection.execute("UPDATE session_mappings SET updated_at = 3")
        copy(live, file)
    await comes_up(file)


# One process owns it. The programs below say a line when they are ready, and wait for their standard input to end.


@contextmanager
def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


async def test_a_second_open_in_the_same_process_is_refused(sessions: SqliteSessionMap, file: Path) -> None:
    other_way = file.with_name("link.db")
    other_way.symlink_to(file)
    for path in (file, other_way):
        assert re.search(rf"in use by process {os.getpid()}, .*own SIDECAR_HOME", await refusal(path))
    await sessions.add(KEY, "s1")
    with plain(file) as other:  # the refused ones have not taken away what SQLite itself keeps locked
        assert other.execute("SELECT count(*) FROM session_mappings").fetchone() == (1,)
    await sessions.close()
    await reopens(file)


TWENTY_OPENERS = """
import asyncio, os, sys
from session_store import StoreUnusable
from session_store.sqlite import SqliteSessionMap

def say(text):
    os.write(1, f"{text}\\n".encode())  # in one piece, whoever else writes

async def attempt(path):
    try:
        sessions = await SqliteSessionMap.open(path)
    except StoreUnusable as error:
        say(f"refused {error}")
    else:
        say(f"opened {os.getpid()}")
        sys.stdin.read()
        await sessions.close()

gate, go = os.pipe()
children = []
for _ in range(20):
    children.append(os.fork())
    if not children[-1]:
        os.close(go)
        os.read(gate, 1)  # ends when the last `go` is closed, for all at once
        asyncio.run(attempt(sys.argv[1]))
        os._exit(0)
os.close(go)
for _ in children:
    os.wait()
print("all gone", flush=True)
"""


async def test_of_twenty_processes_that_open_it_at_once_one_gets_it(file: Path) -> None:
    with running(TWENTY_OPENERS, file) as process:
        answers = [line(process) for _ in range(20)]
        refused = [answer for answer in answers if answer.startswith("refused")]
        (opened,) = [answer for answer in answers if answer.startswith("opened")]
        assert len(refused) == 19
        assert all("in use by" in answer and "own SIDECAR_HOME" in answer for answer in refused)
        holder = int(opened.split()[1])
        assert f"in use by process {holder}, " in await refusal(file)
        os.kill(holder, signal.SIGKILL)
        assert line(process) == "all gone"
        await reopens(file)


def test_one_who_was_killed_is_never_named(file: Path) -> None:
    with running("import sys; sys.stdin.read()") as process:
        pid = process.pid
        kill(process)
    sqlite_file.open_database(file).close()
    lock = Path(f"{file}.lock")
    assert lock.read_bytes() == b""
    with closing(sqlite_file.open_database(file)):
        lock.write_text(str(pid))  # as if this holder had not got to writing its own number yet
        with pytest.raises(StoreUnusable, match="in use by another process,"):
            sqlite_file.open_database(file)


WITH_A_CHILD = """
import asyncio, subprocess, sys
from session_store.sqlite import SqliteSessionMap

async def main():
    await SqliteSessionMap.open(sys.argv[1])
    child = subprocess.Popen(["cat"], close_fds=False)
    print(child.pid, flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


async def test_a_program_that_outlives_us_does_not_keep_the_lock(file: Path) -> None:
    with running(WITH_A_CHILD, file) as process:
        child = int(line(process))
        kill(process)
        async with asyncio.timeout(20):  # the system may take a moment to give back what one had that was killed
            while True:
                try:
                    await reopens(file)
                    break
                except StoreInUse:
                    await asyncio.sleep(0.01)
        os.kill(child, 0)  # it is still there, until its standard input ends


# What a crash leaves behind


WRITER = """
import asyncio, itertools, sys
from session_store import SessionMapping, ThreadKey
from session_store.sqlite import SqliteSessionMap

async def main():
    sessions = await SqliteSessionMap.open(sys.argv[1])
    for n in itertools.count():
        added = await sessions.add(ThreadKey(f"t{n}", "alice"), f"s{n}")
        print(added.thread_id, flush=True)

asyncio.run(main())
"""


async def test_what_was_answered_survives_a_kill(file: Path) -> None:
    with running(WRITER, file) as process:
        answered = [line(process) for _ in range(50)]
        kill(process)
        assert process.stdout is not None
        answered += process.stdout.read().split()
    async with AsyncExitStack() as stack:
        sessions = await SqliteSessionMap.open(file)
        stack.push_async_callback(sessions.close)
        kept = [row.thread_id for row in await sessions.page("alice", limit=100_000, descending=False)]
    assert kept[: len(answered)] == answered
    assert len(kept) <= len(answered) + 1


KILLED_WHILE_OPENING_IT = """
import os, shutil, signal, sqlite3, sys
from session_store.sqlite import file as sqlite_file

class Killed(sqlite_file.OwnedConnection):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.left = int(os.environ["LEFT"])
        self.set_trace_callback(self.count)

    def count(self, statement):
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

sqlite_file.OwnedConnection = Killed
for left in range(30):
    os.environ["LEFT"] = str(left)
    path = f"{sys.argv[1]}.{left}"
    if os.path.exists(sys.argv[1]):
        shutil.copy(sys.argv[1], path)
    child = os.fork()
    if not child:
        sqlite_file.open_database(path)
        os._exit(0)
    survived = os.wait()[1] == 0
    print(path, flush=True)
    if survived:
        break
print("", flush=True)
"""


async def test_a_file_whose_making_was_cut_short_is_made_anew(file: Path) -> None:
    killed = killed_while_opening(file)
    assert len(killed) > 10, "one for every statement of the schema, at least"
    for path in killed:
        await reopens(path)


def killed_while_opening(file: Path) -> list[Path]:
    """What is left of a file, or of none, by processes that were killed before each statement of opening it."""
    with running(KILLED_WHILE_OPENING_IT, file) as process:
        return [Path(path) for path in iter(lambda: line(process), "")]


async def test_a_file_whose_migration_was_cut_short_is_of_the_one_schema_or_the_other_and_comes_up(file: Path) -> None:
    of_schema_1(file)
    killed = killed_while_opening(file)
    assert {schema_of(path)[0] for path in killed} == {1, 2}
    for path in killed:
        version, names = schema_of(path)
        assert ("turn_keys" in names) == (version == 2)
        await comes_up(path)


def cut_in_the_first_commit(file: Path, pages: int) -> None:
    ours(file, rows=1)
    os.truncate(file, pages * 4096)
    Path(f"{file}-journal").write_bytes(HOT_JOURNAL)  # says that there was nothing before


@pytest.mark.parametrize("pages", [0, 1, 3])
async def test_a_file_whose_first_commit_was_cut_short_is_made_anew(file: Path, pages: int) -> None:
    cut_in_the_first_commit(file, pages)
    await reopens(file)
    with plain(file) as connection:
        assert connection.execute("SELECT thread_id FROM session_mappings").fetchall() == [("any",)]


REFUSED = """
import asyncio, sys
from session_store.sqlite import SqliteSessionMap
asyncio.run(SqliteSessionMap.open(sys.argv[1]))
"""


def test_a_refused_start_ends_the_process(file: Path) -> None:
    cut_in_half(file)
    command = [sys.executable, "-c", REFUSED, str(file)]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=10, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("session_store.errors.StoreUnusable: ")
