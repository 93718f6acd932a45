"""What a turn says: the events that frame the SDK's messages, and problems. Tests hold what is sent to these shapes."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict


class FieldError(TypedDict):
    """A field that is wrong."""

    field: str
    message: str


class ProblemDetails(TypedDict):
    """Problem details of RFC 9457; `code` is what programs go by, `detail` says what to do."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retry_after: NotRequired[int]  # seconds
    errors: NotRequired[list[FieldError]]
    api_status: NotRequired[int]  # of the model's API
    turn_id: NotRequired[str]


class Problem(ProblemDetails):
    """Problem details of RFC 9457; `code` is what programs go by, `detail` says what to do."""

    request_id: str


class TurnSession(TypedDict):
    """Which session a turn is in, and how it came to it."""

    thread_id: str
    resource_id: str
    sdk_session_id: str
    turn_id: str
    outcome: Literal["started", "resumed", "forked", "restarted", "reset"]
    origin: Literal["message", "background"]
    replaced_session_id: str | None
    model: Literal["live", "offline"]


class SessionEvent(TurnSession):
    """The first event of a turn. It comes again, with the outcome `reset`, if the SDK moves to another session."""

    type: Literal["session"]


class EndEvent(TypedDict):
    """The last event of a turn. A stream that breaks off without it can be rejoined."""

    type: Literal["end"]
    status: Literal["completed", "interrupted", "failed"]
    sdk_session_id: str
    error: ProblemDetails | None
    stored: NotRequired[bool]  # whether the database has it by now, where that keeps transcripts


class SdkMessage(TypedDict):
    """A message of the SDK as the CLI emitted it: what the TypeScript SDK documents as `SDKMessage`."""

    type: str
