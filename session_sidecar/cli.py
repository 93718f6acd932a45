"""The command line: `session-sidecar`."""

import contextlib
from pathlib import Path
from typing import Any

import click

# Longer than the pools of HTTP clients keep a connection. uvicorn's 5 is what httpx has too: whoever of the two is late
# then sends a message into a connection that is being closed.
KEEP_ALIVE_SECONDS = 75


class _Main(click.Group):
    """The commands here, and those that call a running sidecar: they and their libraries are imported when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_calls().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, cmd_name) or _calls().get_command(ctx, cmd_name)


def _calls() -> click.Group:
    from session_sidecar.client.commands import calls  # noqa: PLC0415 - `serve` does not pay for it

    return calls


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="session-sidecar")
def main() -> None:
    """Map chat threads to Claude Agent SDK sessions, and stream their turns over HTTP.

    \b
    Run it, and in another terminal talk to it:
      session-sidecar serve --model auto
      session-sidecar chat -r alice -t trip "Plan a week in Lisbon"
      session-sidecar fork -r alice trip trip-by-train
      session-sidecar tree -r alice trip
      session-sidecar ls

    A terminal gets tables, a pipe the API's own objects, one JSON object a line. Errors are one line on stderr:
    `error: code: detail`.

    \b
    Exit codes:
      0    done
      1    the sidecar refused; the code is that of its problem details
      2    the command line is wrong
      3    the sidecar is not there, or the connection broke
      4    the turn failed, or somebody else stopped it
      130  Ctrl-C

    \b
    Environment:
      SIDECAR_URL    where the sidecar is [default: http://127.0.0.1:8000]
      SIDECAR_TOKEN  a token, where the sidecar asks for one

    \b
    Completion, in the shell's start-up file (bash, zsh, fish):
      eval "$(_SESSION_SIDECAR_COMPLETE=bash_source session-sidecar)"
      eval "$(_SESSION_SIDECAR_COMPLETE=zsh_source session-sidecar)"
      _SESSION_SIDECAR_COMPLETE=fish_source session-sidecar | source
    """


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


@main.command(cls=_Serve)
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
    """Run the sidecar, until Ctrl-C. Every option is also a SIDECAR_… environment variable.

    Example: session-sidecar serve --model auto --port 8001
    """
    import uvicorn  # noqa: PLC0415 - the other commands do not pay for the server

    from session_sidecar.app import create_app  # noqa: PLC0415
    from session_sidecar.server import logs, terminal  # noqa: PLC0415
    from session_sidecar.server.connection import Connection  # noqa: PLC0415
    from session_sidecar.settings import LOOPBACK, Settings, SettingsError  # noqa: PLC0415

    try:
        settings = Settings.load(**options)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    if settings.host not in LOOPBACK:
        raise click.ClickException(
            f"--host {settings.host}: it listens on loopback only, as it does not check who calls. Proxy to it instead."
        )
    _check_port(settings.host, settings.port)
    config = uvicorn.Config(
        create_app(settings),
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
    server = terminal.Greeting(config, settings) if terminal.is_there() else uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again, when all is closed: that is how it ends
        server.run()


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


@main.command()
@click.option(
    "--home", type=click.Path(path_type=Path, file_okay=False), help="Where everything is kept. [default: var]"
)
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

    \b
    Example:
      session-sidecar doctor --home var --fix
    """
    import asyncio  # noqa: PLC0415
    import json  # noqa: PLC0415
    import sys  # noqa: PLC0415

    from session_sidecar.sessions.doctor import examine  # noqa: PLC0415
    from session_sidecar.settings import Settings, SettingsError  # noqa: PLC0415
    from session_store import StoreInUse  # noqa: PLC0415

    try:
        settings = Settings.load(home=home)
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    if not settings.database.exists():
        raise click.UsageError(f"there is no {settings.database}: no sidecar has run here, so name another --home")
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
