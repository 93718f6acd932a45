"""A turn's events: numbered server-sent events in a bounded buffer that any number of readers replay and follow."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from sidecar.errors import ReplayGone

_as_json = json.JSONEncoder(separators=(",", ":")).encode
# What goes out in one piece to a reader that has much to catch up on; a slow one must be able to take it in time.
CHUNK_BYTES = 64 * 2**10


# What an event takes in memory beside its frame's text: the object, its number and its place in the log.
EVENT_BYTES = 128
# So many are never dropped: a turn's result, and its end.
NEWEST = 2


class EventLog:
    """The events of one turn, oldest dropped first beyond `max_events` or `max_bytes`, but for the `NEWEST`.

    Writing never waits for a reader. Each event is framed once, however many read it.
    """

    def __init__(self, *, max_events: int, max_bytes: int, on_growth: Callable[[int], object] = lambda _: None) -> None:
        """`on_growth` is told after each event by how many bytes the log has grown."""
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._on_growth = on_growth
        self._frames: dict[int, bytes] = {}  # by ID
        self.size = 0  # in bytes of memory
        self._first = 1  # the ID of the oldest frame held
        self._closed = False
        self._news = asyncio.Event()

    @property
    def last_id(self) -> int:
        """The ID of the newest event; 0 before there is one."""
        return self._first + len(self._frames) - 1

    def append(self, event: str, data: dict[str, Any]) -> None:
        """Add an event: `data` goes out as one line of ASCII JSON with its members as they are."""
        number, before = self.last_id + 1, self.size
        frame = f"id: {number}\nevent: {event}\ndata: {_as_json(data)}\n\n".encode()
        self._frames[number] = frame
        self.size += len(frame) + EVENT_BYTES
        if len(self._frames) > self._max_events:
            self._drop_oldest()
        self.shrink(self._max_bytes)
        self._news.set()
        self._on_growth(self.size - before)

    @property
    def can_shrink(self) -> bool:
        """Whether there is an event that may be dropped."""
        return len(self._frames) > NEWEST

    def shrink(self, size: int) -> int:
        """Drop the oldest events until the log has no more than so many bytes; how many bytes were dropped."""
        before = self.size
        while self.size > size and self.can_shrink:
            self._drop_oldest()
        return before - self.size

    def newest(self, event: str) -> dict[str, Any] | None:
        """The data of the newest event of this name that is still held."""
        for number, frame in reversed(self._frames.items()):
            head = f"id: {number}\nevent: {event}\ndata: ".encode()
            if frame.startswith(head):
                data: dict[str, Any] = json.loads(frame[len(head) :])
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

    async def chunks(self, after: int = 0) -> AsyncIterator[bytes]:
        """Framed events from the one after the ID `after`, to the end of the turn; what is there at once comes at once.

        A reader so slow that an event it has not had is dropped ends early, without `end`: it may rejoin, and is then
        told ReplayGone.
        """
        position = after + 1
        while True:
            while position <= self.last_id:
                if position < self._first:
                    return
                chunk, position = self._chunk(position)
                yield chunk
            if self._closed:
                return
            # Nothing is awaited between seeing that there is no news and waiting for some, so none is missed; another
            # reader that waits already has been woken by the news that this one takes back.
            self._news.clear()
            await self._news.wait()

    def _drop_oldest(self) -> None:
        self.size -= len(self._frames.pop(self._first)) + EVENT_BYTES
        self._first += 1

    def _chunk(self, position: int) -> tuple[bytes, int]:
        """The frames from `position` on, up to `CHUNK_BYTES`, and the position after them.

        A larger one comes by itself, as it is: all its readers share it.
        """
        frames: list[bytes] = []
        size = 0
        while position <= self.last_id:
            frame = self._frames[position]
            size += len(frame)
            if frames and size > CHUNK_BYTES:
                break
            frames.append(frame)
            position += 1
        return b"".join(frames), position
