"""`session-sidecar rotate` and `forget-key`: the keys that transcripts are stored with."""

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from session_sidecar.cli import database_option, finish, home_option

if TYPE_CHECKING:
    from session_sidecar.settings import Settings

NAMED = 20  # of what does not open


@click.command()
@home_option
@database_option
@click.pass_context
def rotate(ctx: click.Context, *, home: Path | None, database: str | None) -> None:
    """Seal with the first key of SIDECAR_ENCRYPTION_KEYS what is stored under another, or under none.

    First give all replicas the new key, before the others, and start them again: they may run meanwhile, and so may the
    sidecar of a home. Only where none runs are transcripts taken in that lie in the home plain; a running one takes
    them in as their threads are used. Broken off at any moment, it goes on where it was when it is run again. Once it
    says that nothing was left, the old keys may go.

    Exit codes: 0 all is sealed with that key, 1 something is not, and named.

    \b
    Examples:
      session-sidecar rotate --home var
      session-sidecar rotate --database postgresql://me@db/chat
    """
    from session_sidecar.cli.client import show  # noqa: PLC0415 - a table on a terminal, JSON in a pipe
    from session_sidecar.cli.client.http import dumps  # noqa: PLC0415
    from session_sidecar.sessions.upkeep.rotating import KeyRefused, Rotated, seal_anew  # noqa: PLC0415

    settings = _settings(home, database)

    async def work() -> Rotated:
        last = Rotated()
        with show.working() as say:
            async with contextlib.aclosing(seal_anew(settings)) as steps:
                async for last in steps:
                    say(f"{last.taken_in} conversations taken in, {last.resealed} of {last.of} chunks sealed anew")
                    if not sys.stdout.isatty():
                        numbers = ("taken_in", "resealed", "of", "unreadable")
                        show.write(dumps({name: getattr(last, name) for name in numbers}) + "\n")
        return last

    try:
        last = finish(work())
    except KeyRefused as error:
        raise click.ClickException(str(error)) from None
    for session_id, why in sorted(last.why.items())[:NAMED]:
        show.note(f"session {session_id}: {why}")
    if last.in_use is not None and last.plain:
        show.note(f"{last.plain} transcripts lie here plain, as they are in use or were not used since there are keys")
    elif last.plain:
        show.note(f"{last.plain} transcripts lie here plain, as no thread has them: doctor --fix deletes them")
    told = asdict(last)
    show.one(told if not sys.stdout.isatty() else {**told, "why": len(last.why)})
    ctx.exit(1 if last.why or last.plain else 0)


@click.command("forget-key")
@click.argument("resource")
@home_option
@database_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget_key(*, resource: str, home: Path | None, database: str | None, yes: bool) -> None:
    """Forget the key of RESOURCE, for good: whatever is sealed for it can never be read again, by anyone.

    The resource must have no thread any more: delete those first. Backups that were made before have the key as well,
    until they are deleted, and what lies somewhere plain stays readable.

    \b
    Example:
      session-sidecar forget-key alice --home var
    """
    from session_sidecar.cli.client import show  # noqa: PLC0415 - a table on a terminal, JSON in a pipe
    from session_sidecar.sessions.upkeep.rotating import KeyRefused  # noqa: PLC0415
    from session_sidecar.sessions.upkeep.rotating import forget_key as forget  # noqa: PLC0415

    settings = _settings(home, database)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("nobody can be asked here: --yes says that it is meant")
        click.confirm(f"Make all that is sealed for {resource!r} unreadable, for good?", abort=True)
    try:
        had = finish(forget(settings, resource))
    except KeyRefused as error:
        raise click.ClickException(str(error)) from None
    show.one({"resource_id": resource, "forgotten": had})


def _settings(home: Path | None, database: str | None) -> "Settings":
    from session_sidecar.settings import Settings, SettingsError  # noqa: PLC0415

    try:
        return Settings.load(home=home, database=database)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
