"""Dialects: how a turn's events are written for a reader. The sidecar's own is the server-sent events of the WHATWG.

A dialect makes the chunks of a response body of what a log gives it; it keeps nothing of them.
"""

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import NamedTuple

from session_sidecar.turns.events import CHUNK_BYTES, EventLog

FRAME = b"id: %b-%d\nevent: %b\ndata: %b\n\n"
EVENT_ID = r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-([0-9]{1,15})"
_ID = re.compile(EVENT_ID)


class Position(NamedTuple):
    """Behind which event of which turn, or of which feed, a reader goes on."""

    turn_id: str
    number: int


class Dialect(NamedTuple):
    """How a reader is told a turn. `frames` gets its log, the number of the event to go on after, and its ID."""

    frames: Callable[[EventLog, int, str], AsyncGenerator[bytes]]
    headers: Mapping[str, str] = {}
    has_answers: bool = False  # whether `Accept: application/json` gets one answer instead


def position(event_id: str) -> Position:
    """What an `id:` of the sidecar's says. Raises ValueError for any other text."""
    found = _ID.fullmatch(event_id)
    if found is None:
        raise ValueError("must be the id of an event: it names the turn or the feed, and the event's number in it")
    return Position(found[1], int(found[2]))


async def native(log: EventLog, after: int, turn_id: str) -> AsyncGenerator[bytes]:
    """The events as they are: `id:` is the turn's ID and the number, `event:` the kind, `data:` one line."""
    name = turn_id.encode()
    while events := await log.after(after):
        after, kind, data = events[-1]
        if len(data) > CHUNK_BYTES:
            # By itself, as it is: a large one is not copied for each of its readers.
            yield f"id: {turn_id}-{after}\nevent: {kind}\ndata: ".encode()
            yield data
            yield b"\n\n"
        else:
            yield b"".join([FRAME % (name, number, kind.encode(), data) for number, kind, data in events])


NATIVE = Dialect(native, has_answers=True)
