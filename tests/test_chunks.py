"""What every keeper of chunks promises. Another one joins by one more entry in KEEPERS."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Final

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from session_sidecar.replicas.archive.chunks import MAIN, Change, Chunk, ChunkHead, Chunks, SealedOutline
from session_sidecar.replicas.archive.postgres import PostgresChunks
from session_sidecar.replicas.archive.rotation import Progress, rotate
from session_sidecar.replicas.archive.sealing import KEY_BYTES, SALT_BYTES, Keyring, Seal
from session_sidecar.replicas.archive.sqlite import SqliteChunks
from session_store import StoreUnavailable, StoreUnusable, ThreadKey
from session_store.postgres import PostgresSessionMap
from tests.archive import KEY, Keeper, a_session, in_postgres, in_sqlite
from tests.modes import marks_of
from tests.postgres import through

OLD, NEW = bytes(KEY_BYTES), bytes(range(KEY_BYTES))


def sqlite(request: pytest.FixtureRequest) -> AbstractAsyncContextManager[Keeper]:
    place: Path = request.getfixturevalue("tmp_path")
    return in_sqlite(place / "transcripts.db")


def postgres(request: pytest.FixtureRequest) -> AbstractAsyncContextManager[Keeper]:
    return in_postgres(request.getfixturevalue("database"))


def pgbouncer(request: pytest.FixtureRequest) -> AbstractAsyncContextManager[Keeper]:
    return in_postgres(through(request.getfixturevalue("pgbouncer"), request.getfixturevalue("database")))


KEEPERS: Final = (sqlite, postgres, pgbouncer)


@pytest.fixture(
    params=[pytest.param(keeper, id=keeper.__name__, marks=marks_of(keeper.__name__)) for keeper in KEEPERS]
)
async def kept(request: pytest.FixtureRequest) -> AsyncIterator[Keeper]:
    keeper: Callable[[pytest.FixtureRequest], AbstractAsyncContextManager[Keeper]] = request.param
    async with keeper(request) as kept:
        yield kept


@pytest.fixture
def chunks(kept: Keeper) -> Chunks:
    return kept.chunks


@pytest.fixture
def session() -> str:
    return a_session()


def chunk(path: str, seq: int, data: bytes = b"data", offset: int = 0, key_id: str | None = None) -> Chunk:
    return Chunk(ChunkHead(path, seq, offset, len(data), b"mac of " + data, key_id), data)


async def write(kept: Keeper, session: str, *add: Chunk, **change: object) -> bool:
    cut = {"cut": {}, **change}
    return await kept.chunks.write(session, KEY, kept.fence, Change(add=iter(add), **cut))  # type: ignore[arg-type]


async def read(chunks: Chunks, session: str) -> list[Chunk]:
    return await chunks.read(session, await chunks.heads(session))


async def test_what_was_written_is_what_is_read_in_the_order_of_paths(kept: Keeper, session: str) -> None:
    data = bytes(range(256)) * 1024
    written = [chunk("b/\U0001f469", 0), chunk(MAIN, 0, data), chunk(MAIN, 1, b"", len(data)), chunk("Z", 0, b"\0")]
    assert await write(kept, session, *written)
    in_order = sorted(written, key=lambda chunk: (chunk.head.path, chunk.head.seq))
    assert await kept.chunks.heads(session) == [chunk.head for chunk in in_order]
    assert await read(kept.chunks, session) == in_order
    assert await kept.chunks.read(session, [written[3].head, written[1].head]) == [written[1], written[3]]
    assert await kept.chunks.heads(a_session()) == []
    assert await kept.chunks.read(session, []) == []


async def test_what_is_cut_is_gone_and_can_be_written_anew(kept: Keeper, session: str) -> None:
    await write(kept, session, *(chunk("a", seq) for seq in range(4)), chunk("b", 0), chunk("c", 0))
    await write(kept, session, chunk("a", 2, b"new"), cut={"a": 2, "b": 0})
    assert await read(kept.chunks, session) == [chunk("a", 0), chunk("a", 1), chunk("a", 2, b"new"), chunk("c", 0)]


async def test_what_is_gone_is_left_out(kept: Keeper, session: str) -> None:
    await write(kept, session, chunk("a", 0), chunk("a", 1))
    heads = await kept.chunks.heads(session)
    await write(kept, session, cut={"a": 1})
    assert await kept.chunks.read(session, heads) == [chunk("a", 0)]


async def test_a_change_that_fails_half_way_is_none(kept: Keeper, session: str) -> None:
    def breaking() -> Iterator[Chunk]:
        yield from (chunk("a", seq) for seq in range(1, 20))
        raise FileNotFoundError

    await write(kept, session, chunk("a", 0))
    with pytest.raises(FileNotFoundError):
        await kept.chunks.write(session, KEY, kept.fence, Change({"a": 0}, breaking()))
    assert await read(kept.chunks, session) == [chunk("a", 0)]
    assert await write(kept, session, chunk("a", 1))


async def test_what_is_deleted_is_gone_with_its_outline_and_nothing_else(kept: Keeper, session: str) -> None:
    other = a_session()
    for name in (session, other):
        await write(kept, name, chunk(MAIN, 0), outline=SealedOutline("alice", None, b"outline"))
    await kept.chunks.delete(session)
    assert await kept.chunks.heads(session) == []
    assert await kept.chunks.outlines([session, other]) == {other: SealedOutline("alice", None, b"outline")}
    assert await read(kept.chunks, other) == [chunk(MAIN, 0)]


async def test_an_outline_is_the_last_one_written(kept: Keeper, session: str) -> None:
    for outline in (SealedOutline("alice", None, b"old"), SealedOutline("alice", "k", b"new")):
        await write(kept, session, outline=outline)
    await write(kept, session, chunk(MAIN, 0))
    assert await kept.chunks.outlines([session, a_session()]) == {session: outline}
    assert await kept.chunks.outlines([]) == {}


async def test_a_resource_has_one_salt_until_it_is_forgotten(kept: Keeper, chunks: Chunks) -> None:
    salt = await chunks.salt("alice")
    assert len(salt) == SALT_BYTES
    assert await chunks.salt("alice") == salt
    assert await chunks.salt("bob") != salt
    assert await chunks.salts(["alice", "carol"]) == {"alice": salt}
    await forget(kept)
    assert await chunks.salts(["alice"]) == {}
    assert await chunks.salt("alice") != salt


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.lists(st.binary(max_size=9), max_size=3))))
async def test_any_changes_leave_what_a_dictionary_would_have(
    kept: Keeper, changes: list[tuple[str, int, list[bytes]]]
) -> None:
    session, model = a_session(), dict[tuple[str, int], Chunk]()
    for path, seq, data in changes:
        start = min(seq, sum(name == path for name, _ in model))
        new = [chunk(path, start + i, some) for i, some in enumerate(data)]
        assert await write(kept, session, *new, cut={path: start})
        model = {at: old for at, old in model.items() if at[0] != path or at[1] < start}
        model |= {(path, some.head.seq): some for some in new}
    assert await read(kept.chunks, session) == [model[at] for at in sorted(model)]


async def test_after_its_end_nothing_is_taken(tmp_path: Path) -> None:
    async with in_sqlite(tmp_path / "transcripts.db") as kept:
        pass
    with pytest.raises(StoreUnavailable):
        await kept.chunks.heads(a_session())
    await kept.chunks.close()


# --- fences


async def test_a_write_with_an_old_fence_is_refused(database: str, session: str) -> None:
    async with in_postgres(database) as kept:
        assert kept.leases is not None
        other = await PostgresSessionMap.open(database)
        try:
            await write(kept, session, chunk(MAIN, 0))
            await kept.leases.release(KEY)
            assert await write(kept, session, chunk(MAIN, 1))  # released, but nobody else has it

            lease = await other.acquire(KEY)
            assert lease is not None
            theirs = Keeper(PostgresChunks(other.database, other.replica_id), lease.fence)
            assert not await write(kept, session, chunk(MAIN, 2), cut={MAIN: 0}, settled=9)
            assert not await write(Keeper(kept.chunks, lease.fence), session, chunk(MAIN, 2))
            assert not await write(Keeper(kept.chunks, None), session, chunk(MAIN, 2))
            bobs = ThreadKey(KEY.thread_id, "bob")
            assert not await theirs.chunks.write(session, bobs, lease.fence, Change({}, iter([chunk(MAIN, 2)])))
            assert await write(theirs, session, chunk(MAIN, 2))
            assert len(await kept.chunks.heads(session)) == 3

            await other.remove(KEY)
            assert not await write(theirs, session, chunk(MAIN, 3))  # deleted under it
        finally:
            await other.close()


async def test_where_a_turn_ended_is_noted_with_it_for_the_thread_s_own_session(database: str) -> None:
    async with in_postgres(database) as kept:
        assert kept.leases is not None
        mapping = await kept.leases.get(KEY)
        assert mapping is not None
        await write(kept, a_session(), settled=7)
        for settled in (None, 5, None):
            await write(kept, mapping.sdk_session_id, settled=settled)
        lease = await kept.leases.acquire(KEY)
        assert lease is not None
        assert lease.settled == 5


# --- sealing anew


async def store(kept: Keeper, session: str, ring: Keyring, texts: list[bytes]) -> Seal:
    seal = ring.seal_of("alice", await kept.chunks.salt("alice"))
    outline = SealedOutline("alice", seal.key_id, seal.seal((session, None, 0, 0), b"outline"))
    await write(kept, session, *(seal.chunk(session, "a", seq, seq, text) for seq, text in enumerate(texts)),
                outline=outline)  # fmt: skip
    return seal


async def test_what_is_stored_is_sealed_anew_with_the_first_key(kept: Keeper) -> None:
    texts = [b"%d" % number for number in range(20)]
    plain, old, new = Keyring(), Keyring({"old": OLD}), Keyring({"new": NEW, "old": OLD})
    sessions = {a_session(): ring for ring in (plain, old, new)}
    for session, ring in sessions.items():
        await store(kept, session, ring, texts)
    steps = [step async for step in rotate(kept.chunks, new)]
    assert steps[0] == Progress(0, 42)
    assert steps[-1] == Progress(42, 42)
    assert len(steps) >= 4

    alone = Keyring({"new": NEW}).seal_of("alice", await kept.chunks.salt("alice"))
    for session in sessions:
        stored = await read(kept.chunks, session)
        assert [alone.bytes_of(session, chunk) for chunk in stored] == texts
        assert [alone.mac(text, "new") for text in texts] == [chunk.head.mac for chunk in stored]
        outline = (await kept.chunks.outlines([session]))[session]
        assert alone.open((session, None, 0, 0), outline.key_id, outline.data) == b"outline"
    assert [step async for step in rotate(kept.chunks, new)] == [Progress(0, 0)]


async def test_sealing_anew_can_be_broken_off_and_gone_on_with(kept: Keeper) -> None:
    await store(kept, a_session(), Keyring({"old": OLD}), [b"%d" % number for number in range(40)])
    new = Keyring({"new": NEW, "old": OLD})
    rotation = rotate(kept.chunks, new)
    done = [await anext(rotation) for _ in range(2)][-1].done
    await rotation.aclose()
    assert 0 < done < 41
    assert [step async for step in rotate(kept.chunks, new)][-1] == Progress(41 - done, 41 - done)


async def test_what_a_turn_writes_meanwhile_is_not_written_over(kept: Keeper, session: str) -> None:
    ring = Keyring({"new": NEW, "old": OLD})
    await store(kept, session, Keyring({"old": OLD}), [b"before"])
    ((_, row), (_, outline)) = await kept.chunks.sealed_otherwise("new", after=None, limit=9)
    seal = Keyring({"old": OLD}).seal_of("alice", await kept.chunks.salt("alice"))
    turns = seal.chunk(session, "a", 0, 0, b"after")
    await write(kept, session, turns, cut={"a": 0}, outline=SealedOutline("alice", "old", b"after"))
    anew = ring.seal_of("alice", await kept.chunks.salt("alice")).chunk(session, "a", 0, 0, b"before")
    assert not await kept.chunks.reseal(row, "new", anew.head.mac, anew.data)
    assert not await kept.chunks.reseal(outline, "new", b"", b"before")
    assert await read(kept.chunks, session) == [turns]


async def test_what_does_not_open_is_named_and_left_while_the_rest_is_sealed_anew(kept: Keeper, session: str) -> None:
    await store(kept, session, Keyring({"old": OLD}), [b"text"])
    before, readable = await read(kept.chunks, session), a_session()
    await store(kept, readable, Keyring({"else": NEW}), [b"text"])
    *_, last = [step async for step in rotate(kept.chunks, Keyring({"new": NEW, "else": NEW}))]
    assert last == Progress(2, 4, unreadable=2)
    assert last.why.keys() == {session}
    assert "'old'" in last.why[session]
    assert await read(kept.chunks, session) == before
    assert [chunk.head.key_id for chunk in await read(kept.chunks, readable)] == ["new"]
    with pytest.raises(ValueError, match="no key"):
        [_ async for _ in rotate(kept.chunks, Keyring())]


async def test_what_nobody_can_read_any_more_is_counted_and_left(kept: Keeper, session: str) -> None:
    await store(kept, session, Keyring({"old": OLD}), [b"text"])
    await forget(kept)
    steps = [step async for step in rotate(kept.chunks, Keyring({"new": NEW, "old": OLD}))]
    assert steps[-1] == Progress(0, 2, unreadable=2)
    assert "was deleted" in steps[-1].why[session]


async def test_the_key_of_a_resource_that_has_a_thread_stays_where_replicas_share_it(kept: Keeper) -> None:
    salt = await kept.chunks.salt("alice")
    assert await kept.chunks.forget_salt("alice") == (kept.leases is None)
    assert (await kept.chunks.salt("alice") == salt) == (kept.leases is not None)


async def test_a_thread_that_is_just_being_mapped_keeps_the_key_of_its_resource(database: str) -> None:
    """What it says would be sealed with it."""
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'session_mappings'::regclass"
    async with in_postgres(database) as kept, await psycopg.AsyncConnection.connect(database) as mapping:
        await kept.chunks.salt("bob")
        await mapping.execute(
            "INSERT INTO session_mappings (thread_id, resource_id, sdk_session_id, created_at, updated_at, fence)"
            " VALUES ('t', 'bob', 's', 0, 0, 1)"
        )
        forgetting = asyncio.create_task(kept.chunks.forget_salt("bob"))
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as looking:
            while await (await looking.execute(waits)).fetchone() != (1,):
                assert not forgetting.done()
        await mapping.commit()
        assert not await forgetting
        assert await kept.chunks.salts(["bob"])


async def forget(kept: Keeper) -> None:
    """Forget the key of KEY's resource, which has no thread any more."""
    if kept.leases is not None:
        await kept.leases.remove(KEY)
    assert await kept.chunks.forget_salt("alice")
    assert not await kept.chunks.forget_salt("alice")


# --- the file of SQLite


async def test_the_file_is_private_and_of_this_version(tmp_path: Path) -> None:
    file = tmp_path / "transcripts.db"
    async with in_sqlite(file) as kept:
        await write(kept, a_session(), chunk(MAIN, 0))
        assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("transcripts.db*")} == {0o600}
        assert isinstance(kept.chunks, SqliteChunks)
        kept.chunks._connection.execute("PRAGMA user_version = 9")
    with pytest.raises(StoreUnusable, match="schema 9"):
        SqliteChunks.open(file)
    file.write_bytes(b"no database" * 100)
    with pytest.raises(StoreUnusable):
        SqliteChunks.open(file)
    with pytest.raises(StoreUnusable):
        SqliteChunks.open(tmp_path / "nowhere" / "transcripts.db")
