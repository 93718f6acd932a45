"""Prometheus, where it is: the real one, which scrapes a sidecar of the tests."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

INSTALL = "install the package prometheus, which has promtool too (apt-get install prometheus)"
HAS_PROMETHEUS = all(shutil.which(program) for program in ("prometheus", "promtool"))
Series = dict[str, Any]


def need_prometheus() -> None:
    """Leave a test out, and say so, where there is no Prometheus; where CI is set it fails."""
    if not HAS_PROMETHEUS:
        assert "CI" not in os.environ, INSTALL
        pytest.skip(f"LEFT OUT for want of Prometheus: {INSTALL}")


class Prometheus:
    """A Prometheus that scrapes one address, five times a second."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def ask(self, query: str) -> list[Series]:
        """The series that a query has now: each with its labels as `metric`, and its `value`."""
        try:
            response = await self._http.get("/api/v1/query", params={"query": query})
        except httpx.TransportError:
            return []  # it has yet to listen
        answer = response.json()
        assert answer["status"] == "success", (query, answer["error"])
        found: list[Series] = answer["data"]["result"]
        return found

    async def until(self, query: str, seconds: float = 30) -> list[Series]:
        """Wait until a query has series, every one of them with a figure."""
        found: list[Series] = []
        try:
            async with asyncio.timeout(seconds):
                while not found or any(series["value"][1] == "NaN" for series in found):
                    await asyncio.sleep(0.1)
                    found = await self.ask(query)
        except TimeoutError:
            raise AssertionError(f"{query} has no figures: {found}") from None
        return found


@contextlib.asynccontextmanager
async def scraping(url: str, place: Path) -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes the sidecar at `url` and keeps all in `place`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    target = url.rpartition("//")[2]
    jobs = [{"job_name": "sidecar", "static_configs": [{"targets": [target]}]}]
    # YAML has JSON in it.
    config = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}, "scrape_configs": jobs}
    (place / "prometheus.json").write_text(json.dumps(config))
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={place / 'prometheus.json'}",
        f"--storage.tsdb.path={place / 'data'}",
        f"--web.listen-address={address}",
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}") as http:
            yield Prometheus(http)
    finally:
        process.terminate()
        await process.wait()
