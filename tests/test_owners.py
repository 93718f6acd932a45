"""Whose threads a token may touch: for every call there is, and every wrong owner."""

import contextlib
import json
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from session_sidecar.api.access.tokens import TokenFile, make_token
from session_sidecar.api.http import Call
from session_sidecar.api.routes import CALLS
from tests.faults import FaultyModel
from tests.modes import KEPT
from tests.server import Sidecar, Stream, followed

pytestmark = pytest.mark.smoke

OF_ONE = [call for call in CALLS if call.admits == "token" and "resource_id" in call.asks.model_fields]
# Of one's own they begin a thread, list none, delete nothing, find no turn; of others they are refused all the same.
NO_404 = {
    "POST /v1/chat",
    "GET /v1/chat",
    "GET /v1/sessions",
    "DELETE /v1/sessions",
    "DELETE /v1/session",
    "GET /v1/events",
    "POST /v1/ai-sdk/chat",
    "GET /v1/ai-sdk/chat/{id}/stream",
}
OF_NOBODY = {"/version"}  # for every token
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat": {"message": "Hello"},
    "/v1/chat/fork": {"from_thread_id": "hers", "thread_id": "new"},
    "PATCH /v1/session": {"title": "Mine"},
    "/v1/ai-sdk/chat": {"messages": [{"role": "user", "parts": [{"type": "text", "text": "Hello"}]}]},
}


def named(call: Call[Any]) -> str:
    return f"{call.method} {call.path}"


def asked(call: Call[Any], resource: str, thread: str) -> dict[str, Any]:
    """A request for a call that is right in everything but perhaps in whose thread it is."""
    names = {"thread_id", "id"} & call.asks.model_fields.keys() - set(call.in_path)
    fields = {"resource_id": resource, **dict.fromkeys(names, thread)}
    if call.method != "GET" and call.has_body:
        fields |= BODIES.get(named(call), BODIES.get(call.path, {}))
    if call.path == "/v1/chat/fork":
        fields |= {"from_thread_id": thread, "thread_id": f"{thread}-fork"}
    return fields


class Someone:
    """A caller with a token."""

    def __init__(self, sidecar: Sidecar, token: str) -> None:
        self._sidecar = sidecar
        self._headers = {"authorization": f"Bearer {token}", "accept": "application/json"}

    async def call(self, call: Call[Any], resource: str, thread: str) -> httpx.Response:
        fields = asked(call, resource, thread)
        place: dict[str, Any] = {"json": fields} if call.has_body else {"params": fields}
        return await self.request(call.method, call.path.format(id=thread), **place)

    async def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        client, headers = self._sidecar.http, self._headers | more.pop("headers", {})
        response = await client.send(client.build_request(method, path, headers=headers, **more), stream=True)
        if path == "/v1/events" and response.is_success:  # it has no end
            await response.aclose()
        else:
            await response.aread()
        return response

    def follow(self, **query: str) -> contextlib.AbstractAsyncContextManager[Stream]:
        return followed(self._sidecar, headers=self._headers, **query)


