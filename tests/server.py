"""The sidecar as its users meet it: a process of its own, on a loopback port, spoken to over HTTP."""

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from tests.forked import PROGRAM, Forked, can_be_forked

MARK = "TEST_OF_HOME"  # by which whatever a sidecar has started is known
SECRET_CHARS = 10
SECONDS = 20  # the most that any one thing may take before a test says that it hangs
_ADDRESS = re.compile(r"running on (http://[\w.]+:\d+)")


@dataclass(frozen=True)
class Event:
    """One server-sent event."""

    id: str
    name: str
    data: dict[str, Any]

    @property
    def number(self) -> int:
        """Which one of its turn it is."""
        return int(self.id.rpartition("-")[2])

    @property
    def delta(self) -> str:
        """The text that this event adds to the answer."""
        delta = self.data.get("event", {}).get("delta", {}) if self.name == "stream_event" else {}
        text: str = delta.get("text", "")
        return text


class Stream:
    """An open stream, read one event at a time."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.events: list[Event] = []
        self._raw: list[str] = []
        self._blocks = self._read()

    @property
    def raw(self) -> str:
        """All that has come, as it came."""
        return "".join(self._raw)

    async def _read(self) -> AsyncIterator[str]:
        rest = ""
        async for text in self.response.aiter_text():
            self._raw.append(text)
            if "\n\n" not in rest[-1:] + text:
                rest += text  # in place, so that an event of megabytes is not copied with each piece of it
                continue
            *blocks, rest = (rest + text).split("\n\n")
            for block in blocks:
                yield block

    async def __aiter__(self) -> AsyncIterator[Event]:
        async for block in self._blocks:
            if block.startswith(":"):
                continue
            lines = [line.partition(": ") for line in block.split("\n")]
            fields = {name: value for name, _, value in lines}
            event = Event(fields["id"], fields["event"], json.loads(fields["data"]))
            self.events.append(event)
            yield event

    async def until(self, name: str) -> Event:
        """Read up to the next event of this name."""
        async with asyncio.timeout(SECONDS):
            async for event in self:
                if event.name == name:
                    return event
        raise AssertionError(f"the stream ended without {name}: {[event.name for event in self.events]}")

    async def until_text(self, text: str = "") -> None:
        """Read until the answer so far holds `text` (any text at all by default)."""
        async with asyncio.timeout(SECONDS):
            async for event in self:
                if event.delta and text in self.text:
                    return
        raise AssertionError(f"the stream ended without {text!r}")

    async def until_ping(self) -> None:
        """Read up to the next comment ping."""
        async with asyncio.timeout(SECONDS):
            async for block in self._blocks:
                if block == ": ping":
                    return
        raise AssertionError("the stream ended without a ping")

    async def rest(self) -> list[Event]:
        """Read to the end; all events there were."""
        async with asyncio.timeout(SECONDS):
            async for _ in self:
                pass
        return self.events

    @property
    def text(self) -> str:
        """The answer as far as it has been streamed."""
        return "".join(event.delta for event in self.events)


async def a_moment() -> None:
    """Between two looks at what no event tells of: without it, looking takes the core that the others need."""
    await asyncio.sleep(0.01)


class Sidecar:
    """`session-sidecar serve` in a home of its own."""

    def __init__(self, home: Path, env: Mapping[str, str], *options: str, forked: bool = True) -> None:
        """`forked` spares it its imports, where the interpreter has nothing else to be told: see tests/forked.py."""
        self.home = home
        self.forked = forked and can_be_forked(env)
        person = {k: v for k, v in os.environ.items() if not k.startswith("SIDECAR_")}
        self.env = {**person, MARK: str(home), **env}
        self.options = options
        self.log: list[str] = []
        self._secrets: set[str] = set()  # what was said, and tokens: nothing of it belongs into a log
        self._leaks: list[str] = []
        self._process: asyncio.subprocess.Process | Forked | None = None
        self._reader: asyncio.Task[None] | None = None
        self._address: asyncio.Future[str] | None = None
        self._logged = asyncio.Condition()
        self._client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            await self.stop(signal.SIGTERM)
        if self._client is not None:
            await self._client.aclose()
        assert self._leaks == [], "the log holds what somebody has said"

    def keep_secret(self, *texts: Any) -> None:
        """See that no line of the log holds one of these from here on. Very short ones are in it by chance."""
        self._secrets |= {text for text in texts if isinstance(text, str) and len(text) >= SECRET_CHARS}

    @property
    def process(self) -> asyncio.subprocess.Process | Forked:
        assert self._process is not None
        return self._process

    @property
    def http(self) -> httpx.AsyncClient:
        assert self._client is not None
        return self._client

    async def start(self) -> None:
        """Start it and wait until it listens. A process that refuses to start fails here with its log."""
        arguments = ("serve", "--port", "0", "--home", str(self.home), *self.options)
        if self.forked:
            self._process = await Forked.serve(*arguments, env=self.env)
        else:
            self._process = await asyncio.create_subprocess_exec(
                PROGRAM, *arguments, env=self.env, stderr=asyncio.subprocess.PIPE
            )
        self._address = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read_log())
        async with asyncio.timeout(SECONDS):
            address = await self._address
        self._client = httpx.AsyncClient(base_url=address, timeout=4 * SECONDS)

    async def hang_up(self) -> None:
        """Close the connections that the client keeps open."""
        address = self.http.base_url
        await self.http.aclose()
        self._client = httpx.AsyncClient(base_url=address, timeout=4 * SECONDS)
        await self.settle()

    async def stop(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end; the exit status, negative for a signal."""
        self.process.send_signal(number)
        return await self.wait()

    async def wait(self) -> int:
        """Wait for the end; the exit status, negative for a signal."""
        assert self._reader is not None
        async with asyncio.timeout(SECONDS):
            status = await self.process.wait()
            await self._reader
        return status

    async def restart(self) -> None:
        """Start it again after it ended."""
        if self._client is not None:
            await self._client.aclose()
        await self.start()

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        assert self._address is not None
        async for line in self.process.stderr:
            async with self._logged:
                self.log.append(line.decode())
                self._logged.notify_all()
            self._leaks += [line.decode() for secret in self._secrets if json.dumps(secret)[1:-1] in line.decode()]
            if (found := _ADDRESS.search(self.log[-1])) and not self._address.done():
                self._address.set_result(found[1])
        if not self._address.done():
            self._address.set_exception(AssertionError("it did not start: " + "".join(self.log)))

    async def until_logged(self, event: str, **fields: Any) -> dict[str, Any]:
        """Wait for a log line; the newest that fits."""
        async with asyncio.timeout(SECONDS), self._logged:
            await self._logged.wait_for(lambda: self.logged(event, **fields))
        return self.logged(event, **fields)[-1]

    async def settle(self) -> None:
        """Let it take in what has been sent: some round trips on another connection."""
        for _ in range(5):
            await self.http.get("/healthz")

    async def at_rest(self, seconds: float = SECONDS, *, threads: int = 1000) -> None:
        """Wait until no CLI is left but those that are kept; it fails if one is after so many seconds.

        `threads` could have a process that is kept, as their last turn came to a result.
        """
        kept = min(int(self.env["SIDECAR_WARM_SESSIONS"]), threads) + int(self.env["SIDECAR_SPARE_PROCESSES"])
        async with asyncio.timeout(seconds):
            while len(self.cli_processes()) > kept:
                await a_moment()

    # What its users do

    async def chat(self, thread: str, message: Any, **fields: Any) -> httpx.Response:
        """`POST /v1/chat`, answered once."""
        return await self.post("/v1/chat", thread, message=message, **fields)

    async def post(
        self, path: str, thread: str, *, idempotency_key: str | None = None, **fields: Any
    ) -> httpx.Response:
        """POST a body and get one JSON answer."""
        body = {"thread_id": thread, "resource_id": "alice", **fields}
        self.keep_secret(fields.get("message"))
        headers = {"accept": "application/json"}
        if idempotency_key is not None:
            headers["idempotency-key"] = idempotency_key
        return await self.http.post(path, json=body, headers=headers)

    async def say(self, thread: str, message: Any, **fields: Any) -> str:
        """Run a turn that is expected to complete; the answer's text."""
        response = await self.chat(thread, message, **fields)
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["status"] == "completed", answer
        text: str = answer["text"]
        return text

    @contextlib.asynccontextmanager
    async def stream(
        self, thread: str, message: Any, *, path: str = "/v1/chat", **fields: Any
    ) -> AsyncIterator[Stream]:
        """`POST /v1/chat` as a stream; leaving the block disconnects."""
        body = {"thread_id": thread, "resource_id": "alice", "message": message, **fields}
        self.keep_secret(message)
        async with self.http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                await response.aread()
            yield Stream(response)

    @contextlib.asynccontextmanager
    async def rejoin(self, thread: str, after: str | None = None, **query: str) -> AsyncIterator[Stream]:
        """`GET /v1/chat` as a stream."""
        headers = {} if after is None else {"last-event-id": after}
        params = {"thread_id": thread, "resource_id": "alice", **query}
        async with self.http.stream("GET", "/v1/chat", params=params, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
            yield Stream(response)

    async def session(self, thread: str, resource: str = "alice") -> httpx.Response:
        """`GET /v1/session`: the mapping alone."""
        params = {"thread_id": thread, "resource_id": resource, "metadata": "false"}
        return await self.http.get("/v1/session", params=params)

    async def session_id(self, thread: str) -> str:
        """The SDK session ID that a thread is mapped to."""
        answer: str = (await self.session(thread)).json()["sdk_session_id"]
        return answer

    async def history(self, thread: str) -> list[tuple[str, str]]:
        """What the SDK has kept of a thread: (role, text), oldest first."""
        return chain(self.transcript(await self.session_id(thread)))

    def transcript(self, session_id: str) -> Path:
        """Where the CLI keeps a session."""
        return next(self.home.glob(f"claude/projects/*/{session_id}.jsonl"))

    def logged(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log lines of an event that have these members."""
        lines = [json.loads(line) for line in self.log if line.startswith("{")]
        return [line for line in lines if line["event"] == event and fields.items() <= line.items()]

    async def process_of(self, thread: str) -> int:
        """The CLI process that is connected to a thread's session, by the CLI's own registry."""
        session_id = await self.session_id(thread)
        for pid in self.cli_processes():
            entry = self.home / "claude" / "sessions" / f"{pid}.json"
            if entry.exists() and session_id in entry.read_text():
                return pid
        raise AssertionError("no process is connected to this session")

    def cli_processes(self) -> list[int]:
        """The CLI processes that run for this home, found by their environment."""
        wanted = f"CLAUDE_CONFIG_DIR={self.home}/claude".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if b"/claude\0" in (process / "cmdline").read_bytes() and wanted in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found


@contextlib.asynccontextmanager
async def followed(
    sidecar: Sidecar, *, after: str | None = None, headers: Mapping[str, str] | None = None, **query: str
) -> AsyncIterator[Stream]:
    """`GET /v1/events` as a stream, of the resource that the query names."""
    sent = {**(headers or {}), **({} if after is None else {"last-event-id": after})}
    async with sidecar.http.stream("GET", "/v1/events", params=query, headers=sent) as response:
        if response.status_code != 200:
            await response.aread()
        yield Stream(response)


def chain(transcript: Path) -> list[tuple[str, str]]:
    """A transcript's conversation as (role, text), read from its last entry up; fails unless it is one single chain."""
    entries = [json.loads(line) for line in transcript.read_text().split("\n") if line]
    linked = {entry["uuid"]: entry for entry in entries if "parentUuid" in entry}
    parents = [entry["parentUuid"] for entry in linked.values()]
    assert len(set(parents)) == len(parents), "two entries have the same parent: a turn was lost from the history"
    found, current = [], next(reversed(linked), None)
    while current is not None:
        entry = linked[current]
        if entry["type"] in ("user", "assistant"):
            content = entry["message"]["content"]
            text = content if isinstance(content, str) else "".join(block.get("text", "") for block in content)
            found.append((entry["type"], text))
        current = entry["parentUuid"]
    return found[::-1]


def parting(before: bytes, after: bytes) -> list[str]:
    """What a CLI that was kept has added to a transcript as it left: the types of its lines, none of them a message."""
    assert after.startswith(before)
    added = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    assert not [line for line in added if "message" in line]
    return [line["type"] for line in added]


def running(program: Path) -> list[int]:
    """The processes that have this file in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(program).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # an orphan's last trace stays until whoever adopted it looks


async def gone(pids: list[int], seconds: float = 1.0) -> bool:
    """Whether all these processes end within so many seconds."""
    deadline = asyncio.get_running_loop().time() + seconds
    while any(_runs(pid) for pid in pids):
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True
