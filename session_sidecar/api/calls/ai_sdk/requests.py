"""What the AI SDK's client sends. It sends more than is asked for, as do those who build on it: that is let pass."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from session_sidecar.api.calls.ai_sdk.parts import ANSWER
from session_sidecar.api.models.requests import Blocks, TurnOptions
from session_sidecar.api.models.texts import ID, Name
from session_sidecar.errors import InvalidRequest
from session_sidecar.sessions.chats import Parents
from session_sidecar.turns.turn import TurnRequest
from session_store import ThreadKey

_DATA = re.compile(r"data:([^,;]+)(?:;[^,;]+)*;base64,(.*)", re.DOTALL)
_IGNORED = ("data-", "step-start")
MAX_MESSAGES = 10_000


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)


class Part(_Lenient):
    """A part of a message: of a user's, `text` and `file` are for the model."""

    type: Name
    text: str | None = None
    mediaType: str | None = None  # noqa: N815 - the client's name for it
    url: str | None = None
    filename: str | None = None


class SentMessage(_Lenient):
    """A message of the client's. Of those before the last one only the IDs are looked at."""

    id: str = ""
    role: Literal["system", "user", "assistant"]
    parts: list[Any] = []
    metadata: Any = None


class _OfChat(_Lenient):
    id: Annotated[ID, Field(description="the chat: the name of its thread", examples=["t1"])]
    resource_id: Annotated[
        ID | None, Field(description="whose it is, where neither the token nor `X-Resource-Id` says it")
    ] = None

    branch: Annotated[
        Literal["latest", "this"], Field(description="`this`: the thread of this name, whichever was used last")
    ] = "latest"

    @property
    def thread_id(self) -> str:
        """The name of the chat's own thread."""
        return self.id

    @property
    def key(self) -> ThreadKey:
        """The chat's own thread."""
        return ThreadKey(self.id, self.resource_id or "")


class Resuming(_OfChat):
    """What is asked of `GET /v1/ai-sdk/chat/{id}/stream`."""


class Loading(_OfChat):
    """What is asked of `GET /v1/ai-sdk/chat/{id}`."""

    limit: Annotated[int, Field(ge=1, le=200, description="turns")] = 50
    before: Annotated[ID | None, Field(description="taken from the `Link` header of the page after it")] = None


class Sending(_OfChat, TurnOptions):
    """The body of `POST /v1/ai-sdk/chat`, as `useChat` makes it."""

    model_config = ConfigDict(extra="ignore")
    most_bytes: ClassVar[int] = 64 * 2**20  # with every answer so far, and the files that were sent

    messages: Annotated[list[SentMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    trigger: Annotated[str | None, Field(description="the client's word for why it sends; the messages tell it")] = None

    @field_validator("messages")
    @classmethod
    def _ends_with_the_users(cls, messages: list[SentMessage]) -> list[SentMessage]:
        if messages[-1].role != "user":
            raise ValueError("the last one must be the user's: the agent runs its tools itself")
        return messages

    def turn(self) -> TurnRequest:
        """The turn that is asked for, on the chat's own thread. Raises InvalidRequest."""
        parts = self.messages[-1].parts
        at = f"messages.{len(self.messages) - 1}.parts"
        blocks = [block for number, part in enumerate(parts) for block in _blocks(part, f"{at}.{number}")]
        if not blocks:
            raise _wrong(at, "must hold text that is not blank, or a file")
        try:
            checked = _Content.model_validate({"blocks": blocks})
        except ValidationError as error:
            raise _wrong(at, error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        only = blocks[0]["text"] if len(blocks) == 1 and blocks[0]["type"] == "text" else None
        return self._turn(self.key, only if only is not None else checked.blocks)

    @property
    def parents(self) -> Parents:
        """What the client knows of what was said before."""
        before = self.messages[:-1]
        names = dict.fromkeys(message.id.removesuffix(ANSWER) for message in reversed(before) if message.id)
        asked = next((i for i, message in enumerate(before) if message.role == "user"), len(before))
        nearest = next((message for message in reversed(before) if message.role == "assistant"), None)
        told = nearest.metadata.get("threadId") if nearest and isinstance(nearest.metadata, dict) else None
        return Parents(
            tuple(names),
            told if isinstance(told, str) else None,
            # What comes before anything was asked is a greeting of the page's own.
            answered=any(message.role == "assistant" for message in before[asked:]),
        )


class _Content(_Lenient):
    blocks: Blocks


def _blocks(given: Any, at: str) -> Sequence[dict[str, Any]]:
    """A part of a user's message as a block of the Messages API, if there is one for it. Raises InvalidRequest."""
    try:
        part = Part.model_validate(given)
    except ValidationError as error:
        raise _wrong(at, error.errors()[0]["msg"]) from None
    if part.type == "text":
        return [{"type": "text", "text": part.text}] if part.text and part.text.strip() else []
    if part.type.startswith(_IGNORED):
        return []
    media = (part.mediaType or "").lower()
    if part.type != "file" or not (media.startswith("image/") or media == "application/pdf"):
        raise _wrong(at, "must be text, or a file that is an image or a PDF")
    found = _DATA.fullmatch(part.url or "")
    if found is not None:
        source = {"type": "base64", "media_type": media, "data": found[2]}
    elif (part.url or "").startswith(("https://", "http://")):
        source = {"type": "url", "url": part.url or ""}
    else:
        raise _wrong(at, "`url` must be a `data:` URL in base64, or one of http")
    if media.startswith("image/"):
        return [{"type": "image", "source": source}]
    return [{"type": "document", "source": source, **({"title": part.filename} if part.filename else {})}]


def _wrong(field: str, message: str) -> InvalidRequest:
    return InvalidRequest("Nothing was started. See `errors`.", [{"field": field, "message": message}])
