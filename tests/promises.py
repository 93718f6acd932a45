"""What was said to a sidecar by many at once, and what each answer has promised since."""

import asyncio
import itertools
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import httpx

from session_sidecar.offline.reply import QUOTED
from tests.server import Sidecar
from tests.transcripts import texts

RESOURCES, NAMES = ("alice", "bob"), 6
BOUND = 75.0  # seconds for any one call: a few stopped CLIs one after the other, each as long as the settings allow

# What a call may be told, whatever happens to it.
GONE = {"session_not_found", "session_missing"}
NOTHING_TO_FORK = GONE | {"unsafe_fork_point", "message_not_found"}
STRUCK = {"agent_failed", "agent_start_failed", "turn_timeout", "api_error", "not_saved"}
STOPPED = {"turn_interrupted", "thread_deleted", "replay_gone", "session_not_found"}
TURN = {"thread_busy", "queue_full", "too_many_turns"} | STRUCK | STOPPED
FORK = {"thread_busy", "thread_exists", "too_many_turns", "not_saved"} | NOTHING_TO_FORK
ADOPT = {"thread_busy", "thread_exists", "session_taken", "session_busy", "session_missing"}


@dataclass(eq=False)
class Thread:
    """A thread, and the newest session ID that somebody was told of it."""

    name: str
    resource: str
    session: str | None = None
    changes: int = 0  # by hand: what was told before then says nothing any more

    def change(self, session: str | None = None) -> None:
        self.session, self.changes = session, self.changes + 1


@dataclass(eq=False)
class Asked:
    """What was said, and what was known of the thread then."""

    thread: Thread
    prompt: str
    session: str | None
    changes: int
    at: float
    completed_at: float = 0

    @property
    def still(self) -> bool:
        """Whether nobody has changed the thread by hand since then."""
        return self.thread.changes == self.changes


