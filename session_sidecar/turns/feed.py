"""What happens to threads, told to whoever keeps a list of them: IDs and words, never what was said.

One log for all threads, bounded, so that a reader who was away goes on where it was. An event is told after its change:
whoever looks then sees it. Telling never waits, and wakes only the readers of the resource.
"""

import asyncio
import contextlib
import json
import uuid
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from session_sidecar.turns.turn import Turn
from session_store import SessionMapping, ThreadKey

MAX_EVENTS = 10_000
MAX_BYTES = 8 * 2**20
# What an event takes in memory beside its data.
EVENT_BYTES = 256

Kind = Literal["reset", "created", "forked", "turn_started", "turn_ended", "titled", "deleted"]


class FeedEvent(NamedTuple):
    """Something that happened. `line` is its data: one line of ASCII JSON, shared by all who read it."""

    number: int
    kind: str
    line: bytes
    resource_id: str | None  # None: it is for everybody
    is_own: bool  # not told by another replica


class FeedReader:
    """Whoever reads the feed, of one resource or of all."""

    def __init__(self, feed: "Feed", resource_id: str | None, *, own_only: bool) -> None:
        self._feed = feed
        self.resource_id = resource_id
        self.own_only = own_only
        self.waiting: deque[FeedEvent] = deque()
        """What it has not taken yet: the log's own events, so it costs little more than their places."""
        self.missed = False
        """There was more than the log holds, or what came before this is not known."""
        self.news = asyncio.Event()

    def wants(self, event: FeedEvent) -> bool:
        """Whether an event is told to this reader."""
        if self.own_only and not event.is_own:
            return False
        return event.resource_id is None or self.resource_id in (None, event.resource_id)

    async def take(self) -> list[FeedEvent]:
        """All that is new, as soon as there is anything; nothing when there will be no more.

        A `reset` comes first where something was missed.
        """
        while not self.waiting and not self.missed and not self._feed.is_closed:
            self.news.clear()
            await self.news.wait()
        taken = [self._feed.known_from(self.waiting)] if self.missed else []
        taken += self.waiting
        self.missed = False
        self.waiting.clear()
        return [] if self._feed.is_closed else taken


class Feed:
    """The newest events of all threads, and who reads them."""

    def __init__(self, *, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BYTES) -> None:
        self.id = str(uuid.uuid4())
        """Of this process's feed: an event's ID is this and its number."""
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._log: deque[FeedEvent] = deque()
        self._bytes = 0
        self._last = 0
        self._readers: dict[str | None, set[FeedReader]] = {}  # by resource; of all of them under None
        self._callers = 0
        self.wanted = asyncio.Event()
        """Set while a caller reads; replicas that read each other do not count, or none would ever cease to."""
        self.is_closed = False

    def tell(self, kind: Kind, key: ThreadKey, **more: Any) -> None:
        """Tell what has happened to a thread; `more` are the event's further members."""
        data = {"type": kind, "thread_id": key.thread_id, "resource_id": key.resource_id, "at": _now(), **more}
        self._add(kind, data, key.resource_id, is_own=True)

    def came_to_be(self, mapping: SessionMapping) -> None:
        """Tell of a thread's first mapping."""
        session = {"sdk_session_id": mapping.sdk_session_id}
        if mapping.parent_thread_id is None:
            self.tell("created", mapping.key, **session)
        else:
            parent = {"parent_thread_id": mapping.parent_thread_id, "parent_message_id": mapping.parent_message_id}
            self.tell("forked", mapping.key, **session, **parent)

    def turn_started(self, turn: Turn) -> None:
        """Tell that a turn runs, whose mapping is committed."""
        self.tell("turn_started", turn.request.key, turn_id=turn.id, origin=turn.origin)

    def turn_ended(self, turn: Turn) -> None:
        """Tell that a turn has ended and given its thread back."""
        code = turn.error.code if turn.error else None
        more = {"turn_id": turn.id, "origin": turn.origin, "status": turn.status, "code": code}
        self.tell("turn_ended", turn.request.key, **more)

    def pass_on(self, kind: str, data: dict[str, Any]) -> None:
        """Tell what another replica has told; it is told to no other replica."""
        self._add(kind, data, data.get("resource_id"), is_own=False)

    def reset(self) -> None:
        """Tell everybody that something may have happened that is not known here."""
        self.pass_on("reset", {"type": "reset"})

    @contextlib.contextmanager
    def reader(
        self, resource_id: str | None, after: tuple[str, int] | None, *, own_only: bool = False
    ) -> Iterator[FeedReader]:
        """Read what happens to the threads of a resource (all, without one), from behind the event `after`.

        That is a feed's ID and a number. Where it is not held, or there is none, `reset` comes first. `own_only` is
        another replica: it is told nothing that it could have from another one.
        """
        reader = FeedReader(self, resource_id, own_only=own_only)
        if after is not None and self._holds(*after):
            reader.waiting.extend(event for event in self._log if event.number > after[1] and reader.wants(event))
        else:
            reader.missed = True
        readers = self._readers.setdefault(resource_id, set())
        readers.add(reader)
        self._count(0 if own_only else 1)
        try:
            yield reader
        finally:
            readers.discard(reader)
            if not readers and self._readers.get(resource_id) is readers:
                del self._readers[resource_id]
            self._count(0 if own_only else -1)

    def close(self) -> None:
        """There will be no more events; readers end at once, and come back elsewhere or later."""
        self.is_closed = True
        for readers in self._readers.values():
            for reader in readers:
                reader.news.set()

    def known_from(self, waiting: deque[FeedEvent]) -> FeedEvent:
        """The `reset` that comes before these events; a reader who goes on from it has each of them."""
        number = waiting[0].number - 1 if waiting else self._last
        return FeedEvent(number, "reset", b'{"type":"reset"}', None, is_own=True)

    def _holds(self, feed_id: str, number: int) -> bool:
        """Whether every event after this one is still held, or yet to come."""
        return feed_id == self.id and self._first - 1 <= number <= self._last

    @property
    def _first(self) -> int:
        return self._last - len(self._log) + 1

    def _count(self, more: int) -> None:
        self._callers += more
        if self._callers:
            self.wanted.set()
        else:
            self.wanted.clear()

    def _add(self, kind: str, data: dict[str, Any], resource_id: str | None, *, is_own: bool) -> None:
        self._last += 1
        line = json.dumps(data, separators=(",", ":")).encode()
        event = FeedEvent(self._last, kind, line, resource_id, is_own)
        self._log.append(event)
        self._bytes += len(line) + EVENT_BYTES
        while len(self._log) > self._max_events or (self._bytes > self._max_bytes and len(self._log) > 1):
            self._bytes -= len(self._log.popleft().line) + EVENT_BYTES
        everybody = self._readers if resource_id is None else (resource_id, None)
        for readers in (self._readers.get(name, ()) for name in everybody):
            for reader in readers:
                if reader.wants(event):
                    self._give(reader, event)

    def _give(self, reader: FeedReader, event: FeedEvent) -> None:
        if reader.waiting and reader.waiting[0].number < self._first:
            reader.waiting.clear()  # it is behind what the log holds: what it has missed may be anything
            reader.missed = True
        reader.waiting.append(event)
        reader.news.set()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
