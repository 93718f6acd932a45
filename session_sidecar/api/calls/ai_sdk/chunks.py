"""A turn's events as the chunks of a UI message stream: one answer is one message, one API reply one step of it.

https://ai-sdk.dev/docs/ai-sdk-ui/stream-protocol. The client throws on a part that was not begun, and on an `error`:
whatever is open is closed before a step ends, and an `error` comes last.
"""

import json
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

from session_sidecar.api.calls.ai_sdk.parts import (
    NO_RESULT,
    RUN_HERE,
    TOOLS,
    Json,
    answer_id,
    dumped,
    is_result,
    of_thinking,
    output,
    usage,
    without_nulls,
)
from session_sidecar.turns.events import EventLog

# A delta as the CLI writes it: its text is JSON already, and is passed on as it is. What looks otherwise is parsed.
_DELTA = re.compile(
    rb'\{"type":"stream_event","event":\{"type":"content_block_delta","index":(\d+),"delta":\{'
    rb'"type":"(?:text_delta","text|thinking_delta","thinking|input_json_delta","partial_json)":'
    rb'("(?:[^"\\]++|\\.)*+")(?:,"estimated_tokens":[^,}]*+)?\}\},'
    rb'"session_id":"[^"\\]*+","parent_tool_use_id":null[,}]'
)
_FINISHED = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "refusal": "content-filter"}
_DONE = b"data: [DONE]\n\n"


async def ui_messages(log: EventLog, after: int, turn_id: str) -> AsyncGenerator[bytes]:
    """The events of a turn as a UI message stream, which is always read from its beginning: `after` is 0."""
    chunks = Chunks(turn_id)
    while events := await log.after(after):
        after = events[-1][0]
        if made := b"".join([chunks.of(kind, data) for _, kind, data in events]):
            yield made


@dataclass(slots=True)
class _Block:
    """A content block that is being streamed: what a delta of it begins with, and what its end is."""

    before: bytes
    end: Json
    signature: str = ""


