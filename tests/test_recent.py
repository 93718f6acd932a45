"""The mappings in memory: whatever is asked for at once and given up, what is told is what the file holds."""

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from session_store import SessionMapError, SessionMapping, ThreadKey
from session_store.sqlite import SqliteSessionMap
from session_store.sqlite.recent import Recent

THREADS = [ThreadKey(f"t{n}", "alice") for n in range(3)]


@pytest.fixture
async def statements() -> list[str]:
    """The statements that were run, by kind."""
    return []


@pytest.fixture
async def sessions(tmp_path: Path, statements: list[str]) -> AsyncIterator[SqliteSessionMap]:
    opened = await SqliteSessionMap.open(tmp_path / "sidecar.db", lambda kind, _: statements.append(kind))
    yield opened
    await opened.close()


async def test_a_mapping_that_was_just_written_is_found_without_a_statement(
    sessions: SqliteSessionMap, statements: list[str]
) -> None:
    added = await sessions.add(THREADS[0], "s")
    assert await sessions.get(THREADS[0]) == added
    touched = await sessions.touch(THREADS[0], "s")
    assert await sessions.get(THREADS[0]) == touched
    assert statements == ["add", "replace"]


async def test_a_thread_that_was_removed_is_not_found(sessions: SqliteSessionMap) -> None:
    await sessions.add(THREADS[0], "s")
    await sessions.remove(THREADS[0])
    assert await sessions.get(THREADS[0]) is None


@pytest.mark.parametrize("seed", range(20))
async def test_what_is_told_is_what_the_file_holds_whatever_was_given_up(
    sessions: SqliteSessionMap, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    session_ids = [f"s{n}" for n in range(4)]

    async def call() -> Any:
        key, one, other = rng.choice(THREADS), rng.choice(session_ids), rng.choice(session_ids)
        ways: list[Callable[[], Awaitable[SessionMapping | None]]] = [
            lambda: sessions.get(key),
            lambda: sessions.add(key, one),
            lambda: sessions.touch(key, one),
            lambda: sessions.replace(key, one, expected=other),
            lambda: sessions.remove(key, expected=rng.choice([None, one])),
        ]
        return await rng.choice(ways)()

    for _ in range(30):
        calls = [asyncio.create_task(call()) for _ in range(rng.randrange(1, 6))]
        for task in calls:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            if rng.random() < 0.4:
                task.cancel()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert not isinstance(outcome, Exception) or isinstance(outcome, SessionMapError)
        told = [await sessions.get(key) for key in THREADS]
        with closing(sqlite3.connect(tmp_path / "sidecar.db")) as file:
            rows = dict(file.execute("SELECT thread_id, sdk_session_id || ' ' || version FROM session_mappings"))
        assert [found and f"{found.sdk_session_id} {found.version}" for found in told] == [
            rows.get(key.thread_id) for key in THREADS
        ]


def test_the_least_recently_used_is_dropped_first() -> None:
    recent = Recent(most=2)
    one, two, three = (SessionMapping(key.thread_id, "alice", "s", *[None] * 5) for key in THREADS)  # type: ignore[arg-type]
    for mapping in (one, two):
        recent.learn(recent.reading(), mapping)
    assert recent.get(one.key) is one
    recent.learn(recent.reading(), three)
    assert [recent.get(key) for key in THREADS] == [one, None, three]
