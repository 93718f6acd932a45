"""One CLI process, connected to one session: the owner of a `ClaudeSDKClient`."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anyio import EndOfStream
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKError, CLIJSONDecodeError, CLINotFoundError

from session_sidecar.agent.credentials import check_credentials
from session_sidecar.agent.messages import Message
from session_sidecar.agent.processes.descendants import KILL_SECONDS, PROCESS_VARIABLE, Descendants, stat_fields
from session_sidecar.agent.processes.raw import RawClient
from session_sidecar.agent.processes.speech import Speech
from session_sidecar.errors import AgentFailed, AgentStartFailed, NotConfigured
from session_sidecar.settings import CLI_BYTES

logger = logging.getLogger(__name__)

# The CLI leaves within 50 ms of its last turn; one that has not after these is hung.
LEAVE_SECONDS = 2.0
TERMINATE_SECONDS = 2.0

# A background task that has ended makes the CLI begin a turn by itself within a tenth of a second.
DUE_SECONDS = 5.0
# Of its own, so that the end of a process never waits for a reader of long transcripts.
_THREADS = ThreadPoolExecutor(4, "descendants")

TITLE_ARGUMENT = "name"  # the CLI's option, for a new session; the SDK has none of its own
CLI_MISSING = "There is no Claude Code CLI. Install claude-agent-sdk anew, which brings one, or mend `cli_path`."

PF_EXITING = 0x4  # Linux, include/linux/sched.h
KILLED = 1 << (signal.SIGKILL - 1)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a person says, and the UUID under which the CLI keeps it in the transcript."""

    uuid: str
    content: str | list[dict[str, Any]]


