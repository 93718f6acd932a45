"""`/openapi.json`, and `/docs`, which shows the same to people: HTML without a script, from files of this package."""

import base64
import functools
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

from starlette.responses import HTMLResponse, Response

from session_sidecar.api.documents.openapi import document
from session_sidecar.api.http import Call, Incoming, Nothing
from session_sidecar.api.models.answers import Json

_TEMPLATE = Path(__file__).parent / "docs.html"


class Docs:
    """The table of calls, described: made when it is first asked for, and then kept."""

    def __init__(self, calls: Callable[[], Sequence[Call[Any]]]) -> None:
        """`calls` is a function, as these two calls are in the table themselves."""
        self._calls = calls

    async def openapi(self, _: Incoming[Nothing]) -> Response:
        """`GET /openapi.json`: this document."""
        return Response(self._json, media_type="application/json")

    async def page(self, _: Incoming[Nothing]) -> Response:
        """`GET /docs`: this document as a page for people."""
        text, policy = self._html
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @functools.cached_property
    def _document(self) -> Json:
        return document(self._calls())

    @functools.cached_property
    def _json(self) -> bytes:
        return json.dumps(self._document, separators=(",", ":")).encode()

    @functools.cached_property
    def _html(self) -> tuple[str, str]:
        return page(self._document)


def page(described: Json) -> tuple[str, str]:
    """An OpenAPI document as HTML, and the Content-Security-Policy that it needs: its own style, and nothing else."""
    components = described["components"]
    paths = described["paths"].items()
    operations = [(path, method, one) for path, methods in paths for method, one in methods.items()]
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=_escaped(described["info"]["title"]),
        version=_escaped(described["info"]["version"]),
        description=_prose(described["info"]["description"]),
        contents="".join(_entry(*operation) for operation in operations),
        calls="".join(_call(*operation, components["parameters"]) for operation in operations),
        shapes="".join(_shape(name, schema) for name, schema in components["schemas"].items()),
    )
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return text, f"{policy}; frame-ancestors 'none'"


def _entry(path: str, method: str, operation: Json) -> str:
    return f'<li><a href="#{operation["operationId"]}"><b>{method.upper()}</b> {_escaped(path)}</a></li>'


def _call(path: str, method: str, operation: Json, shared: Json) -> str:
    given = [shared[one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in operation["parameters"]]
    parameters = "".join(_row(one["name"], one["schema"], one, required=one.get("required", False)) for one in given)
    body = operation.get("requestBody")
    return (
        f'<section id="{operation["operationId"]}"><h2><b>{method.upper()}</b> {_escaped(path)}</h2>'
        f"{_prose(operation['summary'])}{_prose(operation.get('description', ''))}"
        f"{f'<p>Body: {_typed(_content(body))}</p>' if body else ''}"
        f"<h3>Parameters</h3><dl>{parameters}</dl>"
        f"<h3>Answers</h3><dl>{''.join(_answers(operation['responses']))}</dl></section>"
    )


def _answers(responses: Json) -> Iterator[str]:
    for status, response in responses.items():
        kinds = " or ".join(
            f"{_escaped(kind)}: {_typed(media['schema'])}" for kind, media in response.get("content", {}).items()
        )
        headers = ", ".join(f"`{name}`" for name in response["headers"] if name != "X-Request-Id")
        told = _prose(response["description"]) + _prose(f"Headers: {headers}" if headers else "")
        yield f"<dt><b>{status}</b> {kinds}</dt><dd>{told}</dd>"


def _shape(name: str, schema: Json) -> str:
    fields = schema.get("properties", {}).items()
    rows = "".join(_row(field, one, one, required=field in schema.get("required", ())) for field, one in fields)
    return f'<section id="{name}"><h3>{name}</h3>{_prose(schema.get("description", ""))}<dl>{rows}</dl></section>'


def _row(name: str, schema: Json, about: Json, *, required: bool) -> str:
    notes = "" if required else f" = {json.dumps(schema['default'])}" if "default" in schema else ", optional"
    told = _prose(about.get("description", ""))
    return f"<dt><b>{_escaped(name)}</b>: {_typed(schema)}{_escaped(notes)}</dt><dd>{told}</dd>"


def _content(described: Json) -> Json:
    schema: Json = described["content"]["application/json"]["schema"]
    return schema


def _typed(schema: Json) -> str:
    """What a schema takes, in a few words; those that have a name are linked."""
    if "$ref" in schema:
        name = _escaped(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for either in ("anyOf", "oneOf"):
        if either in schema:
            return " or ".join(_typed(one) for one in schema[either])
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return " or ".join(f"<code>{_escaped(json.dumps(value))}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_typed(schema['items'])}"
    return _escaped(schema.get("type", "anything"))


def _prose(text: str) -> str:
    """Paragraphs of text and lists, with `code` in them: as much of Markdown as descriptions have."""
    return "".join(f"<p>{_inline(block)}</p>" for block in text.strip().split("\n\n") if block)


def _inline(text: str) -> str:
    lines = re.sub("`([^`]*)`", r"<code>\1</code>", _escaped(text))
    return re.sub("(^|\n)- ", r"\1<br>", lines).removeprefix("<br>")


def _escaped(text: str) -> str:
    return html.escape(text)
