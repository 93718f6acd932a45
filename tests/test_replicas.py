"""Several replicas, one truth: whichever of them is asked, a thread is one conversation, with one turn at a time."""

import asyncio
import json
import os
import signal
from collections.abc import Coroutine
from typing import Any

import pytest

from tests.ai_sdk import chunks, load, post, texts, told
from tests.faults import FaultyModel, hold
from tests.figures import PREFIX, families, figure, until
from tests.modes import COLD, KEPT
from tests.replicas import SECRET, Know, Make, Replica, get, let_go, messages, until_gone, when_free
from tests.server import SECONDS, a_moment, followed

THREAD = {"thread_id": "t", "resource_id": "alice"}


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
async def test_a_conversation_goes_on_on_whichever_replica_it_lands(some_replicas: Make, warm: bool) -> None:
    async with some_replicas(2, **(KEPT if warm else COLD)) as replicas:
        for number in range(1, 6):
            assert f"You have said {number} thing" in await replicas.any.say("t", f"thing {number}")
        for replica in replicas.members:
            heard = [text for role, text in await messages(replica, "t") if role == "user"]
            assert heard == [f"thing {number}" for number in range(1, 6)]


async def test_a_replica_that_has_the_thread_again_keeps_its_process(some_replicas: Make) -> None:
    async with some_replicas(2, **KEPT) as replicas:
        for message in ("one", "two"):
            await replicas[0].say("t", message)
        await let_go(replicas[1], "t")
        await replicas[1].say("t", "three")
        await let_go(replicas[0], "t")
        await replicas[0].say("t", "four")
        async with asyncio.timeout(SECONDS):
            while len(came := [line["process"] for line in replicas[0].logged("turn")]) < 3:
                await a_moment()
    assert came[1:] == ["warm", "cold"]  # the first one takes what there is by then


async def test_a_turn_asks_the_session_map_three_times(some_replicas: Make) -> None:
    async def asked() -> dict[str, float]:
        (statements,) = (one for one in await families(replica) if one.name == f"{PREFIX}store_statement_seconds")
        return {one.labels["operation"]: one.value for one in statements.samples if one.name.endswith("_count")}

    async with some_replicas(1, **KEPT, SIDECAR_LEASE_SECONDS="60") as (replica,):
        await replica.say("t", "hello")
        seen = []
        for number in range(2, 5):  # what is stored beside the turns, every other second, has statements of its own
            await until(replica, "store_statement_seconds_count", number - 1, operation="release")
            before = await asked()
            await replica.say("t", "and again")
            await until(replica, "store_statement_seconds_count", number, operation="release")
            seen.append(
                {name: more for name, count in (await asked()).items() if (more := count - before.get(name, 0))}
            )
        assert {"acquire": 1, "replace": 1, "release": 1} in seen


async def test_the_end_of_a_turn_says_that_it_is_stored(some_replicas: Make) -> None:
    async with some_replicas(1, **KEPT) as replicas:
        async with replicas[0].stream("t", "hello") as stream:
            end = (await stream.rest())[-1].data
        assert (await replicas[0].chat("t", "again")).json()["stored"] is True
    assert (end["status"], end["stored"]) == ("completed", True)


async def test_a_turn_that_runs_elsewhere_makes_the_thread_busy_everywhere(
    some_replicas: Make, model: FaultyModel
) -> None:
    async with some_replicas(2) as (one, other):
        async with one.stream("t", "[[hold 1]]") as stream:
            await stream.until_text()
            busy = await other.chat("t", "me too")
            assert (busy.status_code, busy.json()["code"]) == (409, "thread_busy")
            assert (await get(other, "/v1/session", "t", metadata="false")).json()["status"] == "running"
            assert not other.logged("turn")  # it is logged where it ran, and was refused
            (asked,) = [line for line in other.logged("request") if line["path"] == "/v1/chat"]
            assert asked["forwarded"] is True
            listed = await other.http.get("/v1/sessions", params={"resource_id": "alice"})
            assert [session["status"] for session in listed.json()["data"]] == ["running"]
            model.release()
            await stream.rest()
        assert "You have said 2 things" in await other.say("t", "now")


