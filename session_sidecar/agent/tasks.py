"""Tasks that somebody owns: each is held until its end, and whoever owns them can wait for that."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """The tasks of one owner."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        """How many have not ended."""
        return len(self._running)

    def own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin a task."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def one_ended(self) -> None:
        """Wait until any of them has ended; there must be one."""
        await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)

    async def ended(self) -> None:
        """Wait until none is left, those that others begin meanwhile included."""
        while self._running:
            await asyncio.wait(self._running)
