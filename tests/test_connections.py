"""What a client can make the sidecar hold, and wait for: bounded, and never at the cost of another one."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import Behaviour, FaultyModel
from tests.server import SECONDS, Sidecar, a_moment

Make = Callable[..., Sidecar]
MIB = 2**20


class Client:
    """A client that does with its connection what no library would."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._url = sidecar.http.base_url

    async def __aenter__(self) -> "Client":
        self.reader, self.writer = await asyncio.open_connection(self._url.host, self._url.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def begin(self, method: str, path: str, *headers: str) -> None:
        """Send a header as far as these lines; an empty one ends it."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._url.host}", *headers]
        await self.send("".join(f"{line}\r\n" for line in lines).encode())

    async def post(self, body: bytes, *, length: int | None = None) -> None:
        """Send a body, or as much of one of that length."""
        size = f"Content-Length: {len(body) if length is None else length}"
        await self.begin("POST", "/v1/chat", "Content-Type: application/json", size, "")
        await self.send(body)

    async def send(self, data: bytes) -> None:
        """Send as much of it as the server takes."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def answer(self, seconds: float = SECONDS) -> tuple[int, dict[str, Any], str]:
        """The answer's status, its body and its header."""
        async with asyncio.timeout(seconds):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = re.search(r"content-length: (\d+)", head)
            assert length is not None, head
            body = await self.reader.readexactly(int(length[1]))
        return int(head.split()[1]), json.loads(body), head

    async def closed(self, seconds: float = SECONDS) -> None:
        """Wait until the server has hung up."""
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ConnectionError):
                while await self.reader.read(MIB):
                    pass


