"""The texts that callers may send: IDs, names, labels and messages."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

MAX_ID_CHARS = 256
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSOUND = re.compile("[\x00-\x1f\x7f-\x9f\ufffd\ud800-\udfff]")
# The same for the document, as ECMA-262 has it. What is blank to Python is a little more, and U+FEFF is not.
_SOUND = r"[^\x00-\x1f\x7f-\x9f\ufffd]"
_SEEN = r"(?:[^\s\x00-\x1f\x7f-\x9f\ufffd]|\ufeff)"
_NOT_BLANK = r"[^\s\x1c-\x1f\x85]|\ufeff"


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


def _pattern(pattern: str) -> Any:
    """For the document alone: a validator says more of what is wrong."""
    return Field(json_schema_extra={"pattern": pattern})


ID = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(_opaque_id), _pattern(f"^{_SOUND}*$")]
Text = Annotated[str, AfterValidator(_text), _pattern(_NOT_BLANK)]
Label = Annotated[
    str,
    Field(max_length=MAX_ID_CHARS),
    AfterValidator(_text),
    AfterValidator(_opaque_id),
    _pattern(f"^{_SOUND}*{_SEEN}{_SOUND}*$"),
]
Name = Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS)]
SESSION_ID = _pattern("^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
