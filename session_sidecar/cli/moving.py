"""`session-sidecar import` and `export`: from a home into PostgreSQL, and back."""

import contextlib
import sys
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from session_sidecar.cli import database_option, finish, home_option

if TYPE_CHECKING:
    from session_sidecar.sessions.upkeep.moving.places import Step
    from session_sidecar.settings import Settings

_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


@click.command("import")
@home_option
@database_option
@_dry_run
@click.pass_context
def import_(ctx: click.Context, *, home: Path | None, database: str | None, dry_run: bool) -> None:
    """Take the mappings and the transcripts of a home into PostgreSQL. The home's sidecar must be stopped.

    A thread is mapped there when its transcript is, and was compared by hashes. Broken off at any moment, it goes on
    where it was when it is run again; the home stays as it is. Where SIDECAR_ENCRYPTION_KEYS is set, what is stored is
    sealed. Workspace, settings and logins are not moved, nor are transcripts that no thread has.

    Exit codes: 0 all of it is there, 1 something is in the way, and named.

    \b
    Examples:
      session-sidecar import --home var --database postgresql://me@db/chat --dry-run
      session-sidecar import --home var --database postgresql://me@db/chat
    """
    from session_sidecar.sessions.upkeep.moving.into import move_in  # noqa: PLC0415

    _move(ctx, move_in(_settings(home, database), dry_run=dry_run))


@click.command()
@home_option
@database_option
@_dry_run
@click.pass_context
def export(ctx: click.Context, *, home: Path | None, database: str | None, dry_run: bool) -> None:
    """Make a new home of what PostgreSQL holds, for a sidecar without it. HOME must not be there yet, or be empty.

    It is there once all is in it, compared by hashes; broken off, it goes on where it was when it is run again.
    Replicas may go on: what a running turn has not stored yet is not in the home, and its thread is named. Where
    SIDECAR_ENCRYPTION_KEYS is set, transcripts are sealed in the home, too. The database stays as it is.

    Exit codes: 0 all of it is here, 1 something is in the way or was running, and named.

    \b
    Example:
      session-sidecar export --home var --database postgresql://me@db/chat
    """
    from session_sidecar.sessions.upkeep.moving.out import move_out  # noqa: PLC0415

    _move(ctx, move_out(_settings(home, database), dry_run=dry_run))


def _settings(home: Path | None, database: str | None) -> "Settings":
    from session_sidecar.settings import Settings, SettingsError  # noqa: PLC0415

    try:
        settings = Settings.load(home=home, database=database)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    if settings.database is None:
        raise click.UsageError("which database? Name one: --database postgresql://…, or SIDECAR_DATABASE")
    return settings


def _move(ctx: click.Context, steps: "AsyncGenerator[Step, None]") -> None:
    from session_sidecar.cli.client import show  # noqa: PLC0415 - a table on a terminal, JSON in a pipe
    from session_sidecar.cli.client.http import dumps  # noqa: PLC0415
    from session_sidecar.sessions.upkeep.moving.places import MoveFailed  # noqa: PLC0415

    counts: Counter[str] = Counter()

    async def move() -> None:
        with show.working() as say:
            async with contextlib.aclosing(steps):
                async for step in steps:
                    counts.update({step.outcome: 1, "bytes": step.bytes})
                    if not sys.stdout.isatty():
                        show.write(dumps(step.plain()) + "\n")
                    elif step.why is not None:
                        show.write(
                            f"{step.outcome}: {step.mapping.thread_id} of {step.mapping.resource_id}: {step.why}\n"
                        )
                    say(", ".join(f"{name} {count}" for name, count in counts.items()))

    try:
        finish(move())
    except MoveFailed as error:
        raise click.ClickException(str(error)) from None
    show.one({"threads": counts.total() - counts["bytes"], **counts})
    ctx.exit(1 if counts["refused"] or counts["running"] else 0)
