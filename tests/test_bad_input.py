"""Bad input is told what is wrong with it, changes nothing and starts nothing."""

import asyncio
import base64
import contextlib
import json
from typing import Any

import httpx
import pytest

from tests.faults import FaultyModel
from tests.server import SECONDS, Sidecar

pytestmark = pytest.mark.smoke

KEY = {"thread_id": "bad", "resource_id": "alice"}
CHAT = {**KEY, "message": "Hello"}
FORK = {**KEY, "from_thread_id": "parent"}
JSON = {"content-type": "application/json"}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Tea."}}


@pytest.fixture(autouse=True)
async def nothing_started(cold: Sidecar, model: FaultyModel) -> Any:
    """After each of these, no process was started and no mapping made."""
    yield
    assert cold.cli_processes() == []
    assert model.requests == []
    listed = await cold.http.get("/v1/sessions", params={"resource_id": "alice", "thread_id_prefix": "bad"})
    assert listed.json()["data"] == []


def refused(response: httpx.Response, status: int, code: str, field: str | None = None) -> None:
    problem = response.json()
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert response.headers["content-type"] == "application/problem+json"
    assert set(problem) >= {"type", "title", "status", "detail", "code", "request_id"}
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["status"] == status
    if field is not None:
        assert field in [error["field"] for error in problem["errors"]]
        assert all(error["message"] for error in problem["errors"])


@pytest.mark.parametrize("path", ["/v1/chat", "/v1/chat/fork"])
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"thread_id": None}, "thread_id"),
        ({"thread_id": ""}, "thread_id"),
        ({"thread_id": "x" * 257}, "thread_id"),
        ({"thread_id": "bad\n"}, "thread_id"),
        ({"thread_id": "bad\0"}, "thread_id"),
        ({"thread_id": "bad\x7f"}, "thread_id"),
        ({"thread_id": "bad\ufffd"}, "thread_id"),
        ({"thread_id": "bad\ud800x"}, "thread_id"),
        ({"thread_id": 5}, "thread_id"),
        ({"resource_id": ["alice"]}, "resource_id"),
        ({"message": ""}, "message"),
        ({"message": " \n\t"}, "message"),
        ({"message": 5}, "message"),
        ({"message": []}, "message"),
        ({"message": "\ud800"}, "message"),
        ({"message": [{"type": "text", "text": " "}]}, "message.0.text"),
        ({"message": [{"type": "tool_result"}]}, "message.0"),
        ({"message": [{"type": "image", "source": {"type": "base64", "data": 5}}]}, "message.0.source.data"),
        ({"message": [{**DOCUMENT, "citations": {"enabled": "yes"}}]}, "message.0.citations.enabled"),
        ({"agent": "nobody"}, "agent"),
        ({"agent": ""}, "agent"),
        ({"multitask_strategy": "rollback"}, "multitask_strategy"),
        ({"on_disconnect": "panic"}, "on_disconnect"),
        ({"if_missing": "guess"}, "if_missing"),
        ({"options": {"tools": ["Bash"]}}, "options"),
        ({"resume": "something"}, "resume"),
    ],
)
async def test_a_wrong_field_is_named(cold: Sidecar, path: str, change: dict[str, Any], field: str) -> None:
    body = {**FORK, **CHAT} if path.endswith("fork") else CHAT
    code = "unknown_agent" if change == {"agent": "nobody"} else "invalid_request"
    response = await cold.http.post(path, content=json.dumps({**body, **change}), headers=JSON)
    refused(response, 422, code, field)


