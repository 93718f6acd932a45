"""`session-sidecar` without its imports: a process that has them done, and forks for each one that is asked of it.

Importing the SDK takes most of a start, and tests start many. What comes out of the fork is a process like any other:
its own environment, directory, streams, signals, exit status, and nothing else that is open. What an interpreter reads
before it runs a program cannot be given to it (`can_be_forked`). The program as it is installed is what runs then, and
where a test is about starting, or measures.
"""

import asyncio
import atexit
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

PROGRAM = Path(sys.executable).with_name("session-sidecar")
_IMPORTED = (  # the commands import most when they run
    "session_sidecar.cli.serve",
    "session_sidecar.cli.backup",
    "session_sidecar.cli.doctor",
    "session_sidecar.cli.keys",
    "session_sidecar.cli.moving",
    "session_sidecar.cli.restore",
    "session_sidecar.cli.client.show",
    "session_sidecar.replicas.archive.postgres",
    "session_sidecar.replicas.archive.sqlite",
    "session_sidecar.replicas.fleet",
    "session_sidecar.replicas.leases.identity",
    "session_sidecar.replicas.leases.sole",
    "session_sidecar.replicas.listening",
    "session_sidecar.replicas.outbox",
    "session_sidecar.sessions.upkeep.backup",
    "session_sidecar.sessions.upkeep.doctor",
    "session_sidecar.sessions.upkeep.moving.into",
    "session_sidecar.sessions.upkeep.moving.out",
    "session_sidecar.sessions.upkeep.rotating",
    "session_sidecar.app",
    "session_sidecar.server.connection",
    "session_sidecar.server.listening",
    "session_sidecar.server.logs",
    "session_sidecar.server.terminal",
    "session_store.postgres",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
)
_MOST_BYTES = 2**17  # of a request: an environment and a command line
_template: socket.socket | None = None


def can_be_forked(env: Mapping[str, str]) -> bool:
    """Whether the interpreter would read the same in this environment as in ours."""
    return not [
        name
        for name, value in env.items()
        if name.startswith(("PYTHON", "LANG", "LC_")) and os.environ.get(name) != value
    ]


async def reading(descriptor: int) -> asyncio.StreamReader:
    """What comes out of a pipe."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0))
    return reader


class Forked:
    """A process that was forked, with what tests use of `asyncio.subprocess.Process`."""

    def __init__(self, pid: int, told: asyncio.StreamReader, heard: asyncio.StreamWriter) -> None:
        """`told` brings the exit status, a line; `heard` is closed then."""
        self.pid = pid
        self.stderr: asyncio.StreamReader | None = None
        self.returncode: int | None = None
        self._end = asyncio.create_task(self._ended(told, heard))

    async def _ended(self, told: asyncio.StreamReader, heard: asyncio.StreamWriter) -> int:
        self.returncode = int(await told.readline())
        heard.close()
        return self.returncode

    @classmethod
    async def start(
        cls, *arguments: str, env: Mapping[str, str], streams: tuple[int, int, int], login: bool = False
    ) -> Self:
        """Start `session-sidecar` with these arguments, and with these descriptors as its standard streams.

        With `login` they are a terminal, which becomes its own: Ctrl-C typed there is a signal.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            wanted = {"arguments": arguments, "env": dict(env), "cwd": os.getcwd(), "login": login}
            request = json.dumps(wanted).encode()
            socket.send_fds(_running_template(), [request], [theirs.fileno(), *streams])
        told, heard = await asyncio.open_unix_connection(sock=ours)
        return cls(int(await told.readline()), told, heard)

    @classmethod
    async def serve(cls, *arguments: str, env: Mapping[str, str]) -> Self:
        """Start it with a pipe for its errors, and our other streams."""
        errors, stderr = os.pipe()
        try:
            process = await cls.start(*arguments, env=env, streams=(0, 1, stderr))
        finally:
            os.close(stderr)
        process.stderr = await reading(errors)
        return process

    @classmethod
    async def run(cls, *arguments: str, env: Mapping[str, str], stdin: bytes = b"") -> tuple[int, bytes, bytes]:
        """Run it with all of its streams in pipes; the exit status, and what it wrote. The input fits into a pipe."""
        (its_input, ours), (out, its_out), (err, its_err) = os.pipe(), os.pipe(), os.pipe()
        os.write(ours, stdin)
        os.close(ours)
        try:
            process = await cls.start(*arguments, env=env, streams=(its_input, its_out, its_err))
        finally:
            for descriptor in (its_input, its_out, its_err):
                os.close(descriptor)
        written = await asyncio.gather((await reading(out)).read(), (await reading(err)).read())
        return await process.wait(), *written

    def send_signal(self, number: int) -> None:
        """Send a signal; ProcessLookupError if it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for the end; the exit status, negative for a signal."""
        return await asyncio.shield(self._end)


def _running_template() -> socket.socket:
    """Where the process that forks is asked. It is started when it is first needed, and ends with this one."""
    global _template
    if _template is None:
        _template, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        atexit.register(process.wait)
        atexit.register(_template.close)  # first, and with it the process ends
    return _template


# In the process that forks


def _forked(asked: socket.socket) -> None:
    """Fork whenever it is asked; return in the new process, ready to run its program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    while True:
        request, descriptors, *_ = socket.recv_fds(asked, _MOST_BYTES, 4)
        if not request:
            sys.exit()
        if os.fork() == 0:
            _watched(*descriptors)
            break
        for descriptor in descriptors:
            os.close(descriptor)
    wanted = json.loads(request)
    asked.detach()
    os.closerange(3, 2**16)
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    if wanted["login"]:
        os.login_tty(0)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # it was made for what was there before
    sys.argv = [str(PROGRAM), *wanted["arguments"]]


def _watched(told: int, *streams: int) -> None:
    """Fork once more, and return in the new process; the parent tells its ID and its end, and lets it be a zombie until
    that has been heard.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) != 0:
        os.closerange(min(streams), max(streams) + 1)
        with socket.socket(fileno=told) as whoever_asked:
            whoever_asked.send(b"%d\n" % pid)
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert end is not None
            status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            whoever_asked.send(b"%d\n" % status)
            whoever_asked.recv(1)
        os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.path[0] = str(PROGRAM.parent)  # as if that were the script
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _forked(socket.socket(fileno=int(sys.argv[1])))
    sys.exit(importlib.import_module("session_sidecar.cli").main())
