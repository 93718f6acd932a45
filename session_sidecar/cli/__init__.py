"""The command line: `session-sidecar`."""

import importlib
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

T = TypeVar("T")

# The operator's, each with its module and its name there; the others call a running sidecar.
OPERATORS = {
    **{name: (name, name) for name in ("serve", "token", "doctor", "config", "backup", "restore")},
    "import": ("moving", "import_"),
    "export": ("moving", "export"),
    "rotate": ("keys", "rotate"),
    "forget-key": ("keys", "forget_key"),
}

home_option = click.option(
    "--home", type=click.Path(path_type=Path, file_okay=False), help="Where everything is kept. [default: var]"
)

database_option = click.option("--database", metavar="URL", help="postgresql://… [default: SIDECAR_DATABASE]")


class _Main(click.Group):
    """The operator's commands, and those that call a running sidecar; each is imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*OPERATORS, *_calls().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in OPERATORS:
            return _calls().get_command(ctx, cmd_name)
        module, name = OPERATORS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        return command


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Do what takes long and can be broken off. What it raises ends the command in one line, Ctrl-C with 130."""
    import asyncio  # noqa: PLC0415

    from session_sidecar.cli.client import show  # noqa: PLC0415
    from session_sidecar.cli.client.http import Interrupted  # noqa: PLC0415
    from session_sidecar.errors import SidecarError  # noqa: PLC0415
    from session_sidecar.settings import SettingsError  # noqa: PLC0415
    from session_store import SessionMapError  # noqa: PLC0415

    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        show.note("broken off; it goes on where it was when it is run again")
        sys.exit(Interrupted.exit_code)
    except SidecarError as error:
        raise click.ClickException(str(error.detail)) from None
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    except (SessionMapError, OSError) as error:
        raise click.ClickException(str(error)) from None


def _calls() -> click.Group:
    from session_sidecar.cli.client.commands import calls  # noqa: PLC0415 - `serve` does not pay for it

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
