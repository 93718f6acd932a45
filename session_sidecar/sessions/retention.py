"""Retention: mappings that nobody used for so many days go, with their transcripts if the operator says so.

A sweep at start, and one every hour. Each walks the mappings from the oldest on, a small batch at a time, and removes
them one by one, as a caller would: a thread with a turn stays, and so does one that was used since it was looked at.
Threads of some tags can have days of their own. A tag stands in the transcript, so that is looked at where a mapping is
old enough for it to matter; and again when nobody can change it any more, as tagging a thread does not use it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

from session_sidecar.errors import HeldElsewhere, KeyMissing, SealBroken, SessionAmbiguous, SidecarError, ThreadBusy
from session_sidecar.sessions.changes import Changes
from session_sidecar.sessions.reading import Metadata, Reading
from session_sidecar.settings import Settings
from session_store import SessionMap, SessionMapError, SessionMapping

logger = logging.getLogger(__name__)

HOUR = 3600.0
BATCH = 100
PAUSE = 0.05  # between two batches, so that callers come in between
_UNREADABLE = (KeyMissing, SealBroken, SessionAmbiguous)


@contextlib.asynccontextmanager
async def retention(
    session_map: SessionMap, reading: Reading, changes: Changes, settings: Settings
) -> AsyncIterator[None]:
    """Sweep in the background as long as the block lasts, if the operator wants any of it.

    The end of the block does not wait for a sweep. One that is broken off leaves at worst a mapping whose transcript is
    gone, and the next sweep removes that.
    """
    if Terms(settings).least is None:
        yield
        return
    sweeping = asyncio.create_task(_sweep_hourly(session_map, reading, changes, settings), name="retention")
    try:
        yield
    finally:
        sweeping.cancel()
        await asyncio.wait([sweeping])


class Terms:
    """After how many days without use a thread goes, by its tag; None is never."""

    def __init__(self, settings: Settings) -> None:
        self._untagged = settings.retention_days
        self._tagged = settings.days_of_tags
        terms = [days for days in (self._untagged, *self._tagged.values()) if days is not None]
        self.least = min(terms, default=None)
        """The shortest of them: what was used since then is no matter."""

    @property
    def go_by_tags(self) -> bool:
        """Whether there is a tag that makes a difference."""
        return bool(self._tagged)

    def keeps(self, row: SessionMapping, outline: Metadata) -> bool:
        """Whether a mapping is not due yet. One whose tag cannot be told is not: it may be any."""
        days = None if outline.transcript == "ambiguous" else self._tagged.get(outline.tag or "", self._untagged)
        return days is None or row.updated_at >= datetime.now(UTC) - timedelta(days=days)


async def _sweep_hourly(session_map: SessionMap, reading: Reading, changes: Changes, settings: Settings) -> None:
    while True:
        try:
            await sweep(session_map, reading, changes, settings)
        except (SidecarError, SessionMapError) as error:
            logger.error("the sweep was broken off: %s", error)  # noqa: TRY400 - it says what to do
        except Exception:
            logger.exception("the sweep was broken off")
        await asyncio.sleep(HOUR)


async def sweep(session_map: SessionMap, reading: Reading, changes: Changes, settings: Settings) -> int:
    """Remove what has been idle for too long, and log one line; how many mappings were removed."""
    began, terms = time.monotonic(), Terms(settings)
    if terms.least is None:
        return 0
    limit = datetime.now(UTC) - timedelta(days=terms.least)
    counts = dict.fromkeys(("removed", "busy", "kept", "unreadable", "seen"), 0)
    after = None
    while rows := await session_map.page(None, limit=BATCH, after=after, descending=False):
        after = rows[-1].cursor
        counts["seen"] += len(rows)
        old = [row for row in rows if row.updated_at < limit]
        outlines = await _outlines(reading, old) if terms.go_by_tags and old else [Metadata()] * len(old)
        for row, outline in zip(old, outlines, strict=True):
            counts[await _removed(changes, settings, terms, row, outline)] += 1
        if rows[-1].created_at >= limit:
            break  # all that follow are younger
        await asyncio.sleep(PAUSE)
    fields = {**counts, "transcripts": settings.retention_transcripts}
    logger.info("retention", extra={"fields": {**fields, "ms": round((time.monotonic() - began) * 1000, 1)}})
    return counts["removed"]


async def _outlines(reading: Reading, rows: list[SessionMapping]) -> list[Metadata]:
    """What is known of some sessions; what does not open with our keys is as little known as the ambiguous."""
    try:
        return await reading.outlines(rows)
    except _UNREADABLE:
        if len(rows) == 1:
            return [Metadata("ambiguous")]
        return [outline for row in rows for outline in await _outlines(reading, [row])]


async def _removed(changes: Changes, settings: Settings, terms: Terms, row: SessionMapping, outline: Metadata) -> str:
    """Remove a mapping if it is due; what became of it."""
    if terms.keeps(row, outline):
        return "unreadable" if outline.transcript == "ambiguous" else "kept"
    unless: Callable[[Metadata], bool] | None = None
    if terms.go_by_tags:
        unless = lambda now: terms.keeps(row, now)  # noqa: E731
    with_transcript = settings.retention_transcripts == "delete"
    try:
        gone = await changes.forget(row.key, transcript=with_transcript, version=row.version, unless=unless)
    except (ThreadBusy, HeldElsewhere):
        return "busy"
    except _UNREADABLE:
        return "unreadable"
    return "removed" if gone else "kept"
