"""`/healthz`, `/readyz`, `/version` and `/metrics`, as everyone expects."""

import contextlib
from importlib.metadata import version

from starlette.responses import Response

from session_sidecar import __version__
from session_sidecar.api.http import Incoming, Json, Nothing
from session_sidecar.api.models import answers
from session_sidecar.errors import SidecarError
from session_sidecar.observe.metrics import CONTENT_TYPE


async def healthz(_: Incoming[Nothing]) -> Response:
    """Alive: the event loop answers."""
    well: answers.Health = {"status": "ok"}
    return Json(well)


async def readyz(call: Incoming[Nothing]) -> Response:
    """Ready for turns: looked up, saved, a CLI that has credentials, and no shutdown. 502, 503 or 507 otherwise."""
    await call.services.turns.check()
    well: answers.Health = {"status": "ready"}
    return Json(well)


async def versions(call: Incoming[Nothing]) -> Response:
    """What runs here: the sidecar, the SDK and its CLI (null where it cannot be asked), and what answers."""
    cli = None
    with contextlib.suppress(SidecarError):
        cli = await call.services.turns.cli_version()
    runs: answers.Versions = {
        "version": __version__,
        "claude_agent_sdk": version("claude-agent-sdk"),
        "cli": cli,
        "model": call.services.turns.model,
    }
    return Json(runs)


async def metrics(call: Incoming[Nothing]) -> Response:
    """The figures for Prometheus; docs/metrics.md lists them."""
    return Response(call.services.metrics.exposition(), media_type=CONTENT_TYPE)
