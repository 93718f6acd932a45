"""The OpenAPI document: made of the table of calls, and of the models that validate and render.

https://spec.openapis.org/oas/v3.1.0.html. 3.1 has no word for a stream of events: as tools read it, the schema of a
`text/event-stream` is that of one event, and 3.2 has shown how to write it.
"""

from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from session_sidecar import __version__
from session_sidecar.api.documents.problems import OF_NO_CALL, problems_of, title
from session_sidecar.api.http import RESOURCE_HEADER, Call, Nothing
from session_sidecar.api.models import answers, events, feed
from session_sidecar.api.models.answers import Json
from session_sidecar.api.models.components import EXAMPLE, FEED_EXAMPLE, HEADERS, PARAMETERS, STREAMS, UI_EXAMPLE
from session_sidecar.errors import SidecarError

_REF = "#/components/schemas/{model}"
_DESCRIPTION = """\
Which Claude Agent SDK session belongs to which chat thread, and its turns as server-sent events.

Every answer has an `X-Request-Id`. Unknown fields and parameters are refused, but for those of `/v1/ai-sdk`. A path
that is none is answered 404 `not_found`, a method that a path does not take 405 `method_not_allowed` with the header
`Allow`; a path that takes GET takes HEAD too. What is no HTTP gets a 400 of plain text.
"""
_MEDIA: dict[Any, tuple[str, ...]] = {
    answers.TurnAnswer: ("text/event-stream", "application/json"),  # by what the caller accepts
    answers.Html: ("text/html",),
    answers.Style: ("text/css",),
    answers.Script: ("text/javascript",),
    answers.Figures: ("text/plain",),
    feed.Feed: ("text/event-stream",),
    answers.UiMessageStream: ("text/event-stream",),
}
_EVENTS: dict[Any, tuple[str, str]] = {
    answers.TurnAnswer: ("ServerSentEvent", EXAMPLE),
    feed.Feed: ("FeedEvent", FEED_EXAMPLE),
    answers.UiMessageStream: ("UiMessageChunk", UI_EXAMPLE),
}
_OF_SHAPE: dict[Any, tuple[str, ...]] = {
    answers.UiMessageStream: ("X-Vercel-AI-UI-Message-Stream",),
    answers.UiMessages: ("Link",),
}
_OF_STREAMS = (events.SessionEvent, events.SdkMessage, events.EndEvent, *feed.EVENTS.values())
_MAY_COME_AGAIN = (409, 429, 502, 503, 507)


def document(calls: Sequence[Call[Any]]) -> Json:
    """The whole document."""
    schemas = _Schemas(calls)
    paths: dict[str, Json] = {}
    for call in calls:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call, schemas)
    no_calls = {problem.__name__: _problems(problem.status, [problem]) for problem in OF_NO_CALL}
    no_calls["MethodNotAllowed"]["headers"]["Allow"] = _ref("headers", "Allow")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "session-sidecar",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.components.items())),
            "responses": no_calls,
            "parameters": PARAMETERS,
            "headers": HEADERS,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "Where the operator has set tokens.",
                }
            },
        },
    }