@pytest.fixture(scope="module")
async def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A tokens file, and the tokens by what they are for."""
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    file = TokenFile(path)
    made = {
        "alice": make_token(["alice"]),
        "bob": make_token(["bob"]),
        "both": make_token(["alice", "bob"]),
        "reader": make_token(["alice"], read=True),
        "metrics": make_token([], metrics=True),
        "all": make_token(["*"]),
    }
    for text, known in made.values():
        file.add(text, known)
    return path, {name: text for name, (text, _) in made.items()}


@pytest.fixture(scope="module")
async def guarded(
    model_env: dict[str, str], tokens: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Sidecar]:
    home = tmp_path_factory.mktemp("guarded") / "home"
    async with Sidecar(home, model_env | KEPT | {"SIDECAR_TOKENS_FILE": str(tokens[0])}) as sidecar:
        sidecar.keep_secret(*tokens[1].values())
        alice = Someone(sidecar, tokens[1]["alice"])
        body = {"thread_id": "hers", "resource_id": "alice", "message": "My name is Alice"}
        assert (await alice.request("POST", "/v1/chat", json=body)).status_code == 200
        yield sidecar


@pytest.fixture
def people(guarded: Sidecar, tokens: tuple[Path, dict[str, str]], model: FaultyModel) -> dict[str, Someone]:
    return {name: Someone(guarded, token) for name, token in tokens[1].items()}


People = dict[str, Someone]


async def state(people: People) -> Any:
    """All that there is."""
    listed = (await people["all"].request("GET", "/v1/sessions", params={"include": "metadata"})).json()
    return [{k: v for k, v in session.items() if k != "metadata"} for session in listed["data"]]


def test_every_call_says_whose_it_is_about_or_is_for_everybody() -> None:
    left = {call.path for call in CALLS if call.admits == "token" and call not in OF_ONE}
    assert left <= OF_NOBODY
    assert {call.path for call in CALLS if call.admits == "anybody"} == {
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/docs",
        "/ui",
        "/ui/page.css",
        "/ui/page.js",
    }


@pytest.mark.parametrize("call", OF_ONE, ids=named)
async def test_anothers_thread_is_as_if_it_were_not_there(people: People, call: Call[Any], model: FaultyModel) -> None:
    before, requests = await state(people), len(model.requests)
    answers = [await people["bob"].call(call, "alice", thread) for thread in ("hers", "nowhere")]
    problems = [{k: v for k, v in answer.json().items() if k != "request_id"} for answer in answers]
    assert problems[0] == problems[1]
    assert (answers[0].status_code, problems[0]["code"]) == (404, "session_not_found")
    assert "Alice" not in answers[0].text
    assert (await state(people), len(model.requests)) == (before, requests)


@pytest.mark.quiet
async def test_nor_does_the_time_tell_whether_a_thread_of_others_is_there(people: People) -> None:
    (call,) = [call for call in OF_ONE if named(call) == "GET /v1/session"]
    took: dict[str, list[float]] = {"hers": [], "nowhere": []}
    for _ in range(200):
        for thread, times in took.items():
            began = time.perf_counter()
            await people["bob"].call(call, "alice", thread)
            times.append(time.perf_counter() - began)
    there, not_there = (statistics.median(times) for times in took.values())
    assert 0.8 < there / not_there < 1.25


@pytest.mark.parametrize("call", [call for call in OF_ONE if named(call) not in NO_404], ids=named)
async def test_a_thread_of_others_reads_like_one_of_ones_own_that_does_not_exist(
    people: People, call: Call[Any]
) -> None:
    answers = [await people["bob"].call(call, "alice", "hers"), await people["bob"].call(call, "bob", "nowhere")]
    problems = [{k: v for k, v in answer.json().items() if k != "request_id"} for answer in answers]
    assert problems[0] == problems[1]


@pytest.mark.parametrize("call", CALLS, ids=named)
async def test_without_a_token_there_are_probes_and_docs_alone(
    people: People, call: Call[Any], guarded: Sidecar
) -> None:
    for shown in ("", "Bearer wrong", "Basic YTpi", "Bearer"):
        header = {"authorization": shown} if shown else {}
        answer = await guarded.http.request(call.method, call.path, headers=header)
        if call.admits == "anybody":
            assert answer.status_code == 200
        else:
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("call", [call for call in CALLS if call.method != "GET"], ids=named)
async def test_a_token_that_may_only_read_changes_nothing(people: People, call: Call[Any]) -> None:
    before = await state(people)
    refused = await people["reader"].call(call, "alice", "hers")
    assert refused.status_code == 403
    assert refused.json()["code"] in ("read_only_token", "unrestricted_only")
    assert await state(people) == before


async def test_a_token_that_may_only_read_reads(people: People) -> None:
    for call in OF_ONE:
        if call.method == "GET":
            assert (await people["reader"].call(call, "alice", "hers")).status_code in (200, 204), named(call)


async def test_a_list_that_names_nobody_is_of_ones_own(people: People) -> None:
    listed = (await people["alice"].request("GET", "/v1/sessions")).json()["data"]
    assert {session["resource_id"] for session in listed} == {"alice"}
    assert (await people["bob"].request("GET", "/v1/sessions")).json()["data"] == []
    several = await people["both"].request("GET", "/v1/sessions")
    assert (several.status_code, several.json()["errors"][0]["field"]) == (422, "resource_id")
    named = await people["both"].request("GET", "/v1/sessions", params={"resource_id": "alice"})
    assert named.json()["data"] == listed
    assert len((await people["all"].request("GET", "/v1/sessions")).json()["data"]) >= len(listed)


async def test_what_happens_is_told_to_those_whose_threads_they_are(people: People) -> None:
    async with (
        people["alice"].follow() as hers,
        people["reader"].follow(resource_id="alice") as readers,
        people["bob"].follow() as his,
        people["all"].follow() as everybodys,
    ):
        streams = (hers, readers, his, everybodys)
        for stream in streams:
            await stream.until("reset")
        for title in ("Mine", "Mine again"):
            patch = {"thread_id": "hers", "resource_id": "alice", "title": title}
            assert (await people["alice"].request("PATCH", "/v1/session", json=patch)).status_code == 200
        await people["all"].request(
            "POST", "/v1/chat", json={"thread_id": "his", "resource_id": "bob", "message": "I am Bob"}
        )
        for stream in (his, everybodys):
            await stream.until("turn_ended")
        for stream in (hers, readers):
            await stream.until("titled")
            await stream.until("titled")
    assert [event.name for event in hers.events] == ["reset", "titled", "titled"]
    assert readers.events == hers.events
    assert [event.name for event in his.events] == ["reset", "created", "turn_started", "turn_ended"]
    assert [event.id for event in everybodys.events[1:]] == [event.id for event in hers.events[1:] + his.events[1:]]
    await people["all"].request("DELETE", "/v1/session", params={"thread_id": "his", "resource_id": "bob"})
    several = await people["both"].request("GET", "/v1/events")
    assert (several.status_code, several.json()["errors"][0]["field"]) == (422, "resource_id")


async def test_a_header_may_say_whose_a_chat_is_and_is_held_to_the_token(people: People) -> None:
    async def load(who: str, **headers: str) -> httpx.Response:
        return await people[who].request("GET", "/v1/ai-sdk/chat/hers", headers=headers)

    (loaded, *others) = [await load(who, **{"X-Resource-Id": "alice"}) for who in ("alice", "both", "all")]
    assert loaded.json()[0]["parts"] == [{"type": "text", "text": "My name is Alice"}]
    assert [other.json() for other in others] == [loaded.json()] * 2
    assert (await load("alice")).json() == loaded.json()  # a token for one resource says it
    assert (await load("bob", **{"X-Resource-Id": "alice"})).json()["code"] == "session_not_found"
    for who, field in (("both", "resource_id"), ("all", "X-Resource-Id")):
        assert (await load(who)).json()["errors"][0]["field"] == field
    assert (await load("all", **{"X-Resource-Id": "x" * 257})).json()["errors"][0]["field"] == "X-Resource-Id"
    differing = await people["all"].request(
        "GET", "/v1/ai-sdk/chat/hers", headers={"X-Resource-Id": "alice"}, params={"resource_id": "bob"}
    )
    assert differing.json()["errors"][0]["field"] == "X-Resource-Id"


async def test_only_an_unrestricted_token_adopts(people: People) -> None:
    session = (await state(people))[0]["sdk_session_id"]
    body = {"thread_id": "stolen", "resource_id": "bob", "sdk_session_id": session}
    refused = await people["bob"].request("PUT", "/v1/session", json=body)
    assert (refused.status_code, refused.json()["code"]) == (403, "unrestricted_only")
    taken = await people["all"].request("PUT", "/v1/session", json=body)
    assert taken.json()["code"] == "session_taken"


async def test_a_token_for_metrics_is_for_nothing_else(people: People) -> None:
    for call in OF_ONE:
        refused = await people["metrics"].call(call, "alice", "hers")
        assert (refused.status_code, refused.json()["code"]) == (404, "session_not_found"), named(call)
    assert (await people["metrics"].request("GET", "/v1/sessions")).status_code == 422


async def test_metrics_are_for_their_own_token_and_for_unrestricted_ones(people: People) -> None:
    for name, status in (("metrics", 200), ("all", 200), ("alice", 403), ("reader", 403)):
        assert (await people[name].request("GET", "/metrics")).status_code == status, name


async def test_the_log_names_the_token_and_never_shows_it(
    people: People, guarded: Sidecar, tokens: tuple[Path, dict[str, str]]
) -> None:
    await people["alice"].request("GET", "/v1/sessions")
    names = {known.name for known in TokenFile(tokens[0]).read().values()}
    lines = [json.loads(line) for line in guarded.log]
    assert {line["token"] for line in lines if "token" in line} <= names
    assert any("token" in line for line in lines)
    assert not [token for token in tokens[1].values() for line in guarded.log if token in line]
