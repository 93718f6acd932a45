"""A turn: one user message and all that answers it, as its owner and its readers see it."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from session_sidecar.agent.messages import Message, failure_of, refused_of, text_of, usage_of
from session_sidecar.agent.transcripts import Revision
from session_sidecar.errors import ApiFailed, LeaseLost, NotSaved, SidecarError, TurnInterrupted, TurnTimeout
from session_sidecar.observe.metrics import Usage
from session_sidecar.turns.events import EventLog
from session_store import ThreadKey

Status = Literal["queued", "running", "completed", "interrupted", "failed"]
Origin = Literal["message", "background"]
Came = Literal["cold", "spare", "warm"]
Outcome = Literal["started", "resumed", "forked", "restarted", "reset"]


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What a caller asks for. With `fork_of`: the first turn of a branch of that thread, cut after `at_message_id`.

    With `after_turn` the thread's last turn is to be the one of this ID, or there is to be none if that is empty.
    """

    key: ThreadKey
    content: str | list[dict[str, Any]]
    agent: str = "default"
    multitask_strategy: Literal["reject", "enqueue", "interrupt"] = "reject"
    on_disconnect: Literal["continue", "cancel"] = "continue"
    if_missing: Literal["restart", "fail"] = "restart"
    fork_of: ThreadKey | None = None
    at_message_id: str | None = None
    after_turn: str | None = None
    idempotency_key: str | None = None
    asked: bytes | None = field(default=None, compare=False)  # the digest of this before it was put in its place
    request_id: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Settled:
    """Where the last turn that has ended on a thread ended: in which session, and how far its transcript had come."""

    session_id: str
    revision: Revision


