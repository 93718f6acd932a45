"""The command line: `session-sidecar`."""

from pathlib import Path
from typing import Any

import click
import uvicorn

from sidecar import logs
from sidecar.settings import Settings, SettingsError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="session-sidecar")
def main() -> None:
    """Map chat threads to Claude Agent SDK sessions, and stream their turns over HTTP."""


@main.command()
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on. [default: 8000]")
@click.option(
    "--home", type=click.Path(path_type=Path, file_okay=False), help="Where everything is kept. [default: var]"
)
@click.option(
    "--model",
    type=click.Choice(["live", "offline", "auto"]),
    help="Who answers: the API, the built-in stand-in, or (auto) the stand-in without credentials. [default: live]",
)
@click.option("--agents", metavar="FILE", help="agents.toml, or package.module:function.")
def serve(**options: Any) -> None:
    """Run the sidecar. Every option is also a SIDECAR_… environment variable.

    Example: session-sidecar serve --model auto --port 8001
    """
    try:
        settings = Settings.load(**options)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    if settings.host not in LOOPBACK:
        raise click.ClickException(
            f"--host {settings.host}: it listens on loopback only, as it does not check who calls. Proxy to it instead."
        )
    from app import create_app  # noqa: PLC0415 - `app` reads the environment when it is imported

    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        lifespan="on",
        log_config=logs.configure(),
        access_log=False,
        timeout_graceful_shutdown=int(settings.shutdown_seconds) + 1,
    )
    uvicorn.Server(config).run()
