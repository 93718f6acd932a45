"""Titles, tags, counts, usage and last activity: all of it the SDK's, nothing of it in the session map."""

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults import FaultyModel, think, tool
from tests.replicas import Know
from tests.server import Sidecar
from tests.transcripts import AGENTS, get, messages, metadata, repeat, settled, texts

TOKENS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
SECOND = "You have said 2 things. First: My name is Ada; last: I like tea"


@pytest.fixture
async def spoken(sidecar: Sidecar, thread: str, original: str) -> str:
    """A copy of it that a test may do anything to."""
    await copy(sidecar, original, thread)
    return thread


async def copy(sidecar: Sidecar, parent: str, thread: str, **fields: str) -> None:
    response = await sidecar.post("/v1/chat/fork", thread, from_thread_id=parent, **fields)
    assert response.status_code == 201, response.text


async def patch(sidecar: Sidecar, thread: str, **fields: object) -> httpx.Response:
    return await sidecar.http.patch("/v1/session", json={"thread_id": thread, "resource_id": "alice", **fields})


async def listed(sidecar: Sidecar, **query: object) -> list[dict[str, Any]]:
    """All pages of Alice's sessions."""
    found: list[dict[str, Any]] = []
    params = {"resource_id": "alice", **{name: str(value) for name, value in query.items()}}
    while True:
        page = (await sidecar.http.get("/v1/sessions", params=params)).json()
        found += page["data"]
        if not page["has_more"]:
            return found
        params["after"] = page["next"]


@pytest.mark.smoke
async def test_a_session_is_shown_with_all_that_its_transcript_tells(sidecar: Sidecar, original: str) -> None:
    transcript = await settled(sidecar, original)
    found = await metadata(sidecar, original)
    last = (await messages(sidecar, original))[-1]
    assert {name: found[name] for name in ("transcript", "first_prompt", "message_count", "size_bytes")} == {
        "transcript": "present",
        "first_prompt": "My name is Ada",
        "message_count": 4,
        "size_bytes": transcript.stat().st_size,
    }
    assert (found["title"], found["tag"]) == (None, None)
    assert found["last_message"] == {
        "uuid": last["uuid"],
        "type": "assistant",
        "preview": SECOND,
        "timestamp": last["timestamp"],
    }


@pytest.mark.smoke
async def test_without_metadata_no_transcript_is_touched(sidecar: Sidecar, spoken: str) -> None:
    whole = (await get(sidecar, "/v1/session", spoken)).json()
    (await settled(sidecar, spoken)).unlink()
    found = (await get(sidecar, "/v1/session", spoken, metadata="false")).json()
    assert found == {name: value for name, value in whole.items() if name != "metadata"}


async def test_a_missing_transcript_is_told_and_is_no_error(sidecar: Sidecar, spoken: str) -> None:
    (await settled(sidecar, spoken)).unlink()
    found = await metadata(sidecar, spoken)
    assert found.pop("transcript") == "missing"
    assert set(found.values()) == {None}
    page = await listed(sidecar, thread_id_prefix=spoken, include="metadata")
    assert page[0]["metadata"]["transcript"] == "missing"


async def test_a_volume_that_is_not_mounted_is_no_missing_transcript(
    a_sidecar: Callable[..., Sidecar], knows: Know, thread: str
) -> None:
    async with a_sidecar() as sidecar:
        await knows(sidecar, thread)
        claude = sidecar.home / "claude"
        claude.rename(sidecar.home / "elsewhere")
        claude.mkdir()
        for path in ("/v1/session", "/v1/session/messages"):
            response = await get(sidecar, path, thread)
            assert (response.status_code, response.json()["code"]) == (503, "transcripts_unavailable")
        assert (await get(sidecar, "/v1/session", thread, metadata="false")).status_code == 200


@pytest.mark.smoke
async def test_nothing_of_it_is_in_the_session_map(sidecar: Sidecar, spoken: str) -> None:
    await patch(sidecar, spoken, title="A title to be found", tag="a-tag-to-be-found")
    with contextlib.closing(sqlite3.connect(f"file:{sidecar.home}/sidecar.db?mode=ro", uri=True)) as database:
        rows = json.dumps(database.execute("SELECT * FROM session_mappings").fetchall())
    assert spoken in rows
    for text in ("to be found", "to-be-found", "My name is Ada", "I like tea"):
        assert text not in rows


