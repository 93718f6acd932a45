"""The AI SDK's own client, in three major versions, against a running sidecar: what a page does with it works."""

import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.ai_sdk import MAJORS, Node, load, plain, running, texts
from tests.faults import Behaviour, FaultyModel, fail, hold
from tests.node import need_node
from tests.server import Sidecar

Json = dict[str, Any]
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


# For what is the sidecar's to decide, whatever the client's version.
NEWEST = pytest.mark.parametrize("ai", MAJORS[-1:], indirect=True)


@pytest.fixture(scope="module", params=MAJORS)
async def ai(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Node]:
    """The client, of each major version."""
    need_node()
    async with running(request.param, tmp_path_factory.mktemp("node")) as node:
        yield node


async def history(sidecar: Sidecar, chat: str, **query: Any) -> list[Json]:
    """The chat as a page loads it, where it is there."""
    response = await load(sidecar, chat, **query)
    assert response.status_code == 200, response.text
    messages: list[Json] = response.json()
    return messages


async def threads(sidecar: Sidecar, chat: str) -> dict[str, str | None]:
    """The threads whose names begin so, with those that they were forked from."""
    query = {"resource_id": "alice", "thread_id_prefix": chat}
    rows = (await sidecar.http.get("/v1/sessions", params=query)).json()["data"]
    return {row["thread_id"]: row["parent_thread_id"] for row in rows if row["thread_id"].partition("~")[0] == chat}


async def test_a_conversation_goes_on_and_is_the_same_after_a_reload(ai: Node, sidecar: Sidecar, thread: str) -> None:
    chat = await ai.open(sidecar, thread)
    await chat.send("My name is Ada")
    said = await chat.send("I like tea")
    assert (said["status"], said["error"]) == ("ready", None)
    assert texts(said["messages"])[2:] == [
        ("user", "I like tea"),
        ("assistant", "You have said 2 things. First: My name is Ada; last: I like tea"),
    ]
    assert await threads(sidecar, thread) == {thread: None}
    loaded = await history(sidecar, thread)
    assert plain(loaded)[1::2] == plain(said["messages"])[1::2]  # the answers, with their IDs
    assert texts(loaded) == texts(said["messages"])
    told, kept = said["messages"][-1]["metadata"], loaded[-1]["metadata"]
    assert kept == {name: told[name] for name in ("threadId", "turnId", "messageUuid")}
    assert loaded[-2]["id"] == told["turnId"]
    assert told["usage"]["outputTokens"] > 0
    await ai.check([], loaded)
    again = await ai.open(sidecar, thread, loaded)
    assert texts((await again.send("And now?"))["messages"])[-1][1].startswith("You have said 3 things")
    assert await threads(sidecar, thread) == {thread: None}


