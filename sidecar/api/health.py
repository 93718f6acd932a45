"""`/healthz`, `/readyz` and `/version`, as everyone expects."""

from importlib.metadata import version
from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sidecar.turns import Turns


async def healthz(request: Request) -> Response:
    """Alive: the event loop answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Ready for turns: they can be looked up and saved, and no shutdown is under way. 503 or 507 otherwise."""
    await cast("Turns", request.state.turns).check()
    return JSONResponse({"status": "ready"})


async def versions(request: Request) -> Response:
    """What runs here: the sidecar, the SDK and its CLI, and what answers."""
    return JSONResponse(
        {
            "version": version("session-sidecar"),
            "claude_agent_sdk": version("claude-agent-sdk"),
            "model": request.state.model,
        }
    )
