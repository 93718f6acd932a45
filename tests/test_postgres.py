"""What the PostgreSQL database promises beyond the contract: its schema, and what is said when it is in trouble."""

import asyncio
import logging
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import psycopg
import pytest

from session_store import SessionMapError, StoreUnavailable, StoreUnusable, ThreadKey, open_session_map
from session_store.postgres import PostgresSessionMap, database, leases, pages, session_map
from session_store.postgres.errors import translated
from session_store.postgres.migrations import SCHEMA_VERSION
from tests.postgres import PASSWORD, Postgres, conninfo_url, free_port, new_database

KEY = ThreadKey("t1", "alice")
SLEEPING = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%%' AND state = 'active'"
CANNOT, AGAIN = "the session map cannot be used: ", "the session map can be used again"


@pytest.fixture
async def sessions(own: str) -> AsyncIterator[PostgresSessionMap]:
    async with AsyncExitStack() as stack:
        opened = await PostgresSessionMap.open(own)
        stack.push_async_callback(opened.close)
        yield opened


async def refusal(url: str, **options: Any) -> str:
    """The one line with which a database is refused."""
    with pytest.raises(StoreUnusable) as refused:
        await (await PostgresSessionMap.open(url, **options)).close()
    assert PASSWORD not in "".join(traceback.format_exception(refused.value))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def admin(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """What an operator does in psql."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements[:-1]:
            connection.execute(statement.encode())
        cursor = connection.execute(statements[-1].encode())
        return cursor.fetchall() if cursor.description else []


async def asleep(url: str) -> int:
    """Wait until a statement is under way; the process that runs it."""
    while not (found := await asyncio.to_thread(admin, url, SLEEPING.replace("%%", "%"))):
        pass
    pid: int = found[0][0]
    return pid


def logged(caplog: pytest.LogCaptureFixture, said: str) -> int:
    return sum(said in record.getMessage() for record in caplog.records)


# The start


async def test_a_database_that_is_not_there_is_refused_in_one_line_without_its_password() -> None:
    nowhere = conninfo_url(host="127.0.0.1", port=free_port(), user="sidecar", password=PASSWORD, dbname="x")
    assert "cannot be reached" in await refusal(nowhere)
    assert "Connection refused" in await refusal(nowhere)


async def test_who_is_not_let_in_is_told_so_without_the_password(server: Postgres) -> None:
    where = {"host": "127.0.0.1", "port": server.port, "user": "sidecar"}
    assert "password authentication failed" in await refusal(conninfo_url(**where, password="x", dbname="postgres"))
    assert 'database "none" does not exist' in await refusal(conninfo_url(**where, password=PASSWORD, dbname="none"))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://sidecar:{PASSWORD}@127.0.0.1/x",
        "postgresql://u:a/b@h/x",
        "postgresql://u:a@b@h/x",
        "postgresql://u:a%zz@h/x",
        "postgresql://u:1/b@h/x",
    ],
)
async def test_a_password_with_a_character_that_is_not_encoded_is_not_quoted(url: str) -> None:
    said = await refusal(url)
    assert "%-encode" in said
    assert not any(piece in said for piece in ("a/b", "b@h", "zz", '"a"'))


async def test_the_url_decides_who_keeps_the_map(own: str) -> None:
    kinds: list[str] = []
    async with AsyncExitStack() as stack:
        for url in (own, own.replace("postgresql://", "postgres://")):
            opened = await open_session_map(url, observe=lambda kind, _: kinds.append(kind))
            stack.push_async_callback(opened.close)
            assert isinstance(opened, PostgresSessionMap)
            await opened.get(KEY)
            await opened.check()
    assert kinds == ["get", "check"] * 2


async def test_without_its_extra_the_url_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "session_store.postgres", None)
    with pytest.raises(StoreUnusable, match=r"pip install 'session-sidecar\[postgres\]'"):
        await open_session_map("postgresql://localhost/x")


@pytest.mark.long
def test_who_keeps_the_map_in_sqlite_loads_nothing_of_postgresql() -> None:
    program = "import sys, session_store, session_sidecar.app; print([m for m in sys.modules if 'psycopg' in m])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# The schema


async def test_replicas_that_start_together_make_the_tables_once(own: str) -> None:
    opened = await asyncio.gather(*(PostgresSessionMap.open(own) for _ in range(6)))
    assert admin(own, "SELECT v FROM schema_version") == [(SCHEMA_VERSION,)]
    await asyncio.gather(*(sessions.close() for sessions in opened))


async def test_a_newer_schema_is_refused_and_left_as_it_is(own: str) -> None:
    await (await PostgresSessionMap.open(own)).close()
    admin(own, f"UPDATE schema_version SET v = {SCHEMA_VERSION + 1}")
    assert "newer version" in await refusal(own)
    assert admin(own, "SELECT v FROM schema_version") == [(SCHEMA_VERSION + 1,)]


async def test_tables_of_another_program_are_refused_and_left_as_they_are(own: str) -> None:
    admin(own, "CREATE TABLE replicas (theirs text)")
    assert 'another program (relation "replicas" already exists)' in await refusal(own)
    assert admin(own, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [("replicas",)]


async def test_to_be_read_only_a_database_must_have_its_tables(own: str) -> None:
    assert "start the sidecar on it once" in await refusal(own, read_only=True)
    assert admin(own, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(0,)]
    await (await PostgresSessionMap.open(own)).close()
    await (await PostgresSessionMap.open(own, read_only=True)).close()


async def test_a_role_that_may_not_make_tables_can_use_those_that_are_there(server: Postgres, own: str) -> None:
    admin(own, "DROP ROLE IF EXISTS clerk", f"CREATE ROLE clerk LOGIN PASSWORD '{PASSWORD}'")
    clerk = own.replace("//sidecar:", "//clerk:")
    assert "grant it CREATE" in await refusal(clerk)
    await (await PostgresSessionMap.open(own)).close()
    admin(own, "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO clerk")
    admin(own, "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO clerk")
    sessions = await PostgresSessionMap.open(clerk)
    assert await sessions.add(KEY, "s1") == await sessions.get(KEY)
    await sessions.close()


async def test_a_database_that_cannot_hold_every_id_is_refused(server: Postgres) -> None:
    create = "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    admin(server.url, "DROP DATABASE IF EXISTS latin", create)
    assert "encoding is LATIN1" in await refusal(server.url.replace("/postgres", "/latin"))


async def test_ids_of_the_greatest_length_fit_into_every_index(sessions: PostgresSessionMap) -> None:
    rng = random.Random(13)
    texts = ["".join(chr(rng.randrange(0x10000, 0x110000)) for _ in range(256)) for _ in range(4)]
    key = ThreadKey(texts[0], texts[1])
    added = await sessions.add(key, texts[2], parent_thread_id=texts[3], parent_message_id=texts[0])
    assert await sessions.page(texts[1], limit=2, parent_thread_id=texts[3]) == [added]


async def test_an_id_that_postgresql_cannot_hold_is_said_to_be_one(
    sessions: PostgresSessionMap, caplog: pytest.LogCaptureFixture
) -> None:
    for call in (sessions.get(ThreadKey("\0", "alice")), sessions.add(ThreadKey("t1", "a\0"), "s1")):
        with pytest.raises(SessionMapError, match="cannot keep this text") as refused:
            await call
        assert not isinstance(refused.value, StoreUnavailable)
    assert not logged(caplog, CANNOT)


# The trouble


@pytest.mark.long
async def test_a_server_that_stops_and_comes_back_is_found_again_without_a_restart(
    server: Postgres, sessions: PostgresSessionMap, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await sessions.add(KEY, "s1")
    for how in (signal.SIGINT, signal.SIGQUIT):
        caplog.clear()
        server.stop(how)
        try:
            for _ in range(3):
                with pytest.raises(StoreUnavailable, match=r"cannot be reached .*Connection refused"):
                    await sessions.touch(KEY, "s1")
            with pytest.raises(StoreUnavailable):
                await sessions.check()
        finally:
            server.start()
        await sessions.check()
        assert await sessions.touch(KEY, "s1") is not None
        assert (logged(caplog, CANNOT), logged(caplog, AGAIN)) == (1, 1)
        assert PASSWORD not in caplog.text


async def test_a_connection_that_is_cut_in_mid_call_fails_that_call_alone(
    own: str, sessions: PostgresSessionMap
) -> None:
    call = asyncio.create_task(sessions.database.rows("SELECT pg_sleep(60)"))
    pid = await asleep(own)
    assert await sessions.get(KEY) is None
    admin(own, f"SELECT pg_terminate_backend({pid})")
    with pytest.raises(StoreUnavailable, match="database"):
        await call
    assert await sessions.add(KEY, "s1") == await sessions.get(KEY)


async def test_connections_that_were_cut_while_nobody_used_them_are_noticed_by_nobody(
    own: str, sessions: PostgresSessionMap
) -> None:
    await asyncio.gather(*(sessions.database.rows("SELECT pg_sleep(0.05)") for _ in range(database.POOL_SIZE)))
    cut = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = current_database()"
    assert len(admin(own, f"{cut} AND pid <> pg_backend_pid()")) > 1
    await asyncio.gather(*(sessions.add(ThreadKey(f"t{n}", "alice"), f"s{n}") for n in range(30)))


async def test_a_transaction_that_is_cut_or_broken_off_leaves_nothing_behind(
    own: str, sessions: PostgresSessionMap
) -> None:
    begun = asyncio.Event()

    async def writes() -> None:
        async with sessions.database.transaction() as transaction:
            await transaction.execute(b"INSERT INTO resource_keys VALUES ('alice', 'salt')")
            begun.set()
            await transaction.execute(b"SELECT pg_sleep(60)")

    for broken_off in (False, True):
        begun.clear()
        call = asyncio.create_task(writes())
        await begun.wait()
        pid = await asleep(own)
        if broken_off:
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        else:
            admin(own, f"SELECT pg_terminate_backend({pid})")
            with pytest.raises(StoreUnavailable):
                await call
        assert await sessions.database.rows("SELECT * FROM resource_keys") == []
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with sessions.database.transaction() as transaction:
            await transaction.execute(b"INSERT INTO resource_keys VALUES ('alice', 'salt')")
            raise ZeroDivisionError
    assert await sessions.database.rows("SELECT * FROM resource_keys") == []
    async with sessions.database.transaction() as transaction:
        await transaction.execute(b"INSERT INTO resource_keys VALUES ('alice', 'salt')")
    assert await sessions.database.rows("SELECT salt FROM resource_keys") == [(b"salt",)]


async def test_who_gives_up_on_a_statement_sees_it_ended_and_the_connection_goes_on(
    own: str, sessions: PostgresSessionMap
) -> None:
    statement = "INSERT INTO resource_keys SELECT 'alice', 'salt' FROM pg_sleep(0.2) RETURNING 1"
    for _ in range(3):
        await sessions.database.rows("DELETE FROM resource_keys")
        call = asyncio.create_task(sessions.database.rows(statement))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert len(await sessions.database.rows("SELECT * FROM resource_keys")) == 1
    assert admin(own, "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in%'") == [(0,)]


@pytest.mark.long
async def test_a_server_that_hangs_does_not_hang_its_callers(
    server: Postgres, sessions: PostgresSessionMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 0.3)
    await sessions.add(KEY, "s1")
    server.send(signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable, match="was cut"):
            await sessions.get(KEY)
    finally:
        server.send(signal.SIGCONT)
    try:
        with pytest.raises(StoreUnavailable, match="was cut"):  # noqa: PT012
            async with sessions.database.transaction(seconds=2) as transaction:
                await transaction.execute(b"INSERT INTO resource_keys VALUES ('alice', 'salt')")
                server.send(signal.SIGSTOP)  # and so the commit hangs
    finally:
        server.send(signal.SIGCONT)
    monkeypatch.undo()
    assert await sessions.touch(KEY, "s1") is not None


async def test_a_replica_that_stands_still_in_a_transaction_keeps_its_rows_from_nobody_for_long(
    own: str, sessions: PostgresSessionMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BEGIN", database.BEGIN.replace(b"5000", b"200"))
    await sessions.add(KEY, "s1")
    with pytest.raises(StoreUnavailable, match="kept waiting"):  # noqa: PT012
        async with sessions.database.transaction() as transaction:
            await transaction.execute(b"SELECT 1 FROM session_mappings FOR UPDATE")
            assert await sessions.touch(KEY, "s1") is not None
            await transaction.execute(b"SELECT 1")


async def test_when_all_connections_are_in_use_one_waits_but_not_for_ever(
    sessions: PostgresSessionMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "WAIT_SECONDS", 0.2)
    async with AsyncExitStack() as stack:
        for _ in range(database.POOL_SIZE):
            await stack.enter_async_context(sessions.database.transaction())
        with pytest.raises(StoreUnavailable, match="in use"):
            await sessions.get(KEY)
    assert await sessions.get(KEY) is None


async def test_a_database_that_has_become_a_standby_is_told_and_left_as_soon_as_another_is_to_be_had(
    own: str, sessions: PostgresSessionMap
) -> None:
    name = own.rpartition("/")[2]
    admin(own, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    admin(own, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    with pytest.raises(StoreUnavailable, match="connect to the primary"):
        await sessions.add(KEY, "s1")
    with pytest.raises(StoreUnavailable, match="connect to the primary"):
        await sessions.check()
    admin(own, "SET default_transaction_read_only = off", f"ALTER DATABASE {name} RESET default_transaction_read_only")
    with suppress(StoreUnavailable):
        await sessions.check()  # at most one more has a connection from before
    await sessions.check()
    assert await sessions.add(KEY, "s1") == await sessions.get(KEY)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("53100", "disk is full: make room"),
        ("53300", "raise its max_connections"),
        ("57P03", "starting or stopping"),
        ("08006", "was cut"),
        ("42P01", "restore a backup"),
        ("XX001", "damaged"),
        ("42883", "which is a defect: it says"),
    ],
)
def test_what_postgresql_says_is_said_in_one_line_with_what_to_do(state: str, said: str) -> None:
    told = str(translated(psycopg.errors.lookup(state)("it says\nmuch")))
    assert said in told
    assert "\n" not in told


# A million threads


FILL = """
INSERT INTO session_mappings
    (thread_id, resource_id, sdk_session_id, parent_thread_id, created_at, updated_at, fence, holder, lease_until)
SELECT CASE WHEN n < 4 THEN 'oldest ' WHEN n > 999997 THEN 'newest ' ELSE 'thread ' END || n,
    CASE WHEN n % 3 = 0 THEN 'alice' ELSE 'r' || n % 1000 END, 'session ' || n,
    CASE WHEN n % 10 = 0 THEN 'p' || n % 7 END, 0, n, n, n, gen_random_uuid(), now()
FROM generate_series(1, 1000000) AS n
""".replace("parent_thread_id, created_at", "parent_thread_id, version, created_at")
# Of all indexes of the table, what drops each and what makes it again: filling them row by row takes twice as long.
CONSTRAINTS = """
SELECT 'ALTER TABLE session_mappings DROP CONSTRAINT ' || conname,
    'ALTER TABLE session_mappings ADD CONSTRAINT ' || conname || ' ' || pg_get_constraintdef(oid)
FROM pg_constraint WHERE conrelid = 'session_mappings'::regclass AND contype IN ('p', 'u')
"""
INDEXES = """
SELECT 'DROP INDEX ' || indexname, indexdef FROM pg_indexes
WHERE tablename = 'session_mappings' AND indexname LIKE 'session_mappings_by_%'
"""
PARAMETERS = {
    "resource_id": "alice",
    "thread_id": "thread 300",
    "parent_thread_id": "p3",
    "created_at": 500_000,
    "after_thread_id": "t",
    "after_resource_id": "r",
    "prefix": "thread 5",
    "beyond": pages.beyond("thread 5"),
    "limit": 51,
    "me": str(uuid.UUID(int=1)),
    "fence": 7,
    "ttl": 1,
    "grace": 1,
    "sdk_session_id": "s",
    "expected": "s",
    "version": 1,
    "url": None,
    "thread_ids": ["thread 300"] * 100,
    "resource_ids": ["alice"] * 100,
    "fences": [7] * 100,
}


@pytest.fixture(scope="module")
def million(server: Postgres) -> Iterator[str]:
    """A third of the threads are one resource's, the others' of some hundreds; a tenth are forks."""
    with new_database(server.url) as url:
        asyncio.run(opened_once(url))
        dropping, making = zip(*admin(url, CONSTRAINTS), *admin(url, INDEXES), strict=True)
        admin(url, *dropping, FILL, *making, "VACUUM ANALYZE session_mappings")
        yield url


async def opened_once(url: str) -> None:
    await (await PostgresSessionMap.open(url)).close()


def plan(url: str, statement: str) -> str:
    with psycopg.connect(url) as connection:
        cursor = psycopg.ClientCursor(connection)
        return "\n".join(line for (line,) in cursor.execute(f"EXPLAIN (COSTS OFF) {statement}".encode(), PARAMETERS))


@pytest.mark.long
@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize(
    ("whose", "index"),
    [
        ("one", "session_mappings_by_age"),
        ("forks", "session_mappings_by_parent"),
        ("all", "session_mappings_by_age_of_all"),
    ],
)
def test_a_page_of_a_million_is_one_walk_along_an_index(
    million: str, whose: pages.Of, index: str, *, descending: bool
) -> None:
    for steps in (plan(million, way(whose, descending=descending)) for way in (pages.page, pages.page_of_nearby)):
        presorted = "Presorted Key: session_mappings.created_at" in steps or "Presorted Key: created_at" in steps
        assert "Sort" not in steps or (whose == "forks" and presorted)  # then only what has the same age is sorted
        # Of a resource that has a third of all, the walk over all of them is as short.
        assert f"Index Scan {'Backward ' if descending else ''}using {index}" in steps
        position = steps.partition("Index Cond:")[2].partition("Filter:")[0]
        assert re.search(r"ROW\(created_at, |created_at [<>]=? ", position), "a page would start at the beginning"


@pytest.mark.long
@pytest.mark.parametrize(
    "statement",
    [
        *(session_map.GET, session_map.REPLACE, session_map.REMOVE),
        *(leases.ACQUIRE, leases.RENEW, leases.RELEASE, leases.HOLDERS),
    ],
)
def test_a_thread_among_a_million_is_found_by_its_key(million: str, statement: str) -> None:
    steps = plan(million, statement)
    found_by = re.findall(r"Scan.* on session_mappings.*\n(.*)", steps)
    assert found_by
    for condition in found_by:
        assert condition.strip().startswith("Index Cond: ")
        by_key = "thread_id = " in condition and "resource_id = " in condition
        assert by_key or "sdk_session_id = " in condition  # which is as good


@pytest.mark.long
@pytest.mark.quiet
async def test_a_prefix_among_a_million_threads_takes_no_more_than_100_ms(million: str) -> None:
    async with AsyncExitStack() as stack:
        sessions = await PostgresSessionMap.open(million)
        stack.push_async_callback(sessions.close)
        for resource, rare in (("alice", 1), (None, 3)):
            for prefix, number in (("none", 0), ("oldest", rare), ("newest", rare), ("thread 77", 51), ("t", 51)):
                for descending in (True, False):
                    took = []
                    for _ in range(5):
                        before = time.perf_counter()
                        page = await sessions.page(resource, limit=51, thread_id_prefix=prefix, descending=descending)
                        took.append((time.perf_counter() - before) * 1000)
                        assert len(page) == number
                    assert statistics.median(took) <= 100, (resource, prefix, descending, took)
