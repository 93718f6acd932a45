"""How CLIs are started: as many at once as there are cores, as more only slow each other down.

A start that a turn waits for goes before those that are made ahead, and these leave it a core where there are two. What
a CLI says of itself when it is connected is noted here: its version, and whether it has credentials.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextvars import Context

from session_sidecar.agent.processes.process import AgentProcess
from session_sidecar.errors import AgentStartFailed, NotConfigured

AHEAD_SECONDS = 10.0  # for a start that no turn waits for; one that takes longer hangs


class Starts:
    """Every start of a CLI."""

    def __init__(
        self, places: int, *, for_one_turn: bool = False, on_start: Callable[[str, bool], object] = lambda *_: None
    ) -> None:
        """`places` is how many may start at once; `for_one_turn` that no process is kept for a second turn.

        `on_start` is told what each start was for, `turn` or `ahead`, and whether the process is connected.
        """
        self._places = Places(places)
        self._for_one_turn = for_one_turn
        self._on_start = on_start
        self._ahead: set[AgentProcess] = set()
        self._closing = False
        self._unconfigured: dict[str, NotConfigured | None] = {}  # by preset, as its newest process said
        self.version: str | None = None  # of the CLI, once one has been connected

    async def start(self, process: AgentProcess) -> None:
        """Start a process when a core is free for it, in the order of asking.

        Raises AgentStartFailed, NotConfigured. One that is told to end while it waits fails at once.
        """
        async with self._places.place(unless=process.ended):
            await self._start(process, "turn")

    def room_ahead(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Wait for a core that no turn needs, and have it for `start_ahead`."""
        return self._places.place(ahead=True)

    async def start_ahead(self, process: AgentProcess) -> None:
        """Start a process that no turn waits for; it is ended in mid-start if need be.

        Only while having `room_ahead`. Raises AgentStartFailed, NotConfigured.
        """
        self._ahead.add(process)
        try:
            if self._closing:
                raise AgentStartFailed("The sidecar is shutting down.")
            await self._start(process, "ahead", AHEAD_SECONDS)
        finally:
            self._ahead.discard(process)

    @property
    def problem(self) -> NotConfigured | None:
        """What is missing, if no preset's newest process had credentials."""
        return next(iter(self._unconfigured.values()), None) if all(self._unconfigured.values()) else None

    async def stop(self) -> None:
        """Start nothing ahead from here on, and end what is being started so: one that hangs would be waited for."""
        self._closing = True
        await asyncio.gather(*(process.end() for process in self._ahead))

    async def _start(self, process: AgentProcess, purpose: str, patience: float | None = None) -> None:
        problem, connected = None, False
        # The SDK gives a process the trace of whoever starts it, and the CLI takes all turns to come for parts of that.
        context = None if purpose == "turn" and self._for_one_turn else Context()
        try:
            await asyncio.create_task(process.start(patience), context=context)
            connected = True
        except NotConfigured as error:
            problem = error.again()
            raise
        finally:
            self._on_start(purpose, connected)
            if process.cli_version is not None:
                self.version = process.cli_version
                if process.preset is not None:
                    self._unconfigured[process.preset] = problem


class Places:
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
