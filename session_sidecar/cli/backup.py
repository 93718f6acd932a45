"""`session-sidecar backup`: copy a home to somewhere else."""

from pathlib import Path

import click

from session_sidecar.cli import home_option


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@home_option
def backup(*, directory: Path, home: Path | None) -> None:
    """Copy the home to DIRECTORY, beside a running sidecar too. DIRECTORY is there once all is in it.

    It holds the mappings, the transcripts, the workspace and the settings files of the CLI; no login, no cache, no
    lock. As the home does, it holds what people have said: only its owner can read it. What is sealed in the home is
    sealed in it, and the keys of SIDECAR_ENCRYPTION_KEYS are not in it. For PostgreSQL there is pg_dump.

    \b
    Examples:
      session-sidecar backup --home var backups/monday
      session-sidecar doctor --home backups/monday
    """
    from session_sidecar.cli.client import show  # noqa: PLC0415 - a table on a terminal, JSON in a pipe
    from session_sidecar.sessions.upkeep.backup import BackupFailed, back_up  # noqa: PLC0415
    from session_sidecar.settings import Settings, SettingsError  # noqa: PLC0415

    try:
        made, left_out = back_up(Settings.load(home=home), directory)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except BackupFailed as error:
        raise click.ClickException(str(error)) from None
    if left_out:
        show.note(f"left out of the CLI's directory: {', '.join(left_out)}")
    show.one({"directory": str(directory.absolute()), **made.plain()})
