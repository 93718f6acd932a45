"""What callers may send: every field, its rules and its default."""

import base64
import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    Tag,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from session_sidecar.api.models.texts import ID, SESSION_ID, Label, Name, Text
from session_sidecar.sessions.changes import is_session_id
from session_sidecar.sessions.reading import Listing
from session_sidecar.turns.turn import TurnRequest
from session_store import Cursor, ThreadKey

_POSITION = TypeAdapter(tuple[int, ID, ID], config=ConfigDict(strict=True))  # `true` and 1.0 are no times


def encode(cursor: Cursor) -> str:
    """A cursor as the opaque `next` of a page."""
    position = json.dumps([cursor.created_at_us, cursor.thread_id, cursor.resource_id], separators=(",", ":"))
    return base64.urlsafe_b64encode(position.encode()).decode().rstrip("=")


def _decode(text: str) -> Cursor:
    try:
        return Cursor(*_POSITION.validate_json(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))))
    except ValueError:
        raise ValueError("not a cursor of this list; take it from `next`") from None


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Thread(_Model):
    """The key of a mapping."""

    thread_id: Annotated[ID, Field(description="your own name for the conversation", examples=["t1"])]
    resource_id: Annotated[ID, Field(description="whose it is: a user, a workspace, a tenant", examples=["alice"])]

    @property
    def key(self) -> ThreadKey:
        """The pair as the session map knows it."""
        return ThreadKey(self.thread_id, self.resource_id)


class TextBlock(_Model):
    """A text block of the Messages API."""

    type: Literal["text"]
    text: Text
    cache_control: dict[str, str] | None = None


class Source(_Model):
    """Where an image or document block has its content."""

    type: Literal["base64", "url", "text", "file"]
    media_type: str | None = None
    data: str | None = None
    url: str | None = None
    file_id: str | None = None


class ImageBlock(_Model):
    """An image block of the Messages API."""

    type: Literal["image"]
    source: Source
    cache_control: dict[str, str] | None = None


class DocumentBlock(_Model):
    """A document block of the Messages API."""

    type: Literal["document"]
    source: Source
    title: str | None = None
    context: str | None = None
    citations: dict[str, StrictBool] | None = None
    cache_control: dict[str, str] | None = None


Block = Annotated[TextBlock | ImageBlock | DocumentBlock, Field(discriminator="type")]
Blocks = Annotated[list[Block], Field(min_length=1)]


Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Blocks, Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, list) else "text"),
]


class TurnOptions(_Model):
    """The options of a turn."""

    agent: Annotated[Name, Field(description="which of the operator's presets answers")] = "default"
    multitask_strategy: Annotated[
        Literal["reject", "enqueue", "interrupt"],
        Field(description="while a turn runs on the thread: refuse this one, let it wait, or stop the other"),
    ] = "reject"
    on_disconnect: Annotated[
        Literal["continue", "cancel"],
        Field(description="when the last reader has left: go on without one, or interrupt the turn"),
    ] = "continue"
    if_missing: Annotated[
        Literal["restart", "fail"],
        Field(description="the SDK has lost the transcript: begin anew, or answer 410 and change nothing"),
    ] = "restart"

    def _turn(self, key: ThreadKey, message: str | list[Any], **more: Any) -> TurnRequest:
        content = message if isinstance(message, str) else [block.model_dump(exclude_none=True) for block in message]
        return TurnRequest(
            key,
            content,
            agent=self.agent,
            multitask_strategy=self.multitask_strategy,
            on_disconnect=self.on_disconnect,
            if_missing=self.if_missing,
            **more,
        )


class ChatRequest(Thread, TurnOptions):
    """The body of `POST /v1/chat`."""

    message: Annotated[Content, Field(examples=["My name is Ada"])]

    def turn(self) -> TurnRequest:
        """The turn that is asked for."""
        return self._turn(self.key, self.message)


class ForkRequest(Thread, TurnOptions):
    """The body of `POST /v1/chat/fork`."""

    from_thread_id: Annotated[ID, Field(description="the thread that is branched, of the same resource")]
    at_message_id: Annotated[Name | None, Field(description="where to branch; by default at the end")] = None
    message: Annotated[Content | None, Field(description="without one the model is not called")] = None

    @property
    def parent(self) -> ThreadKey:
        """The thread that is branched; it has the same resource."""
        return ThreadKey(self.from_thread_id, self.resource_id)

    def turn(self) -> TurnRequest | None:
        """The branch's first turn, if there is a message."""
        if self.message is None:
            return None
        return self._turn(self.key, self.message, fork_of=self.parent, at_message_id=self.at_message_id)


