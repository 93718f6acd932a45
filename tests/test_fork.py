"""A fork holds what its parent held up to the cut; the parent is never altered, not by a byte."""

import asyncio
import json
from typing import Any

import pytest

from tests.copies import copied
from tests.faults import FaultyModel, tools
from tests.modes import in_both_modes
from tests.server import SECONDS, Sidecar, a_moment, parting

pytestmark = in_both_modes


async def fork(sidecar: Sidecar, parent: str, thread: str, **fields: Any) -> Any:
    return await sidecar.post("/v1/chat/fork", thread, from_thread_id=parent, **fields)


async def messages(sidecar: Sidecar, thread: str, role: str) -> list[dict[str, Any]]:
    lines = sidecar.transcript(await sidecar.session_id(thread)).read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["type"] == role]


@pytest.fixture
async def spoken(sidecar: Sidecar, known: str) -> str:
    """A thread with two completed turns, the last of them here; its process has written its last line or is kept."""
    await sidecar.say(known, "I like tea")
    await sidecar.at_rest()
    return known


@pytest.fixture
async def parent(sidecar: Sidecar, thread: str, mode: str) -> str:
    """A thread with two completed turns; where no process of it is kept, one that has adopted the transcript."""
    told = thread if mode == "warm" else "a parent to copy"
    if (await sidecar.session(told)).status_code == 404:
        for prompt in ("My name is Ada", "I like tea"):
            await sidecar.say(told, prompt)
        await sidecar.at_rest()
    return thread if mode == "warm" else await copied(sidecar, told, thread)


@pytest.fixture
def untouched(request: pytest.FixtureRequest, mode: str) -> str:
    """Such a parent for tests after which it is as it was."""
    name: str = request.getfixturevalue("original" if mode == "warm" else "parent")
    return name


@pytest.mark.smoke
async def test_a_fork_remembers_and_its_parent_is_as_it_was(sidecar: Sidecar, spoken: str, another_thread: str) -> None:
    transcript = sidecar.transcript(await sidecar.session_id(spoken))
    before = transcript.read_bytes()
    answer = (await fork(sidecar, spoken, another_thread, message="Another way")).json()
    assert answer["session"]["outcome"] == "forked"
    assert answer["text"] == "You have said 3 things. First: My name is Ada; last: Another way"
    assert transcript.read_bytes() == before
    mapping = (await sidecar.session(another_thread)).json()
    last = (await messages(sidecar, spoken, "assistant"))[-1]
    assert (mapping["parent_thread_id"], mapping["parent_message_id"]) == (spoken, last["uuid"])
    assert mapping["sdk_session_id"] == answer["session"]["sdk_session_id"] != await sidecar.session_id(spoken)


async def test_a_fork_streams_like_any_turn(sidecar: Sidecar, parent: str, another_thread: str) -> None:
    path = "/v1/chat/fork"
    async with sidecar.stream(another_thread, "Another way", path=path, from_thread_id=parent) as stream:
        events = await stream.rest()
    assert (events[0].name, events[0].data["outcome"]) == ("session", "forked")
    assert events[-1].data["status"] == "completed"


@pytest.mark.smoke
async def test_a_fork_at_a_message_holds_what_came_before_and_it(
    sidecar: Sidecar, parent: str, another_thread: str
) -> None:
    first = (await messages(sidecar, parent, "assistant"))[0]["uuid"]
    answer = (await fork(sidecar, parent, another_thread, message="Go on", at_message_id=first)).json()
    assert answer["text"] == "You have said 2 things. First: My name is Ada; last: Go on"
    assert (await sidecar.session(another_thread)).json()["parent_message_id"] == first


@pytest.mark.smoke
async def test_a_fork_without_a_message_calls_no_model_and_goes_on_from_there(
    sidecar: Sidecar, parent: str, another_thread: str, model: FaultyModel
) -> None:
    transcript = sidecar.transcript(await sidecar.session_id(parent))
    before, asked = transcript.read_bytes(), len(model.requests)
    response = await fork(sidecar, parent, another_thread)
    assert response.status_code == 201
    assert response.json() == (await sidecar.session(another_thread)).json()
    assert (transcript.read_bytes(), len(model.requests)) == (before, asked)
    answer = await sidecar.say(another_thread, "Go on")
    assert answer == "You have said 3 things. First: My name is Ada; last: Go on"


async def test_a_checkpoint_is_restored_by_forking_it(sidecar: Sidecar, parent: str, another_thread: str) -> None:
    first = (await messages(sidecar, parent, "assistant"))[0]["uuid"]
    assert (await fork(sidecar, parent, another_thread, at_message_id=first)).status_code == 201
    restored = (await fork(sidecar, another_thread, f"{another_thread}-restored", message="Again")).json()
    assert restored["text"] == "You have said 2 things. First: My name is Ada; last: Again"


async def test_ten_forks_at_once_are_ten_branches_of_one_parent(
    sidecar: Sidecar, parent: str, another_thread: str, mode: str
) -> None:
    transcript = sidecar.transcript(await sidecar.session_id(parent))
    before = transcript.read_bytes()
    names = [f"{another_thread}-{number}" for number in range(10)]
    answers = await asyncio.gather(*(fork(sidecar, parent, name, message=f"Way {name}") for name in names))
    texts = [answer.json()["text"] for answer in answers]
    assert texts == [f"You have said 3 things. First: My name is Ada; last: Way {name}" for name in names]
    assert len({answer.json()["session"]["sdk_session_id"] for answer in answers}) == 10
    # With ten branches the parent's own process no longer is among those that are kept.
    assert not parting(before, transcript.read_bytes()) or mode == "warm"


