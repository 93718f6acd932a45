"""The stand-in for the Messages API and its faults, over real HTTP."""

import asyncio
import json
import logging
import signal
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from session_sidecar.offline import OfflineModel
from tests.faults import FaultyModel, burst, cut, fail, hold, silent, think, tool, tools

Json = dict[str, Any]


def user(*content: str | Json) -> Json:
    """A user turn: one plain string, or content blocks of which strings are text."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def assistant(text: str) -> Json:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def request(*messages: Json, stream: bool = False) -> Json:
    return {"model": "claude-test", "max_tokens": 100, "stream": stream, "messages": list(messages)}


def events(text: str) -> list[Json]:
    """The data of each server-sent event, after a look at its framing."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event: Json = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def deltas(text: str) -> list[str]:
    return [event["delta"]["text"] for event in events(text) if event["type"] == "content_block_delta"]


class Api:
    """A client of one model."""

    def __init__(self, model: OfflineModel, client: httpx.AsyncClient) -> None:
        self.model = model
        self.client = client

    async def post(self, body: Json, path: str = "/v1/messages") -> httpx.Response:
        return await self.client.post(self.model.url + path, json=body)

    async def says(self, *messages: Json) -> str:
        response = await self.post(request(*messages))
        text: str = response.raise_for_status().json()["content"][0]["text"]
        return text


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
        yield client


@pytest.fixture
async def api(client: httpx.AsyncClient) -> AsyncIterator[Api]:
    async with OfflineModel() as model:
        yield Api(model, client)


@pytest.fixture
async def faulty(client: httpx.AsyncClient) -> AsyncIterator[tuple[FaultyModel, Api]]:
    async with FaultyModel() as model:
        yield model, Api(model, client)


class TestWhatItSays:
    async def test_one_thing_is_quoted(self, api: Api) -> None:
        assert await api.says(user("My name is Ada")) == "You have said 1 thing: My name is Ada"

    async def test_of_several_things_the_first_and_the_last_are_quoted(self, api: Api) -> None:
        said = await api.says(user("one"), assistant("1"), user("two"), assistant("2"), user("What did I say first?"))
        assert said == "You have said 3 things. First: one; last: What did I say first?"

    async def test_eighty_characters_are_quoted_whole_and_longer_prompts_shortened(self, api: Api) -> None:
        assert await api.says(user("x" * 80)) == "You have said 1 thing: " + "x" * 80
        assert await api.says(user("x" * 81)) == "You have said 1 thing: " + "x" * 79 + "…"

    async def test_the_clis_bookkeeping_is_nothing_that_the_person_said(self, api: Api) -> None:
        said = await api.says(
            {"role": "system", "content": "# Environment"},
            user("<system-reminder>\nToday is Monday.\n</system-reminder>", "first"),
            {"role": "system", "content": [{"type": "text", "text": "more"}]},
            assistant("par"),
            user("[Request interrupted by user]"),
            user({"type": "tool_result", "tool_use_id": "t", "content": "files"}),
            user(
                {"type": "tool_result", "tool_use_id": "t", "content": "no"},
                "[Request interrupted by user for tool use]",
            ),
            user("[Request interrupted by user]\n", "second"),
        )
        assert said == "You have said 2 things. First: first; last: second"

    async def test_a_prompt_that_only_mentions_the_bookkeeping_counts(self, api: Api) -> None:
        prompt = "Why <system-reminder>?</system-reminder> and [Request interrupted by user]?"
        assert await api.says(user(prompt)) == f"You have said 1 thing: {prompt}"

    async def test_the_blocks_of_one_prompt_are_one_thing(self, api: Api) -> None:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
        assert (
            await api.says(user("look:", image, "[Image: source: /tmp/1.png]"))
            == "You have said 1 thing: look: [image]"
        )

    async def test_prompts_that_got_no_answer_count_though_the_cli_sends_them_in_one_message(self, api: Api) -> None:
        said = await api.says(user("first\n", "[Request interrupted by user]\n", "second\n", "third\n"))
        assert said == "You have said 3 things. First: first; last: third\n"

    async def test_nothing_said_is_answered_too(self, api: Api) -> None:
        assert await api.says(assistant("hello?")) == "You have said nothing yet."


