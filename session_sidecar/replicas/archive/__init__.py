"""Transcripts in a database, as chunks of the CLI's own files: sealed where there are keys, fenced where replicas."""