@pytest.mark.parametrize("message", [None, "Meanwhile"])
async def test_a_parent_with_a_running_turn_is_forked_at_its_last_completed_one(
    sidecar: Sidecar, spoken: str, another_thread: str, model: FaultyModel, message: str | None
) -> None:
    async with sidecar.stream(spoken, "[[hold 3]]") as stream:
        await stream.until_text()
        async with asyncio.timeout(SECONDS):
            while len(await messages(sidecar, spoken, "user")) < 3:
                await a_moment()  # the running turn's prompt is in the transcript from about here
        fields = {} if message is None else {"message": message}
        response = await fork(sidecar, spoken, another_thread, **fields)
        assert response.status_code == (201 if message is None else 200)
        model.release()
        await stream.rest()
    answer = await sidecar.say(another_thread, "Now")
    assert "hold" not in "".join(text for _, text in await sidecar.history(another_thread))
    assert f"You have said {3 + bool(message)} things." in answer


async def test_a_parent_in_its_first_turn_has_nothing_to_fork_yet(
    sidecar: Sidecar, thread: str, another_thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 1]]") as stream:
        await stream.until_text()
        response = await fork(sidecar, thread, another_thread, message="Too early")
        assert (response.status_code, response.json()["code"]) == (422, "unsafe_fork_point")
        model.release()
        await stream.rest()
    assert (await sidecar.session(another_thread)).status_code == 404


async def test_a_tool_call_is_never_cut_from_its_result(
    sidecar: Sidecar, thread: str, another_thread: str, model: FaultyModel
) -> None:
    # The safe agent has no tools; the CLI then answers each call with an error, which is a result all the same.
    model.script(tools(("One", {}), ("Two", {})))
    await sidecar.say(thread, "Use your tools")
    *calls, answer = await messages(sidecar, thread, "assistant")
    *_, last_result = await messages(sidecar, thread, "user")
    for number, call in enumerate(calls):
        response = await fork(sidecar, thread, f"{another_thread}-{number}", at_message_id=call["uuid"])
        assert (response.status_code, response.json()["code"]) == (422, "unsafe_fork_point")
    for whole in (answer, last_result):
        name = f"{another_thread}-{whole['uuid']}"
        assert (await fork(sidecar, thread, name, at_message_id=whole["uuid"])).status_code == 201
        assert "You have said 2 things. First: Use your tools" in await sidecar.say(name, "Go on")


async def test_a_reply_of_several_blocks_is_kept_whole(
    sidecar: Sidecar, thread: str, another_thread: str, model: FaultyModel
) -> None:
    await sidecar.say(thread, "[[think]] Hello")
    blocks = await messages(sidecar, thread, "assistant")
    assert len(blocks) == 2
    response = await fork(sidecar, thread, another_thread, at_message_id=blocks[0]["uuid"])
    assert response.json()["parent_message_id"] == blocks[1]["uuid"]


@pytest.mark.parametrize("message", [None, "Hello"])
@pytest.mark.parametrize(
    ("at", "status", "code"),
    [("00000000-0000-4000-8000-000000000000", 422, "message_not_found"), ("a prompt", 422, "unsafe_fork_point")],
)
async def test_a_cut_that_cannot_be_made_is_refused_and_leaves_nothing(
    sidecar: Sidecar, untouched: str, another_thread: str, message: str | None, at: str, status: int, code: str
) -> None:
    prompt = (await messages(sidecar, untouched, "user"))[0]["uuid"]
    fields = {} if message is None else {"message": message}
    response = await fork(
        sidecar, untouched, another_thread, at_message_id=prompt if at == "a prompt" else at, **fields
    )
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert (await sidecar.session(another_thread)).status_code == 404


@pytest.mark.smoke
@pytest.mark.parametrize("message", [None, "Hello"])
async def test_an_unknown_parent_and_a_taken_name_are_refused(
    sidecar: Sidecar, untouched: str, another_thread: str, message: str | None
) -> None:
    fields = {} if message is None else {"message": message}
    unknown = await fork(sidecar, "nobody", another_thread, **fields)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "session_not_found")
    taken = await fork(sidecar, untouched, untouched, **fields)
    assert (taken.status_code, taken.json()["code"]) == (409, "thread_exists")
    foreign = await fork(sidecar, untouched, another_thread, resource_id="mallory", **fields)
    assert (foreign.status_code, foreign.json()["code"]) == (404, "session_not_found")


async def test_a_fork_that_is_refused_hides_nothing_of_the_thread_in_its_way(
    sidecar: Sidecar, parent: str, another_thread: str
) -> None:
    await sidecar.say(another_thread, "I am here")
    taken = await fork(sidecar, parent, another_thread, message="Hello")
    assert taken.json()["code"] == "thread_exists"
    async with sidecar.rejoin(another_thread) as stream:
        assert stream.response.status_code == 200
        await stream.rest()
    assert stream.text.endswith("I am here")


async def test_a_parent_without_its_transcript_cannot_be_forked(
    sidecar: Sidecar, parent: str, another_thread: str
) -> None:
    sidecar.transcript(await sidecar.session_id(parent)).unlink()
    for fields in ({}, {"message": "Hello"}):
        response = await fork(sidecar, parent, another_thread, **fields)
        assert (response.status_code, response.json()["code"]) == (410, "session_missing")


async def test_a_line_separator_in_a_message_costs_the_fork_nothing(
    sidecar: Sidecar, thread: str, another_thread: str
) -> None:
    await sidecar.say(thread, "one\u2028two\u2029three\x85four")
    await sidecar.say(thread, "I like tea")
    await sidecar.at_rest()
    assert (await fork(sidecar, thread, another_thread)).status_code == 201
    assert await sidecar.history(another_thread) == await sidecar.history(thread)