class TestWhatItDoesWhenAsked:
    @pytest.mark.long
    async def test_a_slow_answer_takes_as_long_as_was_wished_and_comes_all_the_time(self, api: Api) -> None:
        loop = asyncio.get_running_loop()
        body, began, came = request(user("Tell me [[slow 1]]"), stream=True), loop.time(), 0
        async with api.client.stream("POST", f"{api.model.url}/v1/messages", json=body) as response:
            async for text in response.aiter_text():
                came += "content_block_delta" in text
        assert 1 <= loop.time() - began < 10
        assert came >= 4

    async def test_it_thinks_before_the_answer(self, api: Api) -> None:
        whole = (await api.post(request(user("Why? [[think]]")))).json()["content"]
        assert [block["type"] for block in whole] == ["thinking", "text"]
        assert all((whole[0]["thinking"], whole[0]["signature"]))
        assert whole[1]["text"].startswith("You have said 1 thing: Why?")

    @pytest.mark.parametrize(
        ("there", "called"), [(["Read", "Bash"], "Bash"), (["Glob", "Bash"], "Bash"), (["Glob"], "Glob")]
    )
    async def test_it_uses_a_tool_that_the_agent_has_once(self, api: Api, there: list[str], called: str) -> None:
        tools = [{"name": name, "input_schema": {}} for name in there]
        asked = user("Show me [[tool]]")
        body = {**request(asked), "tools": tools}
        reply = (await api.post(body)).json()
        (call,) = reply["content"]
        assert (reply["stop_reason"], call["type"], call["name"]) == ("tool_use", "tool_use", called)
        result = user({"type": "tool_result", "tool_use_id": call["id"], "content": "Hello"})
        said = [asked, {"role": "assistant", "content": [call]}, result]
        after = (await api.post({**request(*said), "tools": tools})).json()
        assert after["content"][0]["text"].startswith("You have said 1 thing: Show me")

    async def test_an_agent_without_tools_is_told_so(self, api: Api) -> None:
        assert "neither Bash nor Glob" in await api.says(user("Show me [[tool]]"))

    async def test_only_the_newest_prompt_counts(self, api: Api) -> None:
        said = [user("[[think]] [[slow 9]]"), assistant("a"), user("And now?")]
        (block,) = (await api.post(request(*said))).json()["content"]
        assert block["text"] == "You have said 2 things. First: [[think]] [[slow 9]]; last: And now?"


class TestTheApi:
    async def test_a_stream_has_the_apis_events_in_order_a_word_each(self, api: Api) -> None:
        response = await api.post(request(user("a b"), stream=True))
        assert response.headers["content-type"].startswith("text/event-stream")
        assert [event["type"] for event in events(response.text)] == [
            "message_start",
            "content_block_start",
            *["content_block_delta"] * 7,
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        assert deltas(response.text) == ["You ", "have ", "said ", "1 ", "thing: ", "a ", "b"]

    async def test_usage_is_counted_and_the_answer_has_a_reason_to_stop(self, api: Api) -> None:
        start, *_, delta, _ = events((await api.post(request(user("a b"), stream=True))).text)
        assert (start["message"]["usage"]["input_tokens"], start["message"]["usage"]["output_tokens"]) == (2, 1)
        assert (start["message"]["model"], start["message"]["stop_reason"]) == ("claude-test", None)
        assert (delta["delta"]["stop_reason"], delta["delta"]["stop_sequence"]) == ("end_turn", None)
        assert (delta["usage"]["input_tokens"], delta["usage"]["output_tokens"]) == (2, 7)

    async def test_an_answer_in_one_piece_says_the_same(self, api: Api) -> None:
        whole = (await api.post(request(user("a b")))).json()
        streamed = (await api.post(request(user("a b"), stream=True))).text
        assert whole["content"] == [{"type": "text", "text": "".join(deltas(streamed)), "citations": None}]
        assert (whole["stop_reason"], whole["usage"]["output_tokens"]) == ("end_turn", 7)

    async def test_no_two_messages_have_the_same_id(self, api: Api) -> None:
        ids = {(await api.post(request(user("a")))).json()["id"] for _ in range(3)}
        assert len(ids) == 3

    async def test_tokens_are_counted(self, api: Api) -> None:
        response = await api.post(request(user("one two three")), "/v1/messages/count_tokens")
        assert response.json() == {"input_tokens": 3}

    @pytest.mark.parametrize("method", ["HEAD", "GET"])
    async def test_it_says_that_it_is_there(self, api: Api, method: str) -> None:
        assert (await api.client.request(method, api.model.url)).status_code == 200

    @pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"messages": [{"role": "user", "content": 1}]}'])
    @pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
    async def test_what_is_no_request_gets_the_apis_error(self, api: Api, body: bytes, path: str) -> None:
        response = await api.client.post(api.model.url + path, content=body)
        assert response.status_code == 400
        assert (response.json()["type"], response.json()["error"]["type"]) == ("error", "invalid_request_error")


