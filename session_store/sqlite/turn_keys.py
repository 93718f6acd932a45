"""Idempotency keys in the SQLite file of the session map, each call one statement that commits by itself.

No index on `expires_at`: each turn would pay for it, and a sweep reads no more rows than turns began in some minutes.
"""

import time

from session_store.sqlite.database import Database
from session_store.turn_keys import TakenKey

TAKE = """
INSERT INTO turn_keys (key, digest, turn_id, expires_at) VALUES (:key, :digest, :turn_id, :expires_at)
ON CONFLICT (key) DO UPDATE SET
    digest = iif(expires_at <= :now, excluded.digest, digest),
    turn_id = iif(expires_at <= :now, excluded.turn_id, turn_id),
    expires_at = iif(expires_at <= :now, excluded.expires_at, expires_at)
RETURNING digest, turn_id
"""

ENDED = "UPDATE turn_keys SET expires_at = :expires_at WHERE key = :key AND turn_id = :turn_id RETURNING turn_id"

GIVE_BACK = "DELETE FROM turn_keys WHERE key = :key AND turn_id = :turn_id RETURNING turn_id"

BATCH = 500  # removed in some three milliseconds, which a turn's statement may have to wait for
SWEEP = f"""
DELETE FROM turn_keys WHERE key IN (SELECT key FROM turn_keys WHERE expires_at <= :now LIMIT {BATCH})
RETURNING turn_id
"""  # noqa: S608 - all of it is ours


class SqliteTurnKeys:
    """TurnKeys beside the session map, over the same connection."""

    def __init__(self, database: Database) -> None:
        """The database is closed by whoever has opened it."""
        self._database = database

    async def take(self, key: bytes, digest: bytes, turn_id: str, *, seconds: float) -> TakenKey | None:
        """See TurnKeys."""
        now = _now()
        parameters = {"key": key, "digest": digest, "turn_id": turn_id, "now": now, "expires_at": _later(now, seconds)}
        ((has_digest, has_turn_id),) = await self._database.write("take_key", TAKE, parameters)
        return None if has_turn_id == turn_id else TakenKey(has_digest, has_turn_id)

    async def ended(self, key: bytes, turn_id: str, *, seconds: float) -> None:
        """See TurnKeys."""
        parameters = {"key": key, "turn_id": turn_id, "expires_at": _later(_now(), seconds)}
        await self._database.write("end_key", ENDED, parameters)

    async def give_back(self, key: bytes, turn_id: str) -> None:
        """See TurnKeys."""
        await self._database.write("give_back_key", GIVE_BACK, {"key": key, "turn_id": turn_id})

    async def sweep(self) -> int:
        """See TurnKeys."""
        count, now = 0, _now()
        while swept := len(await self._database.write("sweep_keys", SWEEP, {"now": now})):
            count += swept
            if swept < BATCH:
                break
        return count


def _now() -> int:
    return time.time_ns() // 1000


def _later(now: int, seconds: float) -> int:
    return now + round(seconds * 1_000_000)
