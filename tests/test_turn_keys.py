"""What every TurnKeys promises, in each keeper of the session map."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from session_store import SessionMap, StoreUnavailable, TakenKey, TurnKeys, turn_key
from session_store.postgres import PostgresSessionMap
from session_store.sqlite import SqliteSessionMap
from tests.modes import marks_of
from tests.test_session_map import OPENERS, Opener

KEY, OTHER = turn_key("alice", "k1"), turn_key("alice", "k2")
ASKED, ELSE = b"what was asked f", b"something else.."
MINUTES = 600.0
OVER = -1.0  # seconds: its time is over at once


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


@pytest.fixture
def keys(sessions: SessionMap) -> TurnKeys:
    return sessions.turn_keys


async def holder(keys: TurnKeys, key: bytes = KEY) -> TakenKey | None:
    """Who has the key. Nobody has it afterwards either, if nobody had it."""
    taken = await keys.take(key, ELSE, "somebody", seconds=MINUTES)
    if taken is None:
        await keys.give_back(key, "somebody")
    return taken


def has(taken: TakenKey | None, digest: bytes, turn_id: str) -> bool:
    return taken is not None and (taken.digest, taken.turn_id) == (digest, turn_id)


async def test_a_key_that_nobody_has_is_taken_and_whoever_comes_later_is_told_by_whom(keys: TurnKeys) -> None:
    assert await keys.take(KEY, ASKED, "t1", seconds=MINUTES) is None
    assert has(await keys.take(KEY, ASKED, "t2", seconds=MINUTES), ASKED, "t1")
    assert has(await keys.take(KEY, ELSE, "t2", seconds=MINUTES), ASKED, "t1")
    assert await holder(keys, OTHER) is None


async def test_a_turn_may_take_its_key_again_which_changes_nothing(keys: TurnKeys) -> None:
    for digest in (ASKED, ELSE):
        assert await keys.take(KEY, digest, "t1", seconds=MINUTES) is None
    assert has(await holder(keys), ASKED, "t1")


async def test_of_fifty_turns_that_take_one_key_one_gets_it_and_the_others_are_told_which(keys: TurnKeys) -> None:
    turns = [f"t{n}" for n in range(50)]
    told = await asyncio.gather(*(keys.take(KEY, turn.encode(), turn, seconds=MINUTES) for turn in turns))
    (winner,) = [turn for turn, taken in zip(turns, told, strict=True) if taken is None]
    assert all(taken is None or has(taken, winner.encode(), winner) for taken in told)


async def test_a_key_that_is_given_back_is_free(keys: TurnKeys) -> None:
    await keys.take(KEY, ASKED, "t1", seconds=MINUTES)
    await keys.give_back(KEY, "t1")
    assert await keys.take(KEY, ELSE, "t2", seconds=MINUTES) is None
    assert has(await holder(keys), ELSE, "t2")


async def test_only_the_turn_that_has_a_key_can_give_it_back_or_say_when_its_time_is_over(keys: TurnKeys) -> None:
    await keys.take(KEY, ASKED, "t1", seconds=MINUTES)
    await keys.give_back(KEY, "t2")
    await keys.ended(KEY, "t2", seconds=OVER)
    assert has(await holder(keys), ASKED, "t1")


async def test_a_key_whose_time_is_over_is_free(keys: TurnKeys) -> None:
    await keys.take(KEY, ASKED, "t1", seconds=OVER)
    assert await keys.take(KEY, ELSE, "t2", seconds=MINUTES) is None
    assert has(await holder(keys), ELSE, "t2")
    await keys.ended(KEY, "t1", seconds=OVER)
    await keys.give_back(KEY, "t1")
    assert has(await holder(keys), ELSE, "t2")


async def test_the_end_of_a_turn_sets_the_time_of_its_key_anew(keys: TurnKeys) -> None:
    await keys.take(KEY, ASKED, "t1", seconds=OVER)
    await keys.ended(KEY, "t1", seconds=MINUTES)
    assert has(await holder(keys), ASKED, "t1")
    await keys.ended(KEY, "t1", seconds=OVER)
    assert await holder(keys) is None


async def test_a_sweep_forgets_all_whose_time_is_over_and_nothing_else(keys: TurnKeys) -> None:
    stay, go = ([turn_key(who, f"{n}") for n in range(count)] for who, count in (("stay", 5), ("go", 1001)))
    for seconds, some in ((MINUTES, stay), (OVER, go)):
        for key in some:
            await keys.take(key, ASKED, "t1", seconds=seconds)
    assert await keys.sweep() == len(go)
    assert await keys.sweep() == 0
    assert all([has(await holder(keys, key), ASKED, "t1") for key in stay])


async def test_a_turn_that_is_broken_off_while_it_takes_its_key_can_give_it_back(keys: TurnKeys) -> None:
    for steps in range(6):
        taking = asyncio.create_task(keys.take(KEY, ASKED, "t1", seconds=MINUTES))
        for _ in range(steps):
            await asyncio.sleep(0)
        taking.cancel()
        await asyncio.wait([taking])
        await keys.give_back(KEY, "t1")
        assert await holder(keys) is None


async def test_the_keys_of_a_closed_map_say_so(sessions: SessionMap) -> None:
    keys = sessions.turn_keys
    await sessions.close()
    for call in (
        keys.take(KEY, ASKED, "t1", seconds=MINUTES),
        keys.ended(KEY, "t1", seconds=MINUTES),
        keys.give_back(KEY, "t1"),
        keys.sweep(),
    ):
        with pytest.raises(StoreUnavailable):
            await call


async def test_a_key_that_was_taken_is_taken_after_a_restart(opener: Opener) -> None:
    first = await opener()
    await first.turn_keys.take(KEY, ASKED, "t1", seconds=MINUTES)
    await first.close()
    second = await opener()
    try:
        assert has(await holder(second.turn_keys), ASKED, "t1")
    finally:
        await second.close()


async def test_of_two_replicas_one_gets_a_key_and_the_other_is_told_which_replica_has_it(database: str) -> None:
    names = [str(uuid.uuid4()) for _ in range(2)]
    maps = [await PostgresSessionMap.open(database, replica_id=name) for name in names]
    try:
        keys = [turn_key("alice", f"k{n}") for n in range(20)]
        for key in keys:
            told = await asyncio.gather(
                *(
                    one.turn_keys.take(key, ASKED, f"of {name}", seconds=MINUTES)
                    for one, name in zip(maps, names, strict=True)
                )
            )
            (winner,) = [name for name, taken in zip(names, told, strict=True) if taken is None]
            assert [taken for taken in told if taken is not None] == [TakenKey(ASKED, f"of {winner}", winner)]
            await maps[names.index(winner)].turn_keys.ended(key, f"of {winner}", seconds=OVER)
        assert sum(await asyncio.gather(*(one.turn_keys.sweep() for one in maps))) == len(keys)
    finally:
        for one in maps:
            await one.close()


def test_no_two_pairs_of_a_resource_and_a_key_are_taken_for_one() -> None:
    pairs = [("alice", "bc"), ("aliceb", "c"), ("", "alicebc"), ("alicebc", ""), ("bc", "alice")]
    assert len({turn_key(*pair) for pair in pairs}) == len(pairs)


async def test_neither_the_callers_key_nor_whose_it_was_is_in_the_file(tmp_path: Path) -> None:
    sessions = await SqliteSessionMap.open(tmp_path / "sidecar.db")
    try:
        await sessions.turn_keys.take(turn_key("some resource", "some key"), ASKED, "the turn's ID", seconds=MINUTES)
        kept = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    finally:
        await sessions.close()
    assert b"the turn's ID" in kept
    assert b"some resource" not in kept
    assert b"some key" not in kept