class WarmRequest(Thread):
    """The body of `POST /v1/session/warm`."""

    agent: Annotated[Name, Field(description="which of the operator's presets will answer")] = "default"


def _canonical(value: str) -> str:
    if not is_session_id(value):
        raise ValueError("must be a UUID as the SDK writes it, in lower case")
    return value


class Adoption(Thread):
    """The body of `PUT /v1/session`."""

    sdk_session_id: Annotated[str, AfterValidator(_canonical), SESSION_ID]


class _Deletion(_Model):
    transcript: Annotated[
        Literal["keep", "delete"], Field(description="whether the SDK's transcript goes too, for good")
    ] = "keep"
    force: Annotated[bool, Field(description="stop a running turn first")] = False


class DeleteQuery(Thread, _Deletion):
    """The query of `DELETE /v1/session`."""


class EraseQuery(_Deletion):
    """The query of `DELETE /v1/sessions`."""

    resource_id: ID


class SessionQuery(Thread):
    """The query of `GET /v1/session`. Without `metadata` no transcript is touched."""

    metadata: Annotated[bool, Field(description="`false`: the mapping alone")] = True


def _something_to_change(schema: dict[str, Any]) -> None:
    for name in ("title", "tag"):
        del schema["properties"][name]["default"]
    schema["minProperties"] = 3  # the key, and one of them


class SessionPatch(Thread):
    """The body of `PATCH /v1/session`. A tag of null takes it away; what is not named stays."""

    model_config = ConfigDict(json_schema_extra=_something_to_change)

    title: Label = ""
    tag: Label | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.changes:
            raise ValueError("give a title, a tag, or both")
        return self

    @property
    def changes(self) -> dict[str, str | None]:
        """The fields to set."""
        return self.model_dump(include={"title", "tag"}, exclude_unset=True)


class MessagesQuery(Thread):
    """The query of `GET /v1/session/messages`. `after` is the uuid of a message, taken from `next`."""

    limit: Annotated[int, Field(ge=1, le=200)] = 50
    after: Annotated[ID | None, Field(description="the `next` of the page before")] = None
    order: Annotated[Literal["asc", "desc"], Field(description="`desc`: the last page first")] = "asc"
    include: Annotated[
        Literal["compacted"] | None, Field(description="what came before a compaction of the conversation too")
    ] = None


_CURSOR = WithJsonSchema({"type": "string"})


class ListQuery(_Model):
    """The query of `GET /v1/sessions`. `q` is looked for in titles and first prompts, without regard to case."""

    resource_id: Annotated[ID | None, Field(description="whose; all without one")] = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    after: Annotated[
        Annotated[Cursor, BeforeValidator(_decode), _CURSOR] | None, Field(description="the `next` of the page before")
    ] = None
    order: Annotated[Literal["asc", "desc"], Field(description="`desc`: newest first")] = "desc"
    thread_id_prefix: Annotated[ID | None, Field(description="those whose thread's name begins so")] = None
    parent_thread_id: Annotated[ID | None, Field(description="the forks of this one; needs a `resource_id`")] = None
    include: Annotated[Literal["metadata"] | None, Field(description="what the transcripts tell")] = None
    q: Annotated[Label | None, Field(description="looked for in titles and first prompts")] = None

    @model_validator(mode="after")
    def _parent_has_its_resource(self) -> Self:
        if self.parent_thread_id is not None and self.resource_id is None:
            raise ValueError("`parent_thread_id` needs a `resource_id`: it names one resource's thread")
        return self

    @property
    def listing(self) -> Listing:
        """What is to be listed."""
        return Listing(
            self.resource_id,
            self.limit,
            self.after,
            descending=self.order == "desc",
            thread_id_prefix=self.thread_id_prefix,
            parent_thread_id=self.parent_thread_id,
            text=self.q.casefold() if self.q is not None else None,
            metadata=self.include is not None,
        )
