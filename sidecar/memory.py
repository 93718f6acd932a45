"""How much memory there is."""

import contextlib
import os
from pathlib import Path


def memory_bytes() -> int:
    """The machine's memory, or what the container may use of it (cgroup v2), in bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit, or none that can be read
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return memory
