"""What no model describes: the headers that calls take and answer with, and how a stream is written."""

from session_sidecar.api.models import events, feed
from session_sidecar.api.models.answers import Json
from session_sidecar.api.models.texts import MAX_ID_CHARS
from session_sidecar.api.streams.frames import EVENT_ID

HEADERS: Json = {
    "X-Request-Id": {
        "description": "What the server's log calls this request: the caller's own, if that was a sane one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    "Retry-After": {
        "description": "After how many seconds it may go better.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "Allow": {"description": "What the path takes.", "required": True, "schema": {"type": "string"}},
    "WWW-Authenticate": {"description": "`Bearer`: a token is needed.", "schema": {"type": "string"}},
    "Cache-Control": {"description": "Of a stream.", "schema": {"const": "no-store, no-transform"}},
    "X-Accel-Buffering": {"description": "Of a stream: nginx keeps nothing of it back.", "schema": {"const": "no"}},
    "X-Vercel-AI-UI-Message-Stream": {"description": "The version of the AI SDK's stream.", "schema": {"const": "v1"}},
    "Link": {
        "description": 'To the messages before these, where there are any: `<?…>; rel="prev"`, relative to this call.',
        "schema": {"type": "string"},
    },
}
PARAMETERS: Json = {
    "X-Request-Id": {
        "name": "X-Request-Id",
        "in": "header",
        "description": "What the response and the log are to call this request: 1 to 128 of `A-Za-z0-9._:-`. Anything "
        "else is replaced.",
        "schema": {"type": "string"},
    },
    "Idempotency-Key": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "A retry with the same key and body joins or replays the turn that the first attempt began.",
        # Servers take the spaces at its ends away.
        "schema": {"type": "string", "pattern": f"^[!-~](?:[ -~]{{0,{MAX_ID_CHARS - 2}}}[!-~])?$"},
    },
    "Last-Event-ID": {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "Go on after this event. `<turn_id>-<n>` names its turn, and none is started; of `/v1/events` "
        "it is `<feed>-<n>`.",
        "schema": {"type": "string", "pattern": f"^(?:{EVENT_ID})?$"},
    },
    "X-Resource-Id": {
        "name": "X-Resource-Id",
        "in": "header",
        "description": "Whose the chat is. It goes before `resource_id`; one of the two is needed, unless the token is "
        "for one resource alone.",
        "schema": {"type": "string", "pattern": f"^[!-~](?:[ -~]{{0,{MAX_ID_CHARS - 2}}}[!-~])?$"},
    },
}


def _event(name: Json, data: type) -> Json:
    schema = {
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{data.__name__}"},
    }
    return {"properties": {"event": name, "data": schema}}


def _events(description: str, *kinds: Json) -> Json:
    return {
        "description": description,
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": f"^{EVENT_ID}$"},
            "event": {"type": "string"},
            "data": {"type": "string"},
        },
        "required": ["id", "event", "data"],
        "oneOf": list(kinds),
    }


STREAMS: Json = {
    "ServerSentEvent": _events(
        "One event of a stream: `session` first, then the SDK's messages, `end` last. Between them come "
        "comments, `: ping`, every few seconds. `id` is `<turn_id>-<n>`, `event` the `type` of what is in `data`: one "
        "line of JSON in ASCII, a SessionEvent of `session`, an EndEvent of `end`, an SdkMessage of the others.",
        _event({"const": "session"}, events.SessionEvent),
        _event({"not": {"enum": ["session", "end"]}}, events.SdkMessage),
        _event({"const": "end"}, events.EndEvent),
    ),
    "FeedEvent": _events(
        "One event of `/v1/events`. Between them come comments, `: ping`, every few seconds. `id` is "
        "`<feed>-<n>`, `event` the `type` of what is in `data`: one line of JSON in ASCII.",
        *(_event({"const": kind}, shape) for kind, shape in feed.EVENTS.items()),
    ),
    "UiMessageChunk": {
        "description": "One event of a UI message stream of the AI SDK: a chunk in one line of JSON, or `[DONE]` after "
        "the last one. `start` comes first and has the message's ID and, in its metadata, `threadId`, `turnId`, "
        "`sessionId`, `outcome`, `origin` and `model`; then steps, one an API reply, with `text-…`, `reasoning-…` and "
        "`tool-…`, and transient `data-api-retry` and `data-task`. `finish` has `messageUuid` and `usage` in its "
        "metadata; `abort` before it tells of a turn that was stopped, `error` in its place of one that failed.",
        "type": "object",
        "properties": {"event": {"const": "message"}, "data": {"type": "string"}},
        "required": ["data"],
    },
}
FEED_EXAMPLE = """\
id: 0e9a3c54-6f0b-4d57-9c1e-1d2f7a6b8c90-41
event: reset
data: {"type":"reset"}

: ping

id: 0e9a3c54-6f0b-4d57-9c1e-1d2f7a6b8c90-42
event: titled
data: {"type":"titled","thread_id":"t1","resource_id":"alice","at":"2026-11-28T09:30:00.000000Z"}

"""
UI_EXAMPLE = """\
data: {"type":"start","messageId":"63df1c2f-58a1-4c0e-9d0c-2c5b8d3a7e11-answer","messageMetadata":{…}}

data: {"type":"start-step"}

data: {"type":"text-start","id":"1-0"}

data: {"type":"text-delta","id":"1-0","delta":"Hello"}

data: {"type":"text-end","id":"1-0"}

data: {"type":"finish-step"}

data: {"type":"finish","finishReason":"stop","messageMetadata":{…}}

data: [DONE]

"""
EXAMPLE = """\
id: 63df1c2f-58a1-4c0e-9d0c-2c5b8d3a7e11-1
event: session
data: {"type":"session","thread_id":"t1","resource_id":"alice",…}

id: 63df1c2f-58a1-4c0e-9d0c-2c5b8d3a7e11-2
event: assistant
data: {"type":"assistant",…}

: ping

id: 63df1c2f-58a1-4c0e-9d0c-2c5b8d3a7e11-3
event: end
data: {"type":"end","status":"completed","sdk_session_id":"eb142690-3a0c-4f9b-8a59-6a1f6a6f7a3e","error":null}

"""
