"""Reading the session map: over HTTP with a thousand rows and with a million, and in the process."""

import contextlib
import random
import sqlite3
import time
from pathlib import Path
from urllib.parse import urlencode

from agents import SQLiteSession

from bench.load import repeat
from bench.names import DEPTH, ROWS
from bench.samples import Samples
from bench.servers import Server, application, cpu, sidecar
from session_store import ThreadKey
from session_store.sqlite import SqliteSessionMap
from session_store.sqlite.file import open_database

PAGE = 50
CONNECTIONS, SECONDS = 8, 2.0
CALLS = 500


async def measure(home: Path, samples: Samples, rounds: int) -> None:
    """GETs of one mapping and of pages, against an endpoint that answers JSON and does nothing else."""
    async with contextlib.AsyncExitStack() as stack:
        env = {"BENCH_HOME": str(home), "BENCH_MODEL": "http://127.0.0.1:9"}
        bare = await stack.enter_async_context(application(home / "bare.log", "bench.apps:bare", env))
        paths: list[tuple[str, Server, str]] = [("bare Starlette endpoint", bare, "/")]
        page = {"resource_id": "bench", "limit": str(PAGE)}
        for rows in ROWS:
            fill(home / str(rows), rows)
            server = await stack.enter_async_context(sidecar(home / str(rows), "http://127.0.0.1:9"))
            one = {"thread_id": f"thread-{rows // 2}", "resource_id": "bench", "metadata": "false"}
            paths.append((f"GET /v1/session, {rows:,} rows", server, "/v1/session?" + urlencode(one)))
            paths.append((f"GET /v1/sessions, {rows:,} rows", server, "/v1/sessions?" + urlencode(page)))
            if rows > DEPTH:
                deep = {**page, "after": await _cursor(server)}
                name = f"GET /v1/sessions, {rows:,} rows, from row {DEPTH:,}"
                paths.append((name, server, "/v1/sessions?" + urlencode(deep)))
        for _ in range(rounds):
            for name, server, path in paths:
                before = cpu(server.process)
                answers, seconds = await repeat(server.url, path, connections=CONNECTIONS, seconds=SECONDS)
                samples.add("mapping", name, "a second", answers / seconds)
                samples.add("mapping", name, "CPU µs", (cpu(server.process) - before) * 1e6 / answers)
    for _ in range(rounds):
        await _stores(home / str(ROWS[0]), samples)


def fill(home: Path, rows: int) -> None:
    """Make a database of one resource's threads, made a second apart."""
    home.mkdir(parents=True)
    open_database(home / "sidecar.db").close()
    now = time.time_ns() // 1000
    with contextlib.closing(sqlite3.connect(home / "sidecar.db")) as database, database:
        database.execute(
            "WITH RECURSIVE numbers (n) AS (SELECT 0 WHERE ? > 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < ?)"
            " INSERT INTO session_mappings (thread_id, resource_id, sdk_session_id, created_at, updated_at)"
            " SELECT 'thread-' || n, 'bench', printf('%08x-0000-4000-8000-%012x', n, n), made, made"
            " FROM (SELECT n, ? - n * 1000000 AS made FROM numbers)",
            (rows, rows, now),
        )


async def _cursor(server: Server) -> str:
    """Where the page after `DEPTH` rows begins, found the way any client finds it: page by page."""
    params = {"resource_id": "bench", "limit": "200"}
    for _ in range(DEPTH // 200):
        params["after"] = (await server.http.get("/v1/sessions", params=params)).json()["next"]
    return params["after"]


async def _stores(home: Path, samples: Samples) -> None:
    """What it takes in the process to find a thread's session, and a thread's items in a store that holds messages."""
    sessions = await SqliteSessionMap.open(home / "sidecar.db")
    try:
        start = time.perf_counter()
        for number in range(CALLS):
            await sessions.get(ThreadKey(f"thread-{number}", "bench"))
        samples.add("store", "session map, get", "µs", (time.perf_counter() - start) / CALLS * 1e6)
    finally:
        await sessions.close()
    for items in (2, 100, 1000):
        session = SQLiteSession(f"bench-{random.random()}", home / "items.db")
        await session.add_items([{"role": "user", "content": f"This is thing number {n}"} for n in range(items)])
        calls = CALLS // 5
        start = time.perf_counter()
        for _ in range(calls):
            await session.get_items()
        name = f"openai-agents SQLiteSession, get_items of {items}"
        samples.add("store", name, "µs", (time.perf_counter() - start) / calls * 1e6)
        session.close()
