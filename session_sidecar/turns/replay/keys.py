"""Idempotency keys: what a key has begun is not begun again, by no life of this sidecar.

`Replay` knows the turns of this process, and answers a retry at once. A key that it does not know is asked of the rows,
by the turn itself, before anything is looked up for it. What a crash leaves is a key in use: its message may have been
run, so it is not run again.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Awaitable
from dataclasses import astuple, fields

from session_sidecar.errors import IdempotencyMismatch, ReplayGone
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.settings import Settings
from session_sidecar.turns.ending import PATIENCE_SECONDS, unknown
from session_sidecar.turns.turn import Turn, TurnRequest
from session_store import TurnKeys, turn_key

logger = logging.getLogger(__name__)

KEY_SECONDS = 600.0  # for so long after its turn's end a key is remembered
SWEEP_SECONDS = 60.0


class Keys:
    """The keys that turns have taken. Turns without one cost nothing here."""

    def __init__(self, turn_keys: TurnKeys, tenancy: Tenancy, settings: Settings) -> None:
        self._rows = turn_keys
        self._tenancy = tenancy
        # The sidecar may be killed at any moment: from its beginning on, a key outlives the longest turn.
        self._longest = settings.turn_seconds + KEY_SECONDS
        self._sweep_at = 0.0

    async def take(self, turn: Turn) -> None:
        """Take a turn's key, if it has one.

        Raises IdempotencyMismatch; ReplayGone, or HeldElsewhere where another replica may hold what it began.
        """
        if (key := _key(turn)) is None:
            return
        earlier = await self._rows.take(key, turn.digest, turn.id, seconds=self._longest)
        if earlier is None:
            return
        if earlier.digest != turn.digest:
            raise mismatch()
        if there := await self._tenancy.elsewhere(turn.request.key):
            there.instead = gone(earlier.turn_id)
            raise there
        raise gone(earlier.turn_id)

    async def give_back(self, turn: Turn) -> None:
        """Free the key of a turn that never reached the agent, before anybody is told: the retry may run it."""
        if turn.session is None and (key := _key(turn)) is not None:
            await self._unfailing(turn, self._rows.give_back(key, turn.id))

    async def ended(self, turn: Turn) -> None:
        """Let the key of a turn that has ended be free after a while, and forget what is."""
        if turn.session is None or (key := _key(turn)) is None:
            return
        await self._unfailing(turn, self._rows.ended(key, turn.id, seconds=KEY_SECONDS))
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_SECONDS
            await self._unfailing(turn, self._rows.sweep())

    async def _unfailing(self, turn: Turn, work: Awaitable[object]) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await work
        except Exception as error:
            # The key stays in use until the time is over that it was taken for.
            logger.warning("turn %s: its idempotency key was not freed in time", turn.id, exc_info=unknown(error))


def digest(request: TurnRequest) -> bytes:
    """Of all that two attempts must have in common, without keeping it: the message may be long, and is a person's.

    Rows hold it: what is left at its default is left out, so that a later version with more to ask for gives the same.
    """
    if request.asked is not None:
        return request.asked
    content = request.content
    message = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    rest = {
        field.name: value
        for field in fields(request)
        if field.compare and field.name != "content" and (value := getattr(request, field.name)) != field.default
    }
    made = hashlib.blake2b(json.dumps([isinstance(content, str), rest], default=astuple).encode(), digest_size=16)
    made.update(message.encode(errors="surrogatepass"))
    return made.digest()


def mismatch() -> IdempotencyMismatch:
    """A key that was used with another body."""
    return IdempotencyMismatch("Use a new key for a new message; repeat the same body for a retry.")


def gone(turn_id: str) -> ReplayGone:
    """A key whose turn has ended, or was begun by a sidecar that has: it may have come to the agent, or to nothing."""
    return ReplayGone(
        "The turn of this key was begun before, and its answer is no longer held. Read it from the session's messages; "
        "to run the message once more, use a new key.",
        turn_id=turn_id,
    )


def _key(turn: Turn) -> bytes | None:
    key = turn.request.idempotency_key
    return turn_key(turn.request.key.resource_id, key) if key is not None else None