async def test_an_answer_that_is_regenerated_is_a_branch_and_a_reload_shows_it(
    ai: Node, sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    chat = await ai.open(sidecar, thread)
    await chat.send("My name is Ada")
    before = await chat.send("[[say one]]")
    regenerated = await chat.regenerate()
    assert len(regenerated["messages"]) == 4
    last = regenerated["messages"][-1]
    assert re.fullmatch(re.escape(thread) + "~[0-9a-f]{8}", last["metadata"]["threadId"])
    assert last["metadata"]["outcome"] == "forked"
    assert await threads(sidecar, thread) == {thread: None, last["metadata"]["threadId"]: thread}
    assert plain(await history(sidecar, thread))[-1] == plain(regenerated["messages"])[-1]
    kept = await history(sidecar, thread, branch="this")
    assert plain(kept)[1::2] == plain(before["messages"])[1::2]
    assert texts((await chat.send("Go on"))["messages"])[-1][1].startswith("You have said 3 things")
    assert len(await threads(sidecar, thread)) == 2


async def test_a_message_that_is_edited_is_a_branch_from_the_answer_before_it(
    ai: Node, sidecar: Sidecar, thread: str
) -> None:
    chat = await ai.open(sidecar, thread)
    await chat.send("My name is Ada")
    second = (await chat.send("I like tea"))["messages"][2]
    await chat.send("I like cake")
    edited = await chat.send("I like milk", edits=second["id"])
    assert texts(edited["messages"])[-1] == (
        "assistant",
        "You have said 2 things. First: My name is Ada; last: I like milk",
    )
    assert texts(await history(sidecar, thread)) == texts(edited["messages"])
    assert len(await history(sidecar, thread, branch="this")) == 6
    # Edited once more after a reload, on the branch that is shown then.
    loaded = await history(sidecar, thread)
    again = await ai.open(sidecar, thread, loaded)
    once_more = await again.send("I like coffee", edits=loaded[2]["id"])
    assert texts(once_more["messages"])[-1][1] == "You have said 2 things. First: My name is Ada; last: I like coffee"
    assert len(await threads(sidecar, thread)) == 3


@NEWEST
async def test_the_first_message_edited_is_a_thread_of_its_own_and_found_by_the_same_id(
    ai: Node, sidecar: Sidecar, thread: str
) -> None:
    chat = await ai.open(sidecar, thread)
    first = (await chat.send("My name is Ada"))["messages"][0]
    edited = await chat.send("My name is Bea", edits=first["id"])
    assert texts(edited["messages"]) == [
        ("user", "My name is Bea"),
        ("assistant", "You have said 1 thing: My name is Bea"),
    ]
    new = edited["messages"][-1]["metadata"]["threadId"]
    assert await threads(sidecar, thread) == {thread: None, new: None}
    assert texts(await history(sidecar, thread)) == texts(edited["messages"])
    assert texts(await history(sidecar, thread, branch="this"))[0] == ("user", "My name is Ada")
    assert texts((await chat.send("Who am I?"))["messages"])[-1][1].startswith("You have said 2 things. First: My name")
    assert await threads(sidecar, thread) == {thread: None, new: None}


async def test_a_second_client_resumes_in_mid_turn_from_the_beginning(
    ai: Node, sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    chat = await ai.open(sidecar, thread)
    await chat.send("My name is Ada")
    model.script(hold(4))
    await chat.start("I like tea")
    await chat.until("You have said 2")
    loaded = await history(sidecar, thread)
    assert texts(loaded)[2:] == [("user", "I like tea")]  # what is still to come is the stream's
    other = await ai.open(sidecar, thread, loaded)
    await other.begin_to_resume()
    await other.until("You have said 2")
    busy = await (await ai.open(sidecar, thread, loaded[:2])).send("At once")
    assert (busy["status"], json.loads(busy["error"])["code"]) == ("error", "thread_busy")
    assert busy["requests"][-1]["status"] == 409
    model.release()
    mine, theirs = await chat.wait(), await other.wait()
    assert mine["status"] == theirs["status"] == "ready"
    assert plain(mine["messages"])[1::2] == plain(theirs["messages"])[1::2]
    assert plain(await history(sidecar, thread)) == plain(theirs["messages"])


async def test_there_is_nothing_to_resume_where_no_turn_runs(ai: Node, sidecar: Sidecar, thread: str) -> None:
    chat = await ai.open(sidecar, thread)
    assert (await chat.resume())["requests"][-1]["status"] == 204
    said = await chat.send("Hello")
    resumed = await chat.resume()
    assert resumed["requests"][-1]["status"] == 204
    assert (resumed["status"], resumed["messages"]) == ("ready", said["messages"])


async def test_a_turn_that_is_stopped_keeps_what_was_said(
    ai: Node, sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    chat = await ai.open(sidecar, thread)
    model.script(hold(3))
    await chat.start("Hello")
    await chat.until("said")
    stopped = await sidecar.http.post("/v1/chat/interrupt", json={"thread_id": thread, "resource_id": "alice"})
    assert stopped.json()["status"] == "interrupted"
    said = await chat.wait()
    assert (said["status"], said["error"]) == ("ready", None)
    assert texts(said["messages"])[1] == ("assistant", "You have said ")
    assert plain(await history(sidecar, thread))[1] == plain(said["messages"])[1]
    assert texts((await chat.send("Go on"))["messages"])[-1][1].startswith("You have said 2 things")
    assert await threads(sidecar, thread) == {thread: None}


async def test_a_turn_that_fails_is_an_error_that_says_why(
    ai: Node, sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    chat = await ai.open(sidecar, thread)
    await chat.send("My name is Ada")
    model.default = fail(400)
    failed = await chat.send("I like tea")
    model.default = Behaviour()
    assert failed["status"] == "error"
    assert failed["error"] == "The model's API answered 400. The message is in the history. (api_error)"
    again = await chat.regenerate()
    assert (again["status"], texts(again["messages"])[-1][0]) == ("ready", "assistant")
    assert texts(again["messages"])[-1][1].startswith("You have said 2 things")


async def test_what_others_add_to_a_request_is_let_pass_and_the_options_of_a_turn_are_taken(
    ai: Node, sidecar: Sidecar, thread: str
) -> None:
    more: Json = {"system": "Be brief", "tools": {"x": {}}, "metadata": {"a": 1}, "callSettings": None, "runConfig": {}}
    chat = await ai.open(sidecar, thread, body=more)
    assert (await chat.send("Hello"))["status"] == "ready"
    refused = await chat.send("Hello", body={"agent": "nobody"})
    assert json.loads(refused["error"])["code"] == "unknown_agent"


@pytest.mark.smoke
@NEWEST
async def test_a_page_with_a_greeting_of_its_own_and_files_begins_a_chat(
    ai: Node, sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    welcome = {"id": "welcome", "role": "assistant", "parts": [{"type": "text", "text": "Hello! How can I help?"}]}
    chat = await ai.open(sidecar, thread, [welcome])
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    image = {"type": "file", "mediaType": "image/png", "filename": "dot.png", "url": f"data:image/png;base64,{pixel}"}
    said = await chat.send_parts({"type": "text", "text": "What is this?"}, image)
    assert (said["status"], said["error"]) == ("ready", None)
    blocks = [block for message in model.requests[-1].body["messages"] for block in message["content"]]
    assert {"text", "image"} <= {block["type"] for block in blocks}
    shown = (await history(sidecar, thread))[0]["parts"]
    assert [part["type"] for part in shown] == ["text", "file"]
    assert shown[1] == {"type": "file", "mediaType": "image/png", "url": image["url"]}
