"""One CLI process as the sidecar holds it, without a sidecar around it."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from claude_agent_sdk import ClaudeAgentOptions

from session_sidecar.agent.processes.process import AgentProcess, Prompt
from tests.faults import FaultyModel, say, tool
from tests.server import SECONDS


@pytest.fixture
async def process(tmp_path: Path, model_env: dict[str, str]) -> AsyncIterator[AgentProcess]:
    options = ClaudeAgentOptions(
        tools=["Bash"],
        permission_mode="bypassPermissions",
        setting_sources=[],
        cwd=tmp_path,
        env={**model_env, "IS_SANDBOX": "1", "CLAUDE_CONFIG_DIR": str(tmp_path / "claude")},
    )
    process = AgentProcess(options)
    await process.start()
    yield process
    await process.close()


async def said(process: AgentProcess, prompt: str | None) -> str:
    """What is answered to a prompt, or with None said by itself."""
    given = Prompt(str(uuid.uuid4()), prompt) if prompt is not None else None
    messages = [message async for mine, message in process.run(given) if mine]
    return str(messages[-1]["result"])


async def test_a_turn_that_was_over_before_anybody_listened_is_heard_all_the_same(
    process: AgentProcess, model: FaultyModel, tmp_path: Path
) -> None:
    end = tmp_path / "end"
    command = f"until [ -e {end} ]; do sleep 0.01; done"
    bash = {"command": command, "run_in_background": True, "description": "wait"}
    model.script(tool("Bash", bash), say("I have begun."), say("It is done."))
    assert await said(process, "Begin") == "I have begun."
    (transcript,) = (tmp_path / "claude").glob("projects/*/*.jsonl")
    end.touch()
    async with asyncio.timeout(SECONDS):
        while process.speech.by_itself or json.dumps("It is done.").encode() not in transcript.read_bytes():
            await asyncio.sleep(0.01)
            process.glance()
    assert process.at_work
    assert await process.overhear() == "turn"
    assert await said(process, None) == "It is done."
