"""What every SessionMap promises. Another keeper of the map joins by one more entry in OPENERS."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from session_store import Cursor, SessionMap, SessionMapped, SessionMapping, StoreUnavailable, ThreadKey, ThreadMapped
from session_store.postgres import PostgresSessionMap
from session_store.sqlite import SqliteSessionMap
from tests.modes import marks_of
from tests.postgres import new_database, through

Opener = Callable[[], Awaitable[SessionMap]]


def in_sqlite(request: pytest.FixtureRequest) -> Opener:
    home: Path = request.getfixturevalue("tmp_path")
    return lambda: SqliteSessionMap.open(home / "sidecar.db")


def in_postgres(request: pytest.FixtureRequest) -> Opener:
    url: str = request.getfixturevalue("database")
    return lambda: PostgresSessionMap.open(url)


def behind_pgbouncer(request: pytest.FixtureRequest) -> Opener:
    url = through(request.getfixturevalue("pgbouncer"), request.getfixturevalue("database"))
    return lambda: PostgresSessionMap.open(url)


OPENERS: Final[dict[str, Callable[[pytest.FixtureRequest], Opener]]] = {
    "sqlite": in_sqlite,
    "postgres": in_postgres,
    "pgbouncer": behind_pgbouncer,
}
KEY: Final = ThreadKey("t1", "alice")
fresh = itertools.count()

on_one_map = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # each example brings keys of its own, so that one file serves them all
ids = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=24)
tricky_ids = st.text("aA%_*?'\\é\u0301e\uffff\U0010ffff\U0001f469\u200d\u00a0", min_size=1, max_size=5)


@pytest.fixture(scope="module")
def one_database(postgres: str) -> Iterator[str]:
    with new_database(postgres) as url:
        yield url


@pytest.fixture
def database(one_database: str) -> str:
    """The URL of an empty database: the same one each time, as making one takes longer than most tests."""
    with psycopg.connect(one_database) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return one_database


@pytest.fixture(params=[pytest.param(opener, id=name, marks=marks_of(name)) for name, opener in OPENERS.items()])
def opener(request: pytest.FixtureRequest) -> Opener:
    """Open an empty map, and that same one again."""
    opener: Opener = request.param(request)
    return opener


@pytest.fixture
async def sessions(opener: Opener) -> AsyncIterator[SessionMap]:
    opened = await opener()
    yield opened
    await opened.close()


async def fill(sessions: SessionMap, *thread_ids: str, resource_id: str = "alice", parent: str | None = None) -> None:
    for thread_id in thread_ids:
        key = ThreadKey(thread_id, resource_id)
        await sessions.add(key, f"s-{resource_id}-{thread_id}", parent_thread_id=parent)


def threads(page: list[SessionMapping]) -> list[str]:
    return [mapping.thread_id for mapping in page]


# One mapping


async def test_a_thread_that_nobody_added_is_not_there(sessions: SessionMap) -> None:
    assert await sessions.get(KEY) is None


async def test_what_was_added_is_what_is_found(sessions: SessionMap) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    added = await sessions.add(KEY, "s1", parent_thread_id="t0", parent_message_id="m7")
    assert await sessions.get(KEY) == added
    assert added.key == KEY
    assert (added.sdk_session_id, added.parent_thread_id, added.parent_message_id) == ("s1", "t0", "m7")
    assert added.version == 0
    assert before < added.created_at == added.updated_at <= datetime.now(UTC)


async def test_a_thread_that_was_not_forked_has_no_parent(sessions: SessionMap) -> None:
    added = await sessions.add(KEY, "s1")
    assert (added.parent_thread_id, added.parent_message_id) == (None, None)


async def test_one_thread_name_is_a_different_thread_for_every_resource(sessions: SessionMap) -> None:
    await sessions.add(KEY, "s1")
    bobs = ThreadKey(KEY.thread_id, "bob")
    assert await sessions.get(bobs) is None
    await sessions.add(bobs, "s2")
    assert await sessions.remove(bobs) is not None
    assert await sessions.get(KEY) is not None


async def test_a_mapped_thread_cannot_be_added_again(sessions: SessionMap) -> None:
    added = await sessions.add(KEY, "s1")
    for session in ("s2", "s1"):
        with pytest.raises(ThreadMapped, match="already has a session"):
            await sessions.add(KEY, session)
    assert await sessions.get(KEY) == added


async def test_a_session_belongs_to_one_thread_only(sessions: SessionMap) -> None:
    await sessions.add(KEY, "s1")
    other = ThreadKey("t2", "bob")
    with pytest.raises(SessionMapped, match="Another thread"):
        await sessions.add(other, "s1")
    added = await sessions.add(other, "s2")
    with pytest.raises(SessionMapped):
        await sessions.replace(other, "s1", expected="s2")
    assert await sessions.get(other) == added


async def test_a_replaced_session_leaves_everything_else_as_it_was(sessions: SessionMap) -> None:
    added = await sessions.add(KEY, "s1", parent_thread_id="t0", parent_message_id="m7")
    replaced = await sessions.replace(KEY, "s2", expected="s1")
    assert replaced is not None
    assert replaced == await sessions.get(KEY)
    assert (replaced.sdk_session_id, replaced.version) == ("s2", 1)
    assert (replaced.parent_thread_id, replaced.parent_message_id) == ("t0", "m7")
    assert added.created_at == replaced.created_at
    assert added.updated_at <= replaced.updated_at
    await sessions.add(ThreadKey("t2", "alice"), "s1")  # which is free again


async def test_a_session_that_is_not_the_expected_one_stays(sessions: SessionMap) -> None:
    added = await sessions.add(KEY, "s1")
    assert await sessions.replace(KEY, "s3", expected="s2") is None
    assert await sessions.touch(KEY, "s2") is None
    assert await sessions.remove(KEY, expected="s2") is None
    assert await sessions.get(KEY) == added


async def test_a_thread_that_is_gone_is_not_brought_back_by_a_turn_that_ends_late(sessions: SessionMap) -> None:
    assert await sessions.touch(KEY, "s1") is None
    assert await sessions.replace(KEY, "s2", expected="s1") is None
    assert await sessions.remove(KEY) is None
    assert await sessions.get(KEY) is None


async def test_every_turn_bumps_the_version(sessions: SessionMap) -> None:
    added = await sessions.add(KEY, "s1")
    for version in (1, 2, 3):
        touched = await sessions.touch(KEY, "s1")
        assert touched is not None
        assert (touched.version, touched.sdk_session_id, touched.created_at) == (version, "s1", added.created_at)
        assert await sessions.get(KEY) == touched


async def test_a_mapping_that_was_used_since_it_was_seen_is_not_removed(sessions: SessionMap) -> None:
    seen = await sessions.add(KEY, "s1")
    touched = await sessions.touch(KEY, "s1")
    assert touched is not None
    assert await sessions.remove(KEY, version=seen.version) is None
    assert await sessions.get(KEY) == touched
    assert await sessions.remove(KEY, expected="s1", version=touched.version) == touched


async def test_removing_returns_what_was_removed(sessions: SessionMap) -> None:
    added = await sessions.add(KEY, "s1")
    assert await sessions.remove(KEY, expected="s1") == added
    assert await sessions.get(KEY) is None
    again = await sessions.add(KEY, "s1")
    assert await sessions.remove(KEY) == again


@on_one_map
@given(thread_id=ids | tricky_ids, resource_id=ids | tricky_ids, session_id=ids)
@example(thread_id="\u00e9", resource_id="' OR 1=1 --", session_id="\U0001f469\u200d\U0001f469\u200d\U0001f467")
async def test_any_text_comes_back_as_it_went_in(
    sessions: SessionMap, thread_id: str, resource_id: str, session_id: str
) -> None:
    key = ThreadKey(thread_id, resource_id)
    added = await sessions.add(key, session_id, parent_thread_id=resource_id, parent_message_id=thread_id)
    assert added == await sessions.get(key) == (await sessions.page(resource_id, limit=2))[0]
    assert (added.key, added.sdk_session_id) == (key, session_id)
    assert (added.parent_thread_id, added.parent_message_id) == (resource_id, thread_id)
    assert await sessions.remove(key) == added


async def test_texts_that_only_look_alike_are_different_threads(sessions: SessionMap) -> None:
    alike = ["\u00e9", "e\u0301", "\u00c9", "a", "A", "a ", " a", "a\u00a0", "\uff41", "%", "_"]
    await fill(sessions, *alike)
    assert {m.thread_id for m in await sessions.page("alice", limit=99)} == set(alike)
    for thread_id in alike:
        mapping = await sessions.get(ThreadKey(thread_id, "alice"))
        assert mapping is not None
        assert mapping.sdk_session_id == f"s-alice-{thread_id}"


# Many at once


async def test_of_fifty_who_add_one_thread_one_wins(sessions: SessionMap) -> None:
    answers = await asyncio.gather(*(sessions.add(KEY, f"s{n}") for n in range(50)), return_exceptions=True)
    won = [answer for answer in answers if isinstance(answer, SessionMapping)]
    assert [await sessions.get(KEY)] == won
    assert sum(isinstance(answer, ThreadMapped) for answer in answers) == 49


async def test_of_fifty_who_claim_one_session_one_wins(sessions: SessionMap) -> None:
    keys = [ThreadKey(f"t{n}", "alice") for n in range(50)]
    answers = await asyncio.gather(*(sessions.add(key, "s1") for key in keys), return_exceptions=True)
    won = [answer for answer in answers if isinstance(answer, SessionMapping)]
    assert won == await sessions.page("alice", limit=50)
    assert sum(isinstance(answer, SessionMapped) for answer in answers) == 49


async def test_of_fifty_who_replace_what_they_saw_one_wins(sessions: SessionMap) -> None:
    await sessions.add(KEY, "seen")
    answers = await asyncio.gather(*(sessions.replace(KEY, f"s{n}", expected="seen") for n in range(50)))
    won = [answer for answer in answers if answer is not None]
    assert [await sessions.get(KEY)] == won
    assert won[0].version == 1


async def test_a_cancelled_call_has_happened_or_it_has_not(sessions: SessionMap) -> None:
    seen = set()
    for steps in range(12):
        key, session = ThreadKey(f"t{steps}", "alice"), f"s{steps}"
        call = asyncio.create_task(sessions.add(key, session))
        for _ in range(steps):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        found = await sessions.get(key)
        seen.add(found is not None)
        if found is None:
            found = await sessions.add(key, session)
        assert (found.key, found.sdk_session_id, found.version) == (key, session, 0)
        assert await sessions.touch(key, session) is not None
    assert seen == {True, False}


# Pages


async def test_a_page_lists_one_resource_newest_first(sessions: SessionMap) -> None:
    await fill(sessions, "b", "c", "a")
    await fill(sessions, "d", resource_id="bob")
    assert threads(await sessions.page("alice", limit=50)) == ["a", "c", "b"]
    assert threads(await sessions.page("alice", limit=2)) == ["a", "c"]
    assert threads(await sessions.page("alice", limit=50, descending=False)) == ["b", "c", "a"]
    assert await sessions.page("nobody", limit=50) == []


async def test_a_turn_does_not_move_its_thread_in_the_list(sessions: SessionMap) -> None:
    await fill(sessions, "a", "b")
    await sessions.touch(ThreadKey("a", "alice"), "s-alice-a")
    assert threads(await sessions.page("alice", limit=50)) == ["b", "a"]


@pytest.mark.parametrize("descending", [True, False])
async def test_pages_give_every_lasting_row_once_whatever_happens_in_between(
    sessions: SessionMap, *, descending: bool
) -> None:
    names = [f"t{n:02}" for n in range(20)]
    await fill(sessions, *names)
    order = names[::-1] if descending else names
    removed, listed, after = set(), [], None
    while page := await sessions.page("alice", limit=3, after=after, descending=descending):
        listed += threads(page)
        after = page[-1].cursor
        unseen = [name for name in order if name not in listed]
        doomed = [page[-1].thread_id, *unseen[1:2]]  # the row of the cursor itself, and one that is yet to come
        removed.update(doomed)
        for name in doomed:
            await sessions.remove(ThreadKey(name, "alice"))
        for name in (page[0].thread_id, *unseen[:1]):
            await sessions.touch(ThreadKey(name, "alice"), f"s-alice-{name}")
            await sessions.replace(ThreadKey(name, "alice"), f"new-{name}", expected=f"s-alice-{name}")
        if len(listed) < len(names):
            await fill(sessions, f"new{len(listed)}")
    lasting = [name for name in order if name not in removed]
    assert [name for name in listed if name in lasting] == lasting
    assert len(set(listed)) == len(listed)


@on_one_map
@given(
    thread_ids=st.lists(tricky_ids | ids, unique=True, max_size=4), prefix=st.text("aA%_'é\uffff\U0010ffff", max_size=2)
)
@example(thread_ids=["\U0010ffff", "\U0010ffffa", "\uffff", "a\U0010ffff"], prefix="\U0010ffff")
@example(thread_ids=["100%", "100x", "A", "a_", "ab"], prefix="100%")
@example(thread_ids=["\u00e9", "e\u0301", "e"], prefix="e")
async def test_a_prefix_is_plain_text(sessions: SessionMap, thread_ids: list[str], prefix: str) -> None:
    resource_id = f"r{next(fresh)}"
    await fill(sessions, *thread_ids, resource_id=resource_id)
    page = await sessions.page(resource_id, limit=50, descending=False, thread_id_prefix=prefix)
    assert threads(page) == [thread_id for thread_id in thread_ids if thread_id.startswith(prefix)]


async def test_a_parent_narrows_the_list_to_its_forks(sessions: SessionMap) -> None:
    await fill(sessions, "p", "q")
    await fill(sessions, "p1", "p2", "x3", parent="p")
    await fill(sessions, "q1", parent="q")
    await fill(sessions, "p1", resource_id="bob", parent="p")
    assert threads(await sessions.page("alice", limit=9, parent_thread_id="p")) == ["x3", "p2", "p1"]
    first = await sessions.page("alice", limit=1, parent_thread_id="p", descending=False)
    rest = await sessions.page("alice", limit=9, parent_thread_id="p", descending=False, after=first[0].cursor)
    assert threads(first + rest) == ["p1", "p2", "x3"]
    assert threads(await sessions.page("alice", limit=9, parent_thread_id="p", thread_id_prefix="p")) == ["p2", "p1"]
    assert await sessions.page("alice", limit=9, parent_thread_id="p1") == []


@pytest.mark.parametrize("descending", [True, False])
async def test_pages_over_all_resources_give_every_lasting_row_once_whatever_happens_in_between(
    sessions: SessionMap, *, descending: bool
) -> None:
    names = [ThreadKey(f"t{n}", resource) for n in range(6) for resource in ("alice", "bob")]
    for key in names:
        await fill(sessions, key.thread_id, resource_id=key.resource_id)
    order = names[::-1] if descending else names
    removed, listed, after = set(), [], None
    while page := await sessions.page(None, limit=3, after=after, descending=descending):
        listed += [mapping.key for mapping in page]
        after = page[-1].cursor
        unseen = [key for key in order if key not in listed]
        for key in (page[-1].key, *unseen[1:2]):
            removed.add(key)
            await sessions.remove(key)
        if len(listed) < len(names):
            await fill(sessions, f"new{len(listed)}", resource_id="carol")
    lasting = [key for key in order if key not in removed]
    assert [key for key in listed if key in lasting] == lasting
    assert len(set(listed)) == len(listed)


async def test_a_prefix_narrows_the_list_of_all_resources_and_a_parent_cannot(sessions: SessionMap) -> None:
    await fill(sessions, "a1", "b1")
    await fill(sessions, "a1", resource_id="bob")
    page = await sessions.page(None, limit=9, thread_id_prefix="a")
    assert [mapping.key for mapping in page] == [ThreadKey("a1", "bob"), ThreadKey("a1", "alice")]
    with pytest.raises(ValueError, match="resource"):
        await sessions.page(None, limit=9, parent_thread_id="a1")


async def test_a_page_has_at_least_one_row_to_give(sessions: SessionMap) -> None:
    for limit in (0, -1):
        with pytest.raises(ValueError, match="limit"):
            await sessions.page("alice", limit=limit)


def test_a_cursor_from_outside_the_times_there_are_is_refused() -> None:
    for microseconds in (-1, 2**63):
        with pytest.raises(ValueError, match="out of range"):
            Cursor(microseconds, "t1")


# The end


async def test_a_closed_map_says_so_and_may_be_closed_again(sessions: SessionMap) -> None:
    await sessions.check()
    await asyncio.gather(*(sessions.close() for _ in range(3)))
    await sessions.close()
    calls: list[Awaitable[object]] = [
        sessions.get(KEY),
        sessions.add(KEY, "s1"),
        sessions.replace(KEY, "s2", expected="s1"),
        sessions.touch(KEY, "s1"),
        sessions.remove(KEY),
        sessions.page("alice", limit=1),
        sessions.check(),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="closed"):
            await call


async def test_what_was_under_way_when_the_map_was_closed_is_finished(sessions: SessionMap) -> None:
    calls = [asyncio.create_task(sessions.add(ThreadKey(f"t{n}", "alice"), f"s{n}")) for n in range(5)]
    await asyncio.sleep(0)
    await sessions.close()
    assert [(await call).sdk_session_id for call in calls] == [f"s{n}" for n in range(5)]


async def test_giving_up_on_close_does_not_break_it_off(sessions: SessionMap) -> None:
    for _ in range(3):
        closing = asyncio.create_task(sessions.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
    await sessions.close()


async def test_what_was_kept_is_there_after_a_restart(opener: Opener) -> None:
    first = await opener()
    added = await first.add(KEY, "s1")
    await first.close()
    second = await opener()
    try:
        assert await second.get(KEY) == added
    finally:
        await second.close()
