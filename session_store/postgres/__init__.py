"""The session map, and all that replicas share, in one PostgreSQL database."""

from session_store.postgres.session_map import PostgresSessionMap

__all__ = ["PostgresSessionMap"]
