"""Logs: one JSON object a line, on stderr. IDs, outcomes and times; never a prompt, an answer or a token."""

import json
import logging
import logging.config
import traceback
from datetime import UTC, datetime
from typing import Any


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, logger, event, and the members of its `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # Where it happened, and what kind: an exception's own text may hold what a person has written.
            line["error"] = record.exc_info[0].__name__
            line["where"] = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(record.exc_info[2])]
        return json.dumps(line)


def configure(lines: type[logging.Formatter] = JsonLines) -> dict[str, Any]:
    """The logging configuration of `serve`, for uvicorn to apply: everything through one handler, as such lines.

    What uvicorn says of starting and stopping is for machines that wait for it; people are told by `terminal`.
    """
    uvicorn = "INFO" if lines is JsonLines else "WARNING"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"lines": {"()": lines}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            **{name: {"level": "INFO"} for name in ("session_sidecar", "session_store")},
            "uvicorn": {"level": uvicorn},
            # It calls every CLI that ends by a signal an error, those that were told to as well. A turn that fails by
            # it says so itself, with the CLI's last words.
            "claude_agent_sdk": {"level": "CRITICAL"},
        },
    }
