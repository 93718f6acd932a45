"""Deleting: one thread or all of a resource, with a turn on it or none, with its transcript or without, for good."""

import asyncio
from collections.abc import Callable

import httpx
import pytest

from tests.faults import FaultyModel
from tests.replicas import Know
from tests.server import SECONDS, Sidecar

pytestmark = pytest.mark.long  # `make test-all`

Make = Callable[..., Sidecar]


async def delete(sidecar: Sidecar, thread: str, **query: str) -> httpx.Response:
    params = {"thread_id": thread, "resource_id": "alice", **query}
    return await sidecar.http.delete("/v1/session", params=params)


async def erase(sidecar: Sidecar, resource: str, **query: str) -> httpx.Response:
    return await sidecar.http.delete("/v1/sessions", params={"resource_id": resource, **query})


def files(sidecar: Sidecar, session_id: str) -> list[str]:
    return [path.name for path in sidecar.home.glob(f"claude/projects/*/{session_id}*")]


async def listed(sidecar: Sidecar, **query: str) -> list[tuple[str, str]]:
    response = await sidecar.http.get("/v1/sessions", params=query)
    return [(row["resource_id"], row["thread_id"]) for row in response.json()["data"]]


@pytest.mark.smoke
async def test_the_transcript_goes_too_if_asked_for_and_its_subagents_and_what_was_set_aside(
    sidecar: Sidecar, thread: str, another_thread: str, knows: Know
) -> None:
    await sidecar.say(thread, "My name is Ada")
    await knows(sidecar, another_thread)
    session_id, other = await sidecar.session_id(thread), await sidecar.session_id(another_thread)
    transcript = sidecar.transcript(session_id)
    (transcript.with_suffix("") / "subagents").mkdir(parents=True)
    (transcript.with_suffix("") / "subagents" / "agent-1.jsonl").write_text("{}\n")
    transcript.with_suffix(".unreadable-1").write_text("Ada")
    assert (await delete(sidecar, thread, transcript="delete")).status_code == 204
    assert files(sidecar, session_id) == []
    assert files(sidecar, other) == [f"{other}.jsonl"]
    assert (await sidecar.session(thread)).status_code == 404
    assert (await delete(sidecar, thread, transcript="delete")).status_code == 204
    assert await sidecar.say(thread, "Who am I?") == "You have said 1 thing: Who am I?"
    assert await sidecar.session_id(thread) != session_id


async def test_a_transcript_that_is_gone_already_does_not_keep_the_mapping(
    sidecar: Sidecar, thread: str, knows: Know
) -> None:
    await knows(sidecar, thread)
    session_id = await sidecar.session_id(thread)
    await delete(sidecar, f"{thread}-none", transcript="delete")
    sidecar.transcript(session_id).unlink()
    assert (await delete(sidecar, thread, transcript="delete")).status_code == 204
    assert (await sidecar.session(thread)).status_code == 404
    assert files(sidecar, session_id) == []


@pytest.mark.smoke
async def test_a_fork_keeps_its_history_when_its_parent_is_deleted(sidecar: Sidecar, thread: str, knows: Know) -> None:
    await knows(sidecar, thread)
    fork = f"{thread}-fork"
    assert (await sidecar.post("/v1/chat/fork", fork, from_thread_id=thread)).status_code == 201
    assert (await delete(sidecar, thread, transcript="delete")).status_code == 204
    assert "First: My name is Ada" in await sidecar.say(fork, "Who am I?")


async def test_a_running_turn_is_not_deleted_under_and_neither_is_one_that_waits(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "Hello [[hold 1]]") as stream:
        await stream.until_text()
        refused = await delete(sidecar, thread, transcript="delete")
        assert (refused.status_code, refused.json()["code"]) == (409, "thread_busy")
        model.release()
        await stream.rest()
    assert "First: Hello" in await sidecar.say(thread, "And?")


async def test_force_stops_the_running_turn_and_those_behind_it_and_nothing_brings_the_thread_back(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "Hello [[hold 3]]") as stream:
        await stream.until_text()
        session_id = str(stream.events[0].data["sdk_session_id"])
        waiting = [
            asyncio.create_task(
                sidecar.chat(thread, "And?", multitask_strategy="enqueue", idempotency_key=f"{thread}{n}")
            )
            for n in range(2)
        ]
        await sidecar.settle()
        response = await delete(sidecar, thread, transcript="delete", force="true")
        assert response.status_code == 204
        assert (await sidecar.session(thread)).status_code == 404
        end = (await stream.rest())[-1]
    assert (end.name, end.data["status"], end.data["error"]["code"]) == ("end", "interrupted", "thread_deleted")
    for task in waiting:
        answer = await task
        assert (answer.status_code, answer.json()["code"]) == (409, "thread_deleted")
    await sidecar.until_logged("turn", thread_id=thread, sdk_session_id=session_id)
    assert (await sidecar.session(thread)).status_code == 404
    assert files(sidecar, session_id) == []
    async with sidecar.rejoin(thread) as rejoined:
        assert rejoined.response.status_code == 204  # nothing of what was said is replayed either
    assert await sidecar.say(thread, "Who am I?") == "You have said 1 thing: Who am I?"


