"""Who has which thread: one holder at a time, the others first come, first served.

Every decision is made without awaiting, so between asking and having there is no gap for anybody else.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from session_store import ThreadKey

H = TypeVar("H")


@dataclass(slots=True)
class _Lane(Generic[H]):
    holder: H
    waiting: deque[tuple[H, asyncio.Future[None]]] = field(default_factory=deque)


class Claims(Generic[H]):
    """Claims on threads. A lane exists only while somebody holds it, so an idle thread costs nothing."""

    def __init__(self) -> None:
        self._lanes: dict[ThreadKey, _Lane[H]] = {}

    def __iter__(self) -> Iterator[ThreadKey]:
        return iter(self._lanes)

    def holder(self, key: ThreadKey) -> H | None:
        """Who has the thread now."""
        lane = self._lanes.get(key)
        return lane.holder if lane else None

    def waiting(self, key: ThreadKey) -> list[H]:
        """Who waits for the thread, in order."""
        lane = self._lanes.get(key)
        return [waiter for waiter, _ in lane.waiting] if lane else []

    def enter(self, key: ThreadKey, claimant: H, *, first: bool = False) -> asyncio.Future[None]:
        """Ask for the thread: the future is done once `claimant` has it, which may be at once.

        `first` goes ahead of those who wait. Cancelling the future leaves the queue.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane = self._lanes.get(key)
        if lane is None:
            self._lanes[key] = _Lane(claimant)
            future.set_result(None)
        elif first:
            lane.waiting.appendleft((claimant, future))
        else:
            lane.waiting.append((claimant, future))
        return future

    def release(self, key: ThreadKey, claimant: H) -> None:
        """Hand the thread to the next in the queue, or leave the queue; nothing if `claimant` does neither."""
        lane = self._lanes.get(key)
        if lane is None:
            return
        if lane.holder is not claimant:
            lane.waiting = deque(entry for entry in lane.waiting if entry[0] is not claimant)
            return
        while lane.waiting:
            lane.holder, future = lane.waiting.popleft()
            if not future.done():
                future.set_result(None)
                return
        del self._lanes[key]
