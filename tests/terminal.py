"""The command line as its users meet it: in a pipe, on a terminal, and behind a connection that breaks."""

import asyncio
import contextlib
import os
import re
import termios
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from tests.forked import PROGRAM, Forked, can_be_forked
from tests.server import SECONDS

HEAVY = {"backup", "doctor", "export", "forget-key", "import", "restore", "rotate"}  # these import the SDK
CTRL_C, CTRL_D = "\x03", "\x04"
_STYLE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


@dataclass(frozen=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


def environment(url: str, **more: str) -> dict[str, str]:
    """A person's environment, with the sidecar's address in it."""
    person = {name: value for name, value in os.environ.items() if not name.startswith("SIDECAR_")}
    for name in ("COLUMNS", "LINES"):  # what runs the tests may say how wide its own terminal is
        person.pop(name, None)
    path = f"{PROGRAM.parent}{os.pathsep}{person['PATH']}"
    return {**person, "PATH": path, "TERM": "xterm-256color", "SIDECAR_URL": url, **more}


async def command(url: str, *arguments: str, stdin: str = "", **env: str) -> Ended:
    """One command with all of its streams in pipes. A heavy one is forked."""
    if arguments[0] in HEAVY and can_be_forked(env):
        async with asyncio.timeout(SECONDS):
            code, out, err = await Forked.run(*arguments, stdin=stdin.encode(), env=environment(url, **env))
        return Ended(code, out.decode(), err.decode())
    return await installed(url, *arguments, stdin=stdin, **env)


async def installed(url: str, *arguments: str, stdin: str = "", **env: str) -> Ended:
    """The same, which does its imports itself."""
    return await _run(str(PROGRAM), *arguments, stdin=stdin, env=environment(url, **env))


async def shell(url: str, line: str, stdin: str = "", **env: str) -> Ended:
    """A line of a script; it fails if any command in it does."""
    return await _run("bash", "-o", "pipefail", "-c", line, stdin=stdin, env=environment(url, **env))


async def _run(*arguments: str, stdin: str, env: dict[str, str]) -> Ended:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*arguments, env=env, stdin=pipe, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(SECONDS):
        out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


class Terminal:
    """One command on a terminal of its own, 120 columns wide. Use it as a context."""

    def __init__(self, url: str, *arguments: str, **env: str) -> None:
        self._url = url
        self._env = env
        self._arguments = arguments
        self._raw = ""
        self._read = 0
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._person, its_side = os.openpty()
        termios.tcsetwinsize(its_side, (40, 120))
        env = environment(self._url, **self._env)
        self.process: asyncio.subprocess.Process | Forked
        if self._arguments[0] in HEAVY and can_be_forked(self._env):
            self.process = await Forked.start(*self._arguments, env=env, streams=(its_side,) * 3, login=True)
        else:
            self.process = await asyncio.create_subprocess_exec(
                PROGRAM, *self._arguments, env=env, preexec_fn=lambda: os.login_tty(its_side)
            )
        os.close(its_side)
        asyncio.get_running_loop().add_reader(self._person, self._take)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._person)
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        os.close(self._person)

    @property
    def raw(self) -> str:
        """All that was written, with styles and movements."""
        return self._raw

    @property
    def screen(self) -> str:
        """All that was written, as text."""
        return _STYLE.sub("", self._raw)

    async def until(self, text: str) -> str:
        """Wait for text that was not yet waited for; what came up to its end."""
        async with asyncio.timeout(SECONDS):
            while (at := self.screen.find(text, self._read)) < 0:
                assert not self._ended, f"it ended without {text!r}: {self.screen}"
                self._news.clear()
                await self._news.wait()
        begin, self._read = self._read, at + len(text)
        return self.screen[begin : self._read]

    async def prompted(self, text: str) -> None:
        """Wait for a prompt and until the command sleeps on it. Python's input() loses a Ctrl-C that comes between."""
        await self.until(text)
        async with asyncio.timeout(SECONDS):
            stat = Path(f"/proc/{self.process.pid}/stat")
            while stat.read_text().rpartition(") ")[2][0] != "S":  # noqa: ASYNC110 - no event tells of it
                await asyncio.sleep(0.01)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._person, keys.encode())

    async def ended(self) -> int:
        """Wait for the end of the command and of what it wrote; its exit code."""
        async with asyncio.timeout(SECONDS):
            while not self._ended:
                self._news.clear()
                await self._news.wait()
            return await self.process.wait()

    _ended = False

    def _take(self) -> None:
        try:
            self._raw += os.read(self._person, 65536).decode()
        except OSError:  # the command has gone, and with it the terminal's other side
            self._ended = True
            asyncio.get_running_loop().remove_reader(self._person)
        self._news.set()


class Relay:
    """A connection to a sidecar that can be cut and led elsewhere, and that knows what went through it."""

    def __init__(self, url: str) -> None:
        self.target = url
        self.sent = b""
        self.refused = asyncio.Event()  # the target has not taken a connection
        self._open: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Break every connection that is open."""
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = urlsplit(self.target)
        try:
            back, forth = await asyncio.open_connection(there.hostname, there.port)
        except OSError:
            writer.transport.abort()
            self.refused.set()
            return
        ends = {writer, forth}
        self._open |= ends
        await asyncio.gather(self._pump(reader, forth, keep=True), self._pump(back, writer, keep=False))
        self._open -= ends

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.sent += data if keep else b""
                writer.write(data)
                await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def relay(url: str) -> AsyncIterator[tuple[Relay, str]]:
    """A relay to a sidecar, and its own address."""
    there = Relay(url)
    server = await asyncio.start_server(there._serve, "127.0.0.1", 0)
    try:
        yield there, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        there.cut()
