"""The mappings that were used most recently, in memory: exact, as one process alone writes to the file.

Statements are run in the order in which they are asked for, and tell what they found in that order. So what a statement
tells is true until the next one that writes is asked for, be its caller gone by then or not.
"""

from session_store.mapping import SessionMapping, ThreadKey

MOST = 10_000  # some 6 MB


class Recent:
    """So many mappings, the least recently used dropped first."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._mappings: dict[ThreadKey, SessionMapping] = {}  # least recently used first
        self._writes = 0

    def get(self, key: ThreadKey) -> SessionMapping | None:
        """The mapping of a thread, if it is known here."""
        mapping = self._mappings.pop(key, None)
        if mapping is not None:
            self._mappings[key] = mapping
        return mapping

    def reading(self) -> int:
        """What to `learn` with, for a statement that reads and is about to be asked for."""
        return self._writes

    def writing(self, key: ThreadKey) -> int:
        """The same for one that writes; what is known of the thread ends here."""
        self._mappings.pop(key, None)
        self._writes += 1
        return self._writes

    def learn(self, asked: int, mapping: SessionMapping) -> None:
        """Keep what a statement has told, unless one that writes was asked for after it."""
        if asked == self._writes:
            self._mappings[mapping.key] = mapping
            if len(self._mappings) > self._most:
                del self._mappings[next(iter(self._mappings))]