async def test_force_stops_a_turn_that_has_only_just_begun(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    for milliseconds in (0, 5, 50, 200):
        asking = asyncio.create_task(sidecar.chat(thread, "Hello [[hold 3]]"))
        await asyncio.sleep(milliseconds / 1000)  # the instant itself is what is varied here
        async with asyncio.timeout(SECONDS):
            while not asking.done():  # a deletion that was there before the turn has stopped nothing
                assert (await delete(sidecar, thread, force="true")).status_code == 204
        assert (await sidecar.session(thread)).status_code == 404


async def test_a_turn_that_comes_to_interrupt_does_not_pass_a_deletion(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "Hello [[hold 3]]") as stream:
        await stream.until_text()
        deleting = asyncio.create_task(delete(sidecar, thread, force="true"))
        later = asyncio.create_task(sidecar.chat(thread, "Again", multitask_strategy="interrupt"))
        assert (await deleting).status_code == 204
        await stream.rest()
    answer = (await later).json()
    if "session" in answer:  # it came after the deletion
        assert (answer["session"]["outcome"], answer["text"]) == ("started", "You have said 1 thing: Again")


async def test_a_resource_is_erased_and_the_other_ones_stay(a_sidecar: Make, knows: Know) -> None:
    async with a_sidecar() as sidecar:
        for name in ("a", "b", "c"):
            await knows(sidecar, name)
        await knows(sidecar, "a", "bob")
        bobs = (await sidecar.session("a", "bob")).json()["sdk_session_id"]
        kept = await sidecar.session_id("c")
        assert (await delete(sidecar, "c")).status_code == 204
        response = await erase(sidecar, "alice", transcript="delete")
        assert response.status_code == 200
        assert response.json() == {"object": "deleted", "resource_id": "alice", "count": 2}
        assert await listed(sidecar) == [("bob", "a")]
        left = {path.stem for path in sidecar.home.glob("claude/projects/*/*.jsonl")}
        assert left == {bobs, kept}
        assert (await erase(sidecar, "alice")).json()["count"] == 0


async def test_a_resource_with_a_turn_is_erased_with_force_only(
    a_sidecar: Make, model: FaultyModel, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, "idle")
        async with sidecar.stream("new", "Hello [[hold 3]]") as stream:
            await stream.until_text()
            refused = await erase(sidecar, "alice")
            assert (refused.status_code, refused.json()["code"]) == (409, "thread_busy")
            assert await listed(sidecar, resource_id="alice") == [("alice", "new"), ("alice", "idle")]
            erased = await erase(sidecar, "alice", force="true", transcript="delete")
            assert erased.json()["count"] == 2
            assert (await stream.rest())[-1].data["error"]["code"] == "thread_deleted"
        assert await listed(sidecar) == []
        assert list(sidecar.home.glob("claude/projects/*/*.jsonl")) == []


async def test_many_threads_are_erased_in_one_call(a_sidecar: Make, knows: Know) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, "t")
        for n in range(120):
            forked = await sidecar.post("/v1/chat/fork", f"t{n}", from_thread_id="t")
            assert forked.status_code == 201
        assert (await erase(sidecar, "alice", transcript="delete")).json()["count"] == 121
        assert list(sidecar.home.glob("claude/projects/*/*.jsonl")) == []


async def test_with_the_volume_gone_no_mapping_is_deleted_whose_transcript_would_stay(
    a_sidecar: Make, knows: Know
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, "t")
        marker = sidecar.home / "claude" / "session-sidecar.txt"
        marker.unlink()
        for response in (
            await delete(sidecar, "t", transcript="delete"),
            await erase(sidecar, "alice", transcript="delete"),
        ):
            assert (response.status_code, response.json()["code"]) == (503, "transcripts_unavailable")
        assert (await sidecar.session("t")).status_code == 200


@pytest.mark.parametrize("query", [{"transcript": "burn"}, {"force": "perhaps"}, {"all": "true"}])
async def test_a_deletion_that_is_not_understood_deletes_nothing(
    sidecar: Sidecar, thread: str, query: dict[str, str], knows: Know
) -> None:
    await knows(sidecar, thread)
    assert (await delete(sidecar, thread, **query)).status_code == 422
    assert (await erase(sidecar, "alice", **query)).status_code == 422
    assert (await sidecar.http.delete("/v1/sessions")).status_code == 422
    assert (await sidecar.session(thread)).status_code == 200


async def test_the_list_of_all_resources_is_stable_while_rows_come_and_go(a_sidecar: Make, knows: Know) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, "t")
        names = [f"t{n}" for n in range(8)]
        for name in names:
            await sidecar.post("/v1/chat/fork", name, from_thread_id="t")
        await knows(sidecar, "t", "bob")
        expected = [("bob", "t"), *(("alice", name) for name in reversed(names)), ("alice", "t")]
        seen: list[tuple[str, str]] = []
        after: dict[str, str] = {}
        while True:
            page = (await sidecar.http.get("/v1/sessions", params={"limit": "2", **after})).json()
            seen += [(row["resource_id"], row["thread_id"]) for row in page["data"]]
            await sidecar.post("/v1/chat/fork", f"new{len(seen)}", from_thread_id="t")
            if len(seen) == 4:
                await delete(sidecar, "t5")  # the row that the next page goes on from
                await delete(sidecar, "t3")  # one that is yet to come
            if not page["has_more"]:
                break
            after = {"after": page["next"]}
        assert seen == [row for row in expected if row != ("alice", "t3")]
        wrong = await sidecar.http.get("/v1/sessions", params={"parent_thread_id": "t"})
        assert wrong.status_code == 422
