"""A client that costs less than what it measures: keep-alive connections that repeat one GET."""

import asyncio
import time
from typing import cast
from urllib.parse import urlsplit


class _Connection(asyncio.Protocol):
    """Sends the request, waits for an answer as long as the first one was, and sends it again."""

    def __init__(self, request: bytes) -> None:
        self.answered = 0
        self.stopped = asyncio.get_running_loop().create_future()
        self._request = request
        self._length = 0
        self._buffer = b""
        self._until = 0.0

    def run(self, until: float) -> None:
        self._until = until
        self._transport.write(self._request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class is none of asyncio's

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._length:
            head, _, _ = self._buffer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            (length,) = (line[16:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length: "))
            self._length = len(head) + 4 + int(length)
        if len(self._buffer) < self._length:
            return
        self._buffer = b""
        self._length = 0
        self.answered += 1
        if time.perf_counter() < self._until:
            self._transport.write(self._request)
        else:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if error is None:
            self.stopped.set_result(None)
        else:
            self.stopped.set_exception(error)


async def repeat(url: str, path: str, *, connections: int, seconds: float) -> tuple[int, float]:
    """GET `path` over so many connections for so long; the answers that came and the seconds it took."""
    target = urlsplit(url)
    assert target.hostname is not None
    assert target.port is not None
    request = f"GET {path} HTTP/1.1\r\nHost: {target.netloc}\r\n\r\n".encode()
    loop = asyncio.get_running_loop()
    opened = [
        (await loop.create_connection(lambda: _Connection(request), target.hostname, target.port))[1]
        for _ in range(connections)
    ]
    start = time.perf_counter()
    for one in opened:
        one.run(start + seconds)
    await asyncio.gather(*(one.stopped for one in opened))
    return sum(one.answered for one in opened), time.perf_counter() - start
