"""The session map in one SQLite file that one process owns."""

from session_store.sqlite.session_map import SqliteSessionMap

__all__ = ["SqliteSessionMap"]
