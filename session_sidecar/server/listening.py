"""The server of `serve`: uvicorn's, which says when it listens and when it stops, to systemd and to a person."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from session_sidecar.settings import SettingsError

logger = logging.getLogger("uvicorn.error")

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
        if sockets:  # uvicorn says it of addresses alone
            logger.info("Uvicorn running on unix socket %s (Press CTRL+C to quit)", self.uds)
        notify(self._notify_socket, "READY=1")
        if self._greet is not None:
            self._greet(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so, and stop."""
        notify(self._notify_socket, "STOPPING=1")
        if self.uds is not None:  # here, as uvicorn ends the process by the signal that it has had
            await asyncio.to_thread(Path(self.uds).unlink, missing_ok=True)
        await super().shutdown(sockets)

    @property
    def uds(self) -> str | None:
        """The Unix socket on which it listens, if it is one."""
        name: object = self.servers[0].sockets[0].getsockname()
        return name if isinstance(name, str) else None

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        if self.uds is not None:
            return "http://localhost"
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.servers[0].sockets[0].getsockname()[1]}"


def unix_socket(path: Path) -> socket.socket:
    """A socket at `path` that only this process's user may connect to. Raises SettingsError.

    uvicorn's own lets everybody. One that a crash has left is taken away; one that somebody listens on is not.
    """
    found = socket.socket(socket.AF_UNIX)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise SettingsError(f"SIDECAR_UDS: somebody listens on {path}. End that, or choose another path.")
            path.unlink()
        before = os.umask(0o177)
        try:
            found.bind(str(path))
        finally:
            os.umask(before)
    except OSError as error:
        raise SettingsError(f"SIDECAR_UDS: {path} cannot be listened on ({error.strerror or error}).") from error
    return found


def notify(address: str | None, state: str) -> None:
    """Tell a service manager our state, if it has named an address: see sd_notify(3).

    One that does not hear it is waited for a second, and is no reason to stop.
    """
    if address:
        name = f"\0{address[1:]}" if address.startswith("@") else address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as service_manager:
            service_manager.settimeout(_NOTIFY_SECONDS)
            service_manager.sendto(state.encode(), name)