async def test_a_turn_can_be_joined_from_any_replica_while_it_runs_and_after_it(
    some_replicas: Make, model: FaultyModel
) -> None:
    async with some_replicas(2) as (one, other):
        async with one.stream("t", "[[hold 1]] joined") as stream:
            await stream.until_text()
            last = stream.events[-1].id
            async with other.rejoin("t", after=last) as joined:
                model.release()
                events = await joined.rest()
            await stream.rest()
        assert [event.id for event in events] == [event.id for event in stream.events][-len(events) :]
        assert events[-1].name == "end"
        async with other.rejoin("t") as again:
            assert [event.id for event in await again.rest()] == [event.id for event in stream.events]
        async with other.rejoin("t", after=events[-1].id) as over:
            assert over.response.status_code == 204


async def test_a_chat_of_the_ai_sdk_goes_on_on_whichever_replica_it_lands(
    some_replicas: Make, model: FaultyModel
) -> None:
    chat, of_alice = "a/b", {"x-resource-id": "alice"}
    async with some_replicas(2) as (one, other):
        assert told((await post(one, chat, [], "one")).text) == "You have said 1 thing: one"
        await let_go(other, chat)
        seen = (await load(other, chat)).json()
        model.script(hold(1))
        sending = asyncio.create_task(post(other, chat, seen, "two"))
        await (await model.requested(2)).holding()
        resuming = asyncio.create_task(one.http.get("/v1/ai-sdk/chat/a%2Fb/stream", headers=of_alice))
        await one.settle()
        shown = (await load(one, chat)).json()
        assert texts(shown)[2:] == [("user", "two")]
        busy = await post(one, chat, seen, "at once")
        assert (busy.status_code, busy.json()["code"]) == (409, "thread_busy")
        model.release()
        assert chunks((await sending).text) == chunks((await resuming).text)
        assert resuming.result().headers["x-vercel-ai-ui-message-stream"] == "v1"
        seen = (await load(one, chat)).json()
        await let_go(one, chat)
        assert told((await post(one, chat, seen, "three")).text).startswith("You have said 3 things")
        await let_go(other, chat)
        edited = await post(other, chat, seen[:2], "two, edited")
        assert told(edited.text) == "You have said 2 things. First: one; last: two, edited"


async def test_a_turn_can_be_stopped_from_any_replica(some_replicas: Make) -> None:
    async with some_replicas(2) as (one, other), one.stream("t", "[[hold 1]]") as stream:
        await stream.until_text()
        stopped = await other.http.post("/v1/chat/interrupt", json=THREAD)
        assert (stopped.status_code, stopped.json()["status"]) == (200, "interrupted")
        assert (await stream.rest())[-1].data["status"] == "interrupted"


async def test_a_message_waits_for_its_turn_on_another_replica(some_replicas: Make, model: FaultyModel) -> None:
    async with some_replicas(2) as (one, other):
        async with one.stream("t", "first [[hold 1]]") as stream:
            await stream.until_text()
            waiting = asyncio.create_task(other.say("t", "second", multitask_strategy="enqueue"))
            await other.settle()
            model.release()
            await stream.rest()
        assert "You have said 2 things" in await waiting


async def test_a_message_can_take_over_from_a_turn_on_another_replica(some_replicas: Make) -> None:
    async with some_replicas(2) as (one, other), one.stream("t", "first [[hold 1]]") as stream:
        await stream.until_text()
        assert "last: second" in await other.say("t", "second", multitask_strategy="interrupt")
        assert (await stream.rest())[-1].data["status"] == "interrupted"


async def test_a_thread_is_forked_on_any_replica_with_and_without_a_message(some_replicas: Make, knows: Know) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        fork = {"resource_id": "alice", "from_thread_id": "t"}
        made = await other.http.post("/v1/chat/fork", json={**fork, "thread_id": "copy"})
        assert made.status_code == 201
        assert "First: My name is Ada" in await one.say("copy", "who?")
        said = await other.post("/v1/chat/fork", "branch", from_thread_id="t", message="and I?")
        assert "First: My name is Ada" in said.json()["text"]
        taken = await one.http.post("/v1/chat/fork", json={**fork, "thread_id": "branch"})
        assert (taken.status_code, taken.json()["code"]) == (409, "thread_exists")
        assert "You have said 2 things" in await one.say("t", "still me")


