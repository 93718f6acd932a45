"""The composition root: settings in, a Starlette application out."""

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import AsyncIterator
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from session_sidecar.agent.agents import Agents
from session_sidecar.agent.credentials import MISSING, credentials_configured, offline_env
from session_sidecar.agent.processes.descendants import HOME_VARIABLE, home_mark
from session_sidecar.agent.processes.orphans import end_orphans, guarded_cli
from session_sidecar.agent.processes.pool import ProcessPool
from session_sidecar.agent.processes.spares import Spares, maker
from session_sidecar.agent.processes.starts import Starts
from session_sidecar.agent.transcripts.reading.conversations import Conversations
from session_sidecar.agent.transcripts.reading.history import History
from session_sidecar.agent.transcripts.reading.readers import Readers
from session_sidecar.agent.transcripts.transcripts import Transcripts
from session_sidecar.api.access.admission import Access
from session_sidecar.api.calls.ai_sdk.chat import STREAM_HEADER
from session_sidecar.api.front.front import HANDLERS, Front
from session_sidecar.api.http import RESOURCE_HEADER, Services
from session_sidecar.api.models.bodies import Bodies
from session_sidecar.api.routes import CALLS, OF_THE_PAGE
from session_sidecar.observe.metrics import Metrics
from session_sidecar.offline import OfflineModel
from session_sidecar.replicas.opening import opened
from session_sidecar.replicas.peers import Peers
from session_sidecar.replicas.tenancy import Tenancy
from session_sidecar.server.shutdown import on_shutdown_signal
from session_sidecar.sessions.changes import Changes
from session_sidecar.sessions.chats import Chats
from session_sidecar.sessions.reading import Reading
from session_sidecar.sessions.retention import retention
from session_sidecar.settings import ENV_PREFIX, Settings, SettingsError
from session_sidecar.turns.deciding.exclusion import Exclusion
from session_sidecar.turns.deciding.planner import Planner
from session_sidecar.turns.ending import Afterwards
from session_sidecar.turns.feed import Feed
from session_sidecar.turns.processes.processes import Processes
from session_sidecar.turns.processes.warming import Warming
from session_sidecar.turns.replay.keys import Keys
from session_sidecar.turns.replay.replay import Replay
from session_sidecar.turns.story import Story
from session_sidecar.turns.turns import Turns
from session_store import SessionMap

logger = logging.getLogger(__name__)

OURS = (ENV_PREFIX, "NOTIFY_SOCKET")  # what an agent's tools have no business with


