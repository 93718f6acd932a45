"""The end of a turn: that it comes, when somebody asks for it or when it takes too long; and what is seen to then."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from session_sidecar.agent.processes.process import AgentProcess
from session_sidecar.agent.transcripts import NOTHING, Revision
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import NotSaved, TurnInterrupted, TurnTimeout, public_error
from session_sidecar.settings import Settings
from session_sidecar.turns.feed import Feed
from session_sidecar.turns.turn import UNBEGUN, Turn
from session_store import SessionMap, SessionMapError, SessionMapping
from session_store.leases import LeaseHeld

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 10.0  # for each look at a disk: one that hangs must not keep the thread


async def keep_time(turn: Turn, settings: Settings) -> None:
    """Ask a turn to stop when it has taken too long in all, or nothing has been heard of it for too long."""
    deadline = time.monotonic() + settings.turn_seconds
    while not turn.stopping.is_set():
        now = time.monotonic()
        silent_at = turn.last_sign + settings.turn_idle_seconds
        if now >= deadline:
            turn.stop(TurnTimeout(f"It was stopped after {settings.turn_seconds:g} seconds."))
        elif now >= silent_at:
            turn.stop(TurnTimeout(f"The agent said nothing for {settings.turn_idle_seconds:g} seconds."))
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(deadline, silent_at) - now):
                    await turn.stopping.wait()


async def stop_when_asked(turn: Turn, process: AgentProcess, settings: Settings) -> None:
    """Wait until a turn is asked to stop, then stop its process: interrupt it, and end it if that does not help."""
    await turn.stopping.wait()
    if turn.before is not None:
        turn.before.stop(turn.stop_reason)
    if process.prompted:
        await process.interrupt(settings.interrupt_seconds, turn.began)
    else:
        await process.end()


async def unless_stopped(turn: Turn, work: Awaitable[T]) -> T:
    """What `work` comes to. It is broken off when the turn is asked to stop: raises the reason, or TurnInterrupted."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(turn.stopping.wait())
    try:
        if not turn.stopping.is_set():
            await asyncio.wait((working, stopped), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        working.cancel()
    await asyncio.wait([working])
    if working.cancelled():
        raise turn.stop_reason or TurnInterrupted(UNBEGUN)
    return working.result()


async def dismiss(task: asyncio.Task[None]) -> None:
    """Cancel a task that is needed no more and see it end; that it had failed is a defect, and logged."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and (error := task.exception()):
        logger.error("%s failed", task.get_name(), exc_info=error)


class Afterwards:
    """What is seen to when a turn has its result, or will have none: is it saved, and what becomes of its mapping.

    For turns that still have the claim on their thread. None of this fails.
    """

    def __init__(self, session_map: SessionMap, transcripts: Transcripts, feed: Feed) -> None:
        self._map = session_map
        self._transcripts = transcripts
        self._feed = feed

    async def saved(self, turn: Turn) -> Revision | None:
        """How far the transcript has come that holds the turn; None, and the turn has failed, where it does not."""
        if turn.session_id is None:
            return None
        said = turn.last_said if turn.result and turn.result.get("num_turns") else None
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                before = turn.settled.revision if turn.settled else NOTHING
                info = await self._transcripts.saved(turn.session_id, said, prompt_id=turn.id, after=before)
        except Exception as error:
            logger.warning("turn %s: its transcript cannot be read: %s", turn.id, public_error(error).detail)
            info = None
        if info is None and said is not None:
            turn.error = NotSaved(
                "The transcript does not hold this turn: its volume is full, read-only or gone. What was said is in "
                "this stream alone. Tell the operator; then send the message again."
            )
        return info.revision if info else None

    async def note_end(self, turn: Turn) -> SessionMapping | None:
        """Bump the mapping's version: its transcript has grown. The mapping then, if it is still the turn's."""
        try:
            if turn.session_id is not None:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    return await self._map.touch(turn.request.key, turn.session_id)
        except Exception as error:
            # The conversation is safe in the transcript; only the row's time and version stay as they were.
            logger.exception("turn %s: the mapping's version was not bumped", turn.id, exc_info=unknown(error))
        return None

    async def forget_unbegun(self, turn: Turn) -> None:
        """Take back a mapping that this turn made, if the SDK never got as far as a transcript and nobody was told."""
        if turn.made is None or turn.session is not None:
            return
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                info = await self._transcripts.info(turn.made)
                begun = info is not None and not (turn.settled and turn.settled.revision == info.revision)
                if not begun and await self._map.remove(turn.request.key, expected=turn.made):
                    if info is not None:
                        await self._transcripts.delete(turn.made)  # the copy that it was to go on from
                    self._feed.tell("deleted", turn.request.key)
        except LeaseHeld:
            pass  # another replica was first, and the mapping is its own
        except Exception as error:
            # The mapping stays; the next turn finds no transcript and starts it under the same session ID.
            logger.exception("the mapping of a turn that never began was not removed", exc_info=unknown(error))


def unknown(error: Exception) -> Exception | None:
    """The error to be logged with its traceback; None where the session map has logged what it is."""
    return None if isinstance(error, SessionMapError) else error
