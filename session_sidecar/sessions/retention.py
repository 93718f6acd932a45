"""Retention: mappings that nobody used for so many days go, with their transcripts if the operator says so.

A sweep at start, and one every hour. Each walks the mappings from the oldest on, a small batch at a time, and removes
them one by one, as a caller would: a thread with a turn stays, and so does one that was used since it was looked at.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

from session_sidecar.errors import HeldElsewhere, SidecarError, ThreadBusy
from session_sidecar.sessions.changes import Changes
from session_sidecar.settings import Settings
from session_store import SessionMap, SessionMapError

logger = logging.getLogger(__name__)

HOUR = 3600.0
BATCH = 100
PAUSE = 0.05  # between two batches, so that callers come in between


@contextlib.asynccontextmanager
async def retention(session_map: SessionMap, changes: Changes, settings: Settings) -> AsyncIterator[None]:
    """Sweep in the background as long as the block lasts, if the operator wants any of it.

    The end of the block does not wait for a sweep. One that is broken off leaves at worst a mapping whose transcript is
    gone, and the next sweep removes that.
    """
    if settings.retention_days is None:
        yield
        return
    sweeping = asyncio.create_task(_sweep_hourly(session_map, changes, settings), name="retention")
    try:
        yield
    finally:
        sweeping.cancel()
        await asyncio.wait([sweeping])


async def _sweep_hourly(session_map: SessionMap, changes: Changes, settings: Settings) -> None:
    while True:
        try:
            await sweep(session_map, changes, settings)
        except (SidecarError, SessionMapError) as error:
            logger.error("the sweep was broken off: %s", error)  # noqa: TRY400 - it says what to do
        except Exception:
            logger.exception("the sweep was broken off")
        await asyncio.sleep(HOUR)


async def sweep(session_map: SessionMap, changes: Changes, settings: Settings) -> int:
    """Remove what has been idle for too long, and log one line; how many mappings were removed."""
    began, days = time.monotonic(), settings.retention_days
    if days is None:
        return 0
    limit = datetime.now(UTC) - timedelta(days=days)
    seen = removed = busy = 0
    after = None
    with_transcripts = settings.retention_transcripts == "delete"
    while rows := await session_map.page(None, limit=BATCH, after=after, descending=False):
        after = rows[-1].cursor
        seen += len(rows)
        for row in rows:
            if row.updated_at < limit:
                try:
                    removed += await changes.forget(row.key, transcript=with_transcripts, version=row.version)
                except (ThreadBusy, HeldElsewhere):
                    busy += 1
        if rows[-1].created_at >= limit:
            break  # all that follow are younger
        await asyncio.sleep(PAUSE)
    fields = {"removed": removed, "busy": busy, "seen": seen, "transcripts": settings.retention_transcripts}
    logger.info("retention", extra={"fields": {**fields, "ms": round((time.monotonic() - began) * 1000, 1)}})
    return removed
