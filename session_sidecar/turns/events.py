"""A turn's events: numbered, in a bounded buffer that any number of readers replay and follow.

Each is kept as its kind and its data in compact JSON. How that is framed for a reader is the reader's own affair.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from session_sidecar.errors import ReplayGone

_as_json = json.JSONEncoder(separators=(",", ":")).encode
# What a reader that has much to catch up on gets at once; a slow one must be able to take it in time.
CHUNK_BYTES = 64 * 2**10
# What an event takes in memory beside its data: the objects, its number and its place in the log.
EVENT_BYTES = 192
_FRAME_BYTES = 64  # around it, when it goes out
# So many are never dropped: a turn's result, and its end.
NEWEST = 2


class Event(NamedTuple):
    """One event: `data` is one line of ASCII JSON, shared by all who read it."""

    number: int
    kind: str
    data: bytes


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
        before = self.size
        event = Event(self.last_id + 1, kind, _as_json(data).encode())
        self._events[event.number] = event
        self.size += len(event.data) + EVENT_BYTES
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
        for event in reversed(self._events.values()):
            if event.kind == kind:
                data: dict[str, Any] = json.loads(event.data)
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

    async def batches(self, after: int = 0) -> AsyncIterator[list[Event]]:
        """The events from the one after the number `after`, to the end of the turn; what is there comes at once.

        A batch is of `CHUNK_BYTES` at most, or a single event. A reader so slow that an event it has not had is dropped
        ends early, without `end`: it may rejoin, and is then told ReplayGone.
        """
        position = after + 1
        while True:
            while position <= self.last_id:
                if position < self._first:
                    return
                batch = self._batch(position)
                position += len(batch)
                yield batch
            if self._closed:
                return
            # Nothing is awaited between seeing that there is no news and waiting for some, so none is missed; another
            # reader that waits already has been woken by the news that this one takes back.
            self._news.clear()
            await self._news.wait()

    def _drop_oldest(self) -> None:
        self.size -= len(self._events.pop(self._first).data) + EVENT_BYTES
        self._first += 1

    def _batch(self, position: int) -> list[Event]:
        batch: list[Event] = []
        size = 0
        for number in range(position, self.last_id + 1):
            event = self._events[number]
            size += len(event.data) + _FRAME_BYTES
            if batch and size > CHUNK_BYTES:
                break
            batch.append(event)
        return batch
