"""A conversation that moves from one machine to another by way of the archive: the real CLI goes on with it there."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from claude_agent_sdk import ClaudeSDKClient, ResultMessage

from session_sidecar.agent.agents import QUIET_CLI, safe_options
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.replicas.archive.chunks import MAIN
from session_sidecar.replicas.archive.local import PULLED
from tests.archive import KEY, RING, Machine, a_session, in_postgres
from tests.faults import FaultyModel, say, tool

AGENT = {"description": "look", "prompt": "Look around", "subagent_type": "general-purpose", "run_in_background": False}
LONG_OUTPUT = {"command": "yes a line of a long result | head -c 200000"}
SPECIAL = "nul \x00, line \u2028 separators \u2029, emoji \U0001f469\u200d\U0001f4bb"


@pytest.fixture
async def machines(tmp_path: Path, database: str) -> AsyncIterator[list[Machine]]:
    readers = Readers()
    async with in_postgres(database) as kept:
        yield [Machine(tmp_path / name, kept, RING, readers) for name in ("one", "two", "three")]
    await readers.close()


@pytest.fixture
def talk(
    model: FaultyModel, model_env: dict[str, str]
) -> Callable[..., contextlib.AbstractAsyncContextManager[Callable[[str], Any]]]:
    @contextlib.asynccontextmanager
    async def talk(machine: Machine, **session: str) -> AsyncIterator[Callable[[str], Any]]:
        workspace = machine.config / "workspace"
        workspace.mkdir(exist_ok=True)
        env = {**QUIET_CLI, **model_env, "CLAUDE_CONFIG_DIR": str(machine.config)}
        tools = ["Bash", "Agent"]
        options = safe_options(cwd=str(workspace), env=env, tools=tools, allowed_tools=tools, **session)
        client = ClaudeSDKClient(options)
        await client.connect()

        async def ask(prompt: str) -> str:
            await client.query(prompt)
            *_, result = [message async for message in client.receive_response()]
            assert isinstance(result, ResultMessage)
            return result.result or ""

        try:
            yield ask
        finally:
            await client.disconnect()

    return talk


def spoken(machine: Machine, session: str, home: Path) -> None:
    """A session of one turn: a copy of one that the CLI wrote."""
    (written, *_) = home.glob("claude/projects/*/*.jsonl")
    machine.write(session, written.read_bytes().replace(written.stem.encode(), session.encode()))


async def test_a_conversation_goes_on_wherever_it_is_pulled(
    machines: list[Machine], talk: Callable[..., Any], model: FaultyModel
) -> None:
    one, two, three = machines
    session = a_session()
    async with talk(one, session_id=session) as ask:
        await ask("My name is Ada")
        await ask(SPECIAL)
        model.script(tool("Bash", LONG_OUTPUT), say("That was long."))
        await ask("Do something long")
        model.script(tool("Agent", AGENT), say("I see a room."), say("It has looked."))
        await ask("Have somebody look around")
        await one.archive.push(session, KEY, one.fence, settled=one.path(session).stat().st_size)
    await one.archive.push(session, KEY, one.fence)  # what the CLI wrote as it ended
    written = one.files(session)
    assert any(path.startswith("subagents/") for path in written)
    assert any(path.startswith("tool-results/") for path in written)
    assert b"\\u0000" in written[MAIN]

    await two.archive.pull(session, KEY.resource_id, ours=False)
    assert two.files(session) == written
    async with talk(two, resume=session) as ask:
        assert (await ask("What have I said?")).startswith("You have said 5 things. First: My name is Ada")
    await two.archive.push(session, KEY, two.fence)
    gone_on = two.files(session)
    assert gone_on.keys() == written.keys()
    assert gone_on[MAIN].startswith(written[MAIN])
    assert two.path(session).parent.name == PULLED  # in the one place that it was pulled to
    assert len(list(two.projects.glob(f"*/{session}*"))) == 2  # the transcript, and the directory beside it

    for machine in (one, three):
        await machine.archive.pull(session, KEY.resource_id, ours=False)
        assert machine.files(session) == gone_on
    async with talk(one, resume=session) as ask:
        assert (await ask("And now?")).startswith("You have said 6 things. First: My name is Ada")
    (outline,) = await three.outlines.read([session])
    assert outline.first_prompt == "My name is Ada"


async def test_what_the_cli_writes_after_a_pull_belongs_to_what_was_pulled(
    machines: list[Machine], talk: Callable[..., Any], home: Path, model: FaultyModel
) -> None:
    """Subagents and tool results too: they are pushed from wherever the CLI has put them."""
    one, two, _ = machines
    session = a_session()
    spoken(one, session, home)
    await one.archive.push(session, KEY, one.fence)
    await two.archive.pull(session, KEY.resource_id, ours=False)
    async with talk(two, resume=session) as ask:
        model.script(tool("Bash", LONG_OUTPUT), say("That was long."))
        await ask("Do something long")
        model.script(tool("Agent", AGENT), say("I see a room."), say("It has looked."))
        await ask("Have somebody look around")
    await two.archive.push(session, KEY, two.fence)
    written = two.files(session)
    assert {path.partition("/")[0] for path in written} == {MAIN, "subagents", "tool-results"}
    await one.archive.pull(session, KEY.resource_id, ours=False)
    assert one.files(session) == written
    assert await two.archive.forget(session)
    assert not list(two.projects.rglob(f"*{session}*"))


async def test_lone_surrogates_survive(machines: list[Machine], talk: Callable[..., Any], home: Path) -> None:
    """As the CLI writes them: JSON takes them, a column of text would not."""
    one, two, _ = machines
    session = a_session()
    spoken(one, session, home)
    lines = [json.loads(line) for line in one.path(session).read_bytes().splitlines()]
    for line in lines:
        if line["type"] == "user":
            line["message"]["content"] = "lone \ud800 and \x00"
    one.write(session, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode())
    await one.archive.push(session, KEY, one.fence)
    await two.archive.pull(session, KEY.resource_id, ours=False)
    assert two.files(session) == one.files(session)
    assert b"\\ud800" in two.files(session)[MAIN]
    async with talk(two, resume=session) as ask:
        assert (await ask("What have I said?")).startswith("You have said 2 things.")
