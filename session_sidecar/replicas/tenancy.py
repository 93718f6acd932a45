"""Having a thread: what turns, changes and readers ask for before they touch its session.

One process that owns its home has every thread (`Alone`). Of several replicas one has a thread at a time (`Fleet`).
"""

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from session_sidecar.agent.transcripts import Revision
from session_sidecar.agent.transcripts.reading.metadata import Metadata
from session_sidecar.errors import HeldElsewhere, LeaseLost
from session_store import SessionMap, SessionMapping, ThreadKey


class Occupants(Protocol):
    """What this process does on its threads."""

    def is_free(self, key: ThreadKey) -> bool:
        """Whether no turn and no change has the thread."""
        ...

    def at_work(self, key: ThreadKey) -> bool:
        """Whether the thread's process is at work in the background."""
        ...

    def has_process(self, key: ThreadKey) -> bool:
        """Whether a process that no turn has is connected to the thread's session."""
        ...

    def has_session(self, session_id: str) -> ThreadKey | None:
        """The thread of a process that no turn has, if one is connected to this session."""
        ...

    def pause(self, key: ThreadKey) -> AbstractAsyncContextManager[None]:
        """Have the thread for a moment, ahead of those who wait for it."""
        ...

    async def drop(self, key: ThreadKey) -> None:
        """See the thread's process gone, if there is one that no turn has."""
        ...

    async def lose(self, key: ThreadKey) -> None:
        """Stop what runs on the thread: it is another replica's by now, or may be."""
        ...


class Tenancy(Protocol):
    """Who has which thread. Any call may raise StoreUnavailable, but for those that say that they never fail."""

    def attending(self, occupants: Occupants) -> AbstractAsyncContextManager[None]:
        """Keep what this process has of threads for as long as the block lasts, with an eye on what is done on them."""
        ...

    async def enter(self, key: ThreadKey) -> SessionMapping | None:
        """Have a thread, and here the transcript that its last holder left; its mapping, None if it is not mapped.

        Whoever asks has the claim on it among what this process does, and leaves before giving that back. A mapping
        that is added meanwhile is had too. Raises HeldElsewhere; then there is nothing to leave.
        """
        ...

    async def leave(self, key: ThreadKey) -> None:
        """Let others have a thread, as soon as all that was written is stored and nothing is at work. Never fails."""
        ...

    async def save(self, key: ThreadKey, session_id: str, settled: Revision | None) -> bool | None:
        """Store what a turn has written. Whether it is stored by now; None where nothing else is to be stored.

        `settled` is where the turn ended, if it came to a result that is in the transcript. Raises LeaseLost where it
        is refused, as another replica has the thread by now; nothing else.
        """
        ...

    def settle(self, key: ThreadKey, session_id: str, settled: Revision) -> None:
        """Note that a transcript which no turn of the thread has written is of completed turns up to here.

        It is stored when the thread is left.
        """
        ...

    async def look(self, mapping: SessionMapping) -> Revision | None:
        """Have a transcript here as far as it is stored, to read it; where its last turn ended, if that is known.

        Nobody is kept from the thread meanwhile.
        """
        ...

    async def outlines(self, mappings: Sequence[SessionMapping]) -> list[Metadata] | None:
        """What is known of these sessions without their transcripts; None where the transcripts are to be read."""
        ...

    async def bring(self, key: ThreadKey, session_id: str) -> None:
        """Have the transcript of a session here that no thread has, if it is stored: it is to be this thread's."""
        ...

    async def erase(self, session_id: str) -> None:
        """Delete what is stored of a session elsewhere than in its transcript here, by whoever has its thread."""
        ...

    async def running(self, keys: Iterable[ThreadKey]) -> set[ThreadKey]:
        """Those of these threads that another replica has."""
        ...

    async def others(self) -> list[str]:
        """Where the other replicas are that there are, or were."""
        ...

    async def elsewhere(self, key: ThreadKey) -> HeldElsewhere | None:
        """Which other replica has a thread, or had it last: what its turns have said is held there."""
        ...


class Alone:
    """One process that owns its home: it has every thread, and its transcripts lie here."""

    def __init__(self, session_map: SessionMap) -> None:
        self._map = session_map

    def attending(self, occupants: Occupants) -> AbstractAsyncContextManager[None]:
        """See Tenancy."""
        return contextlib.nullcontext()

    async def enter(self, key: ThreadKey) -> SessionMapping | None:
        """See Tenancy."""
        return await self._map.get(key)

    async def leave(self, key: ThreadKey) -> None:
        """See Tenancy."""

    async def save(self, key: ThreadKey, session_id: str, settled: Revision | None) -> bool | None:
        """See Tenancy."""
        return None

    def settle(self, key: ThreadKey, session_id: str, settled: Revision) -> None:
        """See Tenancy."""

    async def look(self, mapping: SessionMapping) -> Revision | None:
        """See Tenancy."""
        return None

    async def outlines(self, mappings: Sequence[SessionMapping]) -> list[Metadata] | None:
        """See Tenancy."""
        return None

    async def bring(self, key: ThreadKey, session_id: str) -> None:
        """See Tenancy."""

    async def erase(self, session_id: str) -> None:
        """See Tenancy."""

    async def running(self, keys: Iterable[ThreadKey]) -> set[ThreadKey]:
        """See Tenancy."""
        return set()

    async def others(self) -> list[str]:
        """See Tenancy."""
        return []

    async def elsewhere(self, key: ThreadKey) -> HeldElsewhere | None:
        """See Tenancy."""
        return None


def lost() -> LeaseLost:
    """What whoever hears a turn is told when its thread is another replica's by now, or may be."""
    return LeaseLost("The turn was stopped. What it had stored by then is kept. Send the message again.")
