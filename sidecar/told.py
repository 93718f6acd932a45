"""What a caller is told of an exception that nobody raised for it."""

from session_store import SessionMapError
from sidecar.errors import InternalError, SidecarError, StoreFailed


def told(error: Exception) -> SidecarError:
    """What a caller is told of an exception; all but a SidecarError itself is for the server's log."""
    if isinstance(error, SidecarError):
        return error
    if isinstance(error, SessionMapError):
        return StoreFailed(str(error), retry_after=5)
    return InternalError("The sidecar failed; its server's log has the reason.")