class AgentProcess:
    """A connected CLI process. `run` turns one after another; `interrupt` the running one; `close` in the end.

    What it says is taken in by its `Speech`, which knows of the turns that the CLI begins by itself.

    Stopping always means: interrupt, let `run` drain to the result, close. The CLI then keeps the partial answer and
    is gone at once, where cancelling would lose the answer and leave the process running for seconds.
    """

    def __init__(self, options: ClaudeAgentOptions, preset: str | None = None) -> None:
        """Nothing is started yet. `options` as from `Agents.options`; `preset` is the agent's name, if it is one."""
        self._stderr: deque[str] = deque(maxlen=20)
        self.options = without_session(options)
        self.preset = preset
        self.cli_version: str | None = None  # once it has been connected
        mark = uuid.uuid4().hex
        self._descendants = Descendants(PROCESS_VARIABLE, mark)
        env, stderr = {**options.env, PROCESS_VARIABLE: mark}, options.stderr or self._stderr.append
        self._client = RawClient(dataclasses.replace(options, env=env, stderr=stderr))
        self._idle = asyncio.Event()
        self._idle.set()
        self._starting: asyncio.Future[None] | None = None
        self._leaving: asyncio.Future[None] | None = None
        self.exit_status: int | None = None  # after `close`; negative for a signal
        self.prompted = False  # while a turn has its prompt; then only `interrupt` keeps what was answered
        self.ended = asyncio.Event()  # it was told to end; it will not start any more, nor take a prompt
        self.speech = Speech()

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
    def at_work(self) -> bool:
        """Whether the process does something that nobody waits for: background tasks, and what it says of their end."""
        return self.speech.at_work

    @property
    def speaks(self) -> bool:
        """Whether it has begun a turn by itself of which nobody has heard the end, be it said by now or not."""
        return self.speech.speaks

    def glance(self) -> None:
        """Take in what the process has said and nobody has heard yet."""
        with contextlib.suppress(EndOfStream):
            while (message := self._client.receive_nowait()) is not None:
                self.speech.hold(message)
            return
        self.speech.over = True

    async def overhear(self) -> Literal["turn", "rest", "gone"]:
        """Listen to a process that nobody uses, until it begins a turn by itself, has no more to do, or has ended.

        Whoever is cancelled here loses nothing of what it said.
        """
        assert self._client.process is not None  # noqa: S101 - connected
        leaving = asyncio.ensure_future(self._client.process.wait())
        try:
            while True:
                worked = self.at_work
                self.glance()
                if self.speaks:
                    return "turn"
                if self.speech.over or leaving.done():
                    return "gone"
                if worked and not self.at_work:
                    return "rest"
                heard, _ = await asyncio.wait(
                    (self._client.incoming(), leaving),
                    timeout=DUE_SECONDS if self.speech.due and not self.speech.tasks else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not heard:
                    self.speech.due = False  # the model was told of the task's end in the turn before
        finally:
            leaving.cancel()

    async def start(self, patience: float | None = None) -> None:
        """Start the process and connect to it. Raises AgentStartFailed, NotConfigured; nothing is left running then.

        One that is not ready in `patience` seconds is ended; by default the SDK's own minute counts.
        """
        if self.ended.is_set():
            raise AgentStartFailed("It was stopped before it was started.")
        self._starting = asyncio.ensure_future(self._client.connect())
        await asyncio.wait([self._starting], timeout=patience)
        if not self._starting.done():
            await self.end()
            await asyncio.wait([self._starting])
        if self._starting.cancelled():
            raise AgentStartFailed("The agent's process was stopped before it was ready.")
        # The SDK reports a refused or timed-out handshake as a bare Exception.
        if error := self._starting.exception():
            raise AgentStartFailed(self._explain(error)) from error
        info = await self._client.get_server_info() or {}
        self.cli_version = info.get("claude_code_version")
        try:
            check_credentials(info, {**os.environ, **self.options.env})
        except NotConfigured:
            await self.end()
            raise

    async def run(self, prompt: Prompt | None) -> AsyncGenerator[tuple[bool, Message]]:
        """Give the prompt and yield the messages of its turn, the result last. Raises AgentFailed without a result.

        Each comes with whether it is of this turn: the CLI may come to one of its own before it comes to the prompt.
        With None, the turn is the one that it has begun by itself.
        """
        self.prompted = True
        self._idle.clear()
        self.speech.ask(prompt.uuid if prompt else None)
        try:
            if prompt is not None:
                await self._client.query(_said(prompt))
            async with contextlib.aclosing(self._messages()) as messages:
                async for by_itself, message in messages:
                    mine = not by_itself or prompt is None
                    if message["type"] == "command_lifecycle":
                        continue  # of the prompt's UUID, which is ours and no client's
                    if mine and message["type"] == "result":
                        self._idle.set()
                        yield mine, message
                        return
                    yield mine, message
        except CLIJSONDecodeError as error:
            raise AgentFailed("The agent's process wrote a line that is no message, or too long to be one.") from error
        except ClaudeSDKError as error:
            raise AgentFailed(self._explain(error)) from error
        finally:
            self._idle.set()
            self.prompted = False
            self.speech.answered()
        raise AgentFailed("The agent's process ended in mid-turn.")

    async def _messages(self) -> AsyncGenerator[tuple[bool, Message]]:
        """What was held and what comes, each with whether it is of a turn that the CLI began by itself."""
        while self.speech.held:
            yield self.speech.held.popleft()
        if self.speech.over:
            return
        async with contextlib.aclosing(self._client.raw_messages()) as messages:
            async for message in messages:
                yield self.speech.hear(message), message

    async def interrupt(self, grace: float, began: asyncio.Event) -> None:
        """Stop the running turn: ask the CLI to, and end the process if `run` is not at its result in `grace` seconds.

        `began` tells that the turn's `init` has come: the CLI loses an interrupt that comes before, so it waits for
        that, up to `grace` seconds; what the CLI does by itself until then is stopped at once.
        """
        async with contextlib.AsyncExitStack() as asked:
            if self.speech.by_itself and not began.is_set():
                await asked.enter_async_context(self._asking_to_stop())
            await _within(grace, began.wait())
            await asked.enter_async_context(self._asking_to_stop())
            if not await _within(grace, self._idle.wait()):
                await self.end()

    @contextlib.asynccontextmanager
    async def _asking_to_stop(self) -> AsyncIterator[None]:
        asking = asyncio.ensure_future(self._client.interrupt())
        try:
            yield
        finally:
            asking.cancel()
            # Its answer is of no interest (the turn's result is), nor is its failure when the process has gone.
            await asyncio.wait([asking])

    async def end(self) -> None:
        """End a process that does not react, while it starts or runs: terminate, then kill. `start` or `run` fails.

        Takes some seconds at most: a process that does not even end when it is killed is not waited for.
        """
        self.ended.set()
        self._client.send_signal("terminate")
        if await _within(TERMINATE_SECONDS, self._settled()):
            return
        await self._kill()
        if await _within(KILL_SECONDS, self._settled()):
            return
        # What is left to wait for is a handshake that nobody will answer, or an output that nobody will close.
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
        else:
            self._leave()

    async def _settled(self) -> None:
        if self._starting is not None:
            await asyncio.wait([self._starting])
        await self._idle.wait()

    async def close(self) -> None:
        """Disconnect and see the process gone, with all that it has started. Never fails.

        Takes some seconds at most; the log says what is left then.
        """
        process = self._client.process  # the SDK forgets it
        self._client.stop_receiving()
        leaving = self._leave()
        if self._starting is not None:
            # While the CLI leaves it is seen who is a stranger; the look that comes after it need not ask again.
            await self._in_thread(self._descendants.look)
            if not await _done(leaving, LEAVE_SECONDS):
                self._client.send_signal("terminate")
                await _done(leaving, TERMINATE_SECONDS)
            await self._kill()
        if not await _done(leaving, KILL_SECONDS):
            logger.error("the agent's process does not end though it was killed; it is left to the system")
            leaving.cancel()
            await _done(leaving, KILL_SECONDS)
        elif not leaving.cancelled() and (error := leaving.exception()):
            logger.error("closing the agent's process failed", exc_info=error)
        self.exit_status = process.returncode if process is not None else None

    def _leave(self) -> asyncio.Future[None]:
        """Disconnect; a `run` that still waits for messages ends with that."""
        if self._leaving is None:
            self._leaving = asyncio.ensure_future(self._client.disconnect())
        return self._leaving

    async def _kill(self) -> None:
        """Kill the process, if it is still there, and all that it has started."""
        await self._in_thread(self._descendants.kill)
        self._client.send_signal("kill")  # where there is no /proc

    async def own_bytes(self) -> int:
        """Bytes of memory that it and all that it has started have of their own; CLI_BYTES where that is not told."""
        return await asyncio.get_running_loop().run_in_executor(_THREADS, self._descendants.own_bytes) or CLI_BYTES

    async def _in_thread(self, work: Callable[[], object]) -> None:
        await asyncio.wait([asyncio.get_running_loop().run_in_executor(_THREADS, work)], timeout=2 * KILL_SECONDS)

    def _explain(self, error: BaseException) -> str:
        if isinstance(error, CLINotFoundError):
            return CLI_MISSING
        if self._stderr:
            logger.warning("the CLI's last words: %s", " | ".join(self._stderr)[-2000:])
        return f"The agent's process failed: {type(error).__name__}. The server's log has its last words."


async def _said(prompt: Prompt) -> AsyncIterator[Message]:
    yield {
        "type": "user",
        "message": {"role": "user", "content": prompt.content},
        "parent_tool_use_id": None,
        "uuid": prompt.uuid,
        # Else the CLI works it into a turn of its own that is using a tool, where nobody finds it again.
        "priority": "later",
    }


def without_session(options: ClaudeAgentOptions) -> ClaudeAgentOptions:
    """Options as they are of every session of an agent, to be compared."""
    extra_args = {name: value for name, value in options.extra_args.items() if name != TITLE_ARGUMENT}
    return dataclasses.replace(
        options,
        session_id=None,
        resume=None,
        fork_session=False,
        resume_session_at=None,
        stderr=None,
        extra_args=extra_args,
    )


def _has_exited(pid: int) -> bool:
    """Whether a child has ended or is about to, even if nobody has heard of it yet; False where there is no /proc.

    A process that was killed takes some milliseconds to give its memory back, and runs by all other signs until then.
    """
    try:
        fields = stat_fields(pid)
    except OSError:
        return Path("/proc/self").exists()
    state, flags, pending = fields[3], int(fields[9]), int(fields[31])
    return state in "ZX" or bool(flags & PF_EXITING or pending & KILLED)


async def _done(future: asyncio.Future[None], seconds: float) -> bool:
    await asyncio.wait([future], timeout=seconds)
    return future.done()


async def _within(seconds: float, waiting: Awaitable[object]) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await waiting
    except TimeoutError:
        return False
    return True
