"""The SDK's client as the sidecar needs it: with the messages as the CLI emitted them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from anyio import EndOfStream, WouldBlock
from anyio.abc import Process
from anyio.streams.memory import MemoryObjectReceiveStream
from claude_agent_sdk import ClaudeSDKClient, ClaudeSDKError

from session_sidecar.agent.messages import Message

# Deltas that come within so long of one another are taken together, or most of what each costs is being woken for it.
BURST_SECONDS = 0.002


class RawClient(ClaudeSDKClient):
    """The SDK's client, with the messages as the CLI emitted them.

    The public `receive_messages()` gives dataclasses that have lost each message's `type`, timestamps and more. The
    SDK keeps the raw dicts two private attributes away; tests/test_sdk_contract.py fails if a release moves them.
    """

    _receiving: asyncio.Future[Message] | None = None

    async def raw_messages(self) -> AsyncGenerator[Message]:
        """The messages, until the process ends. Raises what the SDK's own reader of this stream raises."""
        kind = None
        with contextlib.suppress(EndOfStream):
            while True:
                if (message := self.receive_nowait()) is None:
                    if kind == "content_block_delta":
                        await asyncio.sleep(BURST_SECONDS)
                    if self._receiving is not None:
                        await asyncio.wait([self._receiving])
                        continue
                    message = await self._stream.receive()
                if message["type"] == "end":
                    return
                if message["type"] == "error":
                    raise message.get("exception") or ClaudeSDKError(message["error"])
                kind = message["event"]["type"] if message["type"] == "stream_event" else None
                yield message

    def incoming(self) -> asyncio.Future[Message]:
        """Done when there is a message for `receive_nowait`. Who stops waiting for it takes no message away."""
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._stream.receive())
        return self._receiving

    def receive_nowait(self) -> Message | None:
        """The next message if there is one already. Raises EndOfStream."""
        if self._receiving is not None:
            if not self._receiving.done():
                return None
            received, self._receiving = self._receiving, None
            return received.result()
        try:
            return self._stream.receive_nowait()
        except WouldBlock:
            return None

    def stop_receiving(self) -> None:
        """Let go of a message that nobody will take any more."""
        if self._receiving is not None and not self._receiving.cancel() and not self._receiving.cancelled():
            self._receiving.exception()  # its end is known

    @property
    def _stream(self) -> MemoryObjectReceiveStream[Message]:
        assert self._query is not None  # noqa: S101 - connected: AgentProcess.start() has returned
        stream: MemoryObjectReceiveStream[Message] = self._query._message_receive
        return stream

    def send_signal(self, name: str) -> None:
        """`terminate` or `kill` the process, if there is one."""
        process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                getattr(process, name)()

    @property
    def process(self) -> Process | None:
        return getattr(self._transport, "_process", None)
