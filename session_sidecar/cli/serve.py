"""`session-sidecar serve`: run it."""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import click

from session_sidecar.cli import home_option

# Longer than the pools of HTTP clients keep a connection. uvicorn's 5 is what httpx has too: whoever of the two is late
# then sends a message into a connection that is being closed.
KEEP_ALIVE_SECONDS = 75


class _Serve(click.Command):
    """`serve`, whose help lists every setting."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The settings, from the one place that has them."""
        from session_sidecar.settings import ENV_PREFIX, Settings  # noqa: PLC0415

        rows = []
        for name, field in Settings.model_fields.items():
            default = "" if field.default is None else f" [default: {field.default}]"
            rows.append((ENV_PREFIX + name.upper(), (field.description or "") + default))
        with formatter.section("Settings, in the environment"):
            formatter.write_dl(rows)


@click.command(cls=_Serve)
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on. [default: 8000]")
@click.option(
    "--uds", type=click.Path(path_type=Path, dir_okay=False), help="Unix socket to listen on, for your own user alone."
)
@home_option
@click.option(
    "--model",
    type=click.Choice(["live", "offline", "auto"]),
    help="Who answers: the API, the built-in stand-in, or (auto) the stand-in without credentials. [default: live]",
)
@click.option("--agents", metavar="FILE", help="agents.toml, or package.module:function.")
def serve(**options: Any) -> None:
    """Run the sidecar, until Ctrl-C. Every option is also a SIDECAR_… environment variable.

    Example: session-sidecar serve --model auto --port 8001
    """
    import uvicorn  # noqa: PLC0415 - the other commands do not pay for the server

    from session_sidecar.app import create_app  # noqa: PLC0415
    from session_sidecar.server import logs, terminal  # noqa: PLC0415
    from session_sidecar.server.connection import Connection  # noqa: PLC0415
    from session_sidecar.server.listening import Server, unix_socket  # noqa: PLC0415
    from session_sidecar.settings import LOOPBACK, Settings, SettingsError  # noqa: PLC0415

    try:
        settings = Settings.load(**options)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    if settings.host not in LOOPBACK and settings.tokens_file is None:
        raise click.ClickException(
            f"--host {settings.host}: without tokens it listens on loopback only, as it does not check who calls. "
            "Proxy to it there, or make some: session-sidecar token new --help"
        )
    os.umask(0o077)  # whatever is written, by the CLIs too, is the operator's alone
    try:
        app = create_app(settings)
        sockets = [unix_socket(settings.uds)] if settings.uds is not None else None
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    if sockets is None:
        _check_port(settings.host, settings.port)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=logs.configure(terminal.Plain if terminal.is_there() else logs.JsonLines),
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.shutdown_seconds) + 1,
    )
    server = Server(config, functools.partial(terminal.welcome, settings) if terminal.is_there() else None)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again, when all is closed: that is how it ends
        server.run(sockets)


def _check_port(host: str, port: int) -> None:
    """Say that a port is taken before anything is opened; uvicorn says it when all is running. 0 takes a free one."""
    import socket  # noqa: PLC0415

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise click.ClickException(
                f"port {port} of {host} cannot be listened on ({error.strerror}). "
                "End what has it, or choose another one: --port, SIDECAR_PORT, make run PORT=…"
            ) from None