@pytest.mark.parametrize("missing", ["thread_id", "resource_id", "message"])
async def test_a_missing_field_is_named(cold: Sidecar, missing: str) -> None:
    body = {name: value for name, value in CHAT.items() if name != missing}
    refused(await cold.http.post("/v1/chat", json=body), 422, "invalid_request", missing)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b'{"thread_id": "bad", }', 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b'{"thread_id": NaN}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"message": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, "invalid_json"),
        (b"[]", 422, "invalid_request"),
        (b'"hello"', 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(cold: Sidecar, content: bytes, status: int, code: str) -> None:
    refused(await cold.http.post("/v1/chat", content=content, headers=JSON), status, code)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
async def test_only_json_is_taken(cold: Sidecar, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    response = await cold.http.post("/v1/chat", content=json.dumps(CHAT), headers=headers)
    refused(response, 415, "unsupported_media_type")


async def test_a_message_over_the_limit_is_refused(cold: Sidecar) -> None:
    limit = 4 * 2**20
    refused(await cold.http.post("/v1/chat", json={**CHAT, "message": "x" * (limit + 1)}), 413, "message_too_large")
    blocks = [{"type": "text", "text": "ü" * (limit // 2 + 1)}]
    refused(await cold.http.post("/v1/chat", json={**CHAT, "message": blocks}), 413, "message_too_large")


@pytest.mark.long
async def test_an_endless_body_is_not_read_to_its_end(cold: Sidecar) -> None:
    url = cold.http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(f"POST /v1/chat HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n".encode())
    writer.write(b"Transfer-Encoding: chunked\r\n\r\n")

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"100000\r\n" + b" " * 2**20 + b"\r\n")
                await writer.drain()

    sending = asyncio.create_task(send())
    async with asyncio.timeout(SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
        await sending  # the server has hung up
    writer.close()
    assert head.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"resource_id": "alice"}, "thread_id"),
        ({**KEY, "surprise": "1"}, "surprise"),
        ({**KEY, "thread_id": ["bad", "worse"]}, "thread_id"),
        ({**KEY, "thread_id": "bad\0"}, "thread_id"),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/session"), ("DELETE", "/v1/session"), ("GET", "/v1/chat")])
async def test_a_wrong_parameter_is_named(
    cold: Sidecar, method: str, path: str, query: dict[str, Any], field: str
) -> None:
    refused(await cold.http.request(method, path, params=query), 422, "invalid_request", field)


async def test_bytes_that_are_no_utf_8_are_no_id(cold: Sidecar) -> None:
    response = await cold.http.get("/v1/session?thread_id=bad%FF&resource_id=alice")
    refused(response, 422, "invalid_request", "thread_id")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "201"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"order": "random"}, "order"),
        ({"after": "anything"}, "after"),
        ({"after": "WzEuNSwieCJd"}, "after"),
        ({"after": "Wy0xLCJ4Il0"}, "after"),
    ],
)
async def test_a_wrong_page_is_refused(cold: Sidecar, query: dict[str, str], field: str) -> None:
    params = {"resource_id": "alice", **query}
    refused(await cold.http.get("/v1/sessions", params=params), 422, "invalid_request", field)


@pytest.mark.parametrize(
    "position",
    [
        "[" * 20_000,
        "[1," + "[" * 10_000 + "]" * 10_000 + ',"alice"]',
        "[1" + "0" * 5_000 + ',"t","alice"]',
        '[9223372036854775808,"t","alice"]',
        '[true,"t","alice"]',
        '[1.0,"t","alice"]',
        '[1,"\\ud800","alice"]',
        '[1,"\\u0000","alice"]',
        '[1,"","alice"]',
        '[1,"t"]',
    ],
)
async def test_a_cursor_that_no_list_gave_is_refused(cold: Sidecar, position: str) -> None:
    cursor = base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")
    refused(await cold.http.get("/v1/sessions", params={"after": cursor}), 422, "invalid_request", "after")


async def test_paths_and_methods_that_are_none_are_told(cold: Sidecar) -> None:
    refused(await cold.http.get("/v1/nothing"), 404, "not_found")
    response = await cold.http.put("/v1/chat", json=CHAT)
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET, HEAD, POST"


async def test_a_thread_that_is_not_there_is_told(cold: Sidecar) -> None:
    refused(await cold.session("bad"), 404, "session_not_found")
    refused(await cold.http.post("/v1/chat/interrupt", json=KEY), 404, "session_not_found")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "::1:8000"])
async def test_a_name_that_is_not_ours_is_not_served(cold: Sidecar, host: str) -> None:
    refused(await cold.http.get("/version", headers={"host": host}), 421, "forbidden_host")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "["])
async def test_a_page_of_another_origin_may_not_call(cold: Sidecar, origin: str) -> None:
    refused(await cold.http.post("/v1/chat", json=CHAT, headers={"origin": origin}), 403, "forbidden_origin")


@pytest.mark.parametrize(("given", "kept"), [("abc-123", True), ("a b", False), ("x" * 129, False), ("", False)])
async def test_every_response_has_a_request_id_the_callers_if_it_is_sane(cold: Sidecar, given: str, kept: bool) -> None:
    response = await cold.http.get("/healthz", headers={"x-request-id": given})
    assert (response.headers["x-request-id"] == given) is kept
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("name", ["a/b", "a%2Fb", "../x", "@:?&=#", "😀", "e\u0301", "é", "a" * 256, " "])
async def test_any_other_id_is_taken_byte_for_byte(cold: Sidecar, name: str) -> None:
    response = await cold.session(name)
    refused(response, 404, "session_not_found")
