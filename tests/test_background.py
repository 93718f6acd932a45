"""What an agent goes on with after its answer is a turn of its own, and never taken for another's answer."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultyModel, hold, say, tool
from tests.modes import COLD, in_both_modes
from tests.server import SECONDS, Sidecar, a_moment, followed, gone

Make = Callable[..., Sidecar]

pytestmark = in_both_modes

AGENTS = """
[default]
tools = ["Agent", "Bash"]
allowed_tools = ["Agent", "Bash"]
permission_mode = "bypassPermissions"
[other]
system_prompt = "Be terse."
"""


@pytest.fixture
async def working(a_sidecar: Make, tmp_path: Path) -> AsyncIterator[Sidecar]:
    """A sidecar whose agent may leave tasks in the background."""
    agents = tmp_path / "agents.toml"
    agents.write_text(AGENTS)
    async with a_sidecar("--agents", str(agents), IS_SANDBOX="1", SIDECAR_SPARE_PROCESSES="0") as sidecar:
        yield sidecar


class Task:
    """A task in the background that ends when the test says so."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.command = f"until [ -e {path} ]; do sleep 0.01; done; echo it is done"

    def end(self) -> None:
        self.path.touch()


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path / "end")


async def leave_behind(sidecar: Sidecar, model: FaultyModel, thread: str, task: Task) -> str:
    """A turn that leaves a task in the background; the process that has it."""
    bash = {"command": task.command, "run_in_background": True, "description": "wait"}
    model.script(tool("Bash", bash), say("I have begun."))
    assert await sidecar.say(thread, "Begin") == "I have begun."
    await sidecar.until_logged("turn", thread_id=thread)
    return str(await sidecar.process_of(thread))


async def let_it_speak(model: FaultyModel, task: Task) -> None:
    """End the task, and wait until the agent is in the middle of what it says by itself."""
    model.script(hold(1))
    task.end()
    await (await model.requested(3)).holding()


async def spoken(sidecar: Sidecar, thread: str) -> list[dict[str, Any]]:
    """Wait until the agent has said something by itself on this thread: the log lines of these turns."""
    await sidecar.until_logged("turn", thread_id=thread, origin="background")
    return sidecar.logged("turn", thread_id=thread, origin="background")


@pytest.mark.smoke
async def test_the_end_of_a_task_is_a_turn_of_its_own(
    working: Sidecar, thread: str, model: FaultyModel, task: Task
) -> None:
    process = await leave_behind(working, model, thread, task)
    await let_it_speak(model, task)
    busy = await working.chat(thread, "What is it?")
    assert (busy.status_code, busy.json()["code"]) == (409, "thread_busy")
    assert (await working.session(thread)).json()["status"] == "running"
    async with working.rejoin(thread) as stream:
        first = await stream.until("session")
        model.release()
        await stream.rest()
    assert (first.data["origin"], first.data["outcome"]) == ("background", "resumed")
    assert stream.events[-1].data["status"] == "completed"
    result = next(event for event in stream.events if event.name == "result")
    assert result.data["origin"]["kind"] == "task-notification"
    assert [event.data["subtype"] for event in stream.events if event.name == "system"].count("init") == 1
    assert await working.say(thread, "And now?", multitask_strategy="enqueue")
    said = await working.history(thread)
    assert [text for role, text in said if role == "user" and not text.startswith("<")][-1] == "And now?"
    assert any(text.startswith("<task-notification>") for _, text in said)
    if working.env["SIDECAR_WARM_SESSIONS"] != COLD["SIDECAR_WARM_SESSIONS"]:
        assert str(await working.process_of(thread)) == process


async def test_a_turn_that_the_agent_begins_by_itself_is_told_to_who_reads_what_happens(
    working: Sidecar, thread: str, model: FaultyModel, task: Task
) -> None:
    await leave_behind(working, model, thread, task)
    async with followed(working, resource_id="alice") as stream:
        await let_it_speak(model, task)
        started = await stream.until("turn_started")
        assert (await working.session(thread)).json()["status"] == "running"
        model.release()
        ended = await stream.until("turn_ended")
        assert (await working.session(thread)).json()["status"] == "idle"
    assert (started.data["origin"], ended.data["origin"]) == ("background", "background")
    assert started.data["turn_id"] == ended.data["turn_id"]


async def test_a_message_that_comes_while_the_task_ends_has_its_own_answer(
    working: Sidecar, thread: str, model: FaultyModel, task: Task
) -> None:
    await leave_behind(working, model, thread, task)
    for number in range(8):
        # Both at once, as often as it takes to meet: whoever comes first, each answer is to its own prompt.
        task.end()
        answer = await working.say(thread, f"Number {number}", multitask_strategy="enqueue")
        assert answer.endswith(f"last: Number {number}"), answer
        task.path.unlink()
        bash = {"command": task.command, "run_in_background": True, "description": "wait"}
        model.script(tool("Bash", bash), say("Again."))
        while (again := await working.chat(thread, "Again", multitask_strategy="enqueue")).status_code != 200:
            await a_moment()
        assert again.json()["status"] == "completed"
    prompts = [text for role, text in await working.history(thread) if role == "user"]
    assert [text for text in prompts if text.startswith("Number")] == [f"Number {number}" for number in range(8)]


async def test_a_message_waits_for_what_the_agent_says_by_itself(
    working: Sidecar, thread: str, model: FaultyModel, task: Task
) -> None:
    await leave_behind(working, model, thread, task)
    await let_it_speak(model, task)
    waiting = asyncio.create_task(working.chat(thread, "What is it?", multitask_strategy="enqueue"))
    await working.settle()
    model.release()
    answer = (await waiting).json()
    assert answer["text"].endswith("last: What is it?")
    assert len(await spoken(working, thread)) == 1


