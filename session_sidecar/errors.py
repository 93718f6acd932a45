"""Every error a caller can be told about: a stable `code`, an HTTP status, what was wrong and what to do.

The docstring of a class is its problem's `title`; the `detail` is given where it is raised.
"""

from typing import Any, ClassVar, Self

import session_store
from session_store import SessionMapError, ThreadKey


class SidecarError(Exception):
    """The request failed"""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, detail: str, *, retry_after: int | None = None, **extra: Any) -> None:
        """`retry_after` is in seconds and becomes the Retry-After header; `extra` joins the problem's members."""
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.extra = extra

    def again(self) -> Self:
        """The same error, to be kept or raised again: what was raised holds all that its traceback leads to."""
        error = self.__class__.__new__(self.__class__, *self.args)
        error.__dict__.update(self.__dict__)
        return error

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 problem details of this error, without the `request_id` that only HTTP knows."""
        return {
            "type": f"urn:session-sidecar:problem:{self.code}",
            "title": (self.__doc__ or "").strip(),
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **({"retry_after": self.retry_after} if self.retry_after is not None else {}),
            **self.extra,
        }


class InvalidRequest(SidecarError):
    """The request is not valid"""

    status, code = 422, "invalid_request"

    def __init__(self, detail: str, errors: list[dict[str, str]]) -> None:
        """`errors` holds one `{"field", "message"}` for each field that is wrong."""
        super().__init__(detail, errors=errors)


class InvalidJson(SidecarError):
    """The body is not JSON"""

    status, code = 400, "invalid_json"


class UnsupportedMediaType(SidecarError):
    """The body must be application/json"""

    status, code = 415, "unsupported_media_type"


class BodyTooLarge(SidecarError):
    """The body is too large"""

    status, code = 413, "body_too_large"


class HeaderTooLarge(SidecarError):
    """The request's header is too large"""

    status, code = 431, "header_too_large"


class RequestTimeout(SidecarError):
    """The request did not come in time"""

    status, code = 408, "request_timeout"


class TooManyUploads(SidecarError):
    """Too much is being received"""

    status, code = 503, "too_many_uploads"


class MessageTooLarge(SidecarError):
    """The message is too large"""

    status, code = 413, "message_too_large"


class UnknownAgent(SidecarError):
    """There is no such agent"""

    status, code = 422, "unknown_agent"

    def __init__(self, name: str) -> None:
        """`name` is the agent that was asked for."""
        detail = "The operator has defined no agent of this name; leave `agent` out for the default one."
        super().__init__(detail, errors=[{"field": "agent", "message": f"unknown agent {name!r}"}])


class ForbiddenHost(SidecarError):
    """This Host is not served"""

    status, code = 421, "forbidden_host"


class ForbiddenOrigin(SidecarError):
    """This Origin may not call"""

    status, code = 403, "forbidden_origin"


class Unauthorized(SidecarError):
    """A token is needed"""

    status, code = 401, "unauthorized"


class ReadOnlyToken(SidecarError):
    """This token may only read"""

    status, code = 403, "read_only_token"


class UnrestrictedOnly(SidecarError):
    """This call is for unrestricted tokens"""

    status, code = 403, "unrestricted_only"


class NotFound(SidecarError):
    """There is no such path"""

    status, code = 404, "not_found"


class MethodNotAllowed(SidecarError):
    """This path does not take this method"""

    status, code = 405, "method_not_allowed"


# Threads and their sessions


class SessionNotFound(SidecarError):
    """This thread has no session"""

    status, code = 404, "session_not_found"

    def __init__(self, detail: str = "There is no such thread of this resource.") -> None:
        """Whose thread it would be, and whether it is there, is not to be told apart by `detail`."""
        super().__init__(detail)


class ThreadBusy(SidecarError):
    """A turn is running on this thread"""

    status, code = 409, "thread_busy"


class ThreadExists(SidecarError):
    """The target thread exists already"""

    status, code = 409, "thread_exists"


class ThreadMoved(SidecarError):
    """Another message has come to this thread since it was read"""

    status, code = 409, "thread_moved"


class ThreadDeleted(SidecarError):
    """The thread was deleted"""

    status, code = 409, "thread_deleted"


class SessionTaken(SidecarError):
    """Another thread has this session"""

    status, code = 409, "session_taken"


class SessionBusy(SidecarError):
    """A process is at work on this session"""

    status, code = 409, "session_busy"


class QueueFull(SidecarError):
    """Too many turns wait for this thread"""

    status, code = 429, "queue_full"


