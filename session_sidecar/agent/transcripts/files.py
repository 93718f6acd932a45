"""A session's file: where it lies, and writing to it all or nothing.

A session must have one file. `claude --resume` takes the one in the project directory of its own cwd; where there is
none, it looks in all others, and takes a session that is in two of those for none. The SDK's functions take the first
in the directory's own order. Agents have cwds of their own, so all of these agree only where there is nothing to choose
(seen with CLI 2.1.330 and SDK 0.2.187: tests/test_sdk_contract.py). A session with two files, as a partial restore
leaves it, is refused until a person has chosen.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from claude_agent_sdk import SDKSessionInfo
from claude_agent_sdk._internal.sessions import _parse_session_info_from_lite, _read_session_lite

from session_sidecar.agent.transcripts.lines import TAIL_BYTES, linked, tails
from session_sidecar.errors import NotSaved, SessionAmbiguous, TranscriptsUnavailable

logger = logging.getLogger(__name__)

MARKER = "session-sidecar.txt"
"""The file that tells the directory of the transcripts from an empty mount point."""

LONG_DAYS = 3650
"""A person who sets so many days or more means: never."""
_FEW = 3  # sessions; a directory is listed with three system calls
_MOST_REMEMBERED = 20_000
_remembered: dict[tuple[Path, str], Path] = {}  # what `find` found last


def check_marked(claude_config: Path) -> None:
    """Raise TranscriptsUnavailable if this is not the directory that goes with the session map.

    An unmounted volume looks like a directory without transcripts; every thread would be begun anew.
    """
    if not (claude_config / MARKER).exists():
        raise TranscriptsUnavailable(
            f"Nothing was changed. Mount {claude_config}; if its transcripts are really lost, "
            f"put an empty {MARKER} there to begin anew.",
            retry_after=30,
        )


def find(projects: Path, session_id: str, among: Iterable[str] | None = None) -> Path | None:
    """The file of a session, or None; an empty one is none, as for the CLI and the SDK.

    It looks into every project directory each time (2 µs for each), so a file that has just been put there is seen.
    `among` are the directories to look into, where that is known. Raises SessionAmbiguous, and TranscriptsUnavailable
    where a directory could not be looked into: a session that was not found is then not a lost one.
    """
    found: list[Path] = []
    unread: OSError | None = None
    for directory in _directories(projects) if among is None else among:
        path = f"{projects}/{directory}/{session_id}.jsonl"
        try:
            if os.stat(path).st_size:
                found.append(Path(path))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unread = error
    if len(found) > 1:
        found = sorted({path.resolve() for path in found})  # a link to the file is no second one
    _remembered.pop((projects, session_id), None)
    if len(found) > 1:
        logger.error("session %s has %d transcripts: %s", session_id, len(found), ", ".join(map(str, found)))
        raise SessionAmbiguous(_AMBIGUOUS)
    if found:
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        _remembered[projects, session_id] = found[0]
        return found[0]
    if unread is not None:
        logger.error("a project directory cannot be looked into: %s", unread)
        raise TranscriptsUnavailable(_UNREADABLE, retry_after=30) from unread
    return None


def recall(projects: Path, session_id: str) -> Path | None:
    """Where `find` has found a session's file, if it is still there; else `find` it. For lists: it costs one stat.

    A second file is noticed when anything else is asked of the session, and by lists from then on.
    """
    path = _remembered.get((projects, session_id))
    if path is not None:
        with contextlib.suppress(OSError):
            if path.stat().st_size:
                return path
    return find(projects, session_id)


def look_for(projects: Path, session_ids: Iterable[str]) -> None:
    """Find what `recall` is about to be asked for, with one look at each directory and not one for each session."""
    wanted = {f"{name}.jsonl": list[str]() for name in session_ids if (projects, name) not in _remembered}
    if len(wanted) <= _FEW:
        return
    for directory in _directories(projects):
        try:
            names = wanted.keys() & _names(projects, directory)
        except OSError:
            names = set(wanted)  # `find` tells whether it matters
        for name in names:
            wanted[name].append(directory)
    for name, directories in wanted.items():
        with contextlib.suppress(SessionAmbiguous, TranscriptsUnavailable):  # `recall` tells
            find(projects, name.removesuffix(".jsonl"), directories)


def everything_of(projects: Path, session_id: str) -> list[Path]:
    """A session's files, however many, its subagents' directories, and what was set aside of it. Raises OSError."""
    return [
        projects / directory / name
        for directory in _directories(projects)
        for name in _names(projects, directory)
        if name.startswith(session_id)
    ]


def remove(projects: Path, session_id: str) -> bool:
    """Remove `everything_of` a session; whether there was anything. Raises OSError."""
    found = everything_of(projects, session_id)
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return bool(found)


def session_info(path: Path) -> SDKSessionInfo | None:
    """What the SDK's `get_session_info` says of this very file; None where the CLI could not resume the session.

    That function has no way to be given a file: it looks through all directories, and takes the first of this name. Nor
    does it tell what can be resumed: a title is enough for it, and a first prompt of 64 KiB or a command is too little.
    """
    lite = _read_session_lite(path)
    if lite is None or not _can_be_resumed(path):
        return None
    known = _parse_session_info_from_lite(path.stem, lite)
    return known or SDKSessionInfo(path.stem, summary="", last_modified=lite.mtime, file_size=lite.size)


def _can_be_resumed(path: Path) -> bool:
    """Whether anything of a conversation is in a file: the CLI goes on from one message, whichever it is."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        for start, tail in tails(file, TAIL_BYTES, os.fstat(file.fileno()).st_size):
            lines = tail.split(b"\n")[1 if start else 0 :]  # not a cut one
            if any((entry := linked(line)) and not entry.get("isSidechain") for line in lines):
                return True
    return False


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Say what a caller can do where the disk refuses a change of transcripts. Raises NotSaved, TranscriptsUnavailable.

    The block must leave nothing behind when it fails.
    """
    try:
        yield
    except OSError as error:
        logger.error("the transcripts cannot be changed: %s", error)  # noqa: TRY400 - it says all there is to know
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotSaved(_FULL) from error
        raise TranscriptsUnavailable(_UNWRITABLE, retry_after=30) from error


@contextlib.contextmanager
def appended(path: Path) -> Iterator[None]:
    """The lines that the block appends to a file are on the disk after it, or none of them is in the file.

    Nobody else may write to it meanwhile. Raises NotSaved, TranscriptsUnavailable.
    """
    with saving(), path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        try:
            yield
            if file.seek(0, os.SEEK_END) > size:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # the SDK does not look at how much of its line was written
                    raise OSError(errno.ENOSPC, "only a part of a line was written")  # noqa: TRY301
                os.fsync(file.fileno())
        except BaseException:
            if file.seek(0, os.SEEK_END) > size:
                file.truncate(size)
            raise


def end_line(path: Path) -> None:
    """End a line that a crash has torn, or what is appended would become part of it and be lost."""
    with path.open("r+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def append(path: Path, lines: bytes) -> None:
    """Add whole lines to a transcript, all or none. See `appended`."""
    with appended(path):
        end_line(path)
        with path.open("ab") as file:
            file.write(lines)


def all_sessions(claude_config: Path) -> dict[str, list[Path]]:
    """The sessions' transcripts by session ID; whether they can be resumed is another question."""
    found: dict[str, list[Path]] = {}
    for path in sorted(claude_config.glob("projects/*/*.jsonl")):
        if is_session_id(path.stem):
            found.setdefault(path.stem, []).append(path)
    return found


