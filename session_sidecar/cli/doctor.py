"""`session-sidecar doctor`: look whether the mappings and the transcripts agree."""

from pathlib import Path

import click

from session_sidecar.cli import home_option


@click.command()
@home_option
@click.option("--fix", is_flag=True, help="Repair what is safe, and ask before anything is lost.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; asks nothing.")
@click.pass_context
def doctor(ctx: click.Context, *, home: Path | None, fix: bool, as_json: bool) -> None:
    """Compare the mappings with the transcripts, offline, on the home directory itself.

    \b
    It finds
      - mappings whose conversation is gone
      - sessions with more than one transcript, as a partial restore leaves them
      - CLIs that still run although no sidecar does
      - a config directory that is not the sidecar's, or that a CLI would sweep
      - leftovers: transcripts that were set aside, subagents of sessions that are gone
      - transcripts that no thread has; a deletion keeps them, so these may stay

    Exit codes: 0 healthy, 1 something is left to do, 2 it could not look.

    Of what is stored sealed, or in PostgreSQL (SIDECAR_DATABASE), it looks whether it is there and has its keys.

    \b
    Example:
      session-sidecar doctor --home var --fix
    """
    import asyncio  # noqa: PLC0415
    import json  # noqa: PLC0415
    import sys  # noqa: PLC0415

    from session_sidecar.sessions.upkeep.doctor import examine  # noqa: PLC0415
    from session_sidecar.settings import Settings, SettingsError  # noqa: PLC0415
    from session_store import StoreInUse  # noqa: PLC0415

    try:
        settings = Settings.load(home=home)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    known = settings.database_file if settings.database is None else settings.home.absolute() / "replica"
    if not known.exists():
        raise click.UsageError(f"there is no {known}: no sidecar has run here, so name another --home")
    asks = fix and not as_json and sys.stdin.isatty()
    try:
        report = asyncio.run(examine(settings, fix=fix, ask=click.confirm if asks else None))
    except StoreInUse as error:
        raise click.UsageError(f"--fix: {error}") from None
    if as_json:
        click.echo(json.dumps(report.plain()))
    else:
        if report.in_use:
            click.echo(f"only reading: {report.in_use}")
        harmless = [finding for finding in report.findings if finding.harmless and not finding.fixed]
        for finding in report.findings:
            if finding in harmless:
                continue
            click.echo(f"{finding.kind}: {finding.what} {'Fixed.' if finding.fixed else finding.todo}")
        if harmless:
            names = ", ".join(str(finding.about["sdk_session_id"]) for finding in harmless[:5])
            click.echo(
                f"kept: {len(harmless)} transcript(s) that no thread has, as deletions leave them by default ({names}"
                f"{' …' if len(harmless) > 5 else ''}). PUT /v1/session adopts one, --fix on a terminal asks to delete."
            )
        left = len(report.left)
        if (left or harmless) and fix and not asks:
            click.echo("what loses something is left as it is: run it with --fix on a terminal to be asked")
        counts = f"{report.mappings} mappings, {report.transcripts} transcripts"
        click.echo(f"{left} to do ({counts})" if left else f"healthy ({counts})")
    ctx.exit(0 if report.healthy else 1)
