"""What callers may send: every field, its rules and its default."""

import base64
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    model_validator,
)

from session_sidecar.sessions.changes import is_session_id
from session_sidecar.sessions.reading import Listing
from session_sidecar.turns.turn import TurnRequest
from session_store import Cursor, ThreadKey

MAX_ID_CHARS = 256
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSOUND = re.compile("[\x00-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")


def _opaque_id(value: str) -> str:
    """Somebody else's ID, kept byte for byte. What is refused cannot travel or be shown safely."""
    if _UNSOUND.search(value):
        raise ValueError("control characters, lone surrogates and U+FFFD are not allowed")
    return value


def _text(value: str) -> str:
    """Text for the model. A lone surrogate is no Unicode text: the API refuses it, and with it the whole history."""
    if not value.strip():
        raise ValueError("must not be blank")
    if _SURROGATE.search(value):
        raise ValueError("lone surrogates are not allowed")
    return value


ID = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(_opaque_id)]
Text = Annotated[str, AfterValidator(_text)]
_POSITION = TypeAdapter(tuple[int, ID, ID], config=ConfigDict(strict=True))  # `true` and 1.0 are no times
Label = Annotated[str, Field(max_length=MAX_ID_CHARS), AfterValidator(_text), AfterValidator(_opaque_id)]


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

    thread_id: ID
    resource_id: ID

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
    citations: dict[str, bool] | None = None
    cache_control: dict[str, str] | None = None


Block = Annotated[TextBlock | ImageBlock | DocumentBlock, Field(discriminator="type")]
Blocks = Annotated[list[Block], Field(min_length=1)]


Content = Annotated[
    Annotated[Text, Tag("text")] | Annotated[Blocks, Tag("blocks")],
    Discriminator(lambda value: "blocks" if isinstance(value, list) else "text"),
]


class _TurnOptions(_Model):
    agent: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)] = "default"
    multitask_strategy: Literal["reject", "enqueue", "interrupt"] = "reject"
    on_disconnect: Literal["continue", "cancel"] = "continue"
    if_missing: Literal["restart", "fail"] = "restart"

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


class ChatRequest(Thread, _TurnOptions):
    """The body of `POST /v1/chat`."""

    message: Content

    def turn(self) -> TurnRequest:
        """The turn that is asked for."""
        return self._turn(self.key, self.message)


class ForkRequest(Thread, _TurnOptions):
    """The body of `POST /v1/chat/fork`."""

    from_thread_id: ID
    at_message_id: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)] | None = None
    message: Content | None = None

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

    agent: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)] = "default"


def _canonical(value: str) -> str:
    if not is_session_id(value):
        raise ValueError("must be a UUID as the SDK writes it, in lower case")
    return value


class Adoption(Thread):
    """The body of `PUT /v1/session`."""

    sdk_session_id: Annotated[str, AfterValidator(_canonical)]


class _Deletion(_Model):
    transcript: Literal["keep", "delete"] = "keep"
    force: bool = False


class DeleteQuery(Thread, _Deletion):
    """The query of `DELETE /v1/session`."""


class EraseQuery(_Deletion):
    """The query of `DELETE /v1/sessions`."""

    resource_id: ID


class SessionQuery(Thread):
    """The query of `GET /v1/session`. Without `metadata` no transcript is touched."""

    metadata: bool = True


class SessionPatch(Thread):
    """The body of `PATCH /v1/session`. A tag of null takes it away; what is not named stays."""

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
    after: ID | None = None
    order: Literal["asc", "desc"] = "asc"
    include: Literal["compacted"] | None = None


class ListQuery(_Model):
    """The query of `GET /v1/sessions`. `q` is looked for in titles and first prompts, without regard to case."""

    resource_id: ID | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    after: Annotated[Cursor, BeforeValidator(_decode)] | None = None
    order: Literal["asc", "desc"] = "desc"
    thread_id_prefix: ID | None = None
    parent_thread_id: ID | None = None
    include: Literal["metadata"] | None = None
    q: Label | None = None

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