@pytest.mark.parametrize("how", ["said", "adopted", "copied"])
async def test_a_fork_of_a_turn_that_runs_elsewhere_has_what_came_before_it(
    some_replicas: Make, model: FaultyModel, knows: Know, how: str
) -> None:
    fork = {"resource_id": "alice", "from_thread_id": "t", "thread_id": "copy"}
    async with some_replicas(2) as (one, other):
        if how == "said":
            await one.say("t", "My name is Ada")
        elif how == "adopted":
            await knows(one, "t")
        else:
            await knows(one, "first")
            made = await one.http.post("/v1/chat/fork", json=fork | {"from_thread_id": "first", "thread_id": "t"})
            assert made.status_code == 201
        async with one.stream("t", "[[hold 1]] a secret") as stream:
            await stream.until_text()
            assert (await other.http.post("/v1/chat/fork", json=fork)).status_code == 201
            assert [text for role, text in await messages(other, "copy") if role == "user"] == ["My name is Ada"]
            model.release()
            await stream.rest()


async def test_titles_and_lists_are_the_same_everywhere(some_replicas: Make, knows: Know) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        titled = await other.http.patch("/v1/session", json={**THREAD, "title": "About Ada", "tag": "people"})
        assert titled.status_code == 200
        for replica in (one, other):
            found = (await get(replica, "/v1/session", "t")).json()["metadata"]
            assert (found["title"], found["tag"], found["message_count"]) == ("About Ada", "people", 2)
            listed = await replica.http.get("/v1/sessions", params={"resource_id": "alice", "include": "metadata"})
            (session,) = listed.json()["data"]
            assert session["metadata"]["title"] == "About Ada"
            assert session["metadata"]["first_prompt"] == "My name is Ada"


async def test_a_deletion_stops_the_turn_wherever_it_runs_and_leaves_nothing(some_replicas: Make) -> None:
    async with some_replicas(2) as (one, other), one.stream("t", "[[hold 1]]") as stream:
        await stream.until_text()
        refused = await other.http.delete("/v1/session", params=THREAD)
        assert (refused.status_code, refused.json()["code"]) == (409, "thread_busy")
        query = {**THREAD, "transcript": "delete", "force": "true"}
        assert (await other.http.delete("/v1/session", params=query)).status_code == 204
        assert (await stream.rest())[-1].data["error"]["code"] == "thread_deleted"
        assert (await get(one, "/v1/session", "t")).status_code == 404


async def test_a_resource_is_erased_wherever_its_turns_run(some_replicas: Make, knows: Know) -> None:
    async with some_replicas(2) as (one, other), one.stream("t", "[[hold 1]]") as stream:
        await stream.until_text()
        await knows(other, "u")
        query = {"resource_id": "alice", "transcript": "delete"}
        busy = await other.http.delete("/v1/sessions", params=query)
        assert (busy.status_code, busy.json()["code"]) == (409, "thread_busy")
        gone = await other.http.delete("/v1/sessions", params={**query, "force": "true"})
        assert gone.status_code == 200
        await stream.rest()
        for replica in (one, other):
            assert (await replica.http.get("/v1/sessions", params={"resource_id": "alice"})).json()["data"] == []


async def test_what_one_replica_deletes_is_soon_on_no_disk_of_the_others(some_replicas: Make, knows: Know) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        session_id = await one.session_id("t")
        await messages(other, "t")
        copy = other.transcript(session_id)
        query = {**THREAD, "transcript": "delete"}
        await let_go(other, "t")
        assert (await other.http.delete("/v1/session", params=query)).status_code == 204
        assert not copy.exists()
        await one.restart_cleanly()  # which asks for what was deleted meanwhile, as it does each minute
        await until_gone(one, session_id)


async def test_what_a_deletion_has_kept_is_adopted_by_any_replica(some_replicas: Make, knows: Know) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        session_id = await one.session_id("t")
        assert (await one.http.delete("/v1/session", params=THREAD)).status_code == 204
        adopted = await other.http.put("/v1/session", json={**THREAD, "thread_id": "u", "sdk_session_id": session_id})
        assert adopted.status_code == 201, adopted.text
        assert "First: My name is Ada" in await one.say("u", "who?")


async def test_of_many_first_messages_at_once_on_all_replicas_one_runs(some_replicas: Make, model: FaultyModel) -> None:
    async with some_replicas(3) as replicas:
        asking = {asyncio.create_task(replicas.any.chat("t", f"[[hold 1]] {number}")) for number in range(12)}
        waiting = asking
        while len(waiting) > 1:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await model.requested()
        model.release()
        answers = await asyncio.gather(*asking)
        assert sorted(answer.status_code for answer in answers) == [200] + [409] * 11
        assert len(model.requests) == 1
        assert len(await messages(replicas.any, "t")) == 2