def create_app(settings: Settings) -> Starlette:
    """The application. Everything it holds is opened when it starts and closed when it stops.

    Raises SettingsError for a tokens file that cannot be used.
    """
    access = Access(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        readers = Readers()
        transcripts = Transcripts(settings.claude_config, readers)
        try:
            for directory in (settings.home, settings.claude_config, settings.workspace, settings.temporary):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if settings.stores_transcripts or not settings.database_file.exists():
                transcripts.prepare()
        except OSError as error:
            raise SettingsError(
                f"SIDECAR_HOME: {error.filename or settings.home} cannot be made or written ({error.strerror}). "
                "See to that, or choose another one (--home)."
            ) from error
        configured = credentials_configured(settings.claude_config)
        offline = settings.model == "offline" or (settings.model == "auto" and not configured)
        async with contextlib.AsyncExitStack() as stack:
            env: dict[str, str] = {}
            if offline:
                env = offline_env((await stack.enter_async_context(OfflineModel())).url)
                logger.warning("no real model answers: this is the built-in stand-in (see --model)")
            elif not configured:
                logger.warning("no credentials were found; unless agents bring their own: %s", MISSING)
            metrics = Metrics()
            history = History(settings.claude_config, readers)
            session_map, tenancy = await opened(settings, stack, history, metrics.statement)
            # From here on this home is ours alone, and so is every CLI that still runs in it.
            await asyncio.to_thread(end_orphans, settings.claude_config)
            agents = Agents(
                settings.agents,
                cwd=settings.workspace,
                env={
                    "CLAUDE_CONFIG_DIR": str(settings.claude_config),
                    "CLAUDE_CODE_TMPDIR": str(settings.temporary),
                    HOME_VARIABLE: home_mark(settings.claude_config),
                    **dict.fromkeys((name for name in os.environ if name.startswith(OURS)), ""),
                    **env,
                },
                launcher=guarded_cli(settings.home.absolute()),
            )
            feed = Feed()
            turns = make_turns(
                settings,
                session_map,
                tenancy,
                transcripts,
                agents=agents,
                metrics=metrics,
                feed=feed,
                model="offline" if offline else "live",
            )
            metrics.watch(lambda: turns.load)
            await stack.enter_async_context(tenancy.attending(turns.occupancy))
            stack.push_async_callback(turns.close)
            stack.push_async_callback(readers.close)  # first: no turn's end waits for a long fork
            stack.enter_context(on_shutdown_signal(turns.stop_all))
            stack.enter_context(on_shutdown_signal(feed.close))
            stack.callback(feed.close)  # where there is no signal
            peers = None
            if secret := settings.replica_secret:
                peers = await stack.enter_async_context(Peers(secret, ping_seconds=settings.ping_seconds))
                stack.enter_context(on_shutdown_signal(peers.hang_up))
                await stack.enter_async_context(_hearing(tenancy, peers, feed, settings))
            reading = Reading(session_map, tenancy, history, turns)
            changes = Changes(
                session_map=session_map,
                tenancy=tenancy,
                transcripts=transcripts,
                history=history,
                reading=reading,
                turns=turns,
                peers=peers,
                feed=feed,
                settings=settings,
            )
            await stack.enter_async_context(retention(session_map, reading, changes, settings))
            await stack.enter_async_context(access.watching())
            turns.prepare()
            # What is loaded by now lives as long as the process; each full collection would walk it, for up to 0.1 s.
            gc.collect()
            gc.freeze()
            bodies = Bodies(settings.max_message_bytes)
            chats = Chats(session_map, tenancy, Conversations(settings.claude_config, readers), turns)
            app.state.services = Services(
                settings, access, turns, reading, changes, chats, bodies, metrics, tenancy, peers, feed
            )
            yield {"services": app.state.services}  # for the server's connections

    return Starlette(
        routes=[call.route for call in CALLS if settings.ui == "on" or call not in OF_THE_PAGE],
        lifespan=lifespan,
        middleware=[Middleware(Front, access=access), *_cors(access)],
        exception_handlers=HANDLERS,
    )


def _hearing(
    tenancy: Tenancy, peers: Peers, feed: Feed, settings: Settings
) -> contextlib.AbstractAsyncContextManager[None]:
    """What lets the feed tell of the threads that other replicas have, where there may be others."""
    if settings.database is None:
        return contextlib.nullcontext()
    from session_sidecar.replicas.listening import Listening  # noqa: PLC0415

    return Listening(tenancy.others, peers, feed, lease_seconds=settings.lease_seconds).listening()


def _cors(access: Access) -> list[Middleware]:
    """What lets the pages of other origins read answers, where there are such origins."""
    if not access.origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=sorted(access.origins),
            allow_methods=sorted({call.method for call in CALLS}),
            allow_headers=[
                "authorization",
                "content-type",
                "idempotency-key",
                "last-event-id",
                "x-request-id",
                RESOURCE_HEADER.lower(),
            ],
            expose_headers=["x-request-id", "retry-after", "link", STREAM_HEADER],
        )
    ]


def make_turns(
    settings: Settings,
    session_map: SessionMap,
    tenancy: Tenancy,
    transcripts: Transcripts,
    *,
    agents: Agents,
    metrics: Metrics,
    feed: Feed,
    model: Literal["live", "offline"],
) -> Turns:
    """The turns of a sidecar, with what each of them passes through."""
    idle_seconds = settings.warm_idle_seconds
    starts = Starts(
        os.cpu_count() or 1,
        for_one_turn=settings.warm_sessions == 0,
        on_start=metrics.process_started,
    )
    pool = ProcessPool(
        warm=settings.most_warm_sessions,
        memory=settings.most_warm_bytes,
        idle_seconds=idle_seconds,
        work_seconds=settings.turn_seconds,
    )
    spares = Spares(starts, most=settings.spare_processes, idle_seconds=idle_seconds, make=maker(agents))
    exclusion, processes = Exclusion(queue_turns=settings.queue_turns), Processes(agents, starts, pool, spares)
    replay, planner = (
        Replay(settings),
        Planner(session_map, tenancy, transcripts, exclusion, processes.settled, feed=feed),
    )
    story = Story(
        session_map=session_map,
        tenancy=tenancy,
        exclusion=exclusion,
        replay=replay,
        keys=Keys(session_map.turn_keys, tenancy, settings),
        planner=planner,
        processes=processes,
        afterwards=Afterwards(session_map, transcripts, feed),
        feed=feed,
        settings=settings,
        metrics=metrics,
        model=model,
    )
    return Turns(
        story=story,
        session_map=session_map,
        tenancy=tenancy,
        agents=agents,
        transcripts=transcripts,
        exclusion=exclusion,
        replay=replay,
        planner=planner,
        processes=processes,
        warming=Warming(
            session_map=session_map,
            tenancy=tenancy,
            agents=agents,
            transcripts=transcripts,
            starts=starts,
            pool=pool,
            exclusion=exclusion,
        ),
        feed=feed,
        settings=settings,
    )
