"""uvicorn's connection, bounded: what it holds of a client's header, and how long it waits for a client.

`serve` installs it; for uvicorn's own command line it is `--http session_sidecar.server.connection:Connection`. An
application has no say in these: it is called when the header has been parsed, and cannot reach the transport.
"""

import contextlib
import enum
import json
import logging
import socket
import struct
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from session_sidecar.api.models.bodies import PROGRESS_SECONDS, WHOLE_SECONDS
from session_sidecar.errors import HeaderTooLarge, RequestTimeout, SidecarError

if TYPE_CHECKING:
    from asyncio import TimerHandle, Transport

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 64 * 2**10
# What the parser is fed at once, and so how exactly a header is measured.
_PIECE_BYTES = 16 * 2**10
# What the kernel takes of an answer beyond what the reader's side has room for.
_UNSENT_BYTES = 128 * 2**10
# How long a client that is still sending has to read why it is not heard any more.
_LINGER_SECONDS = 2
# How long a reader that takes nothing may hold up a shutdown.
_SHUTDOWN_SECONDS = 3
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"  # before the header of an answer
_RESET = struct.pack("ii", 1, 0)


class _At(enum.Enum):
    """Where in a request the client is."""

    BETWEEN = enum.auto()
    HEADER = enum.auto()
    BODY = enum.auto()