@pytest.mark.long
async def test_a_process_is_not_closed_under_its_work_and_is_afterwards(
    working: Sidecar, thread: str, another_thread: str, model: FaultyModel, task: Task
) -> None:
    process = int(await leave_behind(working, model, thread, task))
    for number in range(int(working.env["SIDECAR_WARM_SESSIONS"]) + 1):  # more than are kept
        await working.say(f"{another_thread}-{number}", "Hello")
        await working.until_logged("turn", thread_id=f"{another_thread}-{number}")
    assert process in working.cli_processes()
    for refused in (
        await working.http.patch("/v1/session", json={"thread_id": thread, "resource_id": "alice", "title": "Tea"}),
        await working.http.delete("/v1/session", params={"thread_id": thread, "resource_id": "alice"}),
        await working.chat(thread, "Hello", agent="other"),
    ):
        assert (refused.status_code, refused.json()["code"]) == (409, "thread_busy")
    task.end()
    await spoken(working, thread)
    if working.env["SIDECAR_WARM_SESSIONS"] == COLD["SIDECAR_WARM_SESSIONS"]:
        assert await gone([process], SECONDS)
    title = {"thread_id": thread, "resource_id": "alice", "title": "Tea"}
    async with asyncio.timeout(SECONDS):
        while (await working.http.patch("/v1/session", json=title)).status_code == 409:
            await a_moment()


@pytest.mark.long
async def test_work_that_nobody_hears_of_for_too_long_is_ended(
    a_sidecar: Make, thread: str, model: FaultyModel, task: Task, tmp_path: Path
) -> None:
    (tmp_path / "agents.toml").write_text(AGENTS)
    options = ("--agents", str(tmp_path / "agents.toml"))
    settings = {"SIDECAR_TURN_SECONDS": "10", "SIDECAR_SPARE_PROCESSES": "0", "IS_SANDBOX": "1"}
    async with a_sidecar(*options, **settings) as sidecar:
        process = int(await leave_behind(sidecar, model, thread, task))
        assert await gone([process], SECONDS)
        assert await sidecar.say(thread, "Hello")


@pytest.mark.long
async def test_deleting_by_force_and_a_message_that_interrupts_end_the_work(
    working: Sidecar, thread: str, another_thread: str, model: FaultyModel, task: Task
) -> None:
    process = int(await leave_behind(working, model, thread, task))
    query = {"thread_id": thread, "resource_id": "alice", "force": "true"}
    assert (await working.http.delete("/v1/session", params=query)).status_code == 204
    assert await gone([process], 0)
    process = int(await leave_behind(working, model, another_thread, task))
    await working.say(another_thread, "Rather this", agent="other", multitask_strategy="interrupt")
    assert await gone([process], 0)


async def test_what_the_agent_says_by_itself_can_be_interrupted(
    working: Sidecar, thread: str, model: FaultyModel, task: Task
) -> None:
    await leave_behind(working, model, thread, task)
    await let_it_speak(model, task)
    response = await working.post("/v1/chat/interrupt", thread)
    assert response.json()["status"] == "interrupted"
    assert (await working.say(thread, "Go on", multitask_strategy="enqueue")).endswith("last: Go on")


async def test_a_fork_of_a_thread_at_work_ends_where_its_last_turn_did(
    working: Sidecar, thread: str, another_thread: str, model: FaultyModel, task: Task
) -> None:
    await leave_behind(working, model, thread, task)
    await let_it_speak(model, task)
    transcript = working.transcript(await working.session_id(thread))
    async with asyncio.timeout(SECONDS):
        while b"task-notification" not in transcript.read_bytes():
            await a_moment()
    assert (await working.post("/v1/chat/fork", another_thread, from_thread_id=thread)).status_code == 201
    forked = working.transcript(await working.session_id(another_thread)).read_text().splitlines()
    said = [entry for entry in map(json.loads, forked) if entry["type"] in ("user", "assistant")]
    assert said[-1]["message"]["content"][0]["text"] == "I have begun."
    model.release()


async def test_what_is_written_at_work_before_anything_is_said_is_not_part_of_a_fork(
    working: Sidecar, thread: str, another_thread: str, model: FaultyModel, task: Task
) -> None:
    await leave_behind(working, model, thread, task)
    transcript = working.transcript(await working.session_id(thread))
    lines = [json.loads(line) for line in transcript.read_text().splitlines()]
    last = next(entry for entry in reversed(lines) if entry["type"] == "assistant")
    # As the CLI does when a task has ended, some milliseconds before it says that it begins a turn.
    notice = {**last, "type": "user", "uuid": str(uuid.uuid4()), "parentUuid": last["uuid"]}
    notice["message"] = {"role": "user", "content": "<task-notification>"}
    with transcript.open("a") as file:
        file.write(json.dumps(notice) + "\n")
    assert (await working.post("/v1/chat/fork", another_thread, from_thread_id=thread)).status_code == 201
    assert "<task-notification>" not in working.transcript(await working.session_id(another_thread)).read_text()


async def test_an_answer_in_the_background_comes_to_who_follows_the_thread(
    working: Sidecar, thread: str, model: FaultyModel
) -> None:
    delegate = {
        "description": "look",
        "prompt": "[[hold 1]] Look",
        "subagent_type": "general-purpose",
        "run_in_background": True,
    }
    model.script(tool("Agent", delegate), say("I have sent somebody."))
    assert await working.say(thread, "Delegate") == "I have sent somebody."
    model.default = say("They are back.")
    model.release()
    await spoken(working, thread)
    async with working.rejoin(thread) as stream:
        await stream.rest()
    assert stream.text == "They are back."
