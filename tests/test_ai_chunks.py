"""The chunks of a UI message stream, of what the CLI really says: each version of the client takes them all."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from session_sidecar.api.calls.ai_sdk.chunks import Chunks
from session_sidecar.api.calls.ai_sdk.parts import NO_RESULT
from tests.ai_sdk import MAJORS, Node, plain, running
from tests.faults import Behaviour, FaultyModel, fail, hold, say, think, tool, tools
from tests.node import need_node
from tests.server import Event, Sidecar

Json = dict[str, Any]
AGENTS = """
[default]
tools = ["Agent", "Bash"]
allowed_tools = ["Agent", "Bash"]
permission_mode = "bypassPermissions"
[whole]
include_partial_messages = false
"""
AGENT = {"description": "look", "prompt": "Look", "subagent_type": "general-purpose", "run_in_background": False}


@pytest.fixture(scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[Node]]:
    """The client, in all versions."""
    need_node()
    async with AsyncExitStack() as stack:
        places = (tmp_path_factory.mktemp("node") for _ in MAJORS)
        yield [await stack.enter_async_context(running(*one)) for one in zip(MAJORS, places, strict=True)]


@pytest.fixture(scope="module")
async def with_tools(
    _model: FaultyModel, model_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Sidecar]:
    """A sidecar whose agent has tools and subagents, and another one whose agent says nothing before it is whole."""
    place = tmp_path_factory.mktemp("tools")
    (place / "agents.toml").write_text(AGENTS)
    env = {**model_env, "IS_SANDBOX": "1", "SIDECAR_WARM_SESSIONS": "2", "SIDECAR_SPARE_PROCESSES": "0"}
    async with Sidecar(place / "home", env, "--agents", str(place / "agents.toml")) as sidecar:
        yield sidecar


Capture = Callable[..., Any]


@pytest.fixture
def capture(with_tools: Sidecar, model: FaultyModel, thread: str) -> Capture:
    """What the CLI says of a turn, and the history of its chat."""

    async def turn(*behaviours: Behaviour, stop_at: str | None = None, **fields: Any) -> list[Event]:
        model.script(*behaviours)
        async with with_tools.stream(thread, "Go", **fields) as stream:
            if stop_at is not None:
                await stream.until_text(stop_at)
                key = {"thread_id": thread, "resource_id": "alice"}
                await with_tools.http.post("/v1/chat/interrupt", json=key)
            return await stream.rest()

    return turn


def chunked(events: list[Event]) -> list[Json]:
    """The chunks of a turn. They are framed one by one, without nulls; `[DONE]` is behind the last."""
    chunks = Chunks(events[0].data["turn_id"])
    frames = b"".join([chunks.of(event.name, line(event)) for event in events]).decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    made: list[Json] = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    assert not [chunk for chunk in made if None in chunk.values()]
    check_order(made)
    return made


def line(event: Event) -> bytes:
    """An event as a log keeps it."""
    return json.dumps(event.data, separators=(",", ":")).encode()


def check_order(made: list[Json]) -> None:
    """What holds for every stream: `start` first, an end last, parts within steps, and nothing open behind a step."""
    kinds = [chunk["type"] for chunk in made]
    assert (kinds[0], kinds.count("start")) == ("start", 1)
    assert kinds[-1] in {"finish", "error"}
    assert ("finish" in kinds) != ("error" in kinds)
    in_step = False
    still_open: set[str] = set()
    calls: dict[str, str] = {}
    for chunk in made:
        kind = chunk["type"]
        if kind in {"start-step", "finish-step"}:
            assert in_step == (kind == "finish-step")
            assert not still_open
            assert "begun" not in calls.values()
            in_step = not in_step
        elif kind.endswith("-start"):
            assert in_step
            still_open |= {chunk["id"]} if "id" in chunk else set()
            calls |= {chunk["toolCallId"]: "begun"} if "toolCallId" in chunk else {}
        elif kind in {"text-end", "reasoning-end"}:
            still_open.remove(chunk["id"])
        elif kind in {"text-delta", "reasoning-delta"}:
            assert chunk["id"] in still_open
        elif kind == "tool-input-available":
            calls[chunk["toolCallId"]] = "called"
        elif kind in {"tool-output-available", "tool-output-error", "tool-input-error"}:
            assert calls.pop(chunk["toolCallId"])
    assert not in_step
    assert not calls


def of(made: list[Json], *kinds: str) -> list[Json]:
    return [chunk for chunk in made if chunk["type"] in kinds]


def shown(made: list[Json]) -> str:
    return "".join(chunk["delta"] for chunk in of(made, "text-delta"))


async def taken(nodes: list[Node], made: list[Json], history: list[Json]) -> None:
    for node in nodes:
        await node.check(made, history)


async def loaded(sidecar: Sidecar, thread: str) -> list[Json]:
    response = await sidecar.http.get(f"/v1/ai-sdk/chat/{thread}", headers={"X-Resource-Id": "alice"})
    messages: list[Json] = response.json()
    return messages


async def test_tools_that_run_beside_each_other_have_their_inputs_and_their_outputs(
    capture: Capture, nodes: list[Node], with_tools: Sidecar, thread: str
) -> None:
    calls = tools(("Bash", {"command": "echo one"}), ("Bash", {"command": "echo two"}))
    made = chunked(await capture(calls, say('It is "done" \\ é 😀')))
    inputs, outputs = of(made, "tool-input-available"), of(made, "tool-output-available")
    assert [chunk["input"]["command"] for chunk in inputs] == ["echo one", "echo two"]
    assert {chunk["toolCallId"]: chunk["output"] for chunk in outputs} == {
        inputs[0]["toolCallId"]: "one",
        inputs[1]["toolCallId"]: "two",
    }
    for chunk in of(made, "tool-input-start", "tool-input-available", "tool-output-available"):
        assert chunk["dynamic"] is chunk["providerExecuted"] is True
    for call in inputs:
        deltas = [c["inputTextDelta"] for c in of(made, "tool-input-delta") if c["toolCallId"] == call["toolCallId"]]
        assert json.loads("".join(deltas)) == call["input"]
    assert shown(made) == 'It is "done" \\ é 😀'
    assert len(of(made, "start-step")) == 2
    history = await loaded(with_tools, thread)
    assert [part["type"] for part in history[1]["parts"]] == [
        "step-start", "dynamic-tool", "dynamic-tool", "step-start", "text",
    ]  # fmt: skip
    assert [part.get("output") for part in history[1]["parts"]] == [None, "one", "two", None, None]
    await taken(nodes, made, history)


async def test_a_tool_that_fails_is_an_error_of_its_part_and_not_of_the_stream(
    capture: Capture, nodes: list[Node], with_tools: Sidecar, thread: str
) -> None:
    made = chunked(await capture(tool("Bash", {"command": "echo oops >&2; exit 3"}), say("It failed")))
    (failed,) = of(made, "tool-output-error")
    assert failed["errorText"] == "Exit code 3\noops"
    assert made[-1]["type"] == "finish"
    history = await loaded(with_tools, thread)
    assert (history[1]["parts"][1]["state"], history[1]["parts"][1]["errorText"]) == (
        "output-error",
        "Exit code 3\noops",
    )
    await taken(nodes, made, history)


async def test_a_subagents_tools_are_shown_with_the_call_that_they_are_for_and_its_text_is_not(
    capture: Capture, nodes: list[Node], with_tools: Sidecar, thread: str
) -> None:
    made = chunked(
        await capture(
            tool("Agent", AGENT), tool("Bash", {"command": "echo below"}), say("From below"), say("From the top")
        )
    )
    agent, below = of(made, "tool-input-available")
    assert (agent["toolName"], below["toolName"]) == ("Agent", "Bash")
    assert below["providerMetadata"] == {"claude-code": {"parentToolCallId": agent["toolCallId"]}}
    assert "providerMetadata" not in agent
    assert of(made, "tool-output-available")[0]["output"] == "below"
    assert shown(made) == "From the top"
    tasks = of(made, "data-task")
    assert tasks
    assert all(chunk["transient"] for chunk in tasks)
    assert "output_file" not in json.dumps(tasks)
    await taken(nodes, made, await loaded(with_tools, thread))


async def test_thinking_is_reasoning_with_its_signature(
    capture: Capture, nodes: list[Node], with_tools: Sidecar, thread: str
) -> None:
    made = chunked(await capture(think("Let me see.")))
    assert "".join(chunk["delta"] for chunk in of(made, "reasoning-delta")) == "Let me see."
    (end,) = of(made, "reasoning-end")
    assert end["providerMetadata"]["anthropic"]["signature"]
    history = await loaded(with_tools, thread)
    assert history[1]["parts"][1] == {
        "type": "reasoning",
        "text": "Let me see.",
        "state": "done",
        "providerMetadata": end["providerMetadata"],
    }
    await taken(nodes, made, history)


async def test_a_retry_of_the_apis_is_told_and_not_kept(capture: Capture, nodes: list[Node]) -> None:
    made = chunked(await capture(fail(529), say("After all")))
    (retry,) = of(made, "data-api-retry")
    assert (retry["transient"], retry["data"]["error_status"]) == (True, 529)
    assert shown(made) == "After all"
    await taken(nodes, made, [])


async def test_what_is_stopped_in_mid_text_is_closed_aborted_and_finished(
    capture: Capture, nodes: list[Node], with_tools: Sidecar, thread: str
) -> None:
    made = chunked(await capture(hold(3), stop_at="said"))
    assert [chunk["type"] for chunk in made[-4:]] == ["text-end", "finish-step", "abort", "finish"]
    assert made[-1]["finishReason"] == "other"
    await taken(nodes, made, await loaded(with_tools, thread))


async def test_a_client_that_sends_the_results_of_its_tools_by_itself_begins_nothing_with_those_of_the_agents(
    nodes: list[Node], with_tools: Sidecar, model: FaultyModel, thread: str
) -> None:
    for number, node in enumerate(nodes):
        name = f"{thread} {number}"
        chat = await node.open(with_tools, name, resubmit=True)
        model.script(tool("Bash", {"command": "sleep 60"}))
        await chat.start("Go")
        await chat.until("input-available")
        await with_tools.http.post("/v1/chat/interrupt", json={"thread_id": name, "resource_id": "alice"})
        said = await chat.wait()
        (part,) = [part for part in said["messages"][1]["parts"] if part["type"] == "dynamic-tool"]
        assert part["state"] == "output-error"
        assert [request["method"] for request in said["requests"]] == ["POST"]


async def test_an_agent_without_partial_messages_says_each_part_at_once(
    capture: Capture, nodes: list[Node], with_tools: Sidecar, thread: str
) -> None:
    events = await capture(think("Let me see."), agent="whole")
    assert "stream_event" not in {event.name for event in events}
    made = chunked(events)
    assert len(of(made, "start-step")) == len(of(made, "text-delta")) == len(of(made, "reasoning-delta")) == 1
    assert plain(await loaded(with_tools, thread))[1]["id"] == made[0]["messageId"]
    await taken(nodes, made, [])


async def test_a_stream_that_breaks_off_anywhere_is_closed(capture: Capture) -> None:
    events = await capture(tool("Bash", {"command": "echo one"}), say("done"))
    middle, last = events[1:-1], events[-1]
    failed = {"type": "end", "status": "failed", "error": {"detail": "It broke.", "code": "agent_failed"}}
    end = Event(last.id, "end", failed)
    for length in range(len(middle)):
        made = chunked([events[0], *middle[:length], end])
        assert made[-1] == {"type": "error", "errorText": "It broke. (agent_failed)"}
    cut = chunked([events[0], *middle[: [e.name for e in middle].index("assistant") + 1], end])
    assert [chunk["errorText"] for chunk in of(cut, "tool-output-error")] == [NO_RESULT]


async def test_a_delta_that_the_cli_writes_otherwise_comes_to_the_same(capture: Capture) -> None:
    events = await capture(think("Let me see."))
    odd = [Event(e.id, e.name, dict(reversed(e.data.items()))) for e in events]
    assert chunked(odd) == chunked(events)
    below = [Event(e.id, e.name, {**e.data, "parent_tool_use_id": "toolu_1"}) for e in events]
    assert not of(chunked(below), "text-delta", "text-start", "reasoning-delta")


def test_a_turn_that_the_agent_has_begun_is_called_after_its_first_reply() -> None:
    session = {"thread_id": "t", "turn_id": "turn", "sdk_session_id": "s", "outcome": "resumed", "model": "live"}
    start = {"type": "message_start", "message": {"id": "msg_1"}}
    chunks = Chunks("turn")
    said: list[tuple[str, Json]] = [
        ("session", {**session, "origin": "background"}),
        ("system", {"type": "system", "subtype": "task_notification", "task_id": "a"}),
        ("stream_event", {"event": start, "parent_tool_use_id": None}),
        ("end", {"status": "completed"}),
    ]
    made = [chunks.of(kind, json.dumps(data).encode()) for kind, data in said]
    assert made[:2] == [b"", b""]
    first, second, *_ = made[2].decode().split("\n\n")
    assert json.loads(first.removeprefix("data: "))["messageId"] == "msg_1-answer"
    assert json.loads(second.removeprefix("data: "))["type"] == "data-task"
