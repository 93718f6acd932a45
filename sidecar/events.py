"""A turn's events: numbered server-sent events in a bounded buffer that any number of readers replay and follow."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from sidecar.errors import ReplayGone


class EventLog:
    """The events of one turn, oldest dropped first beyond `max_events` or `max_bytes`.

    Writing never waits for a reader. Each event is framed once, however many read it.
    """

    def __init__(self, *, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._frames: deque[bytes] = deque()
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
        text = json.dumps(data, separators=(",", ":"))
        frame = f"id: {self.last_id + 1}\nevent: {event}\ndata: {text}\n\n".encode()
        self._frames.append(frame)
        self._bytes += len(frame)
        while len(self._frames) > self._max_events or (self._bytes > self._max_bytes and len(self._frames) > 1):
            self._bytes -= len(self._frames.popleft())
            self._first += 1
        self._wake()

    def close(self) -> None:
        """There will be no more events; readers end at the last one."""
        self._closed = True
        self._wake()

    def check(self, after: int) -> None:
        """Raise ReplayGone unless every event after the ID `after` is still held, or yet to come."""
        if after > self.last_id:
            raise ReplayGone(f"This turn has no event {after} yet. Read from the start: leave Last-Event-ID out.")
        if after < self._first - 1:
            raise ReplayGone(
                f"Events up to {self._first - 1} have left the buffer. Read the answer from the session's messages."
            )

    async def frames(self, after: int = 0) -> AsyncIterator[bytes]:
        """Framed events from the one after the ID `after`, to the end of the turn.

        A reader so slow that an event it has not had is dropped ends early, without `end`: it may rejoin, and is then
        told ReplayGone.
        """
        position = after + 1
        while True:
            news = self._news
            while position <= self.last_id:
                if position < self._first:
                    return
                yield self._frames[position - self._first]
                position += 1
            if self._closed:
                return
            await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
