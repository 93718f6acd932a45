"""The first minute on a terminal: what is said to a person who starts it, and nothing of it in a pipe."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.server import Sidecar
from tests.terminal import CTRL_C, Terminal, shell

Make = Callable[..., Sidecar]


async def test_a_person_is_told_what_to_do_and_what_is_told_works(tmp_path: Path) -> None:
    home = tmp_path / "home"
    serve = ("serve", "--port", "0", "--model", "offline", "--home", str(home))
    async with Terminal("", *serve) as terminal:
        await terminal.until("session-sidecar")
        await terminal.until("Ctrl-C")
        assert f"home  {home}" in terminal.screen
        assert "model offline" in terminal.screen
        assert "warning no real model answers" in terminal.screen
        command = re.search(r"try +(curl .*?)\n +stop", terminal.screen, re.DOTALL)
        assert command is not None
        tried = await shell("", command[1])
        assert "You have said 1 thing: Hello" in tried.out
        assert '"status":"completed"' in tried.out
        await terminal.until("turn completed")
        await terminal.until("POST /v1/chat 200")
        terminal.type(CTRL_C)
        assert await terminal.ended() == 0
    assert "{" not in terminal.screen.replace(command[1], "")
    assert "Hello" not in terminal.screen.replace(command[1], "")


async def test_in_a_pipe_every_line_is_json(a_sidecar: Make, thread: str) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.say(thread, "Hello")
    assert [line for line in sidecar.log if not isinstance(json.loads(line), dict)] == []


def test_set_up_says_what_it_does() -> None:
    """As far as make itself tells without doing it: each step that takes long is announced before it."""
    said = subprocess.run(
        ["make", "--dry-run", "--always-make", "run"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    steps = [number for number, line in enumerate(said) if "-m venv" in line or "pip install" in line]
    assert len(steps) == 3
    assert all("setting up" in said[number - 1] for number in steps)
