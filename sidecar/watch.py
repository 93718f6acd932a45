"""Seeing that a turn ends: when somebody asks it to, and when it takes too long."""

import asyncio
import contextlib
import time

from sidecar.agent import AgentProcess
from sidecar.errors import TurnTimeout
from sidecar.settings import Settings
from sidecar.turn import Turn


async def watch_over(turn: Turn, process: AgentProcess, settings: Settings) -> None:
    """Wait for a stop or a deadline, then stop the process: interrupt it, and end it if that does not help."""
    deadline = time.monotonic() + settings.turn_seconds
    while not turn.stopping.is_set():
        now = time.monotonic()
        silent_at = turn.last_sign + settings.turn_idle_seconds
        if now >= deadline:
            turn.stop(TurnTimeout(f"It was stopped after {settings.turn_seconds:g} seconds."))
        elif now >= silent_at:
            turn.stop(TurnTimeout(f"The agent said nothing for {settings.turn_idle_seconds:g} seconds."))
        else:
            await _within(min(deadline, silent_at) - now, turn.stopping)
    if process.prompted:
        # The CLI loses an interrupt that comes before `init`, so it is remembered until then.
        await _within(settings.interrupt_seconds, turn.began)
        await process.interrupt(settings.interrupt_seconds)
    else:
        await process.end()


async def _within(seconds: float, event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
