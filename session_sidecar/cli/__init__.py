"""The command line: `session-sidecar`."""

import importlib
from pathlib import Path

import click

# The operator's, each in a module of its name; the others call a running sidecar.
OPERATORS = ("serve", "token", "doctor", "config", "backup", "restore")

home_option = click.option(
    "--home", type=click.Path(path_type=Path, file_okay=False), help="Where everything is kept. [default: var]"
)


class _Main(click.Group):
    """The operator's commands, and those that call a running sidecar; each is imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*OPERATORS, *_calls().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in OPERATORS:
            return _calls().get_command(ctx, cmd_name)
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{cmd_name}"), cmd_name)
        return command


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
