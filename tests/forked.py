"""`session-sidecar` without its imports: a process that has them done, and forks for each one that is asked of it.

Importing the SDK takes most of a sidecar's start, and tests start many. What comes out of the fork is a process like
any other: its own environment, directory, streams, signals, exit status, and nothing else that is open. What an
interpreter reads before it runs a program (`PYTHON…`) cannot be given to it; `Sidecar` runs the installed program then,
and where a test is about starting, or measures.
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
_IMPORTED = (  # `serve` imports most when it runs
    "session_sidecar.cli.serve",
    "session_sidecar.app",
    "session_sidecar.server.connection",
    "session_sidecar.server.listening",
    "session_sidecar.server.logs",
    "session_sidecar.server.terminal",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
)
_MOST_BYTES = 2**17  # of a request: an environment and a command line
_template: socket.socket | None = None


class Forked:
    """A process that was forked, with what tests use of `asyncio.subprocess.Process`."""

    def __init__(
        self, pid: int, stderr: asyncio.StreamReader, told: asyncio.StreamReader, heard: asyncio.StreamWriter
    ) -> None:
        """`told` brings the exit status, a line; `heard` is closed then."""
        self.pid = pid
        self.stderr = stderr
        self.returncode: int | None = None
        self._end = asyncio.create_task(self._ended(told, heard))

    async def _ended(self, told: asyncio.StreamReader, heard: asyncio.StreamWriter) -> int:
        self.returncode = int(await told.readline())
        heard.close()
        return self.returncode

    @classmethod
    async def start(cls, *arguments: str, env: Mapping[str, str]) -> Self:
        """Start `session-sidecar` with these arguments, with a pipe for its errors."""
        ours, theirs = socket.socketpair()
        errors, stderr = os.pipe()
        try:
            request = json.dumps({"arguments": arguments, "env": dict(env), "cwd": os.getcwd()}).encode()
            socket.send_fds(_running_template(), [request], [theirs.fileno(), stderr])
        finally:
            theirs.close()
            os.close(stderr)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(errors, "rb", 0))
        told, heard = await asyncio.open_unix_connection(sock=ours)
        return cls(int(await told.readline()), reader, told, heard)

    def send_signal(self, number: int) -> None:
        """Send a signal; ProcessLookupError if it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

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
        request, descriptors, *_ = socket.recv_fds(asked, _MOST_BYTES, 2)
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
    sys.argv = [str(PROGRAM), *wanted["arguments"]]


def _watched(told: int, stderr: int) -> None:
    """Fork once more, and return in the new process; the parent tells its ID and its end, and lets it be a zombie until
    that has been heard.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) != 0:
        os.close(stderr)
        with socket.socket(fileno=told) as whoever_asked:
            whoever_asked.send(b"%d\n" % pid)
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            assert end is not None
            status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            whoever_asked.send(b"%d\n" % status)
            whoever_asked.recv(1)
        os._exit(0)
    os.dup2(stderr, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.path[0] = str(PROGRAM.parent)  # as if that were the script
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _forked(socket.socket(fileno=int(sys.argv[1])))
    sys.exit(importlib.import_module("session_sidecar.cli").main())
