"""Backups of a home, beside a running sidecar too: what a sidecar needs to go on elsewhere, and no secret.

First the session map, then the transcripts. A mapping is committed before its transcript is begun, and transcripts only
grow: so each mapping of a backup finds its transcript there, at least as long as it was. What is missing is that of a
turn that had not begun to be written, and of a thread that was deleted meanwhile; `doctor --home BACKUP` names those.

A backup is laid out as a home is. What makes it one is the note in it that says how much it holds, written last.
"""

import contextlib
import dataclasses
import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from session_sidecar import __version__
from session_sidecar.agent.transcripts.copying import Size, copy_config, copy_files, left_out, sync, unmark, write
from session_sidecar.agent.transcripts.files import all_sessions, check_marked
from session_sidecar.errors import TranscriptsUnavailable
from session_sidecar.replicas.archive.sqlite import copy_chunks
from session_sidecar.settings import Settings
from session_store import StoreUnusable, back_up_session_map, reserved_session_map

NOTE = "backup.json"
FORMAT = 1
SEALED = 2
"""The format of a backup that holds sealed transcripts as well: older versions would restore it without them."""


class BackupFailed(Exception):
    """There is no backup, or none could be made or restored; the message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds."""

    mappings: int
    transcripts: int
    files: int
    bytes: int
    made_at: str
    made_by: str
    format: int = FORMAT

    def plain(self) -> dict[str, Any]:
        """The backup for JSON."""
        return dataclasses.asdict(self)


def back_up(settings: Settings, directory: Path) -> tuple[Backup, list[str]]:
    """Copy a home into a directory that is not there, or is empty; and what of the CLI's is left out, by name.

    The directory has its name only when all is in it and on the disk. Raises BackupFailed.
    """
    directory = directory.resolve()
    with _failures(f"{settings.home} cannot be copied to {directory}"):
        _refuse_shared(settings, "pg_dump")
        if not settings.database_file.exists():
            raise BackupFailed(f"there is no {settings.database_file}: no sidecar has run here, so name another --home")
        check_marked(settings.claude_config)
        _refuse_place(directory, settings.home.resolve())
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
        try:
            copy = _at(partial)
            mappings = back_up_session_map(settings.database_url, copy.database_file)
            copy_files(settings.workspace, copy.workspace)
            copy_config(settings.claude_config, copy.claude_config)
            stored = set[str]()
            sealed = settings.transcripts_file.exists()
            if sealed:  # after the transcripts: what is taken in meanwhile is in there, and in both at worst
                stored = copy_chunks(settings.transcripts_file, copy.transcripts_file)
            size = Size.of(copy.workspace, copy.claude_config)
            backup = Backup(
                mappings=mappings,
                transcripts=len(all_sessions(copy.claude_config).keys() | stored),
                files=size.files,
                bytes=size.bytes,
                made_at=datetime.now(UTC).isoformat(timespec="seconds"),
                made_by=__version__,
                format=SEALED if sealed else FORMAT,
            )
            sync(partial)
            write(partial / NOTE, json.dumps(backup.plain()))
            sync(partial)
            partial.rename(directory)
            sync(directory.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return backup, left_out(settings.claude_config)


def restore(settings: Settings, directory: Path) -> Backup:
    """Make a home of a backup, where there is none. Until all is there no sidecar runs a turn in it.

    What the home has already of settings and workspace stays. Raises BackupFailed.
    """
    with _failures(f"{directory} cannot be restored to {settings.home}"):
        copy = _at(directory)
        backup = _noted(directory)
        _refuse_shared(settings, "pg_restore")
        if (backup.format == SEALED) != copy.transcripts_file.exists() or Size.of(
            copy.workspace, copy.claude_config
        ) != Size(backup.files, backup.bytes):
            raise BackupFailed(f"{directory} does not hold what was backed up: take another copy of it")
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (
            settings.database_file.exists()
            or settings.transcripts_file.exists()
            or all_sessions(settings.claude_config)
        ):
            raise BackupFailed(
                f"{settings.home} holds conversations, or what a restore has left that was broken off: stop the "
                "sidecar, move the directory away, or name another --home"
            )
        with reserved_session_map(settings.database_url) as put_back:
            unmark(settings.claude_config)
            put_back(copy.database_file)
            copy_files(copy.workspace, settings.workspace)
            if backup.format == SEALED:
                copy_chunks(copy.transcripts_file, settings.transcripts_file)
            copy_config(copy.claude_config, settings.claude_config)
            sync(settings.home)
    return backup


def _refuse_shared(settings: Settings, tool: str) -> None:
    if settings.database is not None:
        raise BackupFailed(
            f"the conversations are in PostgreSQL: use {tool}, and copy the workspaces of the replicas yourself. For a "
            "home without PostgreSQL, unset SIDECAR_DATABASE"
        )


def _at(directory: Path) -> Settings:
    """The paths in a backup, which are those of a home."""
    return Settings.load({}, home=directory)


def _noted(directory: Path) -> Backup:
    try:
        backup = Backup(**json.loads((directory / NOTE).read_bytes()))
    except (OSError, ValueError, TypeError):
        raise BackupFailed(f"{directory} is no backup, or not a whole one: it has no {NOTE} that can be read") from None
    if backup.format not in (FORMAT, SEALED):
        raise BackupFailed(f"{directory} was made by version {backup.made_by}: restore it with that one")
    return backup


def _refuse_place(directory: Path, home: Path) -> None:
    if directory.is_relative_to(home):
        raise BackupFailed(f"{directory} is in the home: what destroys the one destroys the other. Name another place")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BackupFailed(f"{directory} is there already: name a directory that is not, or is empty")
    if directory.is_mount():
        raise BackupFailed(f"{directory} is a mount point, which cannot be renamed to: name a directory in it")


@contextlib.contextmanager
def _failures(what: str) -> Iterator[None]:
    """Say in a line what went wrong, and where."""
    try:
        yield
    except TranscriptsUnavailable as error:
        raise BackupFailed(str(error.detail)) from error
    except StoreUnusable as error:
        raise BackupFailed(str(error)) from error
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        room = ". Make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise BackupFailed(f"{what}{where} ({error.strerror}){room}") from error