class People:
    """Those who talk to a sidecar, and what they were told."""

    def __init__(self, sidecar: Sidecar) -> None:
        self.sidecar = sidecar
        self.threads = [Thread(f"thread-{number}", resource) for resource in RESOURCES for number in range(NAMES)]
        self.completed: defaultdict[str, set[Asked]] = defaultdict(set)  # by session
        self.turns: dict[str, Asked] = {}  # those whose ID was told
        self.left: set[tuple[str, str]] = set()  # resource and session where a mapping was deleted and no more
        self.numbers, self.began = itertools.count(1), time.monotonic()
        self.journal: list[str] = []
        self.outcomes: Counter[str] = Counter()

    def free(self, beside: Thread) -> list[Thread]:
        """The threads of the same resource of which nobody knows a session."""
        return [thread for thread in self.threads if thread.resource == beside.resource and thread.session is None]

    def note(self, what: str, thread: Thread | None = None, more: object = "") -> None:
        self.outcomes[what] += 1
        where = f" ({thread.resource}'s {thread.name})" if thread else ""
        self.journal.append(f"{time.monotonic() - self.began:7.2f} {what}{where} {more}")

    def ask(self, thread: Thread, how: str = "") -> Asked:
        prompt = f"No. {next(self.numbers)} of {thread.resource} on {thread.name} {how}".strip()
        return Asked(thread, prompt, thread.session, thread.changes, time.monotonic())

    async def call(self, what: str, thread: Thread, may: set[str], key: str = "", **fields: Any) -> httpx.Response:
        """Make a call, `METHOD path`, that comes to an end in time, and to one that is documented."""
        method, path = what.split()
        place = "params" if method in ("GET", "DELETE") else "json"
        keywords: dict[str, Any] = {place: {"thread_id": thread.name, "resource_id": thread.resource, **fields}}
        headers = {"accept": "application/json"} | ({"idempotency-key": key} if key else {})
        async with asyncio.timeout(BOUND):
            response = await self.sidecar.http.request(method, path, headers=headers, **keywords)
        self.answered(what, response, thread, may)
        return response

    def answered(self, what: str, response: httpx.Response, thread: Thread, may: set[str]) -> str:
        code = "" if response.is_success else response.json()["code"]
        self.note(f"{what} {response.status_code} {code}", thread)
        assert response.is_success or code in may, (what, response.text)
        return str(code)

    async def follow(self, asked: Asked, leave: int | None = None, may: set[str] = TURN, **fields: Any) -> str:
        """Ask as a stream, and leave after so many events: what has become of it."""
        thread = asked.thread
        opened = self.sidecar.stream(thread.name, asked.prompt, resource_id=thread.resource, **fields)
        async with asyncio.timeout(BOUND), opened as stream:
            if code := self.answered("stream", stream.response, thread, may):
                return code
            async for event in stream:
                if event.name == "session":
                    self.told(asked, event.data)
                if len(stream.events) == leave:
                    return "left"
        return self.ended(asked, stream.events[-1].data, stream.text)

    async def post(self, asked: Asked, key: str = "", **fields: Any) -> str:
        """Ask for one answer: what has become of it."""
        response = await self.call("POST /v1/chat", asked.thread, TURN, key, message=asked.prompt, **fields)
        if not response.is_success:
            return str(response.json()["code"])
        answer = response.json()
        self.told(asked, answer["session"])
        return self.ended(asked, {**answer["session"], **answer, "error": None}, answer["text"])

    # What holds of every answer

    def told(self, asked: Asked, session: dict[str, Any]) -> None:
        """A thread keeps the session that somebody was told, unless nothing was completed there."""
        thread, now = asked.thread, session["sdk_session_id"]
        self.turns[session["turn_id"]] = asked
        assert (session["thread_id"], session["resource_id"]) == (thread.name, thread.resource)
        assert session["origin"] == "message", session
        if asked.session is not None and asked.still:
            assert session["outcome"] in ("resumed", "restarted", "forked"), (asked, session)
            lost = [before for before in self.completed[asked.session] if before.completed_at < asked.at]
            assert now == asked.session or not lost, ("another session took the place of one with", lost, session)
        if asked.still:
            thread.session = now

    def ended(self, asked: Asked, end: dict[str, Any], text: str) -> str:
        """A turn is completed with the answer to its own prompt, or it says why not."""
        assert "status" in end, ("the stream broke off", asked, end)
        status, code = end["status"], end["error"] and end["error"]["code"]
        self.note(f"end {status} {code or ''}", asked.thread, asked.prompt)
        if status != "completed":
            assert code in STRUCK if status == "failed" else code in {None, *STOPPED}, end
            return code or str(status)
        quoted = asked.prompt if len(asked.prompt) <= QUOTED else asked.prompt[: QUOTED - 1] + "…"
        # In a turn that uses tools, the end of a task may be the last that the model hears of.
        assert text.endswith(quoted) or ("[[tool" in asked.prompt and "<task-notification>" in text), (asked, text)
        asked.completed_at = asked.completed_at or time.monotonic()
        self.completed[end["sdk_session_id"]].add(asked)
        return "completed"

    async def history(self, thread: Thread) -> list[str]:
        """The prompts in a thread's history: each once, all that was completed, in order."""
        asked = self.ask(thread)
        promised = set(self.completed[asked.session or ""])
        found: list[dict[str, Any]] = []
        page: dict[str, Any] = {"next": None}
        while not found or page["has_more"]:
            after = {"after": page["next"]} if found else {}
            response = await self.call("GET /v1/session/messages", thread, GONE, limit="200", **after)
            if not response.is_success:
                assert not promised or not asked.still, (response.text, asked, promised)
                return []
            page = response.json()
            found += page["data"]
            if not page["data"]:
                break
        said = [message for message in found if message["type"] == "user" and not message["synthetic"]]
        prompts = [text for text in texts(said) if text.startswith("No. ")]
        assert all(f" of {thread.resource} " in prompt for prompt in prompts), prompts
        assert len(set(prompts)) == len(prompts), ("twice in the history", prompts)
        if asked.still:
            assert {one.prompt for one in promised} <= set(prompts), ("not in the history", asked, promised, prompts)
            placed = sorted(promised, key=lambda one: prompts.index(one.prompt))
            for earlier, later in itertools.combinations(placed, 2):
                assert later.completed_at > earlier.at, ("out of order", earlier, later)
        return prompts
