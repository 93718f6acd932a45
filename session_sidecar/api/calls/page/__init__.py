"""`/ui`: a page for people, three files of this package. It holds nothing of anybody's: it asks the calls beside it."""

import functools
import hashlib
from pathlib import Path

from starlette.responses import Response

from session_sidecar.api.http import Incoming, Nothing

_FILES = Path(__file__).parent
# Its own script and style and nothing else; and no text of a message can become markup or a script.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def ui(call: Incoming[Nothing]) -> Response:
    """`GET /ui`: the page: conversations, their forks as a tree, and answers as they come.

    It is all that a browser needs for the calls above, and asks for a token where one is needed. With `SIDECAR_UI=off`
    neither it nor its files are there.
    """
    return _file(call, "index.html", "text/html")


async def ui_style(call: Incoming[Nothing]) -> Response:
    """`GET /ui/page.css`: its style."""
    return _file(call, "page.css", "text/css")


async def ui_script(call: Incoming[Nothing]) -> Response:
    """`GET /ui/page.js`: its one script, a module."""
    return _file(call, "page.js", "text/javascript")


def _file(call: Incoming[Nothing], name: str, media_type: str) -> Response:
    """A file, or 304 where the caller has it already."""
    content, tag = _read(name)
    headers = {**_HEADERS, "ETag": tag}
    if call.request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)


@functools.cache
def _read(name: str) -> tuple[bytes, str]:
    content = (_FILES / name).read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'