def memory(sidecar: Sidecar, name: str = "VmHWM") -> int:
    """The most that the process has had in memory since it was last forgotten, in MiB."""
    status = Path(f"/proc/{sidecar.process.pid}/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) // 1024


def sockets(sidecar: Sidecar) -> int:
    found = 0
    for entry in Path(f"/proc/{sidecar.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found += os.readlink(entry).startswith("socket:")
    return found


# A process of its own, so that what the test sends does not delay it. It asks 50 times, says so, and asks on until its
# standard input ends.
PROBE = """
import select, socket, sys, time
server = socket.create_connection((sys.argv[1], int(sys.argv[2])))
took = []
while len(took) < 50 or not select.select([sys.stdin], [], [], 0.005)[0]:
    began = time.monotonic()
    server.sendall(b"GET /healthz HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n\\r\\n")
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        answer = server.recv(65536)
        assert answer, "hung up"
    took.append(time.monotonic() - began)
    if len(took) == 50:
        print("asking", flush=True)
print(*took)
"""


@contextlib.asynccontextmanager
async def healthy(sidecar: Sidecar) -> AsyncIterator[None]:
    """Ask for `/healthz` all the while: for at least half of the time an answer must be one that comes within 100 ms.

    A machine that is busy with something else adds to that what it adds to an answer of an idle sidecar.
    """
    url = sidecar.http.base_url
    probe = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROBE,
        url.host,
        str(url.port),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert probe.stdout is not None
    assert await probe.stdout.readline() == b"asking\n"
    try:
        yield
    finally:
        out, _ = await probe.communicate(b"")  # which ends its input
    took = [float(text) for text in out.split()]
    idle, busy = statistics.median(took[:50]), sorted(took[50:])
    passed = list(itertools.accumulate(busy))
    typical = next(seconds for seconds, so_far in zip(busy, passed, strict=True) if so_far >= passed[-1] / 2)
    assert typical < 0.1 + 5 * idle, (idle, busy[-5:])


ESCAPES = b"\\u0041" * (4 * MIB)


@pytest.mark.long
@pytest.mark.quiet
@pytest.mark.parametrize("path", ["/healthz", "/v1/session?thread_id=t&resource_id=r", "/nowhere"])
async def test_a_short_answer_comes_in_one_packet(cold: Sidecar, path: str) -> None:
    async with Client(cold) as client:
        await client.begin("GET", path, "")
        await client.answer()
        info = client.writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
        (packets,) = struct.unpack_from("I", info, 152)  # tcpi_data_segs_in of Linux, include/uapi/linux/tcp.h
        assert packets == 1


async def test_a_client_that_waits_to_be_told_to_go_on_is_told(cold: Sidecar, thread: str) -> None:
    body = json.dumps({"thread_id": thread, "resource_id": "alice"}).encode()
    async with Client(cold) as client, asyncio.timeout(SECONDS):
        size = f"Content-Length: {len(body)}"
        await client.begin("POST", "/v1/chat", "Content-Type: application/json", size, "Expect: 100-continue", "")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(body)
        assert (await client.answer())[0] == 422


async def test_sixty_unfinished_bodies_of_24_mib_take_256_mib(a_sidecar: Make, thread: str) -> None:
    async with a_sidecar() as sidecar, contextlib.AsyncExitStack() as stack:
        before = memory(sidecar, "VmRSS")
        clients = [await stack.enter_async_context(Client(sidecar)) for _ in range(60)]
        text = b'{"message": "' + ESCAPES
        answers = [asyncio.create_task(client.answer(3 * SECONDS)) for client in clients]
        async with healthy(sidecar):
            for client in clients:
                await client.post(text, length=len(text) + 100)
            while sum(answer.done() for answer in answers) < 49:
                await asyncio.wait([answer for answer in answers if not answer.done()], return_when="FIRST_COMPLETED")
        assert memory(sidecar) - before < 400
        refused = [answer.result() for answer in answers if answer.done()]
        # On a slow machine the first ones have waited for too long by now.
        assert {problem["code"] for _, problem, _ in refused} - {"request_timeout"} == {"too_many_uploads"}
        for status, problem, head in refused:
            if problem["code"] == "too_many_uploads":
                assert status == 503
                assert "retry-after: 5" in head
                assert "connection: close" in head
        # Ordinary messages come through all the while.
        assert await sidecar.say(thread, "Hello")
        for answer in answers:
            answer.cancel()
        await asyncio.wait(answers)


@pytest.mark.parametrize(
    "body",
    [
        b'{"message": "' + ESCAPES + b'AB", "agent": "nobody"}',
        b'{"message": [' + b"[]," * (4 * MIB // 3) + b"[]]}",
        b'{"message": [' + b'{"type":"text","text":"x"},' * 30_000 + b"{}]}",
        b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}",
    ],
    ids=["escapes", "lists", "blocks", "fields"],
)
@pytest.mark.quiet
async def test_json_of_megabytes_holds_up_nobody(cold: Sidecar, body: bytes) -> None:
    async with healthy(cold):
        for _ in range(3):
            async with Client(cold) as client:
                await client.post(body)
                status, _, _ = await client.answer()
                assert status in (413, 422)


async def test_a_message_of_just_the_limit_is_read_however_it_is_written(cold: Sidecar) -> None:
    for written in (b"\\u00e9" * (2 * MIB), "é".encode() * (2 * MIB), b"x" + b"\\n" * (4 * MIB - 1), b"x" * (4 * MIB)):
        key = b'{"thread_id": "bad", "resource_id": "alice", "agent": "nobody", "message": '
        for more, code in ((b"", "unknown_agent"), (b"y", "message_too_large")):
            async with Client(cold) as client:
                await client.post(key + b'"' + written + more + b'"}')
                assert (await client.answer())[1]["code"] == code


BIG = 200 * MIB
POST = ("POST", "/v1/chat", "Content-Type: application/json")


@pytest.mark.quiet
async def test_a_header_of_200_mb_is_refused_before_it_is_parsed(cold: Sidecar) -> None:
    line = b"X-Line: 1\r\n"
    heads = {
        "one line": (("GET", "/healthz"), b"X-Long: ", b"x" * MIB),
        "many lines": (("GET", "/healthz"), b"", line * (MIB // len(line))),
        "a trailer": ((*POST, "Transfer-Encoding: chunked", ""), b"1\r\n{\r\n0\r\nX-Long: ", b"x" * MIB),
        "a chunk's extension": ((*POST, "Transfer-Encoding: chunked", ""), b"1\r\n{\r\n1;x=", b"x" * MIB),
    }
    async with healthy(cold):
        for name, (begin, then, more) in heads.items():
            async with Client(cold) as client:

                async def send(client: Client = client, more: bytes = more) -> None:
                    with contextlib.suppress(ConnectionError):
                        for _ in range(BIG // MIB):
                            client.writer.write(more)
                            await client.writer.drain()

                await client.begin(*begin)
                await client.send(then)
                sending = asyncio.create_task(send())
                status, problem, head = await client.answer()
                assert (status, problem["code"]) == (431, "header_too_large"), name
                assert "connection: close" in head
                await sending


@pytest.mark.smoke
async def test_a_header_of_some_kilobytes_is_read_and_so_are_many_requests_at_once(cold: Sidecar) -> None:
    async with Client(cold) as client:
        await client.begin("GET", "/healthz", "X-Long: " + "x" * 60_000, "")
        assert (await client.answer())[0] == 200
        for _ in range(100):
            await client.begin("GET", "/healthz", "X-Long: " + "x" * 2_000, "")
        for _ in range(100):
            assert (await client.answer())[0] == 200


@pytest.mark.long
async def test_a_request_that_does_not_come_on_is_ended(cold: Sidecar) -> None:
    async def trickle(client: Client) -> None:
        while True:
            await client.send(b"x")
            await asyncio.sleep(5)

    async def ends(seconds: float, status: int | None, begin: tuple[str, ...], then: bytes, *, slow: bool) -> None:
        async with Client(cold) as client:
            await client.begin(*begin)
            await client.send(then)
            if status is None:
                assert (await client.answer())[0] == 415
            began = time.monotonic()
            trickling = asyncio.create_task(trickle(client)) if slow else None
            if status is not None:
                got, problem, _ = await client.answer(seconds + SECONDS)
                assert (got, problem["code"]) == (status, "request_timeout")
            await client.closed(seconds + SECONDS)
            assert seconds - 2 < time.monotonic() - began < seconds + 5
            if trickling is not None:
                trickling.cancel()

    unread = ("POST", "/v1/chat", "Content-Type: text/plain", "Content-Length: 1000", "")
    body = (*POST, "Content-Length: 1000", "")
    async with asyncio.TaskGroup() as group:
        group.create_task(ends(30, 408, ("GET", "/healthz"), b"X-Slow: ", slow=False))
        group.create_task(ends(60, 408, ("GET", "/healthz"), b"X-Slow: ", slow=True))
        group.create_task(ends(30, 408, body, b"{", slow=False))
        group.create_task(ends(60, 408, body, b"{", slow=True))
        group.create_task(ends(30, None, unread, b"x", slow=False))
        group.create_task(ends(60, None, unread, b"x", slow=True))


async def test_a_client_that_leaves_in_mid_upload_is_no_error_of_ours(a_sidecar: Make) -> None:
    async with a_sidecar() as sidecar:
        async with Client(sidecar) as client:
            await client.post(b'{"thread_id": ', length=1000)
            await sidecar.settle()
        line = await sidecar.until_logged("request", path="/v1/chat")
        assert (line["level"], line["status"]) == ("info", 499)
        await sidecar.settle()
        assert {json.loads(line)["level"] for line in sidecar.log} <= {"info", "debug"}


@pytest.mark.long
@pytest.mark.quiet
async def test_readers_that_take_nothing_hold_neither_memory_nor_sockets_nor_a_shutdown(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    model.default = Behaviour(text="word " * 100 + "x" * 8_000_000)
    async with a_sidecar(SIDECAR_SEND_SECONDS="5") as sidecar, contextlib.AsyncExitStack() as stack:
        await sidecar.say(thread, "Hello")
        key = f"thread_id={thread}&resource_id=alice"

        async def dead(path: str) -> Client:
            client = await stack.enter_async_context(Client(sidecar))
            client.writer.transport.pause_reading()  # type: ignore[attr-defined] # it is one that reads, too
            await client.begin("GET", f"{path}?{key}", "")
            return client

        await sidecar.settle()
        Path(f"/proc/{sidecar.process.pid}/clear_refs").write_text("5")  # forgets what the most was: proc(5)
        before, open_ = memory(sidecar), sockets(sidecar)
        for _ in range(30):
            await dead("/v1/chat")
        async with asyncio.timeout(3 * SECONDS):
            while len(sidecar.logged("request", path="/v1/chat", method="GET")) < 30:
                await a_moment()
            while sockets(sidecar) > open_:
                await a_moment()
        assert memory(sidecar) - before < 30
        # Thirty more that are not dropped yet; some want an answer that is all there at once.
        for number in range(30):
            await dead("/v1/session/messages" if number % 6 == 0 else "/v1/chat")
        async with asyncio.timeout(SECONDS):
            while sockets(sidecar) < 30:
                await a_moment()
        began = time.monotonic()
        await sidecar.stop(signal.SIGTERM)
        assert time.monotonic() - began < 8
        assert not [line for line in sidecar.log if json.loads(line)["level"] == "error"]
