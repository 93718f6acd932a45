"""Hearing of a shutdown when it is asked for, not when it is nearly over.

uvicorn tells an application only after every connection has closed; open streams would hold it until its timeout. So
ours comes before the signal handlers that uvicorn installed, and lets the running turns end their streams.
"""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def on_shutdown_signal(callback: Callable[[], None]) -> Iterator[None]:
    """Call `callback` in the event loop at SIGTERM and SIGINT, then whatever handled the signal before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # an embedder's server in a thread gets no signals; its lifespan still ends the turns
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        previous = before[signal.Signals(number)]
        if callable(previous):
            previous(number, frame)

    # Without a handler of the server's the signal ends the process, as it should: there is nothing to come before.
    ours = [number for number, previous in before.items() if callable(previous)]
    for number in ours:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])