class Chunks:
    """What is to be known of a turn's events so far, to write the next one."""

    def __init__(self, turn_id: str) -> None:
        self._turn_id = turn_id
        self._in_session = False
        self._held: list[Json] = []  # from `start` on, until it is known what the message is called
        self._reply: str | None = None  # the ID of the newest one
        self._steps = 0
        self._in_step = False
        self._blocks: dict[bytes, _Block] = {}  # that are open, by their index
        self._streamed: set[str] = set()  # the IDs of replies whose blocks have come as events
        self._begun: dict[str, str] = {}  # tools whose input is not there yet: names by call
        self._pending: set[str] = set()  # the calls without a result
        self._last: str | None = None  # the newest message of the answer
        self._result: Json = {}

    def of(self, kind: str, data: bytes) -> bytes:
        """The chunks of an event, framed; nothing for most of them."""
        if kind == "stream_event" and (delta := _DELTA.match(data)) is not None:
            block = self._blocks.get(delta[1])
            return b"%b%b}\n\n" % (block.before, delta[2]) if block is not None else b""
        chunks = list(self._chunks(kind, json.loads(data)))
        if self._held:
            chunks = [*self._held, *chunks]
            self._held = [] if self._steps or kind == "end" else chunks
            if self._held:
                return b""
        framed = b"".join([b"data: %b\n\n" % dumped(chunk).encode() for chunk in chunks])
        return framed + _DONE if kind == "end" else framed

    def _chunks(self, kind: str, event: Json) -> Iterator[Json]:
        match kind:
            case "session":
                yield from self._session(event)
            case "stream_event" if event.get("parent_tool_use_id") is None:
                yield from self._streaming(event["event"])
            case "assistant":
                yield from self._assistant(event)
            case "user":
                yield from self._results(event["message"].get("content"))
            case "system":
                yield from self._told(event)
            case "result":
                self._result = event
            case "end":
                yield from self._end(event)

    def _session(self, event: Json) -> Iterator[Json]:
        if self._in_session:  # the SDK has moved to another one
            yield {"type": "message-metadata", "messageMetadata": {"sessionId": event["sdk_session_id"]}}
            return
        self._in_session = True
        told = {
            "threadId": event["thread_id"],
            "turnId": event["turn_id"],
            "sessionId": event["sdk_session_id"],
            "outcome": event["outcome"],
            "origin": event["origin"],
            "model": event["model"],
        }
        start = {"type": "start", "messageId": answer_id(self._turn_id), "messageMetadata": told}
        if event["origin"] == "message":
            yield start
        else:  # its prompt is the CLI's own: what the history knows it by is its first reply
            self._held = [start]

    def _streaming(self, event: Json) -> Iterator[Json]:
        match event["type"]:
            case "message_start":
                self._streamed.add(event["message"]["id"])
                yield from self._next_step(event["message"]["id"])
            case "content_block_start":
                yield from self._open(b"%d" % event["index"], event["content_block"])
            case "content_block_delta":
                yield from self._delta(self._blocks.get(b"%d" % event["index"]), event["delta"])
            case "content_block_stop":
                yield from self._close(b"%d" % event["index"])

    def _next_step(self, reply: str) -> Iterator[Json]:
        yield from self._end_step()
        if self._held and not self._steps:
            self._held[0]["messageId"] = answer_id(reply)
        self._reply = reply
        self._steps += 1
        self._in_step = True
        yield {"type": "start-step"}

    def _open(self, index: bytes, block: Json) -> Iterator[Json]:
        part = f"{self._steps}-{index.decode()}"
        match block["type"]:
            case "text":
                yield from self._part(index, "text", part)
                yield from self._delta(self._blocks[index], block)
            case "thinking":
                yield from self._part(index, "reasoning", part)
                yield from self._delta(self._blocks[index], block)
            case "redacted_thinking":
                yield from self._whole("reasoning", part, "", of_thinking(block))
            case kind if kind in TOOLS:
                call = {"toolCallId": block["id"]}
                before = dumped({"type": "tool-input-delta", **call})[:-1] + ',"inputTextDelta":'
                self._blocks[index] = _Block(b"data: " + before.encode(), {})
                self._begun[block["id"]] = block["name"]
                yield {"type": "tool-input-start", **call, "toolName": block["name"], **RUN_HERE}

    def _part(self, index: bytes, kind: str, part: str) -> Iterator[Json]:
        before = dumped({"type": f"{kind}-delta", "id": part})[:-1] + ',"delta":'
        self._blocks[index] = _Block(b"data: " + before.encode(), {"type": f"{kind}-end", "id": part})
        yield {"type": f"{kind}-start", "id": part}

    def _delta(self, block: _Block | None, delta: Json) -> Iterator[Json]:
        """What `_DELTA` does not know."""
        if block is None:
            return
        block.signature += delta.get("signature") or ""
        if text := delta.get("text") or delta.get("thinking") or delta.get("partial_json"):
            chunk: Json = json.loads(block.before.removeprefix(b"data: ") + dumped(text).encode() + b"}")
            yield chunk

    def _close(self, index: bytes) -> Iterator[Json]:
        block = self._blocks.pop(index, None)
        if block is not None and block.end:
            yield block.end | of_thinking({"signature": block.signature})

    def _whole(self, kind: str, part: str, text: str, more: Json) -> Iterator[Json]:
        yield {"type": f"{kind}-start", "id": part}
        if text:
            yield {"type": f"{kind}-delta", "id": part, "delta": text}
        yield {"type": f"{kind}-end", "id": part, **more}

    def _assistant(self, event: Json) -> Iterator[Json]:
        message, parent = event["message"], event.get("parent_tool_use_id")
        is_answer = parent is None and message.get("model") != "<synthetic>"
        if is_answer:
            self._last = event.get("uuid")
            if message["id"] not in self._streamed:  # the agent's partial messages are off, or its API does not stream
                if message["id"] != self._reply:
                    yield from self._next_step(message["id"])
                for number, block in enumerate(message["content"]):
                    part = f"{self._steps}-{number}-{self._last}"
                    if block["type"] == "text":
                        yield from self._whole("text", part, block["text"], {})
                    elif block["type"] in {"thinking", "redacted_thinking"}:
                        yield from self._whole("reasoning", part, block.get("thinking", ""), of_thinking(block))
        for block in message["content"]:
            if block["type"] in TOOLS:
                self._begun.pop(block["id"], None)
                self._pending.add(block["id"])
                call = {"toolCallId": block["id"], "toolName": block["name"], "input": block["input"], **RUN_HERE}
                of = {} if parent is None else {"providerMetadata": {"claude-code": {"parentToolCallId": parent}}}
                yield {"type": "tool-input-available", **call, **of}
        yield from self._results(message["content"])

    def _results(self, content: object) -> Iterator[Json]:
        for block in content if isinstance(content, list) else ():
            if is_result(block) and block.get("tool_use_id") in self._pending:  # the client throws on any other
                self._pending.remove(block["tool_use_id"])
                yield self._output(block["tool_use_id"], output(block))

    def _output(self, call: str, given: Json) -> Json:
        kind = "available" if "output" in given else "error"
        return {"type": f"tool-output-{kind}", "toolCallId": call, **given, **RUN_HERE}

    def _told(self, event: Json) -> Iterator[Json]:
        subtype = str(event.get("subtype"))
        if subtype == "api_retry" or subtype.startswith("task_"):
            name = "data-api-retry" if subtype == "api_retry" else "data-task"
            # `output_file` is a path of the server's.
            told = without_nulls(event, "type", "uuid", "session_id", "output_file")
            yield {"type": name, "data": told, "transient": True}

    def _end_step(self) -> Iterator[Json]:
        for index in list(self._blocks):
            yield from self._close(index)
        for call, name in self._begun.items():
            told = {"toolCallId": call, "toolName": name, "input": {}, "errorText": NO_RESULT}
            yield {"type": "tool-input-error", **told, **RUN_HERE}
        self._begun.clear()
        if self._in_step:
            self._in_step = False
            yield {"type": "finish-step"}

    def _end(self, event: Json) -> Iterator[Json]:
        for call in sorted(self._pending):
            yield self._output(call, {"errorText": NO_RESULT})
        yield from self._end_step()
        if event["status"] == "failed":
            problem = event["error"] or {}
            yield {"type": "error", "errorText": f"{problem.get('detail')} ({problem.get('code')})"}
            return
        if event["status"] == "interrupted":
            yield {"type": "abort"}
            reason = "other"
        else:
            reason = _FINISHED.get(self._result.get("stop_reason") or "end_turn", "other")
        told = without_nulls({"messageUuid": self._last, "usage": usage(self._result) or None})
        yield {"type": "finish", "finishReason": reason, "messageMetadata": told}
