"""Which turn is on which thread, and who waits for it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from session_store import ThreadKey
from sidecar.claims import Claims
from sidecar.errors import QueueFull, SidecarError, ThreadBusy, ThreadExists
from sidecar.turn import Turn


class Hold:
    """Has a thread for a moment, to change its mapping or its process while no turn runs."""


class Threads:
    """The threads in use. All that is asked here is decided without awaiting."""

    def __init__(self, *, queue_turns: int) -> None:
        """`queue_turns` may wait for one thread."""
        self._queue_turns = queue_turns
        self._claims: Claims[Turn | Hold] = Claims()

    def running(self, key: ThreadKey) -> Turn | None:
        """The turn that has the thread and has not ended."""
        holder = self._claims.holder(key)
        return holder if isinstance(holder, Turn) and not holder.ended.is_set() else None

    def turns(self, key: ThreadKey) -> list[Turn]:
        """The turns that run on a thread or wait for it."""
        everyone = (self._claims.holder(key), *self._claims.waiting(key))
        return [turn for turn in everyone if isinstance(turn, Turn) and not turn.ended.is_set()]

    def busy(self) -> list[ThreadKey]:
        """The threads that turns run on or wait for."""
        return [key for key in self._claims if self.turns(key)]

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