class Connection(HttpToolsProtocol):
    """A connection that a client can neither fill nor keep by doing nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what uvicorn gives a connection; `services` are in the application's state."""
        super().__init__(*args, **kwargs)
        self._at = _At.BETWEEN
        self._lines = 0  # bytes of header, trailer or chunk lines since the last that were anything else
        self._since = 0.0  # when the request began that the client now keeps waiting
        self._late: TimerHandle | None = None
        self._deaf = False  # nothing more is heard of what the client sends
        self._stalled: TimerHandle | None = None
        self._took = False  # whether the reader has taken something since the last look
        self._begun = False  # whether the header of an answer has been written whose body has not
        self._head = b""  # that header, as long as it waits for the first of the body
        self._send_seconds: float = self.app_state["services"].settings.send_seconds

    # A client that sends

    def connection_made(self, transport: "Transport") -> None:  # type: ignore[override]
        """Wait no longer for a first request than for a next one."""
        super().connection_made(transport)
        with contextlib.suppress(OSError):  # a Unix socket has no such option
            # Otherwise the kernel takes 4 MB of an answer for a reader that may be dead.
            tcp = transport.get_extra_info("socket")
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._keep_alive()

    def data_received(self, data: bytes) -> None:
        """Parse what has come, as far as no header gets too long."""
        if self._deaf:
            return
        view = memoryview(data)
        for start in range(0, len(data), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            self._lines += len(piece)
            super().data_received(piece)  # type: ignore[arg-type] # any buffer will do
            if self.is_closing():
                break
            if self._lines > MAX_HEADER_BYTES:
                self._refuse(HeaderTooLarge(f"A request's header may have {MAX_HEADER_BYTES} bytes."))
                break
        self._expect_the_rest()

    def on_message_begin(self) -> None:
        """A request's first byte."""
        self._at = _At.HEADER
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The application takes over; it has deadlines of its own for the body."""
        super().on_headers_complete()
        self._at, self._lines = _At.BODY, 0
        self.cycle.transport = self  # type: ignore[assignment] # it writes and closes

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._lines = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request's last byte."""
        self._at, self._lines = _At.BETWEEN, 0
        super().on_message_complete()

    def _expect_the_rest(self) -> None:
        """Wait for what the client still has to send, where nobody else does: for a header, or an unread body's end."""
        if self.is_closing():
            return
        late, self._late = self._late, None
        if late is not None:
            late.cancel()
        answered = self._answered()
        if self._at is _At.HEADER or (self._at is _At.BODY and answered):
            now = self.loop.time()
            if late is None:
                self._since = now
            self._late = self.loop.call_at(min(now + PROGRESS_SECONDS, self._since + WHOLE_SECONDS), self._too_late)
        elif answered and self.timeout_keep_alive_task is None:
            self._keep_alive()

    def _too_late(self) -> None:
        within = f"within {WHOLE_SECONDS} s, and never {PROGRESS_SECONDS} s without progress"
        self._refuse(RequestTimeout(f"A header is received {within}."))

    def _keep_alive(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _refuse(self, error: SidecarError) -> None:
        """Close the connection, and say why if an answer can be expected now."""
        request_id = uuid.uuid4().hex
        logger.info("request", extra={"fields": {"request_id": request_id, "status": error.status}})
        if self._may_answer():
            body = json.dumps({**error.problem(), "request_id": request_id}).encode()
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
                f"content-type: application/problem+json\r\ncontent-length: {len(body)}\r\n"
                f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self._linger()
        else:
            self._close()

    def _may_answer(self) -> bool:
        if self.pipeline:
            return False
        if self._at is _At.BODY:
            return not self.cycle.response_started
        return self._answered()

    def _answered(self) -> bool:
        cycle: Any = self.cycle  # None before the first request
        return cycle is None or cycle.response_complete

    # A client that reads

    def write(self, data: bytes) -> None:
        """Send a part of an answer; its header together with the first of its body, where that is there at once.

        uvloop makes a system call and a packet of each write, and these two are a third of what a short answer costs.
        """
        if self._begun or data == _CONTINUE:
            head, self._head = self._head, b""
            self.transport.write(head + data)
        else:
            self._begun, self._head = True, data
            self.loop.call_soon(self._send_head)

    def _send_head(self) -> None:
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """The answer is complete, and no other will follow."""
        if self._at is _At.BODY:
            self._linger()
        else:
            self._close()

    def is_closing(self) -> bool:
        """Whether no more is heard of the client."""
        return self._deaf or self.transport.is_closing()

    def pause_writing(self) -> None:
        """The reader is behind."""
        super().pause_writing()
        self._watch_the_reader()

    def resume_writing(self) -> None:
        """The reader has caught up."""
        self._took = True
        super().resume_writing()

    def on_response_complete(self) -> None:
        """The application has answered."""
        self._send_head()
        self._begun = False
        super().on_response_complete()
        if self._at is _At.BODY:
            self._expect_the_rest()

    def timeout_keep_alive_handler(self) -> None:
        """Nobody needs this connection."""
        self._close()

    def shutdown(self) -> None:
        """Take no more requests; what is being answered is answered to its end, but not to a reader that is dead."""
        super().shutdown()
        self._send_seconds = min(self._send_seconds, _SHUTDOWN_SECONDS)
        if self._at is _At.BODY:
            self._close()  # the request is not there yet, and would only be refused
        self._watch_the_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end: no timer keeps this alive."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it where the connection was reset
        for timer in (self._late, self._stalled):
            if timer is not None:
                timer.cancel()

    def _close(self) -> None:
        """Close once everything has been sent, if it can be."""
        self._send_head()
        self.transport.close()
        self._watch_the_reader()

    def _linger(self) -> None:
        """Close for writing, and go on taking what the client sends for a moment.

        Closing at once would reset the connection, and an answer that the client has not read yet is then lost (RFC
        9112, 9.6).
        """
        self._deaf = True
        self._send_head()
        self.flow.resume_reading()
        self.transport.write_eof()
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(_LINGER_SECONDS, self._close)

    def _watch_the_reader(self) -> None:
        """Hang up if the reader takes nothing from now on, for as long as there is something to take."""
        if self._stalled is not None:
            self._stalled.cancel()
        self._took = False
        left = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self._send_seconds, self._look_at_the_reader, left)

    def _look_at_the_reader(self, before: int) -> None:
        self._stalled = None
        left = self.transport.get_write_buffer_size()
        if left and left >= before and not self._took:
            logger.info("a reader that took nothing was dropped")
            # Without this the kernel would keep what it holds of the answer, and offer it for minutes.
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()
        elif left:
            self._watch_the_reader()
