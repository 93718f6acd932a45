"""What lies in a CLI config directory, for whoever looks after it. No conversation is read here."""

import contextlib
import json
import uuid
from pathlib import Path

LONG_DAYS = 3650
"""A person who sets so many days or more means: never."""


def transcripts(claude_config: Path) -> dict[str, list[Path]]:
    """The sessions' transcripts by session ID; whether they can be resumed is another question."""
    found: dict[str, list[Path]] = {}
    for path in sorted(claude_config.glob("projects/*/*.jsonl")):
        if _is_id(path.stem):
            found.setdefault(path.stem, []).append(path)
    return found


def leftovers(claude_config: Path) -> list[Path]:
    """What belongs to no transcript: files that were set aside, and subagents' directories without their session."""
    aside = claude_config.glob("projects/*/*.unreadable-*")
    directories = (path for path in claude_config.glob("projects/*/*") if _is_id(path.name) and path.is_dir())
    return sorted([*aside, *(path for path in directories if not path.with_suffix(".jsonl").exists())])


def sweeps_after(claude_config: Path) -> int | None:
    """The days after which a CLI that reads this directory's settings deletes transcripts; None if it is told not to.

    The sidecar's own agents are told to keep them, whatever is written here. A person's CLI is not.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        days = json.loads((claude_config / "settings.json").read_bytes()).get("cleanupPeriodDays")
        if isinstance(days, int) and days < LONG_DAYS:
            return days
    return None


def _is_id(name: str) -> bool:
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False
