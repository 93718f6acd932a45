"""`session-sidecar config`: what `serve` would run with, and who has said so."""

import operator
import re
from typing import Any

import click

from session_sidecar.cli.serve import serve

MASK = "********"
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")
# As far as the last @: a password may hold one, though it should not.
_PASSWORD_IN_URL = re.compile(r"(://[^:/@\s]*:)\S+(?=@)|((?:^|[?&\s])(?:ssl)?password=)[^&\s]+")


@click.command(params=serve.params)
def config(**options: Any) -> None:
    """Print the settings that `serve` would run with here, and where each comes from. The options are those of `serve`.

    What depends on the machine is printed as it works out on this one. Secrets are masked.

    \b
    Examples:
      session-sidecar config
      session-sidecar config --port 8001 | grep -v '"default"'
    """
    from session_sidecar.cli.client import show  # noqa: PLC0415 - a table on a terminal, JSON in a pipe
    from session_sidecar.settings import ENV_PREFIX, Settings, SettingsError  # noqa: PLC0415

    try:
        settings = Settings.load(**options)
    except SettingsError as error:
        raise click.ClickException(str(error)) from None

    def origin(name: str) -> str:
        if options.get(name) is not None:
            return "option"
        return "environment" if name in settings.model_fields_set else "default"

    rows = (
        {"setting": ENV_PREFIX + name.upper(), "value": masked(name, value), "origin": origin(name)}
        for name, value in settings.effective().items()
    )
    show.many(rows, {column: operator.itemgetter(column) for column in ("setting", "value", "origin")})


def masked(name: str, value: Any) -> Any:
    """A setting's value for others to see: no secret, as far as its name or a URL's form tells.

    The path of a file that holds one is none.
    """
    if isinstance(value, list):
        return [masked(name, item) for item in value]
    if not isinstance(value, str):
        return value
    if _SECRET.search(name.upper()) and not name.upper().endswith("_FILE"):
        return MASK
    return _PASSWORD_IN_URL.sub(lambda found: (found[1] or found[2]) + MASK, value)
