"""Every path, its method and what answers it."""

from starlette.routing import Route

from sidecar.api import chat, health, history, mappings, sessions, warm

ROUTES = [
    Route("/v1/chat", chat.chat, methods=["POST"]),
    Route("/v1/chat", chat.rejoin, methods=["GET"]),
    Route("/v1/chat/interrupt", chat.interrupt, methods=["POST"]),
    Route("/v1/chat/fork", chat.fork, methods=["POST"]),
    Route("/v1/sessions", sessions.list_sessions, methods=["GET"]),
    Route("/v1/sessions", mappings.erase_resource, methods=["DELETE"]),
    Route("/v1/session", sessions.get_session, methods=["GET"]),
    Route("/v1/session", mappings.adopt_session, methods=["PUT"]),
    Route("/v1/session", sessions.update_session, methods=["PATCH"]),
    Route("/v1/session", mappings.delete_session, methods=["DELETE"]),
    Route("/v1/session/warm", warm.warm, methods=["POST"]),
    Route("/v1/session/messages", history.list_messages, methods=["GET"]),
    Route("/v1/session/branches", history.show_branches, methods=["GET"]),
    Route("/healthz", health.healthz),
    Route("/readyz", health.readyz),
    Route("/version", health.versions),
]
