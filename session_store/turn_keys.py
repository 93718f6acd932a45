"""The words of idempotency keys, and what any keeper of them promises.

A row says that a turn was begun under a key, so that no later life of the program begins it again. It holds digests and
the turn's ID: neither the caller's key, nor whose it was, nor anything that was said.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TakenKey:
    """Who has a key: the turn that was begun under it, and a digest of what was asked for."""

    digest: bytes
    turn_id: str
    holder: str | None = None
    """The replica whose turn it is; None where one process has the rows to itself."""


def turn_key(resource_id: str, key: str) -> bytes:
    """What a resource's key is kept as: a digest, as the one is somebody's name and the other may be anything."""
    made = hashlib.blake2b(resource_id.encode(), digest_size=16, person=b"turn key")
    made.update(b"\0" + key.encode())  # no ID holds a NUL
    return made.digest()


class TurnKeys(Protocol):
    """Keeps which turn has a key, durably: what a call returned has survived a power cut.

    Every call is atomic and sees all earlier ones. Cancelling the caller never leaves a call half done: it has happened
    or it has not. Any call may raise StoreUnavailable.
    """

    async def take(self, key: bytes, digest: bytes, turn_id: str, *, seconds: float) -> TakenKey | None:
        """Take a key for a turn, for so many seconds from now on: None. If another turn has it: which.

        A key whose time is over is free. The turn that has it already may take it again, which changes nothing.
        """
        ...

    async def ended(self, key: bytes, turn_id: str, *, seconds: float) -> None:
        """Let the key's time be over so many seconds from now, if this turn still has it."""
        ...

    async def give_back(self, key: bytes, turn_id: str) -> None:
        """Free a key of a turn of which nothing was run; nothing if another turn has it."""
        ...

    async def sweep(self) -> int:
        """Forget the keys whose time is over, a bounded batch at a time; how many there were."""
        ...
