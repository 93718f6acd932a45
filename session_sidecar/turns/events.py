"""A turn's events: numbered, in a bounded buffer that any number of readers replay and follow.

Each is kept as its kind and its data in compact JSON. How that is framed for a reader is the reader's own affair.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from session_sidecar.errors import ReplayGone

_as_json = json.JSONEncoder(separators=(",", ":")).encode
# What a reader that has much to catch up on gets at once; a slow one must be able to take it in time.
CHUNK_BYTES = 64 * 2**10
# What an event takes in memory beside its data: the objects, its number and its place in the log.
EVENT_BYTES = 192
_FRAME_BYTES = 96  # around it, when it goes out
# So many are never dropped: a turn's result, and its end.
NEWEST = 2

Event = tuple[int, str, bytes]
"""The number of an event, its kind, and its data: one line of ASCII JSON, shared by all who read it."""


class EventLog:
    """The events of one turn, oldest dropped first beyond `max_events` or `max_bytes`, but for the `NEWEST`.

    Writing never waits for a reader. Each event is made JSON once, however many read it.
    """

    def __init__(self, *, max_events: int, max_bytes: int, on_growth: Callable[[int], object] = lambda _: None) -> None:
        """`on_growth` is told after each event by how many bytes the log has grown."""
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._on_growth = on_growth
        self._events: dict[int, Event] = {}  # by number
        self.size = 0  # in bytes of memory
        self._first = 1  # the number of the oldest event held
        self._closed = False
        self._news = asyncio.Event()

    @property
    def last_id(self) -> int:
        """The number of the newest event; 0 before there is one."""
        return self._first + len(self._events) - 1

    def append(self, kind: str, data: dict[str, Any]) -> None:
        """Add an event: `data` goes out with its members as they are."""
        number, before = self.last_id + 1, self.size
        line = _as_json(data).encode()
        self._events[number] = number, kind, line
        self.size += len(line) + EVENT_BYTES
        if len(self._events) > self._max_events:
            self._drop_oldest()
        self.shrink(self._max_bytes)
        self._news.set()
        self._on_growth(self.size - before)

    @property
    def can_shrink(self) -> bool:
        """Whether there is an event that may be dropped."""
        return len(self._events) > NEWEST

    def shrink(self, size: int) -> int:
        """Drop the oldest events until the log has no more than so many bytes; how many bytes were dropped."""
        before = self.size
        while self.size > size and self.can_shrink:
            self._drop_oldest()
        return before - self.size

    def newest(self, kind: str) -> dict[str, Any] | None:
        """The data of the newest event of this kind that is still held."""
        for _, name, line in reversed(self._events.values()):
            if name == kind:
                data: dict[str, Any] = json.loads(line)
                return data
        return None

    def close(self) -> None:
        """There will be no more events; readers end at the last one."""
        self._closed = True
        self._news.set()

    def check(self, after: int) -> None:
        """Raise ReplayGone unless every event after the ID `after` is still held, or yet to come."""
        if after > self.last_id:
            raise ReplayGone(f"This turn has no event {after} yet. Read from the start: leave Last-Event-ID out.")
        if after < self._first - 1:
            raise ReplayGone(
                f"Events up to {self._first - 1} have left the buffer. Read the answer from the session's messages."
            )

    async def after(self, number: int) -> list[Event]:
        """The events after this one, as soon as there are any; none when there will be no more.

        `CHUNK_BYTES` of them at most, or a single one. None too for a reader so slow that an event it has not had is
        dropped: without `end`. It may rejoin, and is then told ReplayGone.
        """
        while number >= self.last_id and not self._closed:
            # Nothing is awaited between seeing that there is no news and waiting for some, so none is missed; another
            # reader that waits already has been woken by the news that this one takes back.
            self._news.clear()
            await self._news.wait()
        if number < self._first - 1:
            return []
        batch: list[Event] = []
        size = 0
        for position in range(number + 1, self.last_id + 1):
            event = self._events[position]
            size += len(event[2]) + _FRAME_BYTES
            if batch and size > CHUNK_BYTES:
                break
            batch.append(event)
        return batch

    def _drop_oldest(self) -> None:
        self.size -= len(self._events.pop(self._first)[2]) + EVENT_BYTES
        self._first += 1
