"""What the stand-in lets people try: a slow answer, thinking, a tool; and how its streams are typed."""

import asyncio
import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.modes import KEPT
from tests.node import CLIENTS, need_node
from tests.server import Sidecar

pytestmark = pytest.mark.long

Json = dict[str, Any]
OFFLINE = {"ANTHROPIC_API_KEY": "", "ANTHROPIC_BASE_URL": ""}


@pytest.fixture
async def offline(tmp_path: Path) -> AsyncIterator[Sidecar]:
    """A sidecar as `make run` starts it, with an agent that has a tool."""
    agents = tmp_path / "agents.toml"
    agents.write_text('[tooled]\ntools = ["Bash"]\nallowed_tools = ["Bash"]\n')
    env = {**KEPT, **OFFLINE, "HOME": str(tmp_path)}
    async with Sidecar(tmp_path / "home", env, "--model", "auto", "--agents", str(agents)) as sidecar:
        yield sidecar


async def messages(sidecar: Sidecar, prompt: str, agent: str = "default", *, stop: bool = False) -> list[Json]:
    """The SDK's messages in a turn's stream; with `stop` of one that is interrupted in mid-answer."""
    async with sidecar.stream(agent, prompt, agent=agent) as stream:  # an agent has one thread, with one process
        if stop:
            await stream.until_text()
            assert (await sidecar.post("/v1/chat/interrupt", agent)).status_code == 200
        events = await stream.rest()
    assert events[-1].data["status"] == ("interrupted" if stop else "completed")
    return [event.data for event in events if event.name not in ("session", "end")]


async def test_what_the_readme_says_of_a_long_turn_can_be_tried(offline: Sidecar, thread: str) -> None:
    async with offline.stream(thread, "[[slow 60]] Count for me") as stream:
        await stream.until_text("1 2 3")
        after = stream.events[-1]
    async with offline.rejoin(thread, after.id) as stream:
        await stream.until_text()
        assert stream.events[0].number == after.number + 1
        assert (await offline.post("/v1/chat/interrupt", thread)).status_code == 200
        assert (await stream.rest())[-1].data["status"] == "interrupted"


async def test_every_message_of_a_stream_is_what_the_typescript_sdk_says(offline: Sidecar, tmp_path: Path) -> None:
    need_node()
    tool = await messages(offline, "[[tool]] Show me", "tooled")
    assert any(block["type"] == "tool_result" for m in tool if m["type"] == "user" for block in m["message"]["content"])
    thinking = await messages(offline, "[[think]] [[slow 1]] Hello")
    stopped = await messages(offline, "[[slow 60]] Hello", stop=True)
    found = [*await messages(offline, "Hello"), *tool, *thinking, *stopped]
    assert {"system", "assistant", "user", "stream_event", "result"} <= {message["type"] for message in found}
    told = await complaints(tmp_path, right=found, **{name: [lacking] for name, lacking in without_a_field(found)})
    assert told.pop("right") == ""
    assert set(told) == {"iterations", "citations"}
    for name, said in told.items():
        assert name in said


def without_a_field(found: list[Json]) -> list[tuple[str, Json]]:
    """Messages as they were before: each without one field that the types ask for."""
    start = next(m for m in found if m["type"] == "stream_event" and m["event"]["type"] == "message_start")
    usage = json.loads(json.dumps(start))
    del usage["event"]["message"]["usage"]["iterations"]
    block = next(m for m in found if m["type"] == "stream_event" and m["event"]["type"] == "content_block_start")
    text = json.loads(json.dumps(block))
    text["event"]["content_block"].pop("citations", None)
    text["event"]["content_block"].pop("input", None)
    return [("iterations", usage), ("citations", text)]


async def complaints(place: Path, **found: list[Json]) -> dict[str, str]:
    """What the compiler says of messages, as values of `SDKMessage`, by the name of those that belong together."""
    (place / "node_modules").symlink_to(CLIENTS / "node_modules")
    shutil.copy(CLIENTS / "literal.ts", place)
    for name, group in found.items():
        lines = [
            'import type { SDKMessage } from "@anthropic-ai/claude-agent-sdk";',
            'import { literal } from "./literal.js";',
        ]
        for number, message in enumerate(group):
            lines += [f"const raw{number} = literal({json.dumps(message)});"]
            lines += [f"export const message{number}: SDKMessage = raw{number};"]
        (place / f"{name}.ts").write_text("\n".join(lines))
    files = [f"{name}.ts" for name in found]
    options = ["--strict", "--noEmit", "--skipLibCheck", "--module", "nodenext", "--target", "es2022", *files]
    compiler = await asyncio.create_subprocess_exec(
        *("node", str(CLIENTS / "node_modules" / "typescript" / "bin" / "tsc"), *options),
        cwd=place,
        env=os.environ,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await compiler.communicate()
    assert (compiler.returncode == 0) == (not out)
    # A complaint begins with its file's name, and goes on in lines that are indented.
    of_file = dict.fromkeys(found, "")
    for complaint in re.split(r"\n(?! )", out.decode().strip()) if out else []:
        of_file[complaint.partition(".ts(")[0]] += complaint
    return of_file
