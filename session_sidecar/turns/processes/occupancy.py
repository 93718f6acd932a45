"""What this process does on its threads, for whoever shares them with others: `replicas.tenancy.Occupants`."""

import contextlib

from session_sidecar.replicas.tenancy import lost
from session_sidecar.turns.deciding.exclusion import Exclusion
from session_sidecar.turns.processes.processes import Processes
from session_store import ThreadKey


class Occupancy:
    """Who is at which thread here: turns, changes, and processes."""

    def __init__(self, exclusion: Exclusion, processes: Processes) -> None:
        self._exclusion = exclusion
        self._processes = processes

    def is_free(self, key: ThreadKey) -> bool:
        """Whether no turn and no change has the thread."""
        return self._exclusion.is_free(key)

    def at_work(self, key: ThreadKey) -> bool:
        """Whether the thread's process is at work in the background."""
        return self._processes.settled(key) is not None

    def has_process(self, key: ThreadKey) -> bool:
        """Whether a process that no turn has is connected to the thread's session."""
        return self._processes.has(key)

    def has_session(self, session_id: str) -> ThreadKey | None:
        """The thread of a process that no turn has, if one is connected to this session."""
        return self._processes.of_session(session_id)

    def pause(self, key: ThreadKey) -> contextlib.AbstractAsyncContextManager[None]:
        """Have the thread for a moment, ahead of those who wait for it."""
        return self._exclusion.pause(key)

    async def drop(self, key: ThreadKey) -> None:
        """See the thread's process gone, if there is one that no turn has."""
        await self._processes.drop(key)

    async def lose(self, key: ThreadKey) -> None:
        """Stop what runs on the thread: it is another replica's by now, or may be."""
        if turn := self._exclusion.running(key):
            turn.stop(lost())
        else:
            await self._processes.drop(key)
