"""The processes that are measured: each a server on a free loopback port, its output in a file."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

from session_sidecar.agent.agents import QUIET_CLI
from tests.postgres import free_port

_ADDRESS = re.compile(r"running on (http://[\w.]+:\d+)")
START_SECONDS = 60


@dataclass(frozen=True)
class Server:
    """A process that listens."""

    url: str
    process: psutil.Process
    http: httpx2.AsyncClient


def clis(process: psutil.Process) -> list[psutil.Process]:
    """The CLIs that a process has started and not yet seen end."""
    found = []
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name() == "claude":  # a zombie too: its CPU is on its parent's account once it is reaped
                found.append(child)
    return found


def cpu(process: psutil.Process, *, alone: bool = False) -> float:
    """CPU seconds used so far by a process and the CLIs that it started, running or gone; or by itself alone."""
    times = process.cpu_times()
    total: float = times.user + times.system
    if not alone:
        total += times.children_user + times.children_system
        for child in clis(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent = child.cpu_times()
                total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


@contextlib.asynccontextmanager
async def serving(log: Path, *command: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Server]:
    """Run a command with `env` on top of this process's environment, until the context ends."""
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **(env or {})}, stdout=file, stderr=file
        )
    try:
        async with asyncio.timeout(START_SECONDS):
            while not (found := _ADDRESS.search(log.read_text(encoding="utf-8"))):
                if process.returncode is not None:
                    raise RuntimeError(f"{command} did not start: {log.read_text(encoding='utf-8')}")
                await asyncio.sleep(0.02)
        async with httpx2.AsyncClient(base_url=found[1], timeout=120) as http:
            yield Server(found[1], psutil.Process(process.pid), http)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def sidecar(
    home: Path, model: str, *, warm: int = 0, spares: int = 0, port: int = 0, env: Mapping[str, str] | None = None
) -> contextlib.AbstractAsyncContextManager[Server]:
    """The sidecar as users run it, with so many warm sessions and spares."""
    home.mkdir(parents=True, exist_ok=True)
    env = {
        **credentials(model),
        "SIDECAR_HOME": str(home),
        "SIDECAR_WARM_SESSIONS": str(warm),
        "SIDECAR_SPARE_PROCESSES": str(spares),
        **(env or {}),
    }
    command = str(Path(sys.executable).with_name("session-sidecar"))
    return serving(home / "server.log", command, "serve", "--port", str(port), env=env)


def replica(home: Path, model: str, database: str, *, warm: int = 0) -> contextlib.AbstractAsyncContextManager[Server]:
    """One of several sidecars on a database of PostgreSQL."""
    port = free_port()
    env = {
        "SIDECAR_DATABASE": database,
        "SIDECAR_REPLICA_SECRET": "the secret of the bench",
        "SIDECAR_REPLICA_URL": f"http://127.0.0.1:{port}",
    }
    return sidecar(home, model, warm=warm, port=port, env=env)


def application(log: Path, app: str, env: Mapping[str, str]) -> contextlib.AbstractAsyncContextManager[Server]:
    """An ASGI application under the same server as the sidecar."""
    command = (sys.executable, "-m", "uvicorn", app, "--port", "0", "--no-access-log")
    return serving(log, *command, env=env)


def stand_in(log: Path) -> contextlib.AbstractAsyncContextManager[Server]:
    """The model that answers at once."""
    return serving(log, sys.executable, "-m", "bench.model")


def credentials(model: str) -> dict[str, str]:
    """What leads a CLI to the stand-in, and nowhere else."""
    return {"ANTHROPIC_BASE_URL": model, "ANTHROPIC_API_KEY": "bench", **QUIET_CLI}


async def quiet() -> None:
    """Wait until everything that this process started has nothing left to do, for at most ten seconds."""

    def used() -> dict[int, float]:
        found = {}
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        return found

    for _ in range(100):
        before = used()
        await asyncio.sleep(0.1)
        after = used()
        if before.keys() == after.keys() and sum(after.values()) - sum(before.values()) < 0.011:  # one tick
            return
    raise RuntimeError("a process that should be idle has been busy for ten seconds")
