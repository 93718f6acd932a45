"""The server of `serve`: uvicorn's, which says when it listens and when it stops, to systemd and to a person."""

import contextlib
import os
import socket
from collections.abc import Callable

import uvicorn

_NOTIFY_SECONDS = 1.0


class Server(uvicorn.Server):
    """uvicorn's server; a unit of `Type=notify` is up when it listens, and stopping from the signal on."""

    def __init__(self, config: uvicorn.Config, greet: Callable[["Server"], object] | None = None) -> None:
        """`greet` is called once it listens.

        The address of systemd is taken out of the environment: what agents start has nothing to tell it.
        """
        super().__init__(config)
        self._greet = greet
        self._notify_socket = os.environ.pop("NOTIFY_SOCKET", None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        notify(self._notify_socket, "READY=1")
        if self._greet is not None:
            self._greet(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so, and stop."""
        notify(self._notify_socket, "STOPPING=1")
        await super().shutdown(sockets)

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.servers[0].sockets[0].getsockname()[1]}"


def notify(address: str | None, state: str) -> None:
    """Tell a service manager our state, if it has named an address: see sd_notify(3).

    One that does not hear it is waited for a second, and is no reason to stop.
    """
    if address:
        name = f"\0{address[1:]}" if address.startswith("@") else address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service_manager:
            service_manager.settimeout(_NOTIFY_SECONDS)
            service_manager.sendto(state.encode(), name)
