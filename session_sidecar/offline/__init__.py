"""The embedded stand-in for the Messages API: the whole path runs for real, with no key and no network."""

from session_sidecar.offline.model import OfflineModel

__all__ = ["OfflineModel"]
