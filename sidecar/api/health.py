"""`/healthz`, `/readyz` and `/version`, as everyone expects."""

from importlib.metadata import version
from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from session_store import SessionMap
from sidecar.errors import ShuttingDown
from sidecar.turns import Turns


async def healthz(request: Request) -> Response:
    """Alive: the event loop answers."""
    return JSONResponse({"status": "ok"})


async def readyz(request: Request) -> Response:
    """Ready for turns: the session map answers and no shutdown is under way. 503 otherwise."""
    if cast("Turns", request.state.turns).closing:
        raise ShuttingDown("No new turns are taken.", retry_after=5)
    await cast("SessionMap", request.state.sessions).check()
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
