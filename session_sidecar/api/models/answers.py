"""What callers get: the shape of every answer. Plain dicts where it runs, held to this by the type checker.

`/openapi.json` is made of the same shapes.
"""

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NewType, NotRequired

from typing_extensions import TypedDict

from session_sidecar.api.models.events import TurnSession

if TYPE_CHECKING:  # `written` runs in the process that reads long transcripts, which needs nothing else of the sidecar
    from session_sidecar.sessions.family import Branch
    from session_sidecar.sessions.reading import Glimpse, Metadata, Session, TranscriptMessage

Json = dict[str, Any]
Html = NewType("Html", str)
Style = NewType("Style", str)
Script = NewType("Script", str)
Figures = NewType("Figures", str)  # as Prometheus reads them
UiMessageStream = NewType("UiMessageStream", str)  # of the AI SDK


class TurnAnswer(TypedDict):
    """A whole turn, for who does not want a stream. `result` is the SDK's result message."""

    session: TurnSession
    status: Literal["completed", "interrupted"]
    text: str
    result: Json | None
    stored: NotRequired[bool]  # whether the database has it by now, where that keeps transcripts


class UiMessage(TypedDict):
    """A message of a chat, as the AI SDK has it: a prompt, or all that answers it."""

    id: str
    role: Literal["user", "assistant"]
    metadata: Json
    parts: list[Json]


UiMessages = list[UiMessage]


class Interrupted(TypedDict):
    """What an interrupt found, and how that ended."""

    object: Literal["interrupt"]
    turn_id: str | None
    status: Literal["idle", "queued", "running", "completed", "interrupted", "failed"]


class SessionObject(TypedDict):
    """A mapping."""

    object: Literal["session"]
    thread_id: str
    resource_id: str
    sdk_session_id: str
    parent_thread_id: str | None
    parent_message_id: str | None
    status: Literal["idle", "running"]
    created_at: str
    updated_at: str


class GlimpseObject(TypedDict):
    """A message for a list: who, when, and how it begins."""

    uuid: str
    type: Literal["user", "assistant"]
    preview: str
    timestamp: str | None


class MetadataObject(TypedDict):
    """What a session's transcript tells beside its messages. In a list, `message_count` and `usage` are null."""

    transcript: Literal["present", "missing", "ambiguous"]
    title: str | None
    first_prompt: str | None
    tag: str | None
    message_count: int | None
    last_message: GlimpseObject | None
    usage: dict[str, int] | None
    size_bytes: int | None


class DescribedSession(SessionObject, total=False):
    """A mapping, and what its transcript tells where that was asked for."""

    metadata: MetadataObject


class SessionList(TypedDict):
    """A page of mappings."""

    object: Literal["list"]
    data: list[DescribedSession]
    has_more: bool
    next: str | None


class MessageObject(TypedDict):
    """A message of a conversation."""

    uuid: str
    type: Literal["user", "assistant"]
    message: Json
    timestamp: str | None
    parent_uuid: str | None
    synthetic: bool


class MessageList(TypedDict):
    """A page of messages, oldest first."""

    object: Literal["list"]
    data: list[MessageObject]
    has_more: bool
    next: str | None


class BranchObject(TypedDict):
    """A thread of a family, and its forks."""

    thread_id: str
    sdk_session_id: str | None
    title: str | None
    status: Literal["idle", "running", "deleted"]
    parent_message_id: str | None
    branch_point: GlimpseObject | None
    last_activity: str | None
    children: "list[BranchObject]"


class Branches(TypedDict):
    """The family of a thread."""

    object: Literal["branches"]
    thread_id: str
    root: BranchObject
    truncated: bool


class Deleted(TypedDict):
    """How many mappings of a resource there were."""

    object: Literal["deleted"]
    resource_id: str
    count: int


class Warming(TypedDict):
    """A hint that was taken."""

    object: Literal["warm"]
    thread_id: str
    resource_id: str


class Health(TypedDict):
    """That it is well."""

    status: Literal["ok", "ready"]


class Versions(TypedDict):
    """What runs."""

    version: str
    claude_agent_sdk: str
    cli: str | None
    model: Literal["live", "offline"]


def session_object(session: "Session") -> DescribedSession:
    """A session as callers see it."""
    mapping = session.mapping
    described: DescribedSession = {
        "object": "session",
        "thread_id": mapping.thread_id,
        "resource_id": mapping.resource_id,
        "sdk_session_id": mapping.sdk_session_id,
        "parent_thread_id": mapping.parent_thread_id,
        "parent_message_id": mapping.parent_message_id,
        "status": "running" if session.running else "idle",
        "created_at": _rfc3339(mapping.created_at),
        "updated_at": _rfc3339(mapping.updated_at),
    }
    if session.metadata is not None:
        described["metadata"] = _metadata_object(session.metadata)
    return described


def _metadata_object(metadata: "Metadata") -> MetadataObject:
    return {
        "transcript": metadata.transcript,
        "title": metadata.title,
        "first_prompt": metadata.first_prompt,
        "tag": metadata.tag,
        "message_count": metadata.message_count,
        "last_message": _glimpse_object(metadata.last_message) if metadata.last_message else None,
        "usage": metadata.usage,
        "size_bytes": metadata.size_bytes,
    }


def _glimpse_object(glimpse: "Glimpse") -> GlimpseObject:
    return {
        "uuid": glimpse.uuid,
        "type": glimpse.type,
        "preview": glimpse.preview,
        "timestamp": glimpse.timestamp,
    }


def branch_object(branch: "Branch") -> BranchObject:
    """A thread of a family, with all below it, as callers see it."""
    mapping = branch.mapping
    return {
        "thread_id": branch.thread_id,
        "sdk_session_id": mapping.sdk_session_id if mapping else None,
        "title": branch.title,
        "status": "deleted" if mapping is None else "running" if branch.running else "idle",
        "parent_message_id": mapping.parent_message_id if mapping else None,
        "branch_point": _glimpse_object(branch.point) if branch.point else None,
        "last_activity": _rfc3339(mapping.updated_at) if mapping else None,
        "children": [branch_object(child) for child in branch.children],
    }


def written(message: "TranscriptMessage") -> str:
    """A message as callers see it, by itself: one long page would be one long stop for everybody else."""
    shown: MessageObject = {
        "uuid": message.uuid,
        "type": message.type,
        "message": message.message,
        "timestamp": message.timestamp,
        "parent_uuid": message.parent_uuid,
        "synthetic": message.synthetic,
    }
    return json.dumps(shown, separators=(",", ":"))


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
