"""`session-sidecar doctor`: does what the session map says agree with what lies on the disk, and may it be mended.

It works on the home directory, not over HTTP. Where no sidecar runs it takes the database's lock, so that none starts
meanwhile; beside a running one it only reads, and leaves out what may be changing at this moment.
"""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from session_sidecar.agent.processes.orphans import end_orphans, live_clis
from session_sidecar.agent.transcripts.files import all_sessions, leftovers, sweeps_after
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.errors import SessionAmbiguous, TranscriptsUnavailable
from session_sidecar.sessions.upkeep.stored import Stored, opened, sessions_beside
from session_sidecar.settings import Settings
from session_store import SessionMap, SessionMapping, StoreInUse, StoreUnusable, walk

UNSETTLED_SECONDS = 60  # beside a running sidecar, what is younger may be half of something


@dataclass(slots=True)
class Finding:
    """Something that is not as it should be, or that is only worth knowing, as nobody has `todo` anything about it.

    `about` names it for scripts, `what` and `todo` for people.
    """

    kind: str
    what: str
    todo: str
    about: dict[str, Any]
    repair: Callable[[], Awaitable[object]] | None = None
    safe: bool = False  # nothing that anybody could miss is lost by the repair
    harmless: bool = False  # it may stay as it is
    fixed: bool = False

    def plain(self) -> dict[str, Any]:
        """The finding for JSON."""
        return {
            "kind": self.kind,
            **self.about,
            "what": self.what,
            "todo": self.todo,
            "harmless": self.harmless,
            "fixed": self.fixed,
        }


