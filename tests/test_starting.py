"""The first minute: what is said to a person on a terminal, and nothing of it in a pipe; and what systemd is told."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import FaultyModel
from tests.server import SECONDS, Sidecar
from tests.terminal import CTRL_C, Terminal, shell

Make = Callable[..., Sidecar]


@pytest.fixture
def forked() -> bool:
    """The program as it is installed."""
    return False


@pytest.mark.long
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
        page = re.search(r"page +(http://\S+/ui)\s", terminal.screen)
        assert page is not None
        assert "<title>session-sidecar</title>" in (await shell("", f"curl -s {page[1]}")).out
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


class ServiceManager:
    """The side of systemd that a service of `Type=notify` talks to: a datagram socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(address)

    async def told(self) -> str:
        """The next thing that a service says."""
        async with asyncio.timeout(SECONDS):
            return (await asyncio.get_running_loop().sock_recv(self._socket, 4096)).decode()

    @property
    def was_told_nothing_more(self) -> bool:
        try:
            self._socket.recv(4096)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@contextlib.contextmanager
def service_manager(address: str) -> Iterator[ServiceManager]:
    with contextlib.closing(ServiceManager(address)) as manager:
        yield manager


@pytest.mark.parametrize("abstract", [False, True], ids=["a path", "an abstract name"])
async def test_systemd_is_told_when_it_listens_and_from_when_on_it_stops(
    a_sidecar: Make, thread: str, model: FaultyModel, tmp_path: Path, abstract: bool
) -> None:
    name = str(tmp_path / "notify")
    with service_manager(f"\0{name}" if abstract else name) as systemd:
        async with a_sidecar(NOTIFY_SOCKET=f"@{name}" if abstract else name) as sidecar:
            assert await systemd.told() == "READY=1"
            async with sidecar.stream(thread, "[[hold 1]] Hello") as stream:
                await stream.until_text()
                for pid in sidecar.cli_processes():
                    assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
                assert systemd.was_told_nothing_more
                sidecar.process.send_signal(signal.SIGTERM)
                assert await systemd.told() == "STOPPING=1"
                assert (await stream.rest())[-1].data["error"]["code"] == "shutting_down"
            await sidecar.wait()
        assert systemd.was_told_nothing_more


async def test_systemd_is_not_told_that_it_is_ready_where_it_cannot_start(a_sidecar: Make, tmp_path: Path) -> None:
    with service_manager(str(tmp_path / "notify")) as systemd:
        async with a_sidecar():
            second = a_sidecar(NOTIFY_SOCKET=str(tmp_path / "notify"))
            with pytest.raises(AssertionError, match="is in use by process"):
                await second.start()
            assert await second.wait() != 0
        assert systemd.was_told_nothing_more


async def test_it_starts_where_systemd_does_not_hear_it(a_sidecar: Make, thread: str, tmp_path: Path) -> None:
    async with a_sidecar(NOTIFY_SOCKET=str(tmp_path / "nobody")) as sidecar:
        await sidecar.say(thread, "Hello")