class TooManyTurns(SidecarError):
    """Too many turns are running"""

    status, code = 503, "too_many_turns"


class TooManyTurnsOfResource(SidecarError):
    """Too many turns of this resource are running"""

    status, code = 429, "too_many_turns_of_resource"


class IdempotencyMismatch(SidecarError):
    """This Idempotency-Key was used for another request"""

    status, code = 422, "idempotency_mismatch"


class TurnInterrupted(SidecarError):
    """The turn was stopped before it began"""

    status, code = 409, "turn_interrupted"


class TranscriptMissing(SidecarError):
    """The SDK no longer has this session's transcript"""

    status, code = 410, "session_missing"


class SessionAmbiguous(SidecarError):
    """This session has two transcripts"""

    status, code = 409, "session_ambiguous"


class MessageNotFound(SidecarError):
    """There is no such message in the session"""

    status, code = 422, "message_not_found"


class UnsafeForkPoint(SidecarError):
    """The session cannot be cut there"""

    status, code = 422, "unsafe_fork_point"


class ReplayGone(SidecarError):
    """The events asked for are no longer held"""

    status, code = 410, "replay_gone"


# Several replicas

_MAY_BE_DONE = (
    "What was asked for may have been done. Look at the session's messages; if an `Idempotency-Key` was sent, sending "
    "it again runs nothing twice."
)


class HeldElsewhere(SidecarError):
    """Another replica has this thread, and cannot be asked at the moment"""

    status, code = 503, "replica_unreachable"

    def __init__(self, key: ThreadKey, url: str | None, *, live: bool) -> None:
        """`url` is where that replica can be asked, if it can be; `live` whether it is at the thread now, or was last.

        Callers are told only where what they ask cannot be forwarded there. `instead` is what they are told then of a
        thread that it is no longer at, if that is an error.
        """
        super().__init__("Nothing was changed. The thread is let go of within seconds. Try again then.", retry_after=5)
        self.key = key
        self.url = url
        self.live = live
        self.instead: SidecarError | None = None

    def broken_off(self) -> Self:
        """The same, where that replica was asked and has not answered: to ask again may be to do it twice."""
        error = self.again()
        error.live, error.instead = False, AnswerLost(_MAY_BE_DONE)
        return error


class AnswerLost(SidecarError):
    """Another replica was asked, and broke off before it had answered"""

    status, code = 502, "replica_broke_off"


class LeaseLost(SidecarError):
    """The thread was taken over by another replica"""

    status, code = 503, "lease_lost"


# The agent behind it


class AgentStartFailed(SidecarError):
    """The agent's process did not start"""

    status, code = 502, "agent_start_failed"


class AgentFailed(SidecarError):
    """The agent's process failed"""

    status, code = 502, "agent_failed"


class NotConfigured(SidecarError):
    """There are no credentials for the model's API"""

    status, code = 503, "not_configured"


class ApiFailed(SidecarError):
    """The model's API failed"""

    status, code = 502, "api_error"


class TurnLimit(SidecarError):
    """The turn came to a limit of its agent"""

    status, code = 502, "turn_limit"


class TurnTimeout(SidecarError):
    """The turn took too long"""

    status, code = 504, "turn_timeout"


class AgentMisconfigured(SidecarError):
    """The operator's agent definition is wrong"""

    status, code = 500, "agent_misconfigured"


class TranscriptsUnavailable(SidecarError):
    """The transcripts cannot be used at the moment"""

    status, code = 503, "transcripts_unavailable"


class NotSaved(SidecarError):
    """There is no room to save it"""

    status, code = 507, "not_saved"


class KeyMissing(SidecarError):
    """The key of this conversation is not there"""

    status, code = 503, "key_missing"


class SealBroken(SidecarError):
    """This conversation does not open with its key"""

    status, code = 503, "seal_broken"


class StoreFailed(SidecarError):
    """The session map cannot be used at the moment"""

    status, code = 503, "store_unavailable"


class ShuttingDown(SidecarError):
    """The sidecar is shutting down"""

    status, code = 503, "shutting_down"


class InternalError(SidecarError):
    """The sidecar failed"""


def public_error(error: Exception) -> SidecarError:
    """What a caller is told of an exception; all but a SidecarError itself is for the server's log."""
    if isinstance(error, SidecarError):
        return error
    if isinstance(error, session_store.LeaseLost):
        return LeaseLost(str(error))
    if isinstance(error, SessionMapError):
        return StoreFailed(str(error), retry_after=5)
    return InternalError("The sidecar failed; its server's log has the reason.")