class TestTheServer:
    async def test_it_listens_on_loopback_and_leaves_nothing_behind(self, client: httpx.AsyncClient) -> None:
        before = asyncio.all_tasks()
        async with OfflineModel() as model:
            assert model.url.startswith("http://127.0.0.1:")
            await client.get(model.url)
            url = model.url
        assert asyncio.all_tasks() == before
        with pytest.raises(httpx.ConnectError):
            await client.get(url)

    async def test_it_leaves_signals_and_the_loggers_of_the_other_server_alone(self, client: httpx.AsyncClient) -> None:
        def state() -> list[object]:
            loggers = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error", "uvicorn.access")]
            handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            return [*handlers, *((log.level, list(log.handlers), log.propagate) for log in loggers)]

        before = state()
        async with OfflineModel() as model:
            await client.get(model.url)
            assert state() == before

    async def test_its_requests_are_in_no_access_log(self, api: Api, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        await api.post(request(user("secret")))
        assert not [record for record in caplog.records if record.name.startswith("uvicorn")]

    async def test_it_cuts_open_streams_when_it_stops(self, client: httpx.AsyncClient) -> None:
        model = FaultyModel()
        async with model:
            model.script(hold(1))
            asking = asyncio.create_task(Api(model, client).post(request(user("a"), stream=True)))
            await (await model.requested()).holding()
        with pytest.raises(httpx.TransportError):
            await asking


class TestFaults:
    @pytest.mark.parametrize("status", [400, 401, 413, 429, 500, 529])
    async def test_an_error_has_the_apis_shape(self, faulty: tuple[FaultyModel, Api], status: int) -> None:
        model, api = faulty
        model.script(fail(status, retry_after=7))
        response = await api.post(request(user("a"), stream=True))
        body = response.json()
        assert response.status_code == status
        assert body["type"] == "error"
        assert body["request_id"] == response.headers["request-id"]
        assert body["error"]["type"].endswith("_error") or body["error"]["type"] == "request_too_large"
        assert response.headers["retry-after"] == "7"

    async def test_the_script_comes_first_then_the_prompts_marker_then_the_default(
        self, faulty: tuple[FaultyModel, Api]
    ) -> None:
        model, api = faulty
        model.script(fail(500), fail(429))
        model.default = fail(401)
        marked = request(user("[[hold]] failed\n", "please [[fail 529 3]]"), stream=True)
        statuses = [(await api.post(body)).status_code for body in (marked, marked, marked, request(user("plain")))]
        assert statuses == [500, 429, 529, 401]

    async def test_requests_are_kept_with_their_headers(self, faulty: tuple[FaultyModel, Api]) -> None:
        model, api = faulty
        await api.client.post(model.url + "/v1/messages", json=request(user("a")), headers={"x-api-key": "k"})
        seen = await model.requested()
        assert (seen.prompts, seen.body["model"], seen.headers["x-api-key"]) == (["a"], "claude-test", "k")

    async def test_a_held_answer_waits_for_its_release(self, faulty: tuple[FaultyModel, Api]) -> None:
        model, api = faulty
        async with api.client.stream(
            "POST", model.url + "/v1/messages", json=request(user("[[hold 3]]"), stream=True)
        ) as response:
            held = await model.requested()
            await held.holding()
            text, chunks = "", response.aiter_text()
            while len(text.split("content_block_delta\n")) < 4:
                text += await anext(chunks)
            assert await api.says(user("meanwhile")) == "You have said 1 thing: meanwhile"
            assert (deltas(text), held.sent) == (["You ", "have ", "said "], 3)
            model.release()
            text += "".join([chunk async for chunk in chunks])
        assert deltas(text)[3:] == ["1 ", "thing: ", "[[hold ", "3]]"]

    async def test_a_client_that_leaves_a_held_answer_is_noticed(self, faulty: tuple[FaultyModel, Api]) -> None:
        model, api = faulty
        model.script(hold(0), silent())
        for number in (1, 2):
            asking = asyncio.create_task(api.post(request(user("a"), stream=True)))
            await model.requested(number)
            asking.cancel()
            await model.gone(number)

    async def test_a_complete_answer_is_nobodys_leaving(
        self, faulty: tuple[FaultyModel, Api], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, api = faulty
        await api.post(request(user("a"), stream=True))
        monkeypatch.setattr("tests.faults.SECONDS", 0.05)
        with pytest.raises(AssertionError, match="still there"):
            await model.gone()

    async def test_a_cut_comes_after_its_deltas(self, faulty: tuple[FaultyModel, Api]) -> None:
        model, api = faulty
        model.script(cut(2))
        text = ""

        async def read() -> None:
            nonlocal text
            body = request(user("a"), stream=True)
            async with api.client.stream("POST", model.url + "/v1/messages", json=body) as response:
                async for chunk in response.aiter_text():
                    text += chunk

        with pytest.raises(httpx.RemoteProtocolError):
            await read()
        assert deltas(text) == ["You ", "have "]

    async def test_hung_up_it_refuses_and_then_answers_on_the_same_port(self, faulty: tuple[FaultyModel, Api]) -> None:
        model, api = faulty
        await model.hang_up()
        with pytest.raises(httpx.ConnectError):
            await api.says(user("a"))
        await model.listen()
        assert await api.says(user("a")) == "You have said 1 thing: a"

    async def test_many_deltas_and_a_big_one_arrive_whole(self, faulty: tuple[FaultyModel, Api]) -> None:
        model, api = faulty
        model.script(burst(2000))
        assert len(deltas((await api.post(request(user("a"), stream=True))).text)) == 2000
        (delta,) = deltas((await api.post(request(user("[[big 1100000]]"), stream=True))).text)
        assert len(delta) == 1_100_000

    async def test_tools_are_called_and_their_results_answered_with_text(self, faulty: tuple[FaultyModel, Api]) -> None:
        model, api = faulty
        model.script(tools(("Bash", {"command": "ls -l"}), ("Read", {"file_path": "/x"})))
        asked = user('[[tool Bash {"command": "ls -l"}]]')
        for calls in (["Bash", "Read"], ["Bash"]):
            found = events((await api.post(request(asked, stream=True))).text)
            starts = [event["content_block"] for event in found if event["type"] == "content_block_start"]
            inputs = [event["delta"] for event in found if event["type"] == "content_block_delta"]
            assert [(start["type"], start["name"]) for start in starts] == [("tool_use", name) for name in calls]
            assert json.loads(inputs[0]["partial_json"]) == {"command": "ls -l"}
            assert found[-2]["delta"]["stop_reason"] == "tool_use"
        result = user({"type": "tool_result", "tool_use_id": "t", "content": "total 0"})
        text = (await api.post(request(asked, assistant("…"), result, stream=True))).text
        assert "".join(deltas(text)).startswith("You have said 1 thing: [[tool Bash")

    async def test_a_thought_comes_signed_before_the_answer(self, faulty: tuple[FaultyModel, Api]) -> None:
        model, api = faulty
        model.script(think("Hm."))
        found = events((await api.post(request(user("a"), stream=True))).text)
        kinds = [event["delta"]["type"] for event in found if event["type"] == "content_block_delta"]
        assert kinds[:3] == ["thinking_delta", "signature_delta", "text_delta"]
        assert tool("Bash", {}) == tools(("Bash", {}))