@dataclass(slots=True)
class Report:
    """What was looked at and what was found. `in_use` says who runs this home, if anybody does."""

    home: Path
    in_use: str | None = None
    mappings: int = 0
    transcripts: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is left to do."""
        return not self.left

    @property
    def left(self) -> list[Finding]:
        """What is left to do."""
        return [finding for finding in self.findings if not (finding.fixed or finding.harmless)]

    def plain(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "home": str(self.home),
            "healthy": self.healthy,
            "in_use": self.in_use,
            "mappings": self.mappings,
            "transcripts": self.transcripts,
            "findings": [finding.plain() for finding in self.findings],
        }


Ask = Callable[[str], bool]

QUESTIONS = {
    "dead_mapping": "Remove {} mapping(s) whose conversation is gone?",
    "unmapped_transcript": "Delete {} transcript(s) that no thread has, for good?",
    "leftover": "Delete {} leftover(s), for good?",
}


async def examine(settings: Settings, *, fix: bool = False, ask: Ask | None = None) -> Report:
    """Look at a home directory, and with `fix` repair what is safe, and what `ask` says yes to.

    Raises StoreInUse where `fix` is asked for beside a running sidecar.
    """
    report = Report(settings.home.absolute())
    try:
        async with AsyncExitStack() as stack:
            session_map, stored, report.in_use = await opened(settings, stack, change=fix)
            await _look(session_map, stored, settings, report)
            if fix:
                await _repair(report.findings, ask)
    except StoreInUse:
        raise
    except StoreUnusable as error:
        report.findings.append(Finding("database", str(error), "Nothing was compared.", {}))
    return report


async def _look(session_map: SessionMap, stored: Stored, settings: Settings, report: Report) -> None:
    config, found = settings.claude_config, report.findings
    kept = Transcripts(config, Readers())
    live = live_clis(config)
    # Files first: a turn commits its mapping before there is a transcript.
    unmapped = all_sessions(config)
    report.transcripts = len(unmapped)
    try:
        await kept.check()
        comparable = True
    except TranscriptsUnavailable as error:
        comparable = False
        found.append(Finding("no_marker", "The directory is not marked as the sidecar's.", error.detail, {}))
    owners: dict[str, SessionMapping] = {}
    async for row in walk(session_map):
        report.mappings += 1
        session_id, about = row.sdk_session_id, _about(row)
        name = f"{row.thread_id!r} of {row.resource_id!r}"
        if (other := owners.setdefault(session_id, row)) is not row:
            what = f"{name} and {other.thread_id!r} of {other.resource_id!r} have one session, {session_id}."
            todo = "The database was changed by other hands, or is damaged: restore a backup."
            found.append(Finding("shared_session", what, todo, about))
        paths = unmapped.pop(session_id, [])
        unsettled = report.in_use and (
            time.time() - row.updated_at.timestamp() < UNSETTLED_SECONDS
            or any(c.session_id == session_id for c in live)
        )
        try:
            if comparable and not unsettled and await kept.info(session_id) is None:
                if await stored.has(row):
                    report.transcripts += not paths
                else:
                    found.append(_dead(session_map, row, f"{name}, version {row.version}", paths, stored))
        except SessionAmbiguous:
            found.append(_ambiguous(name, about, paths))
    found += [_locked(key_id, count) for key_id, count in stored.locked.items()]
    for session_id in await sessions_beside(settings):
        unmapped.pop(session_id, None)
    if comparable:
        found += [
            Finding(
                "unmapped_transcript",
                f"No thread has the session {session_id} ({path.stat().st_size} bytes).",
                "A deletion keeps transcripts unless it is told otherwise. Adopt it (PUT /v1/session), or let --fix "
                "delete it.",
                {"sdk_session_id": session_id, "path": str(path)},
                harmless=True,
                repair=lambda session_id=session_id: kept.delete(session_id),  # type: ignore[misc]
            )
            for session_id, paths in unmapped.items()
            for path in paths
            if path.exists() and not (report.in_use and time.time() - path.stat().st_mtime < UNSETTLED_SECONDS)
        ]
    found += [_leftover(path) for path in leftovers(config)]
    if (days := sweeps_after(config)) is not None:
        what = f"A CLI that reads {config / 'settings.json'} deletes transcripts after {days} days."
        found.append(Finding("sweeping", what, "Set its cleanupPeriodDays to 36500.", {"days": days}))
    if not report.in_use:
        for cli in live:
            what = f"The CLI {cli.pid} runs on session {cli.session_id}, and no sidecar does."
            about = {"pid": cli.pid, "sdk_session_id": cli.session_id}
            todo = "--fix ends it, and so does the sidecar's next start."
            found.append(
                Finding("live_cli", what, todo, about, lambda: asyncio.to_thread(end_orphans, config), safe=True)
            )


def _ambiguous(name: str, about: dict[str, Any], paths: list[Path]) -> Finding:
    """A session whose turns and messages are refused until a person has chosen one of its files."""
    files = [(path, path.stat()) for path in paths]
    named = ", ".join(
        f"{path} ({file.st_size} bytes, of {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(file.st_mtime))} UTC)"
        for path, file in files
        if file.st_size
    )
    todo = "Keep the one that holds the conversation, and move the others out of projects/."
    what = f"{name}: its session {about['sdk_session_id']} has more than one transcript: {named}."
    return Finding("session_ambiguous", what, todo, {**about, "paths": [str(path) for path, _ in files]})


def _dead(session_map: SessionMap, row: SessionMapping, name: str, paths: list[Path], stored: Stored) -> Finding:
    """A mapping that its next message would begin anew."""

    async def remove() -> None:
        await session_map.remove(row.key, expected=row.sdk_session_id, version=row.version)

    about = _about(row)
    if stored.of_several:  # what lies in the homes of the others nobody can tell here
        what = f"{name}: no transcript of it is stored."
        todo = "If the replica that had it was killed, start that again: it may have it. Or delete the thread."
        return Finding("dead_mapping", what, todo, about)
    if row.version == 0 and not paths:
        what = f"{name}: its first turn never came to an end, and nothing of it was kept."
        return Finding("dead_mapping", what, "--fix removes it.", about, remove, safe=True)
    if paths:
        what = f"{name}: the SDK cannot resume {', '.join(map(str, paths))}."
        return Finding("dead_mapping", what, "Mend that file, or restore it from a backup.", about)
    what = f"{name}: its transcript {row.sdk_session_id} is not there."
    todo = "Restore it from a backup, or let --fix remove the mapping. The next message begins anew either way."
    return Finding("dead_mapping", what, todo, about, remove)


def _locked(key_id: str, count: int) -> Finding:
    what = f"{count} conversation(s) are sealed with the key {key_id!r}, which is not there."
    todo = "Add it to SIDECAR_ENCRYPTION_KEYS, behind the others."
    return Finding("key_missing", what, todo, {"key_id": key_id, "conversations": count})


def _leftover(path: Path) -> Finding:
    def remove() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    what, todo = f"{path} belongs to no transcript.", "Save what it holds, or let --fix delete it."
    return Finding("leftover", what, todo, {"path": str(path)}, lambda: asyncio.to_thread(remove))


async def _repair(findings: list[Finding], ask: Ask | None) -> None:
    for finding in findings:
        if finding.safe and finding.repair is not None:
            await finding.repair()
            finding.fixed = True
    for kind, question in QUESTIONS.items():
        rest = [f for f in findings if f.kind == kind and f.repair is not None and not f.fixed]
        if rest and ask is not None and ask(question.format(len(rest))):
            for finding in rest:
                assert finding.repair is not None  # noqa: S101 - chosen for having one
                await finding.repair()
                finding.fixed = True


def _about(row: SessionMapping) -> dict[str, Any]:
    return {"thread_id": row.thread_id, "resource_id": row.resource_id, "sdk_session_id": row.sdk_session_id}
