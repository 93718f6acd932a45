"""`session-sidecar token`: who may call."""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import click

from session_sidecar.api.access.tokens import ALL, TokenFile, make_token, plain
from session_sidecar.settings import Settings, SettingsError

T = TypeVar("T")


@click.group()
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The tokens file. [default: SIDECAR_TOKENS_FILE]",
)
@click.pass_context
def token(ctx: click.Context, path: Path | None) -> None:
    """Make, list and revoke tokens. The file keeps their hashes; a sidecar notices a change within a second.

    \b
    Examples:
      export SIDECAR_TOKENS_FILE=tokens
      session-sidecar token new --all
      session-sidecar token new --resource alice --days 30
      session-sidecar token list
      session-sidecar token revoke 4f1c09aa
    """
    try:
        path = path or Settings.load().tokens_file
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
    if path is None:
        raise click.UsageError("which file? Name one: --file, or SIDECAR_TOKENS_FILE, which `serve` needs as well")
    ctx.obj = TokenFile(path)


@token.command()
@click.option(
    "--resource", "-r", "resources", multiple=True, metavar="R", help="Whose threads it may touch; repeatable."
)
@click.option("--all", "everybody", is_flag=True, help="Everybody's: for a backend that knows its people.")
@click.option("--read", is_flag=True, help="Only to list and to read.")
@click.option("--metrics", is_flag=True, help="Only to read /metrics.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Good for so many days. [default: for ever]")
@click.pass_obj
def new(
    file: TokenFile, resources: tuple[str, ...], *, everybody: bool, read: bool, metrics: bool, days: float | None
) -> None:
    """Make a token and print it, once."""
    if bool(resources) + everybody + metrics != 1:
        raise click.UsageError("say whose it is: one of --resource (as often as needed), --all and --metrics")
    expires = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    text, known = make_token([ALL] if everybody else resources, read=read, metrics=metrics, expires=expires)
    _told(lambda: file.add(text, known))
    click.echo(f"its name is {known.name}; it is not shown again", err=True)
    click.echo(text)


@token.command("list")
@click.pass_obj
def list_(file: TokenFile) -> None:
    """List the tokens, without what they are."""
    for known in _told(file.read).values():
        if not sys.stdout.isatty():
            click.echo(json.dumps(plain(known)))
            continue
        people = "everybody" if known.is_unrestricted else ", ".join(sorted(known.resources))
        whose = "metrics" if known.metrics else people
        until = "for ever" if known.expires is None else f"until {known.expires:%Y-%m-%d %H:%M} UTC"
        click.echo(f"{known.name}  {whose}{' (read)' if known.read else ''}  {until}")


@token.command()
@click.argument("name")
@click.pass_obj
def revoke(file: TokenFile, name: str) -> None:
    """Take a token away, by the NAME that `list` gives."""
    if not _told(lambda: file.revoke(name)):
        raise click.ClickException(f"no token is named {name}; `session-sidecar token list` names them")


def _told(work: Callable[[], T]) -> T:
    try:
        return work()
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
