"""A turn's events: numbered server-sent events in a bounded buffer that any number of readers replay and follow."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from sidecar.errors import ReplayGone

_as_json = json.JSONEncoder(separators=(",", ":")).encode
# What goes out in one piece to a reader that has much to catch up on; a slow one must be able to take it in time.
CHUNK_BYTES = 64 * 2**10


class EventLog:
    """The events of one turn, oldest dropped first beyond `max_events` or `max_bytes`.

    Writing never waits for a reader. Each event is framed once, however many read it.
    """

    def __init__(self, *, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._frames: dict[int, bytes] = {}  # by ID
        self._bytes = 0
        self._first = 1  # the ID of the oldest frame held
        self._closed = False
        self._news = asyncio.Event()

    @property
    def last_id(self) -> int:
        """The ID of the newest event; 0 before there is one."""
        return self._first + len(self._frames) - 1

    def append(self, event: str, data: dict[str, Any]) -> None:
        """Add an event: `data` goes out as one line of ASCII JSON with its members as they are."""
        number = self.last_id + 1
        frame = f"id: {number}\nevent: {event}\ndata: {_as_json(data)}\n\n".encode()
        self._frames[number] = frame
        self._bytes += len(frame)
        while len(self._frames) > self._max_events or (self._bytes > self._max_bytes and len(self._frames) > 1):
            self._bytes -= len(self._frames.pop(self._first))
            self._first += 1
        self._news.set()

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

    def _chunk(self, position: int) -> tuple[bytes, int]:
        """The frames from `position` on, up to about `CHUNK_BYTES`, and the position after them."""
        frames, size = [], 0
        while position <= self.last_id and size < CHUNK_BYTES:
            frames.append(self._frames[position])
            size += len(frames[-1])
            position += 1
        return b"".join(frames), position
