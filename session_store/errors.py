"""What can go wrong with a session map. A message is one line: what is wrong, then what to do about it."""


class SessionMapError(Exception):
    """The session map could not do this."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)


class ThreadMapped(SessionMapError):
    """This thread already has a session: choose another thread, or remove its mapping first."""


class SessionMapped(SessionMapError):
    """Another thread already has this session: give this thread a session of its own."""


class StoreUnavailable(SessionMapError):
    """The session map is closed: start the program again."""


class StoreUnusable(SessionMapError):
    """The session map cannot be opened: see the message of whoever opened it."""


class StoreMissing(StoreUnusable):
    """There is no session map in this database yet: start the sidecar on it once."""


class StoreInUse(StoreUnusable):
    """Another process has the session map: stop that one first."""
