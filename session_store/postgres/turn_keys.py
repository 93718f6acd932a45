"""Idempotency keys in the PostgreSQL database of the session map, each call one statement that commits by itself.

Times are this database's, so that replicas need not agree on theirs.
"""

from collections.abc import Awaitable
from typing import Any, Protocol

from session_store.turn_keys import TakenKey

_TIME = "now() + make_interval(secs => %(seconds)s)"

# now() is one moment throughout a statement. To one that has waited for another's row it is never past that row's time.
TAKE = f"""
INSERT INTO turn_keys AS had (key, digest, turn_id, holder, expires_at)
VALUES (%(key)s, %(digest)s, %(turn_id)s, %(me)s::uuid, {_TIME})
ON CONFLICT (key) DO UPDATE SET
    digest = CASE WHEN had.expires_at <= now() THEN excluded.digest ELSE had.digest END,
    turn_id = CASE WHEN had.expires_at <= now() THEN excluded.turn_id ELSE had.turn_id END,
    holder = CASE WHEN had.expires_at <= now() THEN excluded.holder ELSE had.holder END,
    expires_at = CASE WHEN had.expires_at <= now() THEN excluded.expires_at ELSE had.expires_at END
RETURNING digest, turn_id, holder
"""  # noqa: S608 - all of it is ours, here and below

ENDED = f"UPDATE turn_keys SET expires_at = {_TIME} WHERE key = %(key)s AND turn_id = %(turn_id)s RETURNING turn_id"  # noqa: S608

GIVE_BACK = "DELETE FROM turn_keys WHERE key = %(key)s AND turn_id = %(turn_id)s RETURNING turn_id"

BATCH = 500
# Rows that another replica sweeps, or a turn takes again, are left to them.
SWEEP = f"""
DELETE FROM turn_keys WHERE key IN (
    SELECT key FROM turn_keys WHERE expires_at <= now() LIMIT {BATCH} FOR UPDATE SKIP LOCKED
)
RETURNING turn_id
"""  # noqa: S608


class Rows(Protocol):
    """Runs one statement of a kind, which commits by itself; `me` is this replica's ID."""

    def __call__(
        self, kind: str, statement: str, parameters: dict[str, Any], *, writes: bool
    ) -> Awaitable[list[tuple[Any, ...]]]:
        """The rows that it gives."""
        ...


class PostgresTurnKeys:
    """TurnKeys in a database that other replicas use too."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    async def take(self, key: bytes, digest: bytes, turn_id: str, *, seconds: float) -> TakenKey | None:
        """See TurnKeys."""
        parameters = {"key": key, "digest": digest, "turn_id": turn_id, "seconds": seconds}
        ((has_digest, has_turn_id, holder),) = await self._rows("take_key", TAKE, parameters, writes=True)
        return None if has_turn_id == turn_id else TakenKey(has_digest, has_turn_id, str(holder))

    async def ended(self, key: bytes, turn_id: str, *, seconds: float) -> None:
        """See TurnKeys."""
        await self._rows("end_key", ENDED, {"key": key, "turn_id": turn_id, "seconds": seconds}, writes=True)

    async def give_back(self, key: bytes, turn_id: str) -> None:
        """See TurnKeys."""
        await self._rows("give_back_key", GIVE_BACK, {"key": key, "turn_id": turn_id}, writes=True)

    async def sweep(self) -> int:
        """See TurnKeys."""
        count = 0
        while swept := len(await self._rows("sweep_keys", SWEEP, {}, writes=True)):
            count += swept
            if swept < BATCH:
                break
        return count
