"""What people see who start it on a terminal: what to do next, and logs that can be read at a glance.

In a pipe it is one JSON object a line; see `logs`.
"""

import logging
import shlex
import sys
from datetime import datetime

import click

from session_sidecar import __version__
from session_sidecar.server.listening import Server
from session_sidecar.settings import Settings

_TRY = '{"thread_id":"t1","resource_id":"alice","message":"Hello"}'
_MODELS = {
    "live": "live: the API answers, with the credentials of the environment",
    "offline": "offline: the built-in stand-in answers; with ANTHROPIC_API_KEY set, --model auto takes the API",
}
_COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


class Plain(logging.Formatter):
    """A record as a line for people: the time, the event, and what is worth knowing of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")  # noqa: DTZ006 - the person's own clock
        fields = dict(getattr(record, "fields", {}))
        what = record.getMessage()
        if what == "request":
            what = f"{fields.pop('method')} {fields.pop('path')} {fields.pop('status', 'left')} {fields.pop('ms')} ms"
        elif what == "turn":
            ms = fields.pop("ms").get("end")
            what = f"turn {fields.pop('status')} {ms} ms"
            for name in ("turn_id", "sdk_session_id", "exit", "origin"):
                fields.pop(name)
        fields.pop("request_id", None)
        said = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        if record.exc_info and record.exc_info[0] is not None:
            said += f" ({record.exc_info[0].__name__}; in a pipe, the log says where)"
        colour = _COLOURS.get(record.levelname)
        level = click.style(record.levelname.lower() + " ", fg=colour) if colour else ""
        return f"{click.style(at, dim=True)} {level}{what}{click.style(f' {said}', dim=True) if said else ''}"


def welcome(settings: Settings, server: Server) -> None:
    """Say where it listens, where it keeps things, who answers, where the page is, and what to try."""
    url = server.url
    way = f"--unix-socket {shlex.quote(server.uds)} " if server.uds is not None else ""
    command = f"curl -N {way}{url}/v1/chat -H 'content-type: application/json' \\\n            -d {shlex.quote(_TRY)}"
    rows = {
        "home": f"{settings.home.absolute()}: everything is kept there",
        "model": _MODELS[server.lifespan.state["services"].turns.model],
        **({"page": f"{url}/ui"} if settings.ui == "on" and server.uds is None else {}),
        "try": command,
        "stop": "Ctrl-C",
    }
    click.echo(
        f"{click.style('session-sidecar', bold=True)} {__version__} on {click.style(server.uds or url, bold=True)}",
        err=True,
    )
    for name, text in rows.items():
        click.echo(f"  {name:<6}{text}", err=True)


def is_there() -> bool:
    """Whether a person reads what is logged."""
    return sys.stderr.isatty()
