"""A small file system for a directory of a test: one that can be full, and read-only."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

LEFT_OUT = """\
LEFT OUT: what happens on a full or read-only volume. These tests mount one: run them as root, or as the root of a user
namespace: unshare --map-root-user --mount make test-all"""


class Volume:
    """A mounted file system."""

    def __init__(self, path: Path) -> None:
        """`path` is where it is mounted."""
        self._path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Take all the room there is."""
        with contextlib.suppress(OSError), self._ballast.open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass

    def free(self) -> None:
        """Give the room back."""
        self._ballast.unlink()

    def remount(self, mode: str) -> None:
        """`ro` or `rw`."""
        _run("mount", "-o", f"remount,{mode}", str(self._path))


@contextlib.contextmanager
def mounted(path: Path, megabytes: int = 8) -> Iterator[Volume]:
    """A volume of its own at `path`, gone after the block. Where nobody may mount, the test is left out, but in CI."""
    path.mkdir(parents=True)
    if os.geteuid() != 0 and "CI" not in os.environ:
        pytest.skip(LEFT_OUT)
    _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
    try:
        yield Volume(path)
    finally:
        _run("umount", str(path))


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
