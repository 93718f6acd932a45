"""One CLI process, connected to one session: the owner of a `ClaudeSDKClient`."""

import asyncio
import contextlib
import logging
import signal
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

from anyio import EndOfStream, WouldBlock
from anyio.abc import Process
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient, ClaudeSDKError, CLIJSONDecodeError

from sidecar.errors import AgentFailed, AgentStartFailed
from sidecar.results import Message

logger = logging.getLogger(__name__)

# The CLI leaves within 50 ms of its last turn; one that has not after these is hung.
LEAVE_SECONDS = 2.0
TERMINATE_SECONDS = 2.0

# Deltas that come within so long of one another are taken together, or most of what each costs is being woken for it.
BURST_SECONDS = 0.002

PF_EXITING = 0x4  # Linux, include/linux/sched.h
KILLED = 1 << (signal.SIGKILL - 1)


class _RawClient(ClaudeSDKClient):
    """The SDK's client, with the messages as the CLI emitted them.

    The public `receive_messages()` gives dataclasses that have lost each message's `type`, timestamps and more. The
    SDK keeps the raw dicts two private attributes away; tests/test_sdk_contract.py fails if a release moves them.
    """

    async def raw_messages(self) -> AsyncGenerator[Message]:
        """The messages, until the process ends. Raises what the SDK's own reader of this stream raises."""
        assert self._query is not None  # noqa: S101 - connected: AgentProcess.start() has returned
        stream = self._query._message_receive
        kind = None
        with contextlib.suppress(EndOfStream):
            while True:
                try:
                    message = stream.receive_nowait()
                except WouldBlock:
                    if kind == "content_block_delta":
                        await asyncio.sleep(BURST_SECONDS)
                    message = await stream.receive()
                if message["type"] == "end":
                    return
                if message["type"] == "error":
                    raise message.get("exception") or ClaudeSDKError(message["error"])
                kind = message["event"]["type"] if message["type"] == "stream_event" else None
                yield message

    @property
    def has_messages(self) -> bool:
        """Whether there are messages that nobody has taken."""
        return self._query is not None and self._query._message_receive.statistics().current_buffer_used > 0

    def send_signal(self, name: str) -> None:
        """`terminate` or `kill` the process, if there is one."""
        process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                getattr(process, name)()

    @property
    def process(self) -> Process | None:
        return getattr(self._transport, "_process", None)


