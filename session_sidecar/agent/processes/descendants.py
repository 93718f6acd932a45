"""Everything that a CLI has started, found by a mark in the environment that it hands down.

The CLI gives each tool a session of its own, and a tool's children may leave that and lose their parents: no process
group and no tree holds them together. What they keep is the environment, unless they clear it; one that did is found
as long as an ancestor that has the mark lives. Nothing is found on a system without /proc.
"""

import contextlib
import logging
import os
import signal
import time
from pathlib import Path

logger = logging.getLogger(__name__)

KILL_SECONDS = 2.0

PROCESS_VARIABLE = "SESSION_SIDECAR_PROCESS"
"""Whose a process is: a CLI's and its descendants' alone."""

HOME_VARIABLE = "SESSION_SIDECAR_HOME"
"""Which config directory a CLI and its descendants were started for."""


def home_mark(claude_config: Path) -> str:
    """The value of HOME_VARIABLE. Another container may have the same path, so it also says which directory it is."""
    directory = claude_config.stat()
    return f"{directory.st_dev}:{directory.st_ino}:{claude_config}"


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat, numbered from 1 as in proc(5); but for 1 and 2. Raises OSError."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    # The second one, the program's name, may hold spaces and parentheses; what follows it does not.
    return ["", "", "", *stat.rpartition(")")[2].split()]


def own_bytes(pid: int) -> int:
    """What a process has of its own in memory and in swap: not what it shares, as a program's text is by all its CLIs.

    60 µs. That is within a hundredth of its `Private_*` in smaps_rollup, which takes the kernel 5 ms to add up. Raises
    OSError.
    """
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    fields = dict(line.partition(":")[::2] for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem", "VmSwap") if name in fields)


class Descendants:
    """The processes that have a variable in their environment, and all below them. Its methods block."""

    def __init__(self, variable: str, value: str) -> None:
        self._mark = b"\0" + os.fsencode(f"{variable}={value}") + b"\0"
        self._others: set[str] = set()  # as they are named in /proc, with what else is there

    def look(self) -> set[int]:
        """Their process IDs, without this process's own.

        Takes 10 to 20 µs a process that there is, and a thirtieth of that for one that an earlier look has seen: a
        process does not come by a mark later.
        """
        found: set[int] = set()
        for name in _listed("/proc") - self._others:
            if not name.isdecimal():
                self._others.add(name)
                continue
            # Unbuffered and without a Path, as there may be thousands: that halves the time.
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb", buffering=0) as file:
                environ = file.read()
                if self._mark in b"\0" + environ:
                    found |= {int(name), *_below(name)}
                elif environ:  # it is empty for a moment while a program is loaded
                    self._others.add(name)
        return found - {os.getpid()}

    def own_bytes(self) -> int:
        """What they have of their own together; 0 where nothing is found."""
        total = 0
        for pid in self.look():
            with contextlib.suppress(OSError):  # it has gone
                total += own_bytes(pid)
        return total

    def kill(self) -> set[int]:
        """Kill them, with what they start meanwhile, and see them gone.

        What is left after KILL_SECONDS is held by the kernel or another user's; it is returned, and logged.
        """
        deadline = time.monotonic() + KILL_SECONDS
        killed: set[int] = set()
        while (left := self.look() | {pid for pid in killed if _runs(pid)}) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            killed |= left
            time.sleep(0.002)
        if killed - left:
            logger.info("killed of an agent's process and all that it has started: %s", sorted(killed - left))
        if left:
            logger.error("killed in vain, and left to the system: %s", sorted(left))
        return left


def _listed(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except OSError:
        return set()


def _below(pid: str) -> set[int]:
    """The children of a process and theirs, whatever is in their environment."""
    found: set[int] = set()
    for thread in _listed(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{pid}/task/{thread}/children").read_text(encoding="ascii").split():
                found |= {int(child), *_below(child)}
    return found


def _runs(pid: int) -> bool:
    """Whether a process is there, and not only as a zombie that nobody has asked about yet."""
    try:
        return stat_fields(pid)[3] not in "ZX"
    except OSError:
        return False