class Turn:
    """One turn, from being asked for until its events are forgotten. It runs whether or not anybody reads it."""

    def __init__(self, request: TurnRequest, log: EventLog, origin: Origin = "message") -> None:
        """A turn that waits for its thread; `log` takes its events.

        With `background` as its origin nobody has asked for it: the agent began it when a task of its own had ended.
        """
        self.id = str(uuid.uuid4())  # the prompt's in the transcript, too
        self.request = request
        self.log = log
        self.digest = b""  # of the request, by which a reader who comes back with it is known
        self.origin = origin
        self.status: Status = "queued"
        self.session: dict[str, Any] | None = None  # the newest `session` event
        self.result: Message | None = None  # until the end; then it is in the log
        self.usage: dict[str, Usage] = {}  # by model, once there is a result
        self.text = ""  # of the newest answer; in the end, only where the result has none
        self.error: SidecarError | None = None
        self.began = asyncio.Event()  # the first `session` event is out, or there will be none
        self.ended = asyncio.Event()  # `end` is out, or there will be none
        self.stopping = asyncio.Event()
        self.stop_reason: SidecarError | None = None
        self.made: str | None = None  # the session ID of a mapping that this turn may have made
        self.settled: Settled | None = None  # the end of the turn before this one, once that is known
        self.planned = asyncio.Event()  # `settled` is known, or will not be
        self.before: Turn | None = None  # what the agent does by itself before it comes to the prompt
        self.last_said: str | None = None  # the uuid of the newest message of the answer
        self.times = {"asked": time.monotonic()}  # when it came to `running`, `init`, `first_delta`, `end`
        self.last_sign = time.monotonic()  # of life from the CLI
        self.process_came: Came | None = None  # from where its process was taken
        self.stored: bool | None = None  # whether what it wrote is in the database, where that keeps transcripts
        self._readers = 0
        self._last_retry: Message | None = None
        self._said_error: str | None = None  # what its newest answer is instead of one
        self._early: list[Message] = []  # what came before `init`, as hooks do; `session` is the first event

    @property
    def session_id(self) -> str | None:
        """The SDK's session ID, once the SDK has said it."""
        return self.session["sdk_session_id"] if self.session else None

    def stop(self, reason: SidecarError | None = None) -> None:
        """Ask the turn to stop; its partial answer is kept. Remembered if it comes too early, harmless if too late.

        `reason` is told in the `end` event.
        """
        if not self.stopping.is_set():
            self.stop_reason = reason and reason.again()
            self.stopping.set()

    async def wait_until_begun(self) -> None:
        """Wait for the `session` event. Raises the SidecarError of a turn that ended before it."""
        await self.began.wait()
        if self.session is None and self.error is not None:
            raise self.error.again()

    @property
    def is_read(self) -> bool:
        """Whether anybody reads it now."""
        return self._readers > 0

    @contextlib.contextmanager
    def reader(self) -> Iterator[None]:
        """Be counted as a reader. When the last one leaves a turn that is to be cancelled then, it stops."""
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers and self.request.on_disconnect == "cancel":
                self.stop()

    @property
    def has_spoken(self) -> bool:
        """Whether an answer has begun to come."""
        return "first_delta" in self.times or self.last_said is not None

    # What its owner notes and publishes

    def settle(self, settled: Settled) -> None:
        """Note where the turn before this one ended, before anything of this one can be written."""
        self.settled = settled
        self.planned.set()

    def reached(self, stage: str) -> None:
        """Note when the turn first came to a stage."""
        self.times.setdefault(stage, time.monotonic())

    def summary(self) -> dict[str, Any]:
        """The turn in its log line: IDs, outcome and milliseconds since it was asked for; nothing that was said."""
        stages = ("running", "init", "first_delta", "end")
        return {
            "turn_id": self.id,
            "request_id": self.request.request_id,
            "thread_id": self.request.key.thread_id,
            "resource_id": self.request.key.resource_id,
            "sdk_session_id": self.session_id,
            "agent": self.request.agent,
            "outcome": self.session["outcome"] if self.session else None,
            "origin": self.origin,
            "process": self.process_came,
            "status": self.status,
            "code": self.error.code if self.error else None,
            "api_status": self.error.extra.get("api_status") if self.error else None,
            "ms": {
                stage: round((self.times[stage] - self.times["asked"]) * 1000, 1)
                for stage in stages
                if stage in self.times
            },
        }

    def announce(self, session_id: str, outcome: Outcome, replaced: str | None, model: str) -> None:
        """Publish which session the turn is in; `replaced` is the ID that the thread had before."""
        self.session = {
            "type": "session",
            "thread_id": self.request.key.thread_id,
            "resource_id": self.request.key.resource_id,
            "sdk_session_id": session_id,
            "turn_id": self.id,
            "outcome": outcome,
            "origin": self.origin,
            "replaced_session_id": replaced,
            "model": model,
        }
        self.log.append("session", self.session)
        self.reached("init")
        for message in self._early:
            self.log.append(message["type"], message)
        self._early.clear()
        self.began.set()

    def take(self, message: Message) -> None:
        """Publish one of the SDK's messages, as it is."""
        kind = message["type"]
        if kind == "stream_event":
            if "first_delta" not in self.times and message["event"]["type"] == "content_block_delta":
                self.reached("first_delta")
        elif kind == "assistant":
            self.text = text_of(message) or self.text
            if message.get("parent_tool_use_id") is None:
                self.last_said, self._said_error = message.get("uuid"), message.get("error")
        elif kind == "result":
            self.result, self.usage = message, usage_of(message)
        elif kind == "system" and message.get("subtype") == "api_retry":
            self._last_retry = message
            if refused := refused_of(message):
                self.stop(refused)
        if self.session is None:
            self._early.append(message)
        else:
            self.log.append(kind, message)

    def end(self) -> None:
        """Settle how the turn ended, and publish that."""
        error = self.error or (failure_of(self.result, self._last_retry, self._said_error) if self.result else None)
        if isinstance(self.error, (NotSaved, LeaseLost)):
            self.status = "failed"
        elif error is None and self.result is not None:
            self.status = "completed"
        elif isinstance(self.stop_reason, (TurnTimeout, ApiFailed, LeaseLost)):
            self.status, self.error = "failed", self.stop_reason
        elif self.stopping.is_set():
            self.status, self.error = "interrupted", self.stop_reason
        else:
            self.status, self.error = "failed", error
        if self.session_id is not None:
            problem = self.error.problem() if self.error else None
            end = {"type": "end", "status": self.status, "sdk_session_id": self.session_id, "error": problem}
            told = {} if self.stored is None else {"stored": self.stored}
            self.log.append("end", end | told)
        elif self.error is None:
            self.error = TurnInterrupted(UNBEGUN)
        self.log.close()
        self.reached("end")
        self.planned.set()
        self._let_go()
        self.began.set()
        self.ended.set()

    def _let_go(self) -> None:
        """Keep what readers are told, and nothing else that is large: neither the message, nor anything twice."""
        self.request = replace(self.request, content="")
        if self.result is not None and self.result.get("result"):
            self.text = ""  # the result, which is the log's, has it
        self.result = self._last_retry = self.stop_reason = None
        self._early.clear()
        self.error = self.error and self.error.again()


UNBEGUN = "It was stopped before the agent was given the message; nothing of it is in the history. Send it again."
