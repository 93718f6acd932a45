"""Which replica this is: an ID that stays with its home, and that only one process has at a time."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from session_store import StoreInUse


@contextlib.contextmanager
def replica_of(home: Path) -> Iterator[str]:
    """Be the replica of this home while the block lasts; its ID. Raises StoreInUse where another process is, OSError.

    By its ID the database knows whose leases were left behind by a crash, and whose files hold what is not stored yet.
    """
    file = os.open(home / "replica", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreInUse(
                f"{home} is in use by another process: stop that one, or give this replica its own SIDECAR_HOME"
            ) from None
        yield _id(file)
    finally:
        os.close(file)


def _id(file: int) -> str:
    with contextlib.suppress(ValueError):
        return str(uuid.UUID(os.pread(file, 64, 0).decode("ascii", "replace").strip()))
    new = str(uuid.uuid4())
    os.ftruncate(file, 0)
    os.pwrite(file, f"{new}\n".encode(), 0)
    os.fsync(file)
    return new