class AgentProcess:
    """A connected CLI process. `run` turns one after another; `interrupt` the running one; `close` in the end.

    Stopping always means: interrupt, let `run` drain to the result, close. The CLI then keeps the partial answer and
    is gone at once, where cancelling would lose the answer and leave the process running for seconds.
    """

    def __init__(self, options: ClaudeAgentOptions) -> None:
        """Nothing is started yet. `options` as from `Agents.options`."""
        self._stderr: deque[str] = deque(maxlen=20)
        options.stderr = options.stderr or self._stderr.append
        self._client = _RawClient(options)
        self._idle = asyncio.Event()
        self._idle.set()
        self._starting: asyncio.Future[None] | None = None
        self.exit_status: int | None = None  # after `close`; negative for a signal
        self.prompted = False  # while a turn has its prompt; then only `interrupt` keeps what was answered
        self.ended = asyncio.Event()  # it was told to end; it will not start any more, nor take a prompt

    @property
    def pid(self) -> int | None:
        """The process's ID, once it has been started."""
        return self._client.process.pid if self._client.process else None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs and can be given a prompt: it was never told to end."""
        process = self._client.process
        return (
            process is not None
            and process.returncode is None
            and not self.ended.is_set()
            and not _has_exited(process.pid)
        )

    @property
    def has_spoken(self) -> bool:
        """Whether the process has said something that nobody asked for, as a background task's end makes it do."""
        return self._client.has_messages

    async def wait_for_exit(self) -> None:
        """Wait until the process has ended by itself."""
        if self._client.process is not None:
            await self._client.process.wait()

    async def start(self) -> None:
        """Start the process and connect to it. Raises AgentStartFailed; nothing is left running then."""
        if self.ended.is_set():
            raise AgentStartFailed("It was stopped before it was started.")
        self._starting = asyncio.ensure_future(self._client.connect())
        await asyncio.wait([self._starting])
        if self._starting.cancelled():
            raise AgentStartFailed("The agent's process was stopped before it was ready.")
        # The SDK reports a refused or timed-out handshake as a bare Exception.
        if error := self._starting.exception():
            raise AgentStartFailed(self._explain(error)) from error

    async def run(self, content: str | list[dict[str, Any]]) -> AsyncGenerator[Message]:
        """Give the prompt and yield the messages of its turn, the result last. Raises AgentFailed without a result."""

        async def prompt() -> AsyncIterator[Message]:
            yield {"type": "user", "message": {"role": "user", "content": content}, "parent_tool_use_id": None}

        self.prompted = True
        self._idle.clear()
        try:
            await self._client.query(prompt())
            async with contextlib.aclosing(self._client.raw_messages()) as messages:
                async for message in messages:
                    if message["type"] == "result":
                        self._idle.set()
                        yield message
                        return
                    yield message
        except CLIJSONDecodeError as error:
            raise AgentFailed("The agent's process wrote a line that is no message, or too long to be one.") from error
        except ClaudeSDKError as error:
            raise AgentFailed(self._explain(error)) from error
        finally:
            self._idle.set()
            self.prompted = False
        raise AgentFailed("The agent's process ended in mid-turn.")

    async def interrupt(self, grace: float) -> None:
        """Stop the running turn: ask the CLI to, and end the process if `run` is not at its result in `grace` seconds.

        Only after `init`: the CLI loses an interrupt that comes before.
        """
        asking = asyncio.ensure_future(self._client.interrupt())
        try:
            if not await _within(grace, self._idle.wait()):
                await self.end()
        finally:
            asking.cancel()
            # Its answer is of no interest (the turn's result is), nor is its failure when the process has gone.
            await asyncio.wait([asking])

    async def end(self) -> None:
        """End a process that does not react, while it starts or runs: terminate, then kill. `start` or `run` fails."""
        self.ended.set()
        for name in ("terminate", "kill"):
            self._client.send_signal(name)
            if await _within(TERMINATE_SECONDS, self._settled()):
                return
        # What is left to wait for is a handshake that nobody will answer.
        if self._starting is not None:
            self._starting.cancel()

    async def _settled(self) -> None:
        if self._starting is not None:
            await asyncio.wait([self._starting])
        await self._idle.wait()

    async def close(self) -> None:
        """Disconnect and see the process gone. Never fails."""
        process = self._client.process  # the SDK forgets it
        leaving = asyncio.ensure_future(self._client.disconnect())
        for seconds, name in ((LEAVE_SECONDS, "terminate"), (TERMINATE_SECONDS, "kill")):
            await asyncio.wait([leaving], timeout=seconds)
            if leaving.done():
                break
            self._client.send_signal(name)
        try:
            await leaving
        except Exception:
            logger.exception("closing the agent's process failed")
        self.exit_status = process.returncode if process is not None else None

    def _explain(self, error: BaseException) -> str:
        if self._stderr:
            logger.warning("the CLI's last words: %s", " | ".join(self._stderr)[-2000:])
        return f"The agent's process failed: {type(error).__name__}. The server's log has its last words."


def _has_exited(pid: int) -> bool:
    """Whether a child has ended or is about to, even if nobody has heard of it yet; False where there is no /proc.

    A process that was killed takes some milliseconds to give its memory back, and runs by all other signs until then.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Path("/proc/self").exists()
    fields = ["", "", "", *stat.rpartition(")")[2].split()]  # numbered from 1, as in proc(5)
    state, flags, pending = fields[3], int(fields[9]), int(fields[31])
    return state in "ZX" or bool(flags & PF_EXITING or pending & KILLED)


async def _within(seconds: float, waiting: Awaitable[object]) -> bool:
    try:
        await asyncio.wait_for(waiting, seconds)
    except TimeoutError:
        return False
    return True