class _Untitled(GenerateJsonSchema):
    """Without a title for each field, which would be its name once more."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


class _Schemas:
    """The shapes of bodies and answers, each once among the components."""

    def __init__(self, calls: Iterable[Call[Any]]) -> None:
        asked = {call.asks for call in calls if call.has_body}
        answered = {shape for call in calls for shape in call.answers.values() if shape is not None}
        shapes = [*asked, *answered, *_OF_STREAMS, events.Problem]
        self._named, made = TypeAdapter.json_schemas(
            [(shape, "validation", TypeAdapter(shape)) for shape in sorted(shapes, key=str)],
            ref_template=_REF,
            schema_generator=_Untitled,
        )
        self.components: Json = {**made["$defs"], **STREAMS}

    def of(self, shape: Any) -> JsonSchemaValue:
        """A body's or an answer's schema."""
        return self._named[shape, "validation"]


def _operation(call: Call[Any], schemas: _Schemas) -> Json:
    summary, _, more = _told(call).partition("\n\n")
    operation: Json = {
        "operationId": call.handler.__name__,
        "summary": " ".join(summary.split()),
        "parameters": [*([] if call.has_body else _query(call)), *_header_parameters(call)],
        "responses": {str(status): _answer(call, status, schemas) for status in sorted(call.answers)},
    }
    if more:
        operation["description"] = more
    if call.has_body:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas.of(call.asks)}},
        }
    if call.admits == "anybody":
        operation["security"] = []
    problems = problems_of(call)
    for status in sorted({problem.status for problem in problems}):
        operation["responses"][str(status)] = _problems(status, [p for p in problems if p.status == status])
    return operation


def _told(call: Call[Any]) -> str:
    """What the handler's docstring says of the call, without its name."""
    lines = (line.strip() for line in (call.handler.__doc__ or "").strip().splitlines())
    text = "\n".join(lines).removeprefix(f"`{call.method} {call.path}`: ")
    return text[:1].upper() + text[1:]


def _query(call: Call[Any]) -> list[Json]:
    if call.asks is Nothing:
        return []
    schema = call.asks.model_json_schema(schema_generator=_Untitled)
    needed, fields = schema.get("required", ()), schema["properties"].items()
    return [
        _parameter(name, field, required=name in needed, where="path" if name in call.in_path else "query")
        for name, field in fields
    ]


def _parameter(name: str, schema: Json, *, required: bool, where: Literal["path", "query"]) -> Json:
    """A field of a query or a path: what is left out is null, but null cannot be sent."""
    about = {"description": schema["description"]} if "description" in schema else {}
    if "anyOf" in schema:
        (schema,) = (one for one in schema["anyOf"] if one != {"type": "null"})
    schema = {key: value for key, value in schema.items() if key != "description"}
    return {"name": name, "in": where, "required": required, **about, "schema": schema}


def _header_parameters(call: Call[Any]) -> list[Json]:
    names = ["X-Request-Id", *([RESOURCE_HEADER] if call.of_header else [])]
    shapes = set(call.answers.values())
    if call.has_body and shapes & {answers.TurnAnswer, answers.UiMessageStream}:
        names.append("Idempotency-Key")
    if shapes & {answers.TurnAnswer, feed.Feed}:
        names.append("Last-Event-ID")
    return [_ref("parameters", name) for name in names]


def _answer(call: Call[Any], status: int, schemas: _Schemas) -> Json:
    shape = call.answers[status]
    response: Json = {"description": HTTPStatus(status).phrase, "headers": _headers("X-Request-Id")}
    if shape is not None:
        media = _MEDIA.get(shape, ("application/json",))
        response["content"] = {kind: {"schema": schemas.of(shape)} for kind in media}
        if "text/event-stream" in media:
            name, example = _EVENTS[shape]
            response["content"]["text/event-stream"] = {"schema": _ref("schemas", name), "example": example}
            response["headers"] |= _headers("Cache-Control", "X-Accel-Buffering")
        response["headers"] |= _headers(*_OF_SHAPE.get(shape, ()))
    return response


def _problems(status: int, problems: Sequence[type[SidecarError]]) -> Json:
    """One response for all problems of a status."""
    codes = {"properties": {"code": {"enum": [problem.code for problem in problems]}, "status": {"const": status}}}
    response: Json = {
        "description": "\n".join(f"- `{problem.code}`: {title(problem)}" for problem in problems),
        "headers": _headers("X-Request-Id"),
        "content": {"application/problem+json": {"schema": {**_ref("schemas", "Problem"), **codes}}},
    }
    if status in _MAY_COME_AGAIN:
        response["headers"] |= _headers("Retry-After")
    if status == 401:
        response["headers"] |= _headers("WWW-Authenticate")
    return response


def _headers(*names: str) -> Json:
    return {name: _ref("headers", name) for name in names}


def _ref(kind: Literal["schemas", "headers", "parameters"], name: str) -> Json:
    return {"$ref": f"#/components/{kind}/{name}"}