async def test_a_reader_who_leaves_another_replica_stops_a_turn_that_is_to_be_cancelled_then(
    some_replicas: Make,
) -> None:
    async with some_replicas(2) as (one, other):
        async with one.stream("t", "[[hold 1]]", on_disconnect="cancel") as stream:
            await stream.until_text()
            async with other.rejoin("t") as joined:
                await joined.until_text()
        await one.until_logged("turn", status="interrupted")


# A replica that is gone


async def test_the_thread_of_a_replica_that_was_killed_is_free_soon_and_has_what_was_said(
    some_replicas: Make, knows: Know
) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        async with one.stream("t", "[[hold 1]] killed") as stream:
            await stream.until_text()
            await one.kill()
        answer = await other.chat("t", "who?")
        assert (answer.status_code, answer.json()["code"]) == (503, "replica_unreachable")
        assert int(answer.headers["retry-after"]) > 0
        assert "replica" in answer.json()["title"]
        assert str(one.http.base_url) not in answer.text
        said = await when_free(other, "t", "who am I?")
        assert "First: My name is Ada" in said


async def test_what_was_said_elsewhere_is_not_written_over_while_a_thread_is_had_again(
    some_replicas: Make, model: FaultyModel
) -> None:
    def statements(kind: str) -> Coroutine[None, None, float]:
        return figure(one, "store_statement_seconds_count", operation=kind)

    async with some_replicas(2, **KEPT) as (one, other):
        await one.say("t", "I am Ada")
        (process,) = one.cli_processes()
        await let_go(other, "t")
        assert "You have said 2 things" in await other.say("t", "and I like chess")
        await let_go(one, "t")
        os.kill(process, signal.SIGSTOP)  # it takes its time to go, and the thread is had before it has gone
        (file,) = one.home.glob("claude/projects/*/*.jsonl")
        with file.open("a") as transcript:
            transcript.write(
                json.dumps({"type": "last-prompt", "lastPrompt": "x" * 100_000}) + "\n"
            )  # as on its way out
        async with one.stream("u", "[[hold 1]]") as busy:
            await busy.until_text()
            had = await statements("acquire")
            saying = asyncio.create_task(one.say("t", "who am I?"))
            while await statements("acquire") == had:
                await a_moment()
            looked = await statements("get")
            while await statements("get") < looked + 2:  # what is written is stored meanwhile, of whatever is had
                await a_moment()
            os.kill(process, signal.SIGCONT)
            assert "You have said 3 things" in await saying
            model.release()
            await busy.rest()
        assert [text for role, text in await messages(other, "t") if role == "user"] == [
            "I am Ada", "and I like chess", "who am I?"
        ]  # fmt: skip


async def test_a_replica_that_was_killed_goes_on_at_once_when_it_is_back(some_replicas: Make, knows: Know) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        async with one.stream("t", "[[hold 1]] killed") as stream:
            await stream.until_text()
            await one.kill()
        await one.restart()
        assert "First: My name is Ada" in await one.say("t", "who?")
        assert "First: My name is Ada" in await other.say("t", "and now?")


async def test_a_replica_that_stood_still_loses_its_thread_and_what_it_says_is_refused(
    some_replicas: Make, knows: Know, model: FaultyModel
) -> None:
    async with some_replicas(2) as (one, other):
        await knows(one, "t")
        async with one.stream("t", "[[hold 1]] frozen") as stream:
            await stream.until_text()
            with one.frozen():
                said = await when_free(other, "t", "who am I?")
                assert "First: My name is Ada" in said
            model.release()
            end = (await stream.rest())[-1].data
        assert end["status"] == "failed"
        assert end["error"]["code"] == "lease_lost"
        assert "who am I?" in [text for _, text in await messages(one, "t")]
        assert "last: at last" in await one.say("t", "at last")
        assert await messages(one, "t") == await messages(other, "t")


async def test_a_replica_that_ends_leaves_nothing_to_wait_for(some_replicas: Make) -> None:
    async with some_replicas(2) as (one, other):
        async with one.stream("t", "[[hold 1]] I am Ada") as stream:
            await stream.until_text()
            ending = asyncio.create_task(one.stop(signal.SIGTERM))
            end = (await stream.rest())[-1].data
            await ending
        assert end["status"] == "interrupted"
        assert "First: [[hold 1]] I am Ada" in await other.say("t", "who?")


