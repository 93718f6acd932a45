"""Seeing that a turn ends: when somebody asks it to, and when it takes too long."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from sidecar.agent import AgentProcess
from sidecar.errors import TurnInterrupted, TurnTimeout
from sidecar.settings import Settings
from sidecar.turn import UNBEGUN, Turn

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
                await asyncio.wait_for(turn.stopping.wait(), min(deadline, silent_at) - now)


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
