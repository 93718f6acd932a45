"""The session map, and all that replicas share, in one PostgreSQL database."""
