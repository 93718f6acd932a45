"""What happens on the other replicas, for those who read the feed of this one.

Threads are wherever they are, and each replica tells of its own. So one whose feed is read reads those of the others
meanwhile, and passes on what they tell. It says `reset` where something may not have come.
"""

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from session_sidecar.replicas.peers import Peers
from session_store import SessionMapError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0  # between two looks for replicas that are new, and whether anybody still reads
RETRY_SECONDS = 1.0  # after a replica was not reached; twice as long each time, as some never come back
MOST_RETRY_SECONDS = 60.0


class Told(Protocol):
    """The feed of this replica: `turns.feed.Feed`."""

    wanted: asyncio.Event

    def pass_on(self, kind: str, data: dict[str, Any]) -> None:
        """Tell what another replica has told."""
        ...

    def reset(self) -> None:
        """Tell that something may have happened that is not known here."""
        ...


class Listening:
    """Hears the other replicas while somebody wants that. Where it was, it goes on when somebody does again."""

    def __init__(
        self, others: Callable[[], Awaitable[list[str]]], peers: Peers, feed: Told, *, lease_seconds: float
    ) -> None:
        """`others` gives the URLs of the other replicas. One that is gone loses its threads after `lease_seconds`."""
        self._others = others
        self._peers = peers
        self._feed = feed
        self._lease_seconds = lease_seconds
        self._heard: dict[str, str] = {}  # the last event of each
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._later: deque[asyncio.TimerHandle] = deque(maxlen=100)  # the newest

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Listen, if somebody reads, for as long as the block lasts."""
        keeping = asyncio.create_task(self._keep(), name="listening to the other replicas")
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])
            await self._leave(set(self._tasks))
            for timer in self._later:
                timer.cancel()

    async def _keep(self) -> None:
        while True:
            await self._feed.wanted.wait()
            try:
                urls = set(await self._others())
                await self._leave(self._tasks.keys() - urls)
                for url in urls - self._tasks.keys():
                    self._tasks[url] = asyncio.create_task(self._hear(url), name="listening to another replica")
            except SessionMapError:
                pass  # the database has logged what it is
            except Exception:
                logger.exception("looking for the other replicas failed")
            await asyncio.sleep(LOOK_SECONDS)
            if not self._feed.wanted.is_set():
                await self._leave(set(self._tasks))

    async def _leave(self, urls: set[str]) -> None:
        tasks = [self._tasks.pop(url) for url in urls]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _hear(self, url: str) -> None:
        """Pass on what a replica tells, whenever it can be reached.

        When it is lost, what it told last may not have come; and when its leases are over, none of its turns runs, be
        it back by then or not.
        """
        heard, pause = False, RETRY_SECONDS
        while True:
            try:
                async with contextlib.aclosing(self._peers.events(url, self._heard.get(url))) as events:
                    async for event in events:
                        self._feed.pass_on(event.event, json.loads(event.data))
                        self._heard[url], heard, pause = event.id, True, RETRY_SECONDS
            except Exception as error:  # whatever it is: it is tried again
                logger.info("another replica is not heard", extra={"fields": {"error": type(error).__name__}})
            if heard:
                heard = False
                self._feed.reset()
                self._later.append(asyncio.get_running_loop().call_later(self._lease_seconds, self._feed.reset))
            await asyncio.sleep(pause)
            pause = min(2 * pause, MOST_RETRY_SECONDS)
