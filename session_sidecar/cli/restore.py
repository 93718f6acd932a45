"""`session-sidecar restore`: make a home of a backup."""

from pathlib import Path

import click

from session_sidecar.cli import home_option


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@home_option
def restore(*, directory: Path, home: Path | None) -> None:
    """Make a home of the backup in DIRECTORY, at the same path or at another one. It must hold no conversations yet.

    Settings files and what is in the workspace already stay as they are. No login is restored: a backup has none.

    \b
    Example:
      session-sidecar restore --home elsewhere backups/monday
    """
    from session_sidecar.cli.client import show  # noqa: PLC0415 - a table on a terminal, JSON in a pipe
    from session_sidecar.sessions.upkeep.backup import BackupFailed  # noqa: PLC0415
    from session_sidecar.sessions.upkeep.backup import restore as restored  # noqa: PLC0415
    from session_sidecar.settings import Settings, SettingsError  # noqa: PLC0415

    try:
        settings = Settings.load(home=home)
        held = restored(settings, directory)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except BackupFailed as error:
        raise click.ClickException(str(error)) from None
    show.one({"home": str(settings.home.absolute()), **held.plain()})
