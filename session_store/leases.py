"""The words of leases, and what any keeper of them promises: one turn a thread in a whole fleet of replicas."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from session_store.errors import SessionMapError
from session_store.mapping import SessionMapping, ThreadKey

TTL_SECONDS = 15.0
"""How long a lease lasts that nobody renews."""

GRACE_SECONDS = 5.0
"""How long whoever let a lease run out may still come back, from when somebody else first asked for it."""

SEEN_SECONDS = 60.0
SEEN_WITHIN_SECONDS = 3 * SEEN_SECONDS
"""A replica that was not seen for so long is asked no more of itself: by now its address may be anybody's."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A thread that this replica has, as its row was then."""

    mapping: SessionMapping
    fence: int
    """Larger than that of any earlier lease: what is written with an older one is refused."""
    was_ours: bool
    """The replica that had it last is this very one, maybe before a restart."""
    settled: int
    """Bytes of the main transcript at the end of the last completed turn."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who had a thread last, and whether he still has it."""

    replica_id: str
    url: str | None
    """None: unknown, or not advertised."""
    live: bool
    """The lease has not run out, and was not released."""
    settled: int = 0
    """Bytes of the main transcript at the end of the last completed turn."""


class LeaseHeld(SessionMapError):
    """Another replica has this thread: ask that one, or try again."""

    def __init__(self, holder: Holder) -> None:
        """`holder` is whom to ask."""
        super().__init__()
        self.holder = holder


class LeaseLost(SessionMapError):
    """Another replica has taken this thread over: what this one still writes is refused."""


@runtime_checkable
class Leases(Protocol):
    """Gives each thread to one replica at a time, by one clock: the keeper's own. Any call may raise StoreUnavailable.

    A lease that has run out is not given away at once: the first who asks for it marks it as contested, and only after
    GRACE_SECONDS more does it go to whoever asks then. Its holder keeps it by renewing it before that.
    """

    @property
    def replica_id(self) -> str:
        """Whose leases these are."""
        ...

    @property
    def seconds(self) -> float:
        """How long a lease lasts that is not renewed."""
        ...

    async def acquire(self, key: ThreadKey) -> Lease | None:
        """Get a thread, or get it again, with its fence as it was; None if there is no such mapping.

        What this replica had before a restart is its own at once. Raises LeaseHeld where another one has it.
        A caller that is cancelled has not got it.
        """
        ...

    async def renew(self) -> set[ThreadKey]:
        """Renew all leases that are held, in one statement; give those that turn out to be lost, each of them once.

        A lost one is held no more, but what is written to its thread is refused until it is released or acquired anew.
        """
        ...

    async def release(self, key: ThreadKey) -> None:
        """Let others have a thread at once; its holder is remembered. Also what was lost is released, to be forgotten.

        Where that fails, it is renewed no more and runs out.
        """
        ...

    async def holders(self, keys: Iterable[ThreadKey]) -> dict[ThreadKey, Holder]:
        """Who has which of these threads, or had it last; those that nobody ever had are left out."""
        ...

    def held(self) -> dict[ThreadKey, float]:
        """Each lease that is held, and until when it is certain, in seconds of CLOCK_BOOTTIME.

        That is TTL_SECONDS after the last statement that got or renewed it was sent.
        """
        ...

    def fence(self, key: ThreadKey) -> int | None:
        """What is written to a thread is written with this; None where this replica has never had it."""
        ...

    async def left_behind(self) -> list[ThreadKey]:
        """The threads that this replica had when it was last ended, and has not released."""
        ...

    async def register(self, url: str | None) -> None:
        """Note where this replica can be reached by the others."""
        ...

    async def others(self) -> list[str]:
        """Where other replicas can be reached that were `seen` within SEEN_WITHIN_SECONDS."""
        ...

    async def seen(self) -> None:
        """Note that this replica is still there, to be called every SEEN_SECONDS."""
        ...


def boot_time() -> float:
    """Seconds since this machine was started; it goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
