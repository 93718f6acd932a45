"""A thread's history is read from the SDK's transcript, whatever its length and whatever has happened to the file."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from session_sidecar.agent.transcripts.reading.chain import conversation, entries_of
from tests.faults import FaultyModel, fail, tool, tools
from tests.modes import KEPT
from tests.server import SECONDS, Sidecar
from tests.transcripts import AGENTS, get, messages, repeat, settled, texts

FIRST, SECOND = (
    "You have said 1 thing: My name is Ada",
    "You have said 2 things. First: My name is Ada; last: I like tea",
)


@pytest.fixture
async def spoken(sidecar: Sidecar, thread: str, original: str) -> str:
    """A copy of it that a test may do anything to."""
    assert (await sidecar.post("/v1/chat/fork", thread, from_thread_id=original)).status_code == 201
    return thread


@pytest.fixture
async def skilled(a_sidecar: Callable[..., Sidecar], tmp_path: Path) -> AsyncIterator[Sidecar]:
    """A sidecar whose agents have commands, tools and subagents."""
    agents = tmp_path / "agents.toml"
    agents.write_text(AGENTS)
    async with a_sidecar(SIDECAR_AGENTS=str(agents), **KEPT) as sidecar:
        yield sidecar


@pytest.mark.smoke
async def test_the_history_has_what_was_said_when_and_after_what(sidecar: Sidecar, original: str) -> None:
    data = await messages(sidecar, original)
    assert texts(data) == ["My name is Ada", FIRST, "I like tea", SECOND]
    assert [message["type"] for message in data] == ["user", "assistant"] * 2
    assert [message["parent_uuid"] for message in data] == [None, *(message["uuid"] for message in data[:-1])]
    times = [message["timestamp"] for message in data]
    assert times == sorted(times)
    assert all(time.endswith("Z") for time in times)
    assert not any(message["synthetic"] for message in data)
    assert data[1]["message"]["role"] == "assistant"


@pytest.mark.smoke
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_give_every_message_once_and_each_page_is_oldest_first(
    sidecar: Sidecar, spoken: str, order: str
) -> None:
    whole = [message["uuid"] for message in await messages(sidecar, spoken)]
    first = (await get(sidecar, "/v1/session/messages", spoken, limit=3, order=order)).json()
    second = (await get(sidecar, "/v1/session/messages", spoken, limit=3, order=order, after=first["next"])).json()
    assert (first["has_more"], second["has_more"], second["next"]) == (True, False, None)
    pages = [[message["uuid"] for message in page["data"]] for page in (first, second)]
    assert pages == ([whole[:3], whole[3:]] if order == "asc" else [whole[1:], whole[:1]])


async def test_a_page_goes_on_where_it_was_while_the_conversation_grows(sidecar: Sidecar, spoken: str) -> None:
    page = (await get(sidecar, "/v1/session/messages", spoken, limit=2)).json()
    await sidecar.say(spoken, "And cake")
    assert texts(await messages(sidecar, spoken, after=page["next"]))[:2] == ["I like tea", SECOND]


async def test_a_prompt_is_there_while_it_is_being_answered(sidecar: Sidecar, spoken: str, model: FaultyModel) -> None:
    async with sidecar.stream(spoken, "[[hold 3]]") as stream:
        await stream.until_text()
        async with asyncio.timeout(SECONDS):
            while (said := texts(await messages(sidecar, spoken)))[4:5] != ["[[hold 3]]"]:
                pass  # the CLI writes it about when the answer begins
        assert said[:4] == ["My name is Ada", FIRST, "I like tea", SECOND]
        model.release()
        await stream.rest()


async def test_a_thread_in_the_first_moment_of_its_first_turn_has_no_messages_yet(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 1]]") as stream:
        response = await get(sidecar, "/v1/session/messages", thread)
        assert response.status_code == 200
        assert texts(response.json()["data"]) in ([], ["[[hold 1]]"])
        await stream.until_text()
        model.release()
        await stream.rest()


# What nobody has said


async def test_the_marker_of_an_interrupt_is_synthetic_and_the_partial_answer_is_not(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    async with sidecar.stream(thread, "[[hold 3]]") as stream:
        await stream.until_text("said")
        await sidecar.post("/v1/chat/interrupt", thread)
        await stream.rest()
    prompt, partial, marker = await messages(sidecar, thread)
    assert texts([marker]) == ["[Request interrupted by user]"]
    assert [message["synthetic"] for message in (prompt, partial, marker)] == [False, False, True]


async def test_a_person_who_writes_like_the_bookkeeping_is_a_person(sidecar: Sidecar, thread: str) -> None:
    for prompt in ("<command-name>/compact</command-name>", "[Request interrupted by user]"):
        await sidecar.say(thread, prompt)
    assert not any(message["synthetic"] for message in await messages(sidecar, thread))


async def test_the_text_of_an_api_error_is_synthetic(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    await sidecar.say(thread, "Hello")
    model.default = fail(400)
    await sidecar.chat(thread, "This fails")
    *_, prompt, error = await messages(sidecar, thread)
    assert (texts([prompt]), prompt["synthetic"]) == (["This fails"], False)
    assert (error["type"], error["synthetic"]) == ("assistant", True)


# Tools and subagents


async def test_parallel_tool_calls_are_all_there_each_result_after_its_call(
    skilled: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(tools(("Bash", {"command": "echo one"}), ("Bash", {"command": "echo two"})))
    await skilled.say(thread, "Use your tools", agent="tools")
    data = await messages(skilled, thread)
    assert texts(data)[:-1] == ["Use your tools", *["[tool_use]"] * 2, *["[tool_result]"] * 2]
    place = {message["uuid"]: number for number, message in enumerate(data)}
    assert all(place[message["parent_uuid"]] < place[message["uuid"]] for message in data[1:])
    calls = {block["id"] for message in data[1:3] for block in message["message"]["content"]}
    results = {block["tool_use_id"] for message in data[3:5] for block in message["message"]["content"]}
    assert calls == results  # these come in the order in which the tools were done


async def test_what_a_subagent_says_to_itself_is_not_part_of_the_conversation(
    skilled: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(tool("Agent", {"description": "look", "prompt": "Look around", "subagent_type": "general-purpose"}))
    await skilled.say(thread, "Send somebody", agent="tools")
    transcript = await settled(skilled, thread)
    (inner,) = transcript.with_suffix("").glob("subagents/*.jsonl")
    assert "Look around" in inner.read_text()
    data = await messages(skilled, thread)
    assert texts(data)[:3] == ["Send somebody", "[tool_use]", "[tool_result]"]
    assert "Look around" not in texts(data)
    notes = [message for message in data if "<task-notification>" in texts([message])[0]]
    assert all(note["synthetic"] for note in notes)


async def test_a_subagents_lines_within_the_transcript_stay_out_too(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    entries = [json.loads(line) for line in transcript.read_text().splitlines()]
    aside = [{**entry, "isSidechain": True} for entry in entries if entry["type"] in ("user", "assistant")]
    for number, entry in enumerate(aside):  # as older CLIs wrote them
        entry.update(uuid=f"aside-{number}", parentUuid=f"aside-{number - 1}" if number else None)
    with transcript.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in aside[1:])  # the first line of it is lost, besides
        cake = {"role": "user", "content": "And cake"}
        file.write(json.dumps({"type": "user", "uuid": "cake", "parentUuid": "lost", "message": cake}) + "\n")
    assert texts(await messages(sidecar, spoken)) == ["My name is Ada", FIRST, "I like tea", SECOND, "And cake"]


# Compaction


async def test_a_compaction_begins_the_history_anew_and_what_came_before_is_kept(skilled: Sidecar, thread: str) -> None:
    for prompt in ("My name is Ada", "I like tea", "/compact", "After it"):
        response = await skilled.chat(thread, prompt, agent="commands")
        assert response.json()["status"] == "completed"
    since = await messages(skilled, thread)
    said = [message for message in since if not message["synthetic"]]
    assert texts(said)[0] == "After it"
    assert texts(since)[0].startswith("This session is being continued")
    whole = await messages(skilled, thread, include="compacted")
    assert texts(whole)[:4] == ["My name is Ada", FIRST, "I like tea", SECOND]
    assert [message["uuid"] for message in whole[4:]] == [message["uuid"] for message in since]
    assert (since[0]["parent_uuid"], whole[4]["parent_uuid"]) == (None, whole[3]["uuid"])
    # The line of the boundary between them may be lost like any other.
    transcript = await settled(skilled, thread)
    lines = transcript.read_bytes().splitlines(keepends=True)
    transcript.write_bytes(b"".join(b"\x00\n" if b"compact_boundary" in line else line for line in lines))
    assert [m["uuid"] for m in await messages(skilled, thread)] == [m["uuid"] for m in since]
    again = await messages(skilled, thread, include="compacted")
    assert [m["uuid"] for m in again] == [m["uuid"] for m in whole]


# Damage


@pytest.mark.smoke
@pytest.mark.parametrize("lost", ["My name is Ada", FIRST, "I like tea", "attachment"])
async def test_a_corrupt_line_costs_that_line_and_not_the_history(sidecar: Sidecar, spoken: str, lost: str) -> None:
    transcript = await settled(sidecar, spoken)
    lines = transcript.read_bytes().splitlines(keepends=True)

    def is_lost(line: bytes) -> bool:
        entry = json.loads(line)
        if lost == "attachment":
            return bool(entry["type"] == lost)
        return entry["type"] in ("user", "assistant") and texts([entry]) == [lost]

    transcript.write_bytes(b"".join(b"\x00" * len(line) + b"\n" if is_lost(line) else line for line in lines))
    data = await messages(sidecar, spoken)
    assert texts(data) == [text for text in ("My name is Ada", FIRST, "I like tea", SECOND) if text != lost]
    assert [message["parent_uuid"] for message in data] == [None, *(message["uuid"] for message in data[:-1])]


async def test_a_fork_of_a_damaged_history_is_whole_again(sidecar: Sidecar, spoken: str, another_thread: str) -> None:
    transcript = await settled(sidecar, spoken)
    lines = transcript.read_bytes().replace(b"My name is Ada", b"My name is \xffda").splitlines(keepends=True)
    first_answer = next(number for number, line in enumerate(lines) if FIRST[:22].encode() in line)
    del lines[first_answer]
    transcript.write_bytes(b"".join(lines))
    shown = await messages(sidecar, spoken)
    assert texts(shown) == ["My name is \ufffdda", "I like tea", SECOND.replace("Ada", "\ufffdda")]
    forked = await sidecar.post("/v1/chat/fork", another_thread, from_thread_id=spoken, at_message_id=shown[-1]["uuid"])
    assert forked.status_code == 201
    answer = await sidecar.say(another_thread, "Go on")
    assert answer == "You have said 3 things. First: My name is \ufffdda; last: Go on"


@pytest.mark.smoke
async def test_a_torn_last_line_is_left_out(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    whole = transcript.read_bytes()
    for size in (whole.rindex(b'"type":"assistant"'), whole.rindex(b"You have said 2") + 5):
        transcript.write_bytes(whole[:size])
        assert texts(await messages(sidecar, spoken)) == ["My name is Ada", FIRST, "I like tea"]


@pytest.mark.smoke
async def test_a_bad_byte_costs_that_character(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    transcript.write_bytes(transcript.read_bytes().replace(b"I like tea", b"I like t\xff\xfea"))
    assert texts(await messages(sidecar, spoken))[:3] == ["My name is Ada", FIRST, "I like t\ufffd\ufffda"]


@pytest.mark.smoke
async def test_half_an_emoji_is_passed_on_as_it_is(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    transcript.write_bytes(transcript.read_bytes().replace(b"I like tea", rb"I like \ud83d"))
    assert texts(await messages(sidecar, spoken))[2] == "I like \ud83d"
    shown = (await get(sidecar, "/v1/session", spoken)).json()["metadata"]
    assert shown["last_message"]["preview"].endswith("last: I like \ud83d")


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'"uuid"',
        b'{"uuid": []}',
        b'{"type":"user","uuid":"u","parentUuid":null}',
        b'{"type":"user","uuid":"u","parentUuid":{},"message":{"content":[3]},"timestamp":5,"isSidechain":true}',
        b'{"type":"system","uuid":"u","parentUuid":"u"}',
        b'{"type":"custom-title","uuid":"u","customTitle":"T"}',
    ],
)
async def test_no_line_whatever_it_is_costs_the_history(sidecar: Sidecar, spoken: str, line: bytes) -> None:
    transcript = await settled(sidecar, spoken)
    whole = transcript.read_bytes()
    for place in (0, whole.index(b"\n") + 1, len(whole)):
        transcript.write_bytes(whole[:place] + line + b"\n" + whole[place:])
        assert texts(await messages(sidecar, spoken)) == ["My name is Ada", FIRST, "I like tea", SECOND]


# What cannot be shown


@pytest.mark.smoke
async def test_a_thread_without_messages_is_refused(sidecar: Sidecar, spoken: str, another_thread: str) -> None:
    path = "/v1/session/messages"
    unknown = await get(sidecar, path, another_thread)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "session_not_found")
    foreign = await get(sidecar, path, spoken, resource_id="mallory")
    assert (foreign.status_code, foreign.json()["code"]) == (404, "session_not_found")
    (await settled(sidecar, spoken)).unlink()
    lost = await get(sidecar, path, spoken)
    assert (lost.status_code, lost.json()["code"]) == (410, "session_missing")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("after", "0" * 8, "message_not_found"),
        ("limit", 0, "invalid_request"),
        ("limit", 201, "invalid_request"),
        ("order", "up", "invalid_request"),
        ("include", "all", "invalid_request"),
        ("more", "1", "invalid_request"),
    ],
)
async def test_a_query_that_makes_no_sense_is_refused(
    sidecar: Sidecar, spoken: str, field: str, value: object, code: str
) -> None:
    response = await get(sidecar, "/v1/session/messages", spoken, **{field: value})
    assert (response.status_code, response.json()["code"]) == (422, code)


# Length


@pytest.mark.quiet
async def test_five_thousand_messages_are_read_without_holding_up_anybody(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    lines = transcript.read_bytes().splitlines()
    begin = next(number for number, line in enumerate(lines) if b"I like tea" in line)
    transcript.write_bytes(repeat(lines[begin:], 5000))
    pages = {"order": "desc", "limit": 200}
    page = (await get(sidecar, "/v1/session/messages", spoken, **pages)).json()
    assert (len(page["data"]), page["has_more"], texts(page["data"])[-1]) == (200, True, SECOND)
    # The last page is read from the end of the file, the one before it is not.
    reading = asyncio.create_task(get(sidecar, "/v1/session/messages", spoken, **pages, after=page["next"]))
    waited = []
    while not reading.done():
        start = time.perf_counter()
        await sidecar.http.get("/healthz")
        waited.append(time.perf_counter() - start)
    before = (await reading).json()
    assert before["data"][-1]["uuid"] == page["data"][0]["parent_uuid"]
    assert len(waited) > 5, "others were answered only when it was done"


async def test_a_page_of_huge_messages_ends_early(sidecar: Sidecar, spoken: str) -> None:
    transcript = await settled(sidecar, spoken)
    transcript.write_bytes(transcript.read_bytes().replace(b'"My name is Ada"', b'"%s"' % (b"x" * 9_000_000)))
    page = (await get(sidecar, "/v1/session/messages", spoken)).json()
    assert (len(page["data"]), page["has_more"]) == (1, True)
    assert texts(await messages(sidecar, spoken, after=page["next"])) == [FIRST, "I like tea", SECOND]


async def test_a_chain_that_bites_its_tail_comes_to_an_end() -> None:
    entries = [
        {"type": kind, "uuid": name, "parentUuid": parent, "message": {"role": "user", "content": name}}
        for kind, name, parent in [
            ("user", "a", "b"),
            ("system", "b", "c"),
            ("attachment", "c", "b"),
            ("user", "d", "a"),
        ]
    ]
    lines = [json.dumps(entry).encode() for entry in entries]
    found = await asyncio.to_thread(lambda: conversation(list(entries_of(lines))))
    assert [(message.uuid, message.parent_uuid) for message in found] == [("a", None), ("d", "a")]
