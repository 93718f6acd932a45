"""Chats of the AI SDK's dialect, asked of without its client: pages, bad input, and what two pages do at once."""

import asyncio
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urljoin

import httpx
import pytest

from tests.ai_sdk import chunks, load, post, texts, told
from tests.faults import FaultyModel, hold, say, tool
from tests.server import SECONDS, Sidecar, a_moment

Json = dict[str, Any]
ODD = "a/b%2F c?d=#ü🙂/stream"


async def test_a_chat_may_be_called_anything(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    chat = f"{thread} {ODD}"
    assert told((await post(sidecar, chat, [], "Hello")).text) == "You have said 1 thing: Hello"
    loaded = (await load(sidecar, chat)).json()
    assert loaded[0]["metadata"]["threadId"] == chat
    model.script(hold(1))
    sending = asyncio.create_task(post(sidecar, chat, loaded, "And now?"))
    await (await model.requested(2)).holding()
    path = f"/v1/ai-sdk/chat/{quote(chat, safe='')}/stream"
    resuming = asyncio.create_task(sidecar.http.get(path, params={"resource_id": "alice"}))
    await sidecar.settle()
    model.release()
    sent, resumed = await sending, await resuming
    assert chunks(sent.text) == chunks(resumed.text)
    assert resumed.headers["x-vercel-ai-ui-message-stream"] == "v1"


async def test_pages_never_split_a_turn_and_lead_to_the_one_before(
    a_sidecar: Callable[..., Sidecar], model: FaultyModel, thread: str, tmp_path: Any
) -> None:
    agents = tmp_path / "agents.toml"
    agents.write_text('[default]\ntools = ["Bash"]\nallowed_tools = ["Bash"]\npermission_mode = "bypassPermissions"\n')
    async with a_sidecar("--agents", str(agents), IS_SANDBOX="1", SIDECAR_WARM_SESSIONS="1") as sidecar:
        for number in range(5):
            model.script(tool("Bash", {"command": f"echo {number}"}), say(f"answer {number}"))
            await sidecar.say(thread, f"question {number}")
        whole = (await load(sidecar, thread)).json()
        assert [role for role, _ in texts(whole)] == ["user", "assistant"] * 5
        assert [message["parts"][1]["output"] for message in whole[1::2]] == list("01234")
        page = await load(sidecar, thread, limit=2)
        pages = [page.json()]
        while "link" in page.headers:
            target, _, rel = page.headers["link"].partition(">; ")
            assert rel == 'rel="prev"'
            page = await sidecar.http.get(urljoin(str(page.url), target.removeprefix("<")))
            pages.insert(0, page.json())
        assert [len(one) for one in pages] == [2, 4, 4]
        assert [message for one in pages for message in one] == whole
        wrong = await load(sidecar, thread, before="nobody")
        assert (wrong.status_code, wrong.json()["code"]) == (422, "message_not_found")


async def test_a_message_that_waited_is_not_put_behind_one_that_its_person_has_not_seen(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(hold(1))
    first = asyncio.create_task(post(sidecar, thread, [], "Hello"))
    await (await model.requested(1)).holding()
    (shown,) = (await load(sidecar, thread)).json()
    seen = [shown, {"id": f"{shown['id']}-answer", "role": "assistant", "parts": []}]
    waiting = [
        asyncio.create_task(post(sidecar, thread, seen, text, multitask_strategy="enqueue"))
        for text in ("me", "me too")
    ]
    await sidecar.settle()
    model.release()
    await first
    answers = [await one for one in waiting]
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert [answer.json()["code"] for answer in answers if answer.status_code == 409] == ["thread_moved"]
    assert len((await load(sidecar, thread)).json()) == 4


async def test_two_pages_that_edit_the_same_message_at_once_have_a_branch_each(sidecar: Sidecar, thread: str) -> None:
    for text in ("My name is Ada", "I like tea"):
        await sidecar.say(thread, text)
    seen = (await load(sidecar, thread)).json()[:2]
    edits = await asyncio.gather(*(post(sidecar, thread, seen, text) for text in ("I like milk", "I like cake")))
    assert {told(edit.text) for edit in edits} == {
        f"You have said 2 things. First: My name is Ada; last: I like {what}" for what in ("milk", "cake")
    }
    assert len({chunks(edit.text)[0]["messageMetadata"]["threadId"] for edit in edits}) == 2
    assert texts((await load(sidecar, thread, branch="this")).json())[2] == ("user", "I like tea")


async def test_a_retry_under_a_key_joins_the_turn_and_branches_once(sidecar: Sidecar, thread: str) -> None:
    async def send(before: list[Json], text: str, key: str) -> httpx.Response:
        message = {"role": "user", "parts": [{"type": "text", "text": text}]}
        body = {"id": thread, "resource_id": "alice", "messages": [*before, message]}
        return await sidecar.http.post("/v1/ai-sdk/chat", json=body, headers={"idempotency-key": f"{thread} {key}"})

    first = await send([], "Hello", "first")
    assert (await send([], "Hello", "first")).text == first.text
    seen = (await load(sidecar, thread)).json()
    on = await send(seen, "Go on", "on")
    assert (await send(seen, "Go on", "on")).text == on.text
    edited = await send(seen, "Go elsewhere", "edit")
    assert (await send(seen, "Go elsewhere", "edit")).text == edited.text
    other = await send(seen, "Something else", "edit")
    assert other.json()["code"] == "idempotency_mismatch"
    rows = await sidecar.http.get("/v1/sessions", params={"resource_id": "alice", "parent_thread_id": thread})
    assert len(rows.json()["data"]) == 1


async def test_retries_of_an_edit_at_once_are_one_turn_and_after_a_restart_it_is_not_run_again(
    a_sidecar: Callable[..., Sidecar], thread: str, model: FaultyModel
) -> None:
    async def edit(sidecar: Sidecar) -> httpx.Response:
        message = {"role": "user", "parts": [{"type": "text", "text": "Go elsewhere"}]}
        body = {"id": thread, "resource_id": "alice", "messages": [*seen, message]}
        return await sidecar.http.post("/v1/ai-sdk/chat", json=body, headers={"idempotency-key": "edit"})

    first = a_sidecar(SIDECAR_SPARE_PROCESSES="0")
    async with first:
        await post(first, thread, [], "Hello")
        seen = (await load(first, thread)).json()
        await post(first, thread, seen, "Go on")
        answers = await asyncio.gather(*(edit(first) for _ in range(3)))
        assert len({answer.text for answer in answers}) == 1
    async with a_sidecar(SIDECAR_SPARE_PROCESSES="0") as again:
        requests = len(model.requests)
        assert (await edit(again)).json()["code"] == "replay_gone"
        assert len(model.requests) == requests


async def test_of_this_branch_alone_nothing_of_its_family_is_resumed_or_gone_on_with(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    await post(sidecar, thread, [], "Hello")
    fork = {"resource_id": "alice", "from_thread_id": thread, "thread_id": f"{thread} copy"}
    assert (await sidecar.http.post("/v1/chat/fork", json=fork)).status_code == 201
    seen = (await load(sidecar, f"{thread} copy", branch="this")).json()
    async with sidecar.stream(thread, "Go on [[hold 1]]") as stream:
        await stream.until_text()
        query = {"resource_id": "alice", "branch": "this"}
        path = f"/v1/ai-sdk/chat/{thread} copy/stream"
        assert (await sidecar.http.get(path, params=query)).status_code == 204
        on = await post(sidecar, f"{thread} copy", seen, "Go on here", branch="this")
        assert chunks(on.text)[0]["messageMetadata"]["threadId"] == f"{thread} copy"
        model.release()
        await stream.rest()


async def test_what_the_agent_does_by_itself_is_an_answer_of_its_own_and_no_other_head(
    a_sidecar: Callable[..., Sidecar], model: FaultyModel, thread: str, tmp_path: Any
) -> None:
    agents, end = tmp_path / "agents.toml", tmp_path / "end"
    agents.write_text('[default]\ntools = ["Bash"]\nallowed_tools = ["Bash"]\npermission_mode = "bypassPermissions"\n')
    async with a_sidecar("--agents", str(agents), IS_SANDBOX="1", SIDECAR_SPARE_PROCESSES="0") as sidecar:
        command = f"until [ -e {end} ]; do sleep 0.01; done"
        bash = {"command": command, "run_in_background": True, "description": "wait"}
        model.script(tool("Bash", bash), say("I have begun."), hold(1))
        await post(sidecar, thread, [], "Begin")
        seen = (await load(sidecar, thread)).json()
        end.touch()
        await (await model.requested(3)).holding()
        path = f"/v1/ai-sdk/chat/{thread}/stream"
        resuming = asyncio.create_task(sidecar.http.get(path, params={"resource_id": "alice"}))
        await sidecar.settle()
        assert [m["id"] for m in (await load(sidecar, thread)).json()] == [m["id"] for m in seen]
        model.release()
        start, *_ = chunks((await resuming).text)
        await sidecar.until_logged("turn", thread_id=thread, origin="background")
        loaded = (await load(sidecar, thread)).json()
        assert start["messageMetadata"]["origin"] == "background"
        assert [m["id"] for m in loaded] == [*(m["id"] for m in seen), start["messageId"]]
        for has_seen in (False, True):  # what it has added
            known = (await load(sidecar, thread)).json() if has_seen else seen
            async with asyncio.timeout(SECONDS):
                while (answer := await post(sidecar, thread, known, "Go on")).status_code == 409:
                    await a_moment()
            assert chunks(answer.text)[0]["messageMetadata"]["threadId"] == thread


MESSAGE = {"role": "user", "parts": [{"type": "text", "text": "Hello"}]}
WRONG: dict[str, tuple[Json, int, str]] = {
    "no messages": ({"messages": []}, 422, "messages"),
    "nothing to say": ({"messages": [{"role": "user", "parts": [{"type": "text", "text": " "}]}]}, 422, "parts"),
    "no parts": ({"messages": [{"role": "user"}]}, 422, "parts"),
    "half an emoji": ({"messages": [{"role": "user", "parts": [{"type": "text", "text": "\ud83d"}]}]}, 422, "parts"),
    "an answer is the last": ({"messages": [MESSAGE, {"role": "assistant", "parts": []}]}, 422, "messages"),
    "a file that is none": ({"messages": [{"role": "user", "parts": [{"type": "file", "url": "x"}]}]}, 422, "parts.0"),
    "a film": (
        {"messages": [{"role": "user", "parts": [{"type": "file", "mediaType": "video/mp4", "url": "data:,"}]}]},
        422,
        "parts.0",
    ),
    "a part that nobody knows": ({"messages": [{"role": "user", "parts": [{"type": "smell"}]}]}, 422, "parts.0"),
    "an ID that is too long": ({"id": "x" * 257, "messages": [MESSAGE]}, 422, "id"),
    "an option that there is not": ({"messages": [MESSAGE], "on_disconnect": "wait"}, 422, "on_disconnect"),
    "a history of others": (
        {"messages": [MESSAGE, {"id": "x", "role": "assistant", "parts": []}, MESSAGE]},
        422,
        "message_not_found",
    ),
}


@pytest.mark.parametrize("row", WRONG)
async def test_bad_input_is_told_and_starts_nothing(
    sidecar: Sidecar, thread: str, model: FaultyModel, row: str
) -> None:
    body, status, told_of = WRONG[row]
    headers = {"x-resource-id": "alice", "content-type": "application/json"}
    raw = json.dumps({"id": thread, **body})
    answer = await sidecar.http.post("/v1/ai-sdk/chat", content=raw, headers=headers)
    assert answer.status_code == status, answer.text
    problem = answer.json()
    assert told_of in problem["code"] + "".join(error["field"] for error in problem.get("errors", []))
    assert model.requests == []
    assert (await load(sidecar, thread)).status_code == 404


async def test_a_branch_has_to_have_room_for_its_name(sidecar: Sidecar, thread: str) -> None:
    chat = thread.ljust(250, "x")
    await post(sidecar, chat, [], "Hello")
    refused = await post(sidecar, chat, [], "Another beginning")
    assert refused.json()["errors"][0]["field"] == "id"


async def test_a_chat_whose_transcript_is_lost_begins_anew_and_says_so(sidecar: Sidecar, thread: str) -> None:
    await post(sidecar, thread, [], "Hello")
    seen = (await load(sidecar, thread)).json()
    await sidecar.at_rest()
    sidecar.transcript(await sidecar.session_id(thread)).unlink()
    gone = await post(sidecar, thread, seen, "Go on", if_missing="fail")
    assert (gone.status_code, gone.json()["code"]) == (410, "session_missing")
    anew = await post(sidecar, thread, seen, "Go on")
    assert chunks(anew.text)[0]["messageMetadata"]["outcome"] == "restarted"
