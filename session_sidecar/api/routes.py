"""Every call: its method and path, what answers it, what it asks and answers, and its problems.

The README's table is held to this one by a test, and so are the router and the OpenAPI document.
"""

from typing import Any

from session_sidecar import errors
from session_sidecar.api.calls import chat, feed, health, page, sessions
from session_sidecar.api.calls.ai_sdk import chat as ai_sdk
from session_sidecar.api.calls.ai_sdk.requests import Loading, Resuming, Sending
from session_sidecar.api.documents.docs import Docs
from session_sidecar.api.http import Call, Nothing
from session_sidecar.api.models import answers, requests
from session_sidecar.api.models import feed as feeds

# What a call that looks into transcripts may say, and what of those of one session.
_TRANSCRIPTS = (errors.TranscriptsUnavailable, errors.ShuttingDown, errors.KeyMissing, errors.SealBroken)
_TRANSCRIPT = (errors.TranscriptMissing, errors.SessionAmbiguous, *_TRANSCRIPTS)
# What a turn may come to before its readers have an answer, whoever has begun it.
_TURN = (
    *_TRANSCRIPT,
    errors.SessionNotFound,
    errors.UnknownAgent,
    errors.AgentMisconfigured,
    errors.ThreadDeleted,
    errors.NotSaved,
    errors.TurnInterrupted,
    errors.TurnTimeout,
    errors.LeaseLost,
    errors.TurnLimit,
    errors.AgentStartFailed,
    errors.NotConfigured,
    errors.AgentFailed,
    errors.ApiFailed,
)
_BEGUN = (
    *_TURN,
    errors.IdempotencyMismatch,
    errors.MessageTooLarge,
    errors.TooManyTurns,
    errors.TooManyTurnsOfResource,
    errors.QueueFull,
    errors.ThreadBusy,
    errors.ReplayGone,
)
_FORK = (errors.ThreadExists, errors.MessageNotFound, errors.UnsafeForkPoint)

_docs = Docs(lambda: CALLS)

CALLS: tuple[Call[Any], ...] = (
    Call("POST", "/v1/chat", chat.chat, requests.ChatRequest, {200: answers.TurnAnswer, 204: None}, _BEGUN),
    Call(
        "GET",
        "/v1/chat",
        chat.rejoin,
        requests.Thread,
        {200: answers.TurnAnswer, 204: None},
        (*_TURN, *_FORK, errors.ReplayGone),
    ),
    Call(
        "POST",
        "/v1/chat/interrupt",
        chat.interrupt,
        requests.Thread,
        {200: answers.Interrupted},
        (errors.SessionNotFound,),
    ),
    Call(
        "POST",
        "/v1/chat/fork",
        chat.fork,
        requests.ForkRequest,
        {200: answers.TurnAnswer, 201: answers.DescribedSession, 204: None},
        (*_BEGUN, *_FORK),
    ),
    Call(
        "GET",
        "/v1/sessions",
        sessions.list_sessions,
        requests.ListQuery,
        {200: answers.SessionList},
        _TRANSCRIPTS,
    ),
    Call(
        "DELETE",
        "/v1/sessions",
        sessions.erase_resource,
        requests.EraseQuery,
        {200: answers.Deleted},
        (errors.ThreadBusy, errors.TranscriptsUnavailable, errors.NotSaved),
    ),
    Call(
        "GET",
        "/v1/session",
        sessions.get_session,
        requests.SessionQuery,
        {200: answers.DescribedSession},
        (errors.SessionNotFound, *_TRANSCRIPTS),
    ),
    Call(
        "PUT",
        "/v1/session",
        sessions.adopt_session,
        requests.Adoption,
        {200: answers.DescribedSession, 201: answers.DescribedSession},
        (
            errors.TranscriptMissing,
            errors.SessionAmbiguous,
            errors.TranscriptsUnavailable,
            errors.ThreadBusy,
            errors.ThreadExists,
            errors.SessionTaken,
            errors.SessionBusy,
        ),
        admits="unrestricted",
    ),
    Call(
        "PATCH",
        "/v1/session",
        sessions.update_session,
        requests.SessionPatch,
        {200: answers.DescribedSession},
        (*_TRANSCRIPT, errors.SessionNotFound, errors.ThreadBusy, errors.NotSaved),
    ),
    Call(
        "DELETE",
        "/v1/session",
        sessions.delete_session,
        requests.DeleteQuery,
        {204: None},
        (errors.ThreadBusy, errors.TranscriptsUnavailable, errors.NotSaved),
    ),
    Call(
        "POST",
        "/v1/session/warm",
        sessions.warm_session,
        requests.WarmRequest,
        {202: answers.Warming},
        (errors.SessionNotFound, errors.UnknownAgent),
    ),
    Call(
        "GET",
        "/v1/session/messages",
        sessions.list_messages,
        requests.MessagesQuery,
        {200: answers.MessageList},
        (*_TRANSCRIPT, errors.SessionNotFound, errors.MessageNotFound),
    ),
    Call(
        "GET",
        "/v1/session/branches",
        sessions.show_branches,
        requests.Thread,
        {200: answers.Branches},
        (errors.SessionNotFound, *_TRANSCRIPTS),
    ),
    Call("GET", "/v1/events", feed.follow_events, feeds.EventsQuery, {200: feeds.Feed}),
    Call(
        "POST",
        "/v1/ai-sdk/chat",
        ai_sdk.send_message,
        Sending,
        {200: answers.UiMessageStream},
        (*_BEGUN, *_FORK, errors.ThreadMoved),
        of_header=True,
    ),
    Call(
        "GET",
        "/v1/ai-sdk/chat/{id}/stream",
        ai_sdk.resume_stream,
        Resuming,
        {200: answers.UiMessageStream, 204: None},
        (*_TURN, *_FORK, errors.ThreadMoved, errors.ReplayGone),
        of_header=True,
    ),
    Call(
        "GET",
        "/v1/ai-sdk/chat/{id}",
        ai_sdk.load_chat,
        Loading,
        {200: answers.UiMessages},
        (*_TRANSCRIPT, errors.SessionNotFound, errors.MessageNotFound),
        of_header=True,
    ),
    Call("GET", "/ui", page.ui, Nothing, {200: answers.Html, 304: None}, admits="anybody"),
    Call("GET", "/ui/page.css", page.ui_style, Nothing, {200: answers.Style, 304: None}, admits="anybody"),
    Call("GET", "/ui/page.js", page.ui_script, Nothing, {200: answers.Script, 304: None}, admits="anybody"),
    Call("GET", "/healthz", health.healthz, Nothing, {200: answers.Health}, admits="anybody"),
    Call(
        "GET",
        "/readyz",
        health.readyz,
        Nothing,
        {200: answers.Health},
        (
            errors.TranscriptsUnavailable,
            errors.NotSaved,
            errors.AgentStartFailed,
            errors.NotConfigured,
            errors.ShuttingDown,
        ),
        admits="anybody",
    ),
    Call("GET", "/version", health.versions, Nothing, {200: answers.Versions}),
    Call("GET", "/metrics", health.metrics, Nothing, {200: answers.Figures}, admits="metrics"),
    Call("GET", "/openapi.json", _docs.openapi, Nothing, {200: answers.Json}, admits="anybody"),
    Call("GET", "/docs", _docs.page, Nothing, {200: answers.Html}, admits="anybody"),
)

OF_THE_PAGE = tuple(call for call in CALLS if call.path.startswith("/ui"))
