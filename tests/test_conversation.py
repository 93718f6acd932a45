"""One conversation, end to end: remembered, streamed, rejoined, and mapped to one session all along."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import FaultyModel
from tests.modes import in_both_modes
from tests.server import Sidecar


@pytest.mark.smoke
async def test_the_second_message_is_answered_with_the_first_remembered(sidecar: Sidecar, thread: str) -> None:
    assert await sidecar.say(thread, "My name is Ada") == "You have said 1 thing: My name is Ada"
    assert await sidecar.say(thread, "Who am I?") == "You have said 2 things. First: My name is Ada; last: Who am I?"


@pytest.mark.smoke
async def test_a_restart_forgets_nothing(a_sidecar: Callable[..., Sidecar], thread: str) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.say(thread, "My name is Ada")
        session_id = await sidecar.session_id(thread)
        await sidecar.stop(signal.SIGTERM)
        await sidecar.restart()
        assert "First: My name is Ada" in await sidecar.say(thread, "Who am I?")
        assert await sidecar.session_id(thread) == session_id


async def test_kill_9_in_mid_answer_forgets_nothing_that_was_completed(
    a_sidecar: Callable[..., Sidecar], home: Path
) -> None:
    async with a_sidecar() as sidecar:
        async with sidecar.stream("t1", "Go on [[hold 3]]") as stream:
            await stream.until_text()
            await sidecar.stop(signal.SIGKILL)
        await sidecar.restart()
        assert "First: My name is Ada" in await sidecar.say("t1", "Who am I?")
        await sidecar.history("t1")


@pytest.mark.smoke
async def test_a_stream_says_its_session_first_then_the_sdks_messages_then_how_it_ended(
    sidecar: Sidecar, thread: str
) -> None:
    async with sidecar.stream(thread, "Hello") as stream:
        events = await stream.rest()
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert stream.response.headers["cache-control"] == "no-store, no-transform"
    assert stream.response.headers["x-accel-buffering"] == "no"
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    session, init, *_, result, end = events
    assert session.name == "session"
    assert session.data == {
        "type": "session",
        "thread_id": thread,
        "resource_id": "alice",
        "sdk_session_id": await sidecar.session_id(thread),
        "turn_id": session.data["turn_id"],
        "outcome": "started",
        "origin": "message",
        "replaced_session_id": None,
        "model": "live",
    }
    assert (init.name, init.data["subtype"]) == ("system", "init")
    assert all(event.data["type"] == event.name for event in events)
    assert (result.name, result.data["result"]) == ("result", "You have said 1 thing: Hello")
    assert stream.text == "You have said 1 thing: Hello"
    assert end.data == {
        "type": "end",
        "status": "completed",
        "sdk_session_id": session.data["sdk_session_id"],
        "error": None,
    }


@pytest.mark.smoke
async def test_the_frames_are_lines_of_ascii_ended_by_lf_alone(sidecar: Sidecar, thread: str) -> None:
    async with sidecar.stream(thread, "Grüße \u2028 😀") as stream:
        events = await stream.rest()
    assert stream.raw.isascii()
    assert "\r" not in stream.raw
    assert events[-2].data["result"] == "You have said 1 thing: Grüße \u2028 😀"


@pytest.mark.smoke
async def test_the_messages_are_the_clis_own_with_nothing_renamed_or_lost(sidecar: Sidecar, thread: str) -> None:
    async with sidecar.stream(thread, "Hello") as stream:
        events = await stream.rest()
    assistant = next(event.data for event in events if event.name == "assistant")
    kept = [json.loads(line) for line in sidecar.transcript(assistant["session_id"]).read_text().splitlines()]
    written = next(entry for entry in kept if entry["type"] == "assistant")
    for field in ("type", "uuid", "timestamp"):
        assert assistant[field] == written[field]
    assert assistant["message"]["id"] == written["message"]["id"]
    assert "modelUsage" in events[-2].data


async def test_silence_is_filled_with_pings(a_sidecar: Callable[..., Sidecar], thread: str, model: FaultyModel) -> None:
    async with a_sidecar(SIDECAR_PING_SECONDS="0.05") as sidecar, sidecar.stream(thread, "[[hold 1]]") as stream:
        await stream.until_text()
        await stream.until_ping()


@pytest.mark.smoke
async def test_without_a_stream_the_whole_turn_is_one_answer(sidecar: Sidecar, thread: str) -> None:
    response = await sidecar.chat(thread, "Hello")
    answer = response.json()
    assert list(answer) == ["session", "status", "text", "result"]
    assert answer["session"]["outcome"] == "started"
    assert answer["result"]["type"] == "result"
    assert (answer["status"], answer["text"]) == ("completed", "You have said 1 thing: Hello")


async def test_content_blocks_reach_the_model_as_they_are(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    pixel = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": pixel}}
    await sidecar.say(thread, [{"type": "text", "text": "What is this?"}, image])
    content = model.requests[-1].body["messages"][0]["content"]
    assert [block["type"] for block in content][:2] == ["text", "image"]
    assert content[0]["text"] == "What is this?"
    assert content[1]["source"]["data"]


@pytest.mark.smoke
async def test_a_turn_goes_on_without_its_reader_and_can_be_rejoined_where_it_was_left(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 3]]") as stream:
        await stream.until_text()
        seen = stream.events[-1].id
    model.release()
    async with sidecar.rejoin(thread, after=seen) as rest:
        events = await rest.rest()
    assert events[0].number == int(seen.rpartition("-")[2]) + 1
    assert stream.text + rest.text == "You have said 1 thing: [[hold 3]]"
    assert events[-1].data["status"] == "completed"
    async with sidecar.rejoin(thread) as replay:
        assert (await replay.rest())[0].name == "session"
        assert replay.text == stream.text + rest.text


@pytest.mark.smoke
async def test_two_readers_of_one_turn_read_the_same(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    async with sidecar.stream(thread, "[[hold 3]]") as one:
        await one.until("session")
        async with sidecar.rejoin(thread) as two:
            await two.until_text()
            model.release()
            assert [event.data for event in await one.rest()] == [event.data for event in await two.rest()]


@pytest.mark.smoke
async def test_there_is_nothing_to_rejoin_where_no_turn_ran(sidecar: Sidecar, thread: str) -> None:
    async with sidecar.rejoin(thread) as none:
        assert none.response.status_code == 204


@pytest.mark.smoke
async def test_a_named_turn_is_rejoined_or_none_is(sidecar: Sidecar, thread: str) -> None:
    turns = [(await sidecar.chat(thread, text)).json()["session"]["turn_id"] for text in ("Hello", "And another")]
    for turn_id in turns:
        async with sidecar.rejoin(thread, after=f"{turn_id}-1") as same:
            events = await same.rest()
        assert [event.number for event in events] == list(range(2, len(events) + 2))
        assert {event.id.rpartition("-")[0] for event in events} == {turn_id}
    async with sidecar.rejoin(thread, after="63df1c2f-0000-4000-8000-000000000000-1") as another:
        assert another.response.status_code == 204


async def test_nothing_is_left_after_the_end(sidecar: Sidecar, thread: str) -> None:
    async with sidecar.stream(thread, "Hello") as stream:
        end = (await stream.rest())[-1]
    async with sidecar.rejoin(thread, after=end.id) as nothing:
        assert nothing.response.status_code == 204


async def test_a_turn_whose_ids_a_reader_has_is_not_taken_for_the_next_one(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "Hello") as stream:
        first = await stream.rest()
    async with sidecar.stream(thread, "[[hold 3]]") as stream:
        await stream.until_text()
        async with sidecar.rejoin(thread, after=first[-1].id) as over:
            assert over.response.status_code == 204
        async with sidecar.rejoin(thread, after=first[-3].id) as rest:
            assert [event.id for event in await rest.rest()] == [event.id for event in first[-2:]]
        async with sidecar.rejoin(thread) as running:
            assert (await running.until("session")).data == stream.events[0].data
            model.release()
            assert (await running.rest())[-1].name == "end"


async def test_events_that_have_left_the_buffer_are_told_and_not_skipped(
    a_sidecar: Callable[..., Sidecar], thread: str
) -> None:
    async with a_sidecar(SIDECAR_REPLAY_EVENTS="16") as sidecar:
        await sidecar.say(thread, "[[burst 100]]")
        async with sidecar.rejoin(thread) as gone:
            problem = json.loads(gone.response.text)
            assert (gone.response.status_code, problem["code"]) == (410, "replay_gone")


async def test_an_ended_turn_is_forgotten_after_a_while(a_sidecar: Callable[..., Sidecar], thread: str) -> None:
    async with a_sidecar(SIDECAR_REPLAY_SECONDS="0") as sidecar:
        await sidecar.say(thread, "Hello")
        async with sidecar.rejoin(thread) as none:
            assert none.response.status_code == 204


async def test_a_missing_transcript_restarts_the_thread_and_says_so(sidecar: Sidecar, thread: str) -> None:
    await sidecar.say(thread, "My name is Ada")
    before = await sidecar.session_id(thread)
    sidecar.transcript(before).unlink()
    async with sidecar.stream(thread, "Who am I?") as stream:
        session = await stream.until("session")
        await stream.rest()
    assert (session.data["outcome"], session.data["replaced_session_id"]) == ("restarted", before)
    assert session.data["sdk_session_id"] == await sidecar.session_id(thread) != before
    assert stream.text == "You have said 1 thing: Who am I?"


@pytest.mark.smoke
async def test_a_missing_transcript_can_be_an_error_that_changes_nothing(
    sidecar: Sidecar, thread: str, original: str
) -> None:
    assert (await sidecar.post("/v1/chat/fork", thread, from_thread_id=original)).status_code == 201
    before = (await sidecar.session(thread)).json()
    sidecar.transcript(before["sdk_session_id"]).unlink()
    response = await sidecar.chat(thread, "Who am I?", if_missing="fail")
    assert (response.status_code, response.json()["code"]) == (410, "session_missing")
    assert (await sidecar.session(thread)).json() == before


@pytest.mark.parametrize("agent", ["default", "terse"])
async def test_an_agent_is_what_the_operator_says_it_is(
    a_sidecar: Callable[..., Sidecar],
    thread: str,
    model: FaultyModel,
    agent: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    agents = tmp_path_factory.mktemp("agents") / "agents.toml"
    agents.write_text('[default]\nsystem_prompt = "Be default."\n[terse]\nsystem_prompt = "Be terse."\n')
    async with a_sidecar("--agents", str(agents)) as sidecar:
        await sidecar.say(thread, "Hello", agent=agent)
    assert f"Be {agent}." in json.dumps(model.requests[-1].body["system"])


async def test_a_conversation_that_the_sdk_resets_is_followed_at_once(
    a_sidecar: Callable[..., Sidecar], home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agents = tmp_path_factory.mktemp("agents") / "agents.toml"
    agents.write_text("[default]\nverbatim_prompts = false\n")
    async with a_sidecar("--agents", str(agents)) as sidecar:
        before = await sidecar.session_id("t1")
        async with sidecar.stream("t1", "/clear") as stream:
            events = await stream.rest()
        sessions = [event.data for event in events if event.name == "session"]
        assert [session["outcome"] for session in sessions] == ["resumed", "reset"]
        assert sessions[1]["replaced_session_id"] == before
        assert await sidecar.session_id("t1") == sessions[1]["sdk_session_id"] != before
        assert "Ada" not in await sidecar.say("t1", "Who am I?")


async def test_mappings_are_listed_newest_first_in_pages(sidecar: Sidecar, thread: str, original: str) -> None:
    names = [f"{thread}-{letter}" for letter in "abc"]
    for name in names:
        assert (await sidecar.post("/v1/chat/fork", name, from_thread_id=original)).status_code == 201
    query = {"resource_id": "alice", "thread_id_prefix": f"{thread}-", "limit": "2"}
    first = (await sidecar.http.get("/v1/sessions", params=query)).json()
    assert (first["object"], first["has_more"]) == ("list", True)
    assert [row["thread_id"] for row in first["data"]] == names[:0:-1]
    second = (await sidecar.http.get("/v1/sessions", params={**query, "after": first["next"]})).json()
    assert [row["thread_id"] for row in second["data"]] == names[:1]
    assert (second["has_more"], second["next"]) == (False, None)
    oldest_first = (await sidecar.http.get("/v1/sessions", params={**query, "order": "asc"})).json()
    assert [row["thread_id"] for row in oldest_first["data"]] == names[:2]


async def test_a_session_is_shown_as_running_while_a_turn_runs(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 1]]") as stream:
        await stream.until_text()
        assert (await sidecar.session(thread)).json()["status"] == "running"
        model.release()
        await stream.rest()
    shown = (await sidecar.session(thread)).json()
    assert shown == {
        "object": "session",
        "thread_id": thread,
        "resource_id": "alice",
        "sdk_session_id": shown["sdk_session_id"],
        "parent_thread_id": None,
        "parent_message_id": None,
        "status": "idle",
        "created_at": shown["created_at"],
        "updated_at": shown["updated_at"],
    }
    assert shown["created_at"] < shown["updated_at"]
    assert shown["created_at"].endswith("Z")


async def test_a_deleted_mapping_is_gone_and_the_transcript_stays(sidecar: Sidecar, thread: str) -> None:
    await sidecar.say(thread, "Hello")
    session_id = await sidecar.session_id(thread)
    key = {"thread_id": thread, "resource_id": "alice"}
    assert (await sidecar.http.delete("/v1/session", params=key)).status_code == 204
    assert (await sidecar.session(thread)).status_code == 404
    assert (await sidecar.http.delete("/v1/session", params=key)).status_code == 204
    assert sidecar.transcript(session_id).exists()
    assert await sidecar.say(thread, "Hello again") == "You have said 1 thing: Hello again"


async def test_a_thread_with_a_running_turn_is_not_deleted(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    async with sidecar.stream(thread, "[[hold 1]]") as stream:
        await stream.until_text()
        key = {"thread_id": thread, "resource_id": "alice"}
        response = await sidecar.http.delete("/v1/session", params=key)
        assert (response.status_code, response.json()["code"]) == (409, "thread_busy")
        model.release()
        await stream.rest()
    assert (await sidecar.session(thread)).status_code == 200


@in_both_modes
async def test_another_resources_thread_is_as_if_it_were_not_there(sidecar: Sidecar, thread: str) -> None:
    await sidecar.say(thread, "Hello")
    mallory = f"mallory of {thread}"
    key = {"thread_id": thread, "resource_id": mallory}
    assert (await sidecar.session(thread, mallory)).status_code == 404
    assert (await sidecar.http.post("/v1/chat/interrupt", json=key)).status_code == 404
    assert (await sidecar.http.get("/v1/chat", params=key)).status_code == 204
    assert (await sidecar.http.get("/v1/sessions", params={"resource_id": mallory})).json()["data"] == []
    await sidecar.http.delete("/v1/session", params=key)
    assert (await sidecar.session(thread)).status_code == 200


@pytest.mark.parametrize("event_id", ["seven", "7", "63df1c2f-0000-4000-8000-000000000000", "63DF1C2F-1"])
async def test_a_last_event_id_that_is_none_of_ours_is_refused(sidecar: Sidecar, original: str, event_id: str) -> None:
    before = await sidecar.history(original)
    key, headers = {"thread_id": original, "resource_id": "alice"}, {"last-event-id": event_id}
    for response in (
        await sidecar.http.get("/v1/chat", params=key, headers=headers),
        await sidecar.http.post("/v1/chat", json={**key, "message": "Hello"}, headers=headers),
    ):
        assert (response.status_code, response.json()["errors"][0]["field"]) == (422, "Last-Event-ID")
    assert await sidecar.history(original) == before
