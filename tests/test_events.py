"""A turn's events: numbered, bounded, replayed to whoever comes, and never with a hole."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from session_sidecar.api.streams.frames import native, position
from session_sidecar.errors import ReplayGone
from session_sidecar.turns.events import CHUNK_BYTES, EventLog

TURN = "63df1c2f-0000-4000-8000-000000000000"


def a_log(max_events: int = 100, max_bytes: int = 10_000) -> EventLog:
    return EventLog(max_events=max_events, max_bytes=max_bytes)


async def read(log: EventLog, after: int = 0) -> list[bytes]:
    async with asyncio.timeout(5):
        return [frame async for chunk in native(log, after, TURN) for frame in frames(chunk)]


async def closed(log: EventLog, after: int = 0) -> list[bytes]:
    log.close()
    return await read(log, after)


def frames(chunk: bytes) -> list[bytes]:
    assert chunk.endswith(b"\n\n")
    return [frame + b"\n\n" for frame in chunk.split(b"\n\n")[:-1]]


def ids(frames: list[bytes]) -> list[int]:
    return [position(frame.split(b"\n")[0].removeprefix(b"id: ").decode()).number for frame in frames]


async def test_a_reader_gets_every_event_in_order_and_ends_with_the_turn() -> None:
    log = a_log()
    for number in range(3):
        log.append("assistant", {"n": number})
    log.close()
    events = await read(log)
    assert events[0] == b'id: 63df1c2f-0000-4000-8000-000000000000-1\nevent: assistant\ndata: {"n":0}\n\n'
    assert ids(events) == [1, 2, 3]


async def test_a_reader_that_is_there_first_follows_the_turn() -> None:
    log = a_log()
    reading = asyncio.create_task(read(log))
    await asyncio.sleep(0)
    log.append("assistant", {})
    await asyncio.sleep(0)
    log.append("end", {})
    log.close()
    assert ids(await reading) == [1, 2]


async def test_every_one_of_several_readers_is_woken_for_each_event() -> None:
    log = a_log()
    readers = [native(log, 0, TURN), native(log, 0, TURN), native(log, 1, TURN)]
    log.append("assistant", {})
    for reader in readers[:2]:
        assert ids(frames(await anext(reader))) == [1]
    for number in (2, 3):
        waiting = [asyncio.ensure_future(anext(reader)) for reader in readers]
        await asyncio.sleep(0)
        log.append("assistant", {})
        async with asyncio.timeout(5):
            assert [ids(frames(await one)) for one in waiting] == [[number]] * 3


async def test_events_that_are_there_at_once_come_at_once_but_no_more_than_a_slow_reader_can_take() -> None:
    log = a_log(max_events=10_000, max_bytes=20 * CHUNK_BYTES)
    for number in range(5_000):
        log.append("assistant", {"n": number})
    log.close()
    chunks = [chunk async for chunk in native(log, 0, TURN)]
    assert 1 < len(chunks) < 10
    assert max(map(len, chunks)) < CHUNK_BYTES + 100
    assert ids(frames(b"".join(chunks))) == list(range(1, 5_001))


async def test_a_rejoining_reader_gets_what_it_missed() -> None:
    log = a_log()
    for _ in range(5):
        log.append("assistant", {})
    log.close()
    assert ids(await read(log, after=3)) == [4, 5]
    assert await read(log, after=5) == []


async def test_events_beyond_the_bound_are_dropped_oldest_first_and_missing_them_is_told() -> None:
    log = a_log(max_events=3)
    for _ in range(5):
        log.append("assistant", {})
    log.close()
    log.check(after=2)
    assert ids(await read(log, after=2)) == [3, 4, 5]
    with pytest.raises(ReplayGone, match="up to 2 have left"):
        log.check(after=1)


async def test_an_id_that_this_turn_has_not_reached_is_told_too() -> None:
    log = a_log()
    log.append("assistant", {})
    with pytest.raises(ReplayGone, match="no event 57 yet"):
        log.check(after=57)


async def test_bytes_are_bounded_and_the_two_newest_events_are_always_held() -> None:
    log = a_log(max_bytes=1000)
    for _ in range(10):
        log.append("assistant", {"text": "x" * 90})
    assert 800 < log.size <= 1000
    assert ids(await closed(log, after=7)) == [8, 9, 10]
    log.append("result", {"text": "x" * 1000})
    log.append("end", {})
    assert ids(await closed(log, after=10)) == [11, 12]
    with pytest.raises(ReplayGone):
        log.check(after=9)


async def test_the_newest_event_of_a_name_is_found_in_what_is_held() -> None:
    log = a_log(max_events=3)
    for number in range(3):
        log.append("assistant", {"n": number})
        log.append("result", {"n": number})
    assert log.newest("assistant") == {"n": 2}
    assert log.newest("result") == {"n": 2}
    assert log.newest("end") is None
    for _ in range(3):
        log.append("user", {})
    assert log.newest("result") is None


async def test_a_reader_that_falls_behind_the_buffer_is_ended_before_the_hole() -> None:
    log = a_log(max_events=3)
    chunks = native(log, 0, TURN)
    log.append("assistant", {})
    assert ids(frames(await anext(chunks))) == [1]
    for _ in range(10):
        log.append("assistant", {})
    log.close()
    assert [chunk async for chunk in chunks] == []


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_whatever_the_data_a_frame_is_three_lines_of_ascii_that_hold_it(data: dict[str, object]) -> None:
    async def framed() -> bytes:
        log = a_log()
        log.append("assistant", data)
        log.close()
        return (await read(log))[0]

    frame = asyncio.run(framed())
    assert frame.isascii()
    assert frame.endswith(b"\n\n")
    lines = frame[:-2].split(b"\n")
    assert len(lines) == 3
    assert json.loads(lines[2].removeprefix(b"data: ")) == data
