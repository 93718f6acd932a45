"""`/v1/events`: what is asked, and the events as they are told. Tests hold what is sent to these shapes."""

from typing import Annotated, Literal, NewType

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from session_sidecar.api.models.texts import ID


class EventsQuery(BaseModel):
    """The query of `GET /v1/events`."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    resource_id: Annotated[ID | None, Field(description="whose; all without one")] = None


class ResetEvent(TypedDict):
    """What happened before this is not known here: read the list anew."""

    type: Literal["reset"]


class _OfThread(TypedDict):
    thread_id: str
    resource_id: str
    at: str


class CreatedEvent(_OfThread):
    """A thread came to be: its first turn was begun, or a session was adopted."""

    type: Literal["created"]
    sdk_session_id: str


class ForkedEvent(_OfThread):
    """A thread came to be as a branch of another one."""

    type: Literal["forked"]
    sdk_session_id: str
    parent_thread_id: str
    parent_message_id: str


class TurnStartedEvent(_OfThread):
    """A turn runs on the thread."""

    type: Literal["turn_started"]
    turn_id: str
    origin: Literal["message", "background"]


class TurnEndedEvent(_OfThread):
    """A turn has ended, and the thread is free. Of one that was refused before it began this is the only event."""

    type: Literal["turn_ended"]
    turn_id: str
    origin: Literal["message", "background"]
    status: Literal["completed", "interrupted", "failed"]
    code: str | None  # of the problem, where there was one


class TitledEvent(_OfThread):
    """Title or tag were set by hand."""

    type: Literal["titled"]


class DeletedEvent(_OfThread):
    """The thread's mapping is gone."""

    type: Literal["deleted"]


EVENTS = {
    "reset": ResetEvent,
    "created": CreatedEvent,
    "forked": ForkedEvent,
    "turn_started": TurnStartedEvent,
    "turn_ended": TurnEndedEvent,
    "titled": TitledEvent,
    "deleted": DeletedEvent,
}

Feed = NewType("Feed", str)  # the stream of them
