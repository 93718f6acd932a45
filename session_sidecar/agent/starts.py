"""How many CLIs start at once: as many as there are cores, as more only slow each other down.

A start that a turn waits for goes before those that are made ahead, and these leave it a core where there are two.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Starts:
    """The places for starting processes. Who gets one is decided without awaiting."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._spared = min(1, places - 1)  # places that a start made ahead leaves free
        self._turns: deque[asyncio.Future[None]] = deque()
        self._ahead: deque[asyncio.Future[None]] = deque()

    @contextlib.asynccontextmanager
    async def place(self, *, ahead: bool = False, unless: asyncio.Event | None = None) -> AsyncIterator[None]:
        """Have a place for as long as the block lasts; `ahead` when no turn waits for what is started.

        Once `unless` is set nothing is waited for any more, and the block has no place.
        """
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._ahead if ahead else self._turns).append(place)
        self._hand_out()
        stopped = asyncio.ensure_future((unless or asyncio.Event()).wait())
        try:
            await asyncio.wait((place, stopped), return_when=asyncio.FIRST_COMPLETED)
            yield
        finally:
            stopped.cancel()
            self._free += not place.cancel()
            self._hand_out()

    def _hand_out(self) -> None:
        for waiting, spared in ((self._turns, 0), (self._ahead, self._spared)):
            while waiting and (waiting[0].cancelled() or self._free > spared):
                place = waiting.popleft()
                if not place.cancelled():
                    self._free -= 1
                    place.set_result(None)