# Usage


async def test_usage_is_the_sum_of_what_each_turn_has_cost(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    # Replies of several blocks are several entries in the transcript, each with the usage of the whole reply.
    model.script(think(), tool("One", {}))
    spent = dict.fromkeys(TOKENS, 0)
    for prompt in ("Think first", "Use a tool", "Just talk"):
        result = (await sidecar.chat(thread, prompt)).json()["result"]
        for name in TOKENS:
            spent[name] += result["usage"][name]
    assert spent["output_tokens"] > 0
    assert (await metadata(sidecar, thread))["usage"] == spent


async def test_a_fork_has_the_usage_that_it_inherited_and_its_own(
    sidecar: Sidecar, original: str, spoken: str, another_thread: str
) -> None:
    inherited = (await metadata(sidecar, original))["usage"]
    assert (await metadata(sidecar, spoken))["usage"] == inherited
    answer = await sidecar.post("/v1/chat/fork", another_thread, from_thread_id=original, message="Go on")
    own = answer.json()["result"]["usage"]
    expected = {name: inherited[name] + own[name] for name in TOKENS}
    assert (await metadata(sidecar, another_thread))["usage"] == expected


async def test_what_a_subagent_has_cost_is_part_of_it(
    a_sidecar: Callable[..., Sidecar], thread: str, model: FaultyModel, tmp_path: Path
) -> None:
    agents = tmp_path / "agents.toml"
    agents.write_text(AGENTS)
    async with a_sidecar(SIDECAR_AGENTS=str(agents)) as sidecar:
        model.script(
            tool("Agent", {"description": "look", "prompt": "Look around", "subagent_type": "general-purpose"})
        )
        await sidecar.say(thread, "Send somebody", agent="tools")
        transcript = await settled(sidecar, thread)
        replies: dict[str, dict[str, int]] = {}
        for file in (transcript, *transcript.with_suffix("").glob("subagents/*.jsonl")):
            for entry in map(json.loads, file.read_text().splitlines()):
                if entry["type"] == "assistant":
                    replies[entry["message"]["id"]] = entry["message"]["usage"]
        assert len(replies) >= 3  # the call, the subagent's answer, the answer
        usage = (await metadata(sidecar, thread))["usage"]
        assert usage == {name: sum(reply[name] for reply in replies.values()) for name in TOKENS}


# Title and tag


@pytest.mark.smoke
async def test_a_title_and_a_tag_are_set_changed_and_taken_away(sidecar: Sidecar, spoken: str) -> None:
    found = (await patch(sidecar, spoken, title="  About tea ", tag="drinks")).json()
    assert found == (await get(sidecar, "/v1/session", spoken)).json()
    assert (found["thread_id"], found["metadata"]["title"], found["metadata"]["tag"]) == (spoken, "About tea", "drinks")
    await patch(sidecar, spoken, title="About 🫖 and coffee")
    assert [(await metadata(sidecar, spoken))[name] for name in ("title", "tag")] == ["About 🫖 and coffee", "drinks"]
    await patch(sidecar, spoken, tag=None)
    assert [(await metadata(sidecar, spoken))[name] for name in ("title", "tag")] == ["About 🫖 and coffee", None]


async def test_a_title_and_a_tag_outlive_the_turns_that_come_after(sidecar: Sidecar, spoken: str) -> None:
    assert (await patch(sidecar, spoken, title="About tea", tag="drinks")).status_code == 200
    for number in range(3):  # more than what is read of a tail
        await sidecar.say(spoken, f"{number}: {'word ' * 10_000}")
    found = await metadata(sidecar, spoken)
    assert (found["title"], found["tag"], found["message_count"]) == ("About tea", "drinks", 10)


async def test_a_title_set_right_after_an_answer_is_not_lost_to_the_process_that_gave_it(
    sidecar: Sidecar, thread: str
) -> None:
    await sidecar.say(thread, "Hello")
    assert (await patch(sidecar, thread, title="At once")).status_code == 200
    await sidecar.at_rest()
    await sidecar.say(thread, "Hello again")
    assert (await metadata(sidecar, thread))["title"] == "At once"


async def test_a_title_waits_for_no_turn(sidecar: Sidecar, spoken: str, model: FaultyModel) -> None:
    async with sidecar.stream(spoken, "[[hold 3]]") as stream:
        await stream.until_text()
        response = await patch(sidecar, spoken, title="Too early")
        assert (response.status_code, response.json()["code"]) == (409, "thread_busy")
        model.release()
        await stream.rest()
    assert (await patch(sidecar, spoken, title="Now")).status_code == 200


@pytest.mark.smoke
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"title": " "},
        {"title": None},
        {"title": "x" * 257},
        {"title": "two\nlines"},
        {"title": "\ud800"},
        {"tag": ""},
        {"tag": "\u200b"},
        {"tag": 5},
        {"title": "T", "status": "idle"},
    ],
)
async def test_a_label_that_cannot_be_kept_is_refused(sidecar: Sidecar, spoken: str, fields: dict[str, Any]) -> None:
    transcript = await settled(sidecar, spoken)
    before = transcript.read_bytes()
    body = json.dumps({"thread_id": spoken, "resource_id": "alice", **fields})
    response = await sidecar.http.patch("/v1/session", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request"), response.text
    assert transcript.read_bytes() == before


async def test_a_title_needs_a_transcript_of_ones_own(sidecar: Sidecar, spoken: str, another_thread: str) -> None:
    for thread, resource in ((another_thread, "alice"), (spoken, "mallory")):
        response = await patch(sidecar, thread, resource_id=resource, title="T")
        assert (response.status_code, response.json()["code"]) == (404, "session_not_found")
    (await settled(sidecar, spoken)).unlink()
    response = await patch(sidecar, spoken, title="T")
    assert (response.status_code, response.json()["code"]) == (410, "session_missing")


async def test_a_torn_line_does_not_swallow_a_title_or_a_tag(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    transcript.write_bytes(transcript.read_bytes() + b'{"type":"user","uuid":"torn')
    await patch(sidecar, spoken, tag="drinks")
    assert transcript.read_bytes().splitlines()[-1].startswith(b'{"type":"tag"')
    assert (await metadata(sidecar, spoken))["tag"] == "drinks"


async def test_a_checkpoint_is_a_titled_fork_and_forking_it_restores_it(
    sidecar: Sidecar, spoken: str, another_thread: str
) -> None:
    await copy(sidecar, spoken, another_thread)
    await patch(sidecar, another_thread, title="Before the cake", tag="checkpoint")
    await sidecar.say(spoken, "And cake")
    (checkpoint,) = await listed(sidecar, parent_thread_id=spoken, include="metadata")
    assert (checkpoint["thread_id"], checkpoint["metadata"]["title"]) == (another_thread, "Before the cake")
    restored = f"{another_thread}-restored"
    await copy(sidecar, another_thread, restored)
    assert texts(await messages(sidecar, restored))[-1] == SECOND


@pytest.mark.parametrize("title", ["About tea", "--resume", '-x 🫖 "quoted"'])
async def test_a_fork_of_a_titled_thread_says_that_it_is_one_until_it_has_a_title_of_its_own(
    sidecar: Sidecar, spoken: str, another_thread: str, title: str
) -> None:
    await patch(sidecar, spoken, title=title)
    await copy(sidecar, spoken, f"{another_thread}-copy")
    await sidecar.post("/v1/chat/fork", another_thread, from_thread_id=spoken, message="And cake")
    for fork in (another_thread, f"{another_thread}-copy"):
        assert (await metadata(sidecar, fork))["title"] == f"{title} (fork)"
        await sidecar.say(fork, "Go on")
        assert (await metadata(sidecar, fork))["title"] == f"{title} (fork)"
        assert (await patch(sidecar, fork, title="My own")).json()["metadata"]["title"] == "My own"
    assert (await metadata(sidecar, spoken))["title"] == title


async def test_a_fork_of_a_thread_without_a_title_has_none(sidecar: Sidecar, spoken: str, another_thread: str) -> None:
    untitled = (await metadata(sidecar, "the original"))["title"]
    await sidecar.post("/v1/chat/fork", another_thread, from_thread_id="the original", message="And cake")
    assert untitled is None
    assert (await metadata(sidecar, another_thread))["title"] is None


# Damage and length


async def test_a_damaged_transcript_still_tells_what_it_can(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    whole = transcript.read_bytes().replace(b"I like tea", b"I like t\xff\xfea")
    transcript.write_bytes(whole.replace(b"\n", b"\n\x00broken\n", 3) + b'{"type":"assistant","uuid":"torn')
    found = await metadata(sidecar, spoken)
    assert (found["transcript"], found["first_prompt"], found["message_count"]) == ("present", "My name is Ada", 4)


async def test_the_last_message_is_what_somebody_said(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    await sidecar.say(thread, "Hello")
    async with sidecar.stream(thread, f"[[hold 0]] {'very ' * 100}long\n\nprompt") as stream:
        await (await model.requested(2)).holding()
        await sidecar.post("/v1/chat/interrupt", thread)
        await stream.rest()
    last = (await metadata(sidecar, thread))["last_message"]
    assert (last["type"], len(last["preview"])) == ("user", 200)
    assert last["preview"].startswith("[[hold 0]] very very")
    assert last["preview"].endswith("…")
    (row,) = await listed(sidecar, thread_id_prefix=thread, include="metadata")
    assert row["metadata"]["last_message"] == last


async def test_a_list_tells_of_long_histories_from_their_heads_and_tails(
    sidecar: Sidecar, spoken: str, another_thread: str
) -> None:
    await copy(sidecar, spoken, f"{spoken}-b")
    transcript = await settled(sidecar, spoken)
    transcript.write_bytes(repeat(transcript.read_bytes().splitlines(), 5000))
    await patch(sidecar, spoken, title="The long one")
    whole = await metadata(sidecar, spoken)
    assert whole["message_count"] == 5000
    newest, oldest = await listed(sidecar, thread_id_prefix=spoken, include="metadata")
    assert newest["thread_id"] == f"{spoken}-b"
    assert oldest["metadata"] == {**whole, "message_count": None, "usage": None}
    assert "metadata" not in (await listed(sidecar, thread_id_prefix=spoken))[0]


async def test_the_last_message_is_found_behind_a_long_tool_result(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    note = json.dumps({"type": "api-request-blob", "hash": "x" * 300_000})
    transcript.write_bytes(transcript.read_bytes() + note.encode() + b"\n")
    (row,) = await listed(sidecar, thread_id_prefix=spoken, include="metadata")
    assert row["metadata"]["last_message"]["preview"] == SECOND


# Lists


@pytest.mark.smoke
async def test_sessions_are_found_by_their_titles_and_first_prompts(
    sidecar: Sidecar, spoken: str, another_thread: str
) -> None:
    await patch(sidecar, spoken, title="Grüße aus ZÜRICH")
    await copy(sidecar, spoken, f"{spoken}-b")
    await patch(sidecar, f"{spoken}-b", title="Something else")

    async def found(text: str, **query: object) -> list[str]:
        rows = await listed(sidecar, q=text, thread_id_prefix=spoken, **query)
        return [row["thread_id"] for row in rows]

    assert await found("zürich") == [spoken]
    assert await found("NAME IS ada") == [f"{spoken}-b", spoken]
    assert await found("name is ada", limit=1, order="asc") == [spoken, f"{spoken}-b"]
    assert await found("nowhere") == []
    assert await found("%") == []
    rows = await listed(sidecar, q="zürich", include="metadata")
    assert rows[0]["metadata"]["title"] == "Grüße aus ZÜRICH"


@pytest.mark.smoke
async def test_a_search_that_makes_no_sense_is_refused(sidecar: Sidecar) -> None:
    for params in ({"q": " "}, {"q": "x" * 257}, {"include": "messages"}):
        response = await sidecar.http.get("/v1/sessions", params={"resource_id": "alice", **params})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


async def test_status_and_last_activity_follow_a_turn(sidecar: Sidecar, spoken: str, model: FaultyModel) -> None:
    before = (await get(sidecar, "/v1/session", spoken)).json()
    async with sidecar.stream(spoken, "[[hold 3]]") as stream:
        await stream.until_text()
        assert (await get(sidecar, "/v1/session", spoken)).json()["status"] == "running"
        model.release()
        await stream.rest()
    after = (await get(sidecar, "/v1/session", spoken)).json()
    assert (before["status"], after["status"]) == ("idle", "idle")
    assert before["updated_at"] < after["updated_at"]
    assert before["metadata"]["last_message"]["timestamp"] < after["metadata"]["last_message"]["timestamp"]


async def test_many_readers_at_once_are_all_answered(sidecar: Sidecar, spoken: str) -> None:
    found = await asyncio.gather(*(metadata(sidecar, spoken) for _ in range(50)))
    assert all(one == found[0] for one in found)
