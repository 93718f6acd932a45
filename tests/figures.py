"""The figures of a running sidecar, as Prometheus would read them."""

import asyncio
import contextlib
from collections.abc import Mapping

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.server import SECONDS, Sidecar, a_moment

PREFIX = "session_sidecar_"


async def families(sidecar: Sidecar) -> list[Metric]:
    """What `GET /metrics` says now."""
    response = await sidecar.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return list(text_string_to_metric_families(response.text))


async def figure(sidecar: Sidecar, name: str, **labels: str) -> float:
    """The sum of the samples of this name that have these labels."""
    samples = [sample for family in await families(sidecar) for sample in family.samples]
    return sum(s.value for s in samples if s.name == PREFIX + name and labels.items() <= s.labels.items())


async def until(sidecar: Sidecar, name: str, value: float, **labels: str) -> None:
    """Wait until a figure has come to this value: what ends is counted when its process has been seen to."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SECONDS):
            while await figure(sidecar, name, **labels) != value:
                await a_moment()
    found = await figure(sidecar, name, **labels)
    assert found == value, (name, labels, found)


def labels_of(found: list[Metric]) -> Mapping[str, set[str]]:
    """The names of the labels of each family; the buckets' own is left out."""
    return {family.name: {label for s in family.samples for label in s.labels} - {"le"} for family in found}
