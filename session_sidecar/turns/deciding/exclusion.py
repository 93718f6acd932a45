"""One turn on a thread at a time: who has which thread, who waits for it, and in which order.

Every decision is made without awaiting, so between asking and having there is no gap for anybody else.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from session_sidecar.errors import QueueFull, SidecarError, ThreadBusy, ThreadExists
from session_sidecar.turns.turn import Turn
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


class Hold:
    """Has a thread for a moment, to change its mapping or its process while no turn runs."""


class Exclusion:
    """The threads in use. All that is asked here is decided without awaiting."""

    def __init__(self, *, queue_turns: int) -> None:
        """`queue_turns` may wait for one thread."""
        self._queue_turns = queue_turns
        self._claims: Claims[Turn | Hold] = Claims()

    def running(self, key: ThreadKey) -> Turn | None:
        """The turn that has the thread and has not ended."""
        holder = self._claims.holder(key)
        return holder if isinstance(holder, Turn) and not holder.ended.is_set() else None

    def has_thread(self, turn: Turn) -> bool:
        """Whether this turn has its thread, be it about to give it back."""
        return self._claims.holder(turn.request.key) is turn

    def turns(self, key: ThreadKey) -> list[Turn]:
        """The turns that run on a thread or wait for it."""
        everyone = (self._claims.holder(key), *self._claims.waiting(key))
        return [turn for turn in everyone if isinstance(turn, Turn) and not turn.ended.is_set()]

    def busy(self) -> list[ThreadKey]:
        """The threads that turns run on or wait for."""
        return [key for key in self._claims if self.turns(key)]

    @property
    def load(self) -> tuple[int, int]:
        """How many turns have their thread, and how many wait for it."""
        running = sum(self.running(key) is not None for key in self._claims)
        return running, sum(len(self.turns(key)) for key in self._claims) - running

    def is_free(self, key: ThreadKey) -> bool:
        """Whether nobody has the thread."""
        return self._claims.holder(key) is None

    def enter(self, turn: Turn) -> asyncio.Future[None]:
        """Put a turn on its thread, as its request says about those before it; the future is done once it has it.

        Raises ThreadBusy, QueueFull and, for the first turn of a fork, ThreadExists.
        """
        request = turn.request
        running, waiting = self.running(request.key), self._claims.waiting(request.key)
        if (running is None and not waiting) or turn.origin == "background":
            return self._claims.enter(request.key, turn)
        if request.fork_of is not None:
            raise ThreadExists("Choose another `thread_id`; a turn is running on this one.")
        if request.multitask_strategy == "reject":
            raise ThreadBusy(
                "One turn at a time. Wait for it, stop it, or send `multitask_strategy`: `enqueue` or `interrupt`.",
                retry_after=1,
            )
        if request.multitask_strategy == "enqueue":
            if len(waiting) >= self._queue_turns:
                raise QueueFull(f"{len(waiting)} turns wait for this thread already.", retry_after=5)
            return self._claims.enter(request.key, turn)
        # An interrupt stops the running turn and those that came to interrupt before it, and goes ahead of those that
        # wait for their turn; but nobody passes a hold.
        for other in (running, *waiting):
            if isinstance(other, Turn) and (other is running or other.request.multitask_strategy == "interrupt"):
                other.stop()
        held = any(isinstance(waiter, Hold) for waiter in waiting)
        return self._claims.enter(request.key, turn, first=not held)

    def leave(self, turn: Turn) -> None:
        """Hand the thread to the next, or leave its queue."""
        self._claims.release(turn.request.key, turn)

    @contextlib.asynccontextmanager
    async def hold(self, key: ThreadKey, *, stop: SidecarError | None = None) -> AsyncIterator[None]:
        """Keep turns off a thread.

        If one runs or waits there: stops them all for the reason `stop`, or raises ThreadBusy where there is none.
        """
        turns = self.turns(key)
        if turns and stop is None:
            raise ThreadBusy("Wait for it, or stop it first; a deletion takes `force=true` for that.", retry_after=1)
        for turn in turns:
            turn.stop(stop)
        hold = Hold()
        try:
            await self._claims.enter(key, hold)
            yield
        finally:
            self._claims.release(key, hold)

    @contextlib.asynccontextmanager
    async def pause(self, key: ThreadKey) -> AsyncIterator[None]:
        """Have the thread for a moment, ahead of those who wait for it: it is looked at while no turn runs."""
        hold = Hold()
        try:
            await self._claims.enter(key, hold, first=True)
            yield
        finally:
            self._claims.release(key, hold)

    def stop_all(self, reason: SidecarError) -> None:
        """Stop every turn that runs or waits."""
        for key in self.busy():
            for turn in self.turns(key):
                turn.stop(reason)