def leftovers(claude_config: Path) -> list[Path]:
    """What belongs to no transcript: files that were set aside, and subagents' directories without their session."""
    aside = claude_config.glob("projects/*/*.unreadable-*")
    directories = (path for path in claude_config.glob("projects/*/*") if is_session_id(path.name) and path.is_dir())
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


def _directories(projects: Path) -> list[str]:
    try:
        return os.listdir(projects)
    except FileNotFoundError:
        return []  # no session was ever kept here
    except OSError as error:
        logger.error("the project directories cannot be listed: %s", error)  # noqa: TRY400
        raise TranscriptsUnavailable(_UNREADABLE, retry_after=30) from error


def _names(projects: Path, directory: str) -> list[str]:
    try:
        return os.listdir(f"{projects}/{directory}")
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_session_id(name: str) -> bool:
    """Whether this is a session ID as the CLI writes it: it takes other texts for titles and paths."""
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False


_AMBIGUOUS = (
    "Nothing was changed. This session has two transcripts, as a partial restore leaves it, and neither is taken for "
    "the right one. The server's log and `session-sidecar doctor` name them: the operator has to move one of them away."
)
_UNREADABLE = "Nothing was changed. Not all transcripts can be read; the server's log has the reason."
_UNWRITABLE = "Nothing was changed. The transcripts cannot be written at the moment; the server's log has the reason."
_FULL = "Nothing was changed. The volume of the transcripts is full: the operator has to make room. Then send it again."
