"""The OpenAPI document is valid, says what the table of calls says, and is what a running sidecar does."""

import ast
import asyncio
import copy
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from starlette.requests import Request

from session_sidecar import errors
from session_sidecar.api.access.admission import PROBES
from session_sidecar.api.documents.docs import Docs, page
from session_sidecar.api.documents.openapi import document
from session_sidecar.api.documents.problems import OF_NO_CALL, problems_of
from session_sidecar.api.documents.problems import page as list_of_problems
from session_sidecar.api.http import Call, Incoming, Nothing
from session_sidecar.api.routes import CALLS
from session_sidecar.errors import SidecarError
from tests.faults import FaultyModel, hold
from tests.modes import COLD
from tests.server import SECONDS, Sidecar

Json = dict[str, Any]
ROOT = Path(__file__).parent.parent
PROBLEM = "application/problem+json"
DOCUMENT = json.loads(json.dumps(document(CALLS)))


def every(node: Any) -> Iterator[Json]:
    """A JSON value's objects, those in others too."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from every(child)


def closed(described: Json) -> Json:
    """The document, with no member in any answer that it does not name: what callers may rely on is all there is."""
    described = copy.deepcopy(described)
    schemas = described["components"]["schemas"]
    for name in schemas.keys() - {"SdkMessage"}:
        for schema in every(schemas[name]):
            if schema.get("type") == "object" and "properties" in schema:
                schema["additionalProperties"] = False
    return described


def codes(response: Json) -> set[str]:
    problems = response.get("content", {}).get(PROBLEM)
    return set(problems["schema"]["properties"]["code"]["enum"]) if problems else set()


def test_it_is_valid() -> None:
    schemathesis.openapi.from_dict(copy.deepcopy(DOCUMENT)).validate()
    names = [method["operationId"] for path in DOCUMENT["paths"].values() for method in path.values()]
    assert len(set(names)) == len(names)
    for node in every(DOCUMENT):
        if "$ref" in node:
            there = DOCUMENT
            for part in node["$ref"].removeprefix("#/").split("/"):
                there = there[part]


def test_every_call_with_its_statuses_and_problems_is_in_it_and_nothing_else() -> None:
    described = {(method.upper(), path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert described == {(call.method, call.path) for call in CALLS}
    for call in CALLS:
        responses = DOCUMENT["paths"][call.path][call.method.lower()]["responses"]
        problems = problems_of(call)
        assert set(call.problems) <= set(problems)
        assert {int(status) for status in responses} == {*call.answers, *(problem.status for problem in problems)}
        for status, response in responses.items():
            assert codes(response) == {problem.code for problem in problems if problem.status == int(status)}
            assert (call.answers.get(int(status)) is not None) == bool(set(response.get("content", {})) - {PROBLEM})
            assert "X-Request-Id" in response["headers"]


def test_every_problem_that_the_sidecar_has_is_some_calls() -> None:
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SidecarError)}
    told = {problem for call in CALLS for problem in problems_of(call)} | set(OF_NO_CALL)
    assert told == defined - {SidecarError}
    assert len({problem.code for problem in told}) == len(told)


def test_what_a_field_of_a_call_may_be_is_told_of_every_one() -> None:
    for call in CALLS:
        operation = DOCUMENT["paths"][call.path][call.method.lower()]
        if call.has_body:
            schema = DOCUMENT["components"]["schemas"][call.asks.__name__]
            named, required = set(schema["properties"]), set(schema["required"])
        else:
            query = [one for one in operation["parameters"] if one.get("in") in {"query", "path"}]
            assert [one["name"] for one in query if one["in"] == "path"] == call.in_path
            named, required = {one["name"] for one in query}, {one["name"] for one in query if one["required"]}
        assert named == set(call.asks.model_fields)
        assert required == {name for name, field in call.asks.model_fields.items() if field.is_required()}


def test_whatever_may_come_with_a_retry_after_says_so() -> None:
    raised = set()
    for path in (ROOT / "session_sidecar").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and any(keyword.arg == "retry_after" for keyword in node.keywords):
                raised.add(getattr(errors, ast.unparse(node.func), None))
    statuses = {kind.status for kind in raised if kind is not None}
    assert statuses >= {409, 502, 503}
    for operation in (one for path in DOCUMENT["paths"].values() for one in path.values()):
        for status, response in operation["responses"].items():
            assert ("Retry-After" in response["headers"]) == (int(status) in statuses), (operation, status)


def test_the_list_of_problems_is_that_of_the_calls() -> None:
    command = "python -m session_sidecar.api.documents.problems > docs/problems.md"
    assert (ROOT / "docs" / "problems.md").read_text() == list_of_problems(CALLS), f"write it anew: {command}"


async def test_the_running_sidecar_answers_as_it_is_documented(
    a_sidecar: Callable[..., Sidecar], model: FaultyModel, thread: str, another_thread: str
) -> None:
    key = {"thread_id": thread, "resource_id": "alice"}
    other = {"thread_id": another_thread, "resource_id": "alice"}
    chat = {**key, "message": "Hello"}
    fork = {**other, "from_thread_id": thread, "message": [{"type": "text", "text": "Another way"}]}
    seen: set[tuple[str, str, int]] = set()

    async def call(method: str, path: str, asked: Json, status: int = 200, **headers: str) -> httpx.Response:
        body: Json = {"json": asked} if method in ("POST", "PUT", "PATCH") else {"params": asked}
        response = await sidecar.http.request(method, path.format(id=thread), headers=headers, **body)
        assert response.status_code == status, response.text
        schema[path][method].validate_response(response)
        seen.add((method, path, status))
        return response

    async with a_sidecar() as sidecar:
        served = (await sidecar.http.get("/openapi.json")).json()
        assert served == DOCUMENT
        schema = schemathesis.openapi.from_dict(closed(served))
        for path, asked in (("/v1/chat", chat), ("/v1/chat/fork", fork)):
            streamed = await call("POST", path, asked)
            assert streamed.headers["content-type"].startswith("text/event-stream")
            *_, last = re.findall("^id: (.*)$", streamed.text, re.M)
            await call("POST", path, asked, 204, **{"last-event-id": last})
        await call("POST", "/v1/chat", chat, accept="application/json")
        await call("POST", "/v1/chat/fork", {**key, "thread_id": "a copy", "from_thread_id": thread}, 201)
        await call("GET", "/v1/chat", key)
        await call("GET", "/v1/chat", {**key, "thread_id": "nobody's"}, 204)
        await call("POST", "/v1/chat/interrupt", key)
        of_alice: Json = {"x-resource-id": "alice"}
        shown = (await call("GET", "/v1/ai-sdk/chat/{id}", {"limit": 1}, **of_alice)).json()
        shown.append({"role": "user", "parts": [{"type": "text", "text": "Once more"}]})
        await call("POST", "/v1/ai-sdk/chat", {"id": thread, "messages": shown}, **of_alice)
        await call("GET", "/v1/ai-sdk/chat/{id}/stream", {}, 204, **of_alice)
        model.script(hold(1))
        async with sidecar.stream(thread, "Slowly") as stream:
            await stream.until_text()
            resumed = asyncio.create_task(call("GET", "/v1/ai-sdk/chat/{id}/stream", {}, **of_alice))
            await sidecar.settle()
            model.release()
            await resumed
        described = (await call("GET", "/v1/session", key)).json()
        assert described["metadata"]["usage"]
        assert described["metadata"]["last_message"]
        await call("GET", "/v1/sessions", {"resource_id": "alice", "include": "metadata"})
        await call("GET", "/v1/session/messages", key)
        family = (await call("GET", "/v1/session/branches", key)).json()
        assert family["root"]["children"][0]["branch_point"]
        await call("PATCH", "/v1/session", {**key, "title": "Trip"})
        await call("POST", "/v1/session/warm", key, 202)
        adoption = {**key, "sdk_session_id": described["sdk_session_id"]}
        await call("PUT", "/v1/session", adoption)
        await call("DELETE", "/v1/session", key, 204)
        await call("PUT", "/v1/session", adoption, 201)
        await call("DELETE", "/v1/sessions", {"resource_id": "alice"})
        for path in ("/healthz", "/readyz", "/version", "/metrics", "/openapi.json", "/docs"):
            await call("GET", path, {})
        for path in ("/ui", "/ui/page.css", "/ui/page.js"):
            first = await call("GET", path, {})
            await call("GET", path, {}, 304, **{"if-none-match": first.headers["etag"]})
        path, query = "/v1/events", {"resource_id": "alice"}
        request = sidecar.http.build_request("GET", path, params=query, headers={"x-request-id": "1"})
        response = await sidecar.http.send(request, stream=True)
        await sidecar.stop(signal.SIGTERM)  # it has no other end
        assert "event: reset" in (await response.aread()).decode()
        schema[path]["GET"].validate_response(response)
        seen.add(("GET", path, response.status_code))
        assert seen == {(call.method, call.path, status) for call in CALLS for status in call.answers}


async def test_a_turn_that_fails_ends_as_it_is_documented(sidecar: Sidecar, thread: str) -> None:
    key = {"thread_id": thread, "resource_id": "alice", "message": "[[fail 400]]"}
    response = await sidecar.http.post("/v1/chat", json=key)
    assert '"code":"api_error"' in response.text
    schemathesis.openapi.from_dict(closed(DOCUMENT))["/v1/chat"]["POST"].validate_response(response)


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """A CLI, with an agents.toml beside it, that puts a line into `starts` for each start."""
    import claude_agent_sdk  # noqa: PLC0415

    cli = tmp_path / "claude"
    cli.write_text(
        f'#!/bin/sh\necho started >>{tmp_path}/starts\nexec {claude_agent_sdk.__path__[0]}/_bundled/claude "$@"\n'
    )
    cli.chmod(0o700)
    cli.with_name("agents.toml").write_text(f'[default]\ncli_path = "{cli}"\n')
    return cli


@pytest.mark.long
async def test_whatever_is_sent_is_answered_as_documented_and_bad_input_starts_nothing(
    tmp_path: Path, counted: Path
) -> None:
    starts = counted.with_name("starts")
    offline = {**COLD, "ANTHROPIC_API_KEY": "", "ANTHROPIC_BASE_URL": "", "HOME": str(tmp_path)}
    options = ("--model", "offline", "--agents", str(counted.with_name("agents.toml")))
    async with Sidecar(tmp_path / "home", offline, *options) as sidecar:
        await sidecar.say("t1", "Hello")  # the thread of the document's examples
        await sidecar.http.get("/version")
        session, started = await sidecar.session_id("t1"), starts.read_text()
        before = len(sidecar.logged("request"))

        command = Path(sys.executable).with_name("schemathesis")
        config = ("--no-color", "--config-file", ROOT / "tests" / "schemathesis.toml")
        process = await asyncio.create_subprocess_exec(
            command, *config, "run", f"{sidecar.http.base_url}/openapi.json",
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(6 * SECONDS):
            told, _ = await process.communicate()
        assert process.returncode == 0, told.decode()

        answered = sidecar.logged("request")[before:]
        statuses = {(line["method"], line["path"], line["status"]) for line in answered}
        assert not [answer for answer in statuses if answer[2] >= 500]
        logged = {(call.method, call.path.format(id="t1")) for call in CALLS if call.path not in (*PROBES, "/metrics")}
        assert logged <= {(method, path) for method, path, _ in statuses}
        assert {status for _, _, status in statuses} >= {200, 202, 204, 400, 404, 405, 409, 410, 415, 422}
        assert starts.read_text() == started
        assert len(sidecar.logged("turn")) == 1
        (mapping,) = (await sidecar.http.get("/v1/sessions")).json()["data"]
        assert (mapping["thread_id"], mapping["sdk_session_id"]) == ("t1", session)


def test_the_page_shows_every_call_and_needs_nothing_but_itself() -> None:
    text, policy = page(DOCUMENT)
    for call in CALLS:
        assert f"<h2><b>{call.method}</b> {call.path}</h2>" in text
    for name in DOCUMENT["components"]["schemas"]:
        assert f'<section id="{name}">' in text
    targets = set(re.findall(r'href="#([^"]+)"', text))
    assert targets <= set(re.findall(r'id="([^"]+)"', text))
    assert not re.search(r"<script|<link|<img|\bon\w+=|style=|https?:|url\(", text)
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-\S+'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        policy,
    )


def test_the_page_is_text_whatever_the_document_says() -> None:
    described = copy.deepcopy(DOCUMENT)
    described["paths"]["/healthz"]["get"]["summary"] = "<script>alert(`1`)</script> & so on"
    text, _ = page(described)
    assert "&lt;script&gt;alert(<code>1</code>)&lt;/script&gt; &amp; so on" in text


async def test_it_is_made_once_and_not_on_each_request() -> None:
    looks: list[None] = []

    def calls() -> tuple[Call[Any], ...]:
        looks.append(None)
        return CALLS

    docs, asked = Docs(calls), Incoming(Request({"type": "http"}), Nothing())
    for _ in range(3):
        await docs.openapi(asked)
        await docs.page(asked)
    assert len(looks) == 1
