"""`Idempotency-Key`: a retry joins or replays the turn that its first attempt began, and never runs a prompt twice."""

import asyncio

from sidecar.errors import IdempotencyMismatch
from sidecar.turn import Turn, TurnRequest

MAX_KEYS = 1000
SECONDS = 600.0

_Key = tuple[str, str]


class Idempotency:
    """The turns that were begun under a key, in memory: `MAX_KEYS` of them, each for `SECONDS` after its end."""

    def __init__(self) -> None:
        self._turns: dict[_Key, Turn] = {}

    def find(self, request: TurnRequest) -> Turn | None:
        """The turn that an earlier attempt of this request began.

        One that never reached the agent does not count: nothing of it was run, so the retry may. Raises
        IdempotencyMismatch for a key that was used with another body.
        """
        turn = self._turns.get(self._key(request))
        if turn is None or (turn.ended.is_set() and turn.session is None):
            return None
        if turn.request != request:
            raise IdempotencyMismatch("Use a new key for a new message; repeat the same body for a retry.")
        return turn

    def keep(self, turn: Turn) -> None:
        """Remember a turn that has just begun; beyond `MAX_KEYS` the oldest that has ended is forgotten."""
        if turn.request.idempotency_key is None:
            return
        self._turns[self._key(turn.request)] = turn
        if len(self._turns) > MAX_KEYS:
            oldest = next((key for key, kept in self._turns.items() if kept.ended.is_set()), None)
            if oldest is not None:
                del self._turns[oldest]

    def ended(self, turn: Turn) -> None:
        """Start the time for which an ended turn is kept."""
        if turn.request.idempotency_key is not None:
            asyncio.get_running_loop().call_later(SECONDS, self._forget, turn)

    def _forget(self, turn: Turn) -> None:
        key = self._key(turn.request)
        if self._turns.get(key) is turn:
            del self._turns[key]

    @staticmethod
    def _key(request: TurnRequest) -> _Key:
        return request.key.resource_id, request.idempotency_key or ""
