"""One turn from the caller's side: its text as it comes, Ctrl-C, and a stream that breaks."""

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from httpx2 import EventSource

from session_sidecar.cli.client import show
from session_sidecar.cli.client.http import Broken, Failed, Interrupted, Json, Sidecar, TurnFailed, told

PAUSES = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)  # seconds before each attempt to rejoin; an event makes them start over


def run(sidecar: Sidecar, thread: Json, message: str, agent: str | None) -> None:
    """Run one turn and print it. Raises Failed unless it completed; Ctrl-C stops the turn."""
    answer = _Answer()
    with _CtrlC(sidecar, thread) as ctrl_c:
        try:
            for name, data in _events(sidecar, thread, {**thread, "message": message, "agent": agent}):
                answer.take(name, data)
        except Failed:
            if not ctrl_c.pressed:
                raise
        finally:
            answer.end_line()
    if ctrl_c.pressed:
        raise Interrupted("interrupted", "by Ctrl-C")
    if answer.status != "completed":
        raise TurnFailed(*told(answer.problem or {"code": answer.status, "detail": "The turn did not complete."}))


def _events(sidecar: Sidecar, thread: Json, asked: Json) -> Iterator[tuple[str, Json]]:
    """A turn's events up to `end`. Where the stream breaks, it is rejoined after the last event that arrived."""
    answer = sidecar.open("POST", "/v1/chat", asked)
    last_id, pauses = "", iter(PAUSES)
    while True:
        broken = Broken(sidecar.url, "the stream ended before the turn did")
        try:
            with answer as response:
                if response.status_code == 204:
                    detail = "The sidecar no longer has this turn; see what was kept with `messages`."
                    raise TurnFailed("turn_lost", detail)
                for event in EventSource(response, max_event_size=None):
                    last_id, pauses = event.id, iter(PAUSES)
                    data: Json = json.loads(event.data)
                    yield event.event, data
                    if event.event == "end":
                        return
        except Broken as error:
            broken = error
        pause = next(pauses, None)
        if not last_id or pause is None:  # without its first event nobody can tell which turn to rejoin
            raise broken
        time.sleep(pause)
        answer = sidecar.open("GET", "/v1/chat", thread, {"Last-Event-ID": last_id})


class _CtrlC:
    """While this is entered, Ctrl-C stops the turn and not the program; a second one stops the program.

    The stream is read on undisturbed: what the turn still says, and how it ended, comes in it.
    """

    def __init__(self, sidecar: Sidecar, thread: Json) -> None:
        self.pressed = False
        self._sidecar = sidecar
        self._thread = thread
        self._over = threading.Event()
        self._before: Any = None

    def __enter__(self) -> "_CtrlC":
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.pressed = True
        # Not here: a handler runs in the middle of whatever the main thread does, with its locks held.
        threading.Thread(target=self._interrupt, daemon=True).start()

    def _interrupt(self) -> None:
        """Ask until the sidecar knows of the turn: Ctrl-C may have overtaken the message."""
        while not self._over.is_set():
            with contextlib.suppress(Failed):
                if self._sidecar.call("POST", "/v1/chat/interrupt", **self._thread)["turn_id"]:
                    return
            self._over.wait(0.1)


class _Answer:
    """What a person wants to see of a turn: the answer's text on stdout, and in short on stderr what else happens."""

    def __init__(self) -> None:
        self.status = "failed"
        self.problem: Json | None = None
        self._message = ""  # the ID of the newest one that came in deltas
        self._complete = True  # whether the model came to an end of it
        self._line_open = False

    def take(self, name: str, data: Json) -> None:
        """Print what one event adds."""
        if name == "session" and data["outcome"] in ("restarted", "reset"):
            self._aside(f"the session was {data['outcome']}: what came before is no longer known to the agent")
        elif name == "end":
            self.status, self.problem = data["status"], data["error"]
        elif data.get("parent_tool_use_id") is not None:
            pass  # a subagent's; its result comes back to the agent, who answers
        elif name == "stream_event":
            self._stream_event(data["event"])
        elif name == "assistant":
            self._assistant(data["message"])

    def end_line(self) -> None:
        """Whatever is printed next begins on a line of its own."""
        if self._line_open:
            self._text("\n")

    def _stream_event(self, event: Json) -> None:
        kind = event["type"]
        if kind == "message_start":
            if not self._complete:
                self._aside("the connection to the model broke: the answer starts over")
            self._message, self._complete = event["message"]["id"], False
        elif kind == "message_delta":  # its stop reason; the CLI stops a message that broke off too, without one
            self._complete = True
        elif kind == "content_block_start":
            self.end_line()
        elif kind == "content_block_delta":
            self._text(event["delta"].get("text", ""))

    def _assistant(self, message: Json) -> None:
        """A whole message, or a block of one: its tools, and its text where no deltas brought it."""
        is_news = message["id"] != self._message and message["model"] != "<synthetic>"  # which `end` tells better
        for block in message["content"]:
            if block["type"] == "tool_use":
                self._aside(f"· {show.tool(block)}")
            elif block["type"] == "text" and is_news:
                self.end_line()
                self._text(block["text"])

    def _text(self, text: str) -> None:
        if text:
            show.write(text)
            self._line_open = not text.endswith("\n")

    def _aside(self, text: str) -> None:
        if sys.stdout.isatty():  # elsewhere stderr is not on the same screen, and stdout is the answer alone
            self.end_line()
        show.note(text)
