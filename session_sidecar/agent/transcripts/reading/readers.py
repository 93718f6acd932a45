"""Who reads transcripts: a few threads the short ones, a process of its own the long ones, one at a time.

Parsing megabytes holds the interpreter, whatever the thread; in another process it holds nobody up, can be stopped at
any line, and gives its memory back. None of this takes asyncio's own threads: a turn's looks at the disk go there.
"""

import asyncio
import os
import pickle
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, cast

from session_sidecar.errors import ShuttingDown, TranscriptsUnavailable

T = TypeVar("T")

SHORT_BYTES = 2**21
"""What is read at once in a thread: about 50 ms of it."""
_IDLE_SECONDS = 60  # the process remembers the transcript that it has read last: the next page of it costs nothing
LENGTH_BYTES = 8


class Readers:
    """The readers of one sidecar. Use it in one event loop, and close it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="reader")
        self._one_at_a_time = asyncio.Lock()
        self._process: Process | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._closed = False

    async def short(self, work: Callable[..., T], *args: Any) -> T:
        """Do what reads `SHORT_BYTES` at most. Whoever leaves before it is begun is not worked for."""
        self._check_open()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def whole(self, work: Callable[..., T], files: Sequence[Path], *args: Any) -> T:
        """Do `work(files, *args)`, which reads all of `files`: in a thread if they are short, else in the process.

        `work` is a function of a module, and its arguments and result can be pickled. A long one waits for those before
        it; whoever leaves meanwhile, or while it is done, is not worked for. Raises FileNotFoundError, and
        TranscriptsUnavailable where the process ended over it.
        """
        done, result = await self.short(_if_short, work, files, args)
        return cast("T", result) if done else await self.long(work, files, *args)

    async def long(self, work: Callable[..., T], *args: Any) -> T:
        """Do it in the process, one at a time."""
        async with self._one_at_a_time:
            self._check_open()
            if self._idle is not None:
                self._idle.cancel()
            try:
                if self._process is None or self._process.returncode is not None:  # it was killed while it waited
                    self._process = await _start()
                process = self._process
                result, error = await _ask(process, pickle.dumps((work, args)))
            except BaseException as error:
                await self._end()
                if isinstance(error, (asyncio.IncompleteReadError, ConnectionError)):
                    raise TranscriptsUnavailable(_BROKEN, retry_after=5) from error
                raise
            self._idle = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._forget)
        if error is not None:
            raise error
        return cast("T", result)

    async def close(self) -> None:
        """End them, with whatever waits and is under way."""
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        await self._end()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check_open(self) -> None:
        if self._closed:
            raise ShuttingDown("Nothing was changed. Try again when it is back.", retry_after=5)

    async def _end(self) -> None:
        if (process := self._forget()) is not None:
            await asyncio.shield(process.wait())

    def _forget(self) -> Process | None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
        return process


async def _start() -> Process:
    # Of a group of its own: Ctrl-C on a terminal is the sidecar's, which then ends this.
    command = (sys.executable, "-P", "-m", "session_sidecar.agent.transcripts.reading.worker")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=env, start_new_session=True)


async def _ask(process: Process, job: bytes) -> tuple[Any, Exception | None]:
    assert process.stdin is not None  # noqa: S101 - for the type checker
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(len(job).to_bytes(LENGTH_BYTES) + job)
        await process.stdin.drain()
    except RuntimeError as error:  # uvloop's, of a pipe whose other end has gone
        raise ConnectionResetError from error
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES))
    answer = await process.stdout.readexactly(length)
    return cast("tuple[Any, Exception | None]", pickle.loads(answer))  # noqa: S301 - from our own process


def _if_short(work: Callable[..., T], files: Sequence[Path], args: tuple[Any, ...]) -> tuple[bool, T | None]:
    if sum(path.stat().st_size for path in files) > SHORT_BYTES:
        return False, None
    return True, work(files, *args)


_BROKEN = "The process that reads long transcripts ended. Nothing was changed. Try again."