async def test_only_replicas_are_let_pass_and_only_once(some_replicas: Make) -> None:
    async with some_replicas(2) as (one, other), one.stream("t", "[[hold 1]]") as stream:
        await stream.until_text()
        stranger = {"X-Sidecar-Forwarded": "some other secret"}
        refused = await other.http.get("/v1/session", params=THREAD, headers=stranger)
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
        once = await other.http.post(
            "/v1/chat", json={**THREAD, "message": "hi"}, headers={"X-Sidecar-Forwarded": SECRET}
        )
        assert (once.status_code, once.json()["code"]) == (503, "replica_unreachable")


# What happens elsewhere


async def test_a_reader_on_one_replica_is_told_what_happens_on_all(some_replicas: Make, model: FaultyModel) -> None:
    async with some_replicas(2) as (one, other), followed(one, resource_id="alice") as stream:
        await stream.until("reset")
        await stream.until("reset")  # the other one is heard
        async with other.stream("t", "[[hold 1]]") as turn:
            assert (await stream.until("created")).data["thread_id"] == "t"
            started = await stream.until("turn_started")
            assert (await get(one, "/v1/session", "t", metadata="false")).json()["status"] == "running"
            await turn.until_text()
            model.release()
            await turn.rest()
        ended = await stream.until("turn_ended")
        assert ended.data["turn_id"] == started.data["turn_id"]
        assert (await get(one, "/v1/session", "t", metadata="false")).json()["status"] == "idle"
        await other.say("u", "hello", resource_id="bob")
        await one.say("t", "hello again")
        await stream.until("turn_ended")
        assert (await other.http.patch("/v1/session", json={**THREAD, "title": "Mine"})).status_code == 200
        await stream.until("titled")
        assert (await get(one, "/v1/session", "t")).json()["status"] == "idle"
        async with followed(other, resource_id="alice", after=started.id) as there:  # it is another feed
            await there.until("reset")
            await there.until("reset")
            erased = await other.http.delete("/v1/sessions", params={"resource_id": "alice"})
            assert erased.json()["count"] == 1
            await stream.until("deleted")
            await there.until("deleted")
    names = [event.name for event in stream.events]
    assert names == ["reset", "reset", "created", *["turn_started", "turn_ended"] * 2, "titled", "deleted"]
    assert len({event.id.rpartition("-")[0] for event in stream.events}) == 1
    assert [event.name for event in there.events] == ["reset", "reset", "deleted"]


async def test_a_replica_that_is_gone_costs_a_reader_elsewhere_a_look_at_the_list_when_its_turns_are_over(
    some_replicas: Make,
) -> None:
    async with some_replicas(2) as (one, other), followed(one, resource_id="alice") as stream:
        await stream.until("reset")
        await stream.until("reset")
        async with other.stream("t", "[[hold 1]]") as turn:
            await turn.until_text()
            await stream.until("turn_started")
            await other.kill()
        await stream.until("reset")  # what it told last may not have come
        await stream.until("reset")  # and by now nothing of its runs
        assert (await get(one, "/v1/session", "t", metadata="false")).json()["status"] == "idle"
        await other.restart()
        await stream.until("reset")
        await when_free(one, "t", "hello")
        assert (await stream.until("turn_ended")).data["status"] == "completed"


async def test_replicas_hear_each_other_only_while_somebody_reads(some_replicas: Make) -> None:
    def heard(replica: Replica) -> list[Any]:
        return [line for line in replica.logged("request") if line["path"] == "/v1/events"]

    async with some_replicas(2, **KEPT) as (one, other):
        async with followed(one) as stream:
            await stream.until("reset")
            await stream.until("reset")
            await other.say("t", "hello")
            last = await stream.until("turn_ended")
        async with asyncio.timeout(SECONDS):
            while not heard(other):  # it is logged at its end
                await a_moment()
        await other.say("t", "while nobody reads")
        assert len(heard(one)) == 1
        async with followed(one, after=last.id) as stream:
            await stream.until("turn_started")
            assert (await stream.until("turn_ended")).name == "turn_ended"
    assert [event.name for event in stream.events] == ["turn_started", "turn_ended"]
