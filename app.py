"""The composition root: settings in, a Starlette application out."""

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from session_store import SessionMapError, SqliteSessionMap
from sidecar.agent import Agents, ProcessPool, Transcripts
from sidecar.agent.descendants import HOME_VARIABLE, home_mark
from sidecar.agent.options import credentials_configured, offline_env
from sidecar.agent.orphans import end_orphans, guarded_cli
from sidecar.api import http
from sidecar.api.bodies import Bodies
from sidecar.api.routes import ROUTES
from sidecar.errors import SidecarError
from sidecar.mappings import Mappings
from sidecar.offline import OfflineModel
from sidecar.reading import Readers
from sidecar.retention import retention
from sidecar.settings import Settings
from sidecar.shutdown import on_shutdown_signal
from sidecar.turns import Turns

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def create_app(settings: Settings) -> Starlette:
    """The application. Everything it holds is opened when it starts and closed when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
        for directory in (settings.home, settings.claude_config, settings.workspace, settings.temporary):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        readers = Readers()
        transcripts = Transcripts(settings.claude_config, readers)
        if not settings.database.exists():
            transcripts.prepare()
        # The SDK's session functions read this from the process, not from options.
        os.environ["CLAUDE_CONFIG_DIR"] = str(settings.claude_config)
        offline = settings.model == "offline" or (
            settings.model == "auto" and not credentials_configured(settings.claude_config)
        )
        async with contextlib.AsyncExitStack() as stack:
            env: dict[str, str] = {}
            if offline:
                env = offline_env((await stack.enter_async_context(OfflineModel())).url)
                logger.warning("no real model answers: this is the built-in stand-in (see --model)")
            sessions = await SqliteSessionMap.open(settings.database)
            stack.push_async_callback(sessions.close)
            # From here on this home is ours alone, and so is every CLI that still runs in it.
            await asyncio.to_thread(end_orphans, settings.claude_config)
            turns = Turns(
                sessions=sessions,
                agents=Agents(
                    settings.agents,
                    cwd=settings.workspace,
                    env={
                        "CLAUDE_CODE_TMPDIR": str(settings.temporary),
                        HOME_VARIABLE: home_mark(settings.claude_config),
                        **env,
                    },
                    launcher=guarded_cli(settings.home.absolute()),
                ),
                transcripts=transcripts,
                pool=ProcessPool(
                    warm=settings.warm_sessions,
                    spares=settings.spare_processes,
                    idle_seconds=settings.warm_idle_seconds,
                    work_seconds=settings.turn_seconds,
                ),
                settings=settings,
                model="offline" if offline else "live",
            )
            stack.push_async_callback(turns.close)
            stack.push_async_callback(readers.close)  # first: no turn's end waits for a long fork
            stack.enter_context(on_shutdown_signal(turns.stop_all))
            mappings = Mappings(sessions=sessions, transcripts=transcripts, turns=turns, settings=settings)
            await stack.enter_async_context(retention(sessions, mappings, settings))
            # What is loaded by now lives as long as the process; each full collection would walk it, for up to 0.1 s.
            gc.collect()
            gc.freeze()
            yield {
                "settings": settings,
                "sessions": sessions,
                "turns": turns,
                "mappings": mappings,
                "readers": readers,
                "bodies": Bodies(settings.max_message_bytes),
                "model": turns.model,
            }

    return Starlette(
        routes=ROUTES,
        lifespan=lifespan,
        middleware=[Middleware(http.Front, hosts=LOOPBACK)],
        exception_handlers={
            SidecarError: http.on_sidecar_error,
            SessionMapError: http.on_store_error,
            HTTPException: http.on_http_error,
            ClientDisconnect: http.on_client_gone,
            Exception: http.on_any_error,
        },
    )


app = create_app(Settings.load())
