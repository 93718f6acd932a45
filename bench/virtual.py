"""An event loop whose time is not the machine's: it jumps to the next timer as soon as nothing else is left to do."""

import asyncio
import selectors


class _Jumping(selectors.SelectSelector):
    """Waits for nobody: what it was to wait for has passed at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing is left that could ever happen")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs real asyncio code, hours in seconds. There is no I/O in it, and no thread."""

    def __init__(self) -> None:
        """It is 0 s now."""
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds since its beginning."""
        return self._jumping.now
