"""Bodies: received within bounds of size, memory and time, and parsed where that holds up nobody else."""

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from json import scanner
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from session_sidecar.errors import (
    BodyTooLarge,
    InvalidJson,
    InvalidRequest,
    MessageTooLarge,
    RequestTimeout,
    SidecarError,
    TooManyUploads,
)

M = TypeVar("M", bound=BaseModel)

# A request is received within these, its header and its body each: without a byte of progress, and in all.
PROGRESS_SECONDS = 30
WHOLE_SECONDS = 60
# What all bodies that are being received or parsed may hold together, beside the first INLINE_BYTES of each: so an
# ordinary message comes through while uploads fill the rest.
MOST_HELD_BYTES = 256 * 2**20
# Up to here parsing takes less than handing it to a thread, and no more than a few milliseconds at worst.
INLINE_BYTES = 64 * 2**10
# What a body holds beside its message; JSON escapes make a message up to six times its size.
_ENVELOPE_BYTES = 64 * 2**10
_ESCAPED = 6
_MOST_VALUES = 100_000
_MOST_ERRORS = 100


class Bodies:
    """All request bodies of one application."""

    def __init__(self, max_message_bytes: int) -> None:
        """`max_message_bytes`: the UTF-8 that the `message` of a body may have."""
        self._max_message_bytes = max_message_bytes
        self._most = max_message_bytes + _ENVELOPE_BYTES
        self._most_raw = max_message_bytes * _ESCAPED + _ENVELOPE_BYTES
        self._most_held = max(MOST_HELD_BYTES, self._most_raw)
        self._held = 0
        # One: more would only fight for the interpreter, and hold what they parse at the same time.
        self._parser = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bodies")

    async def read(self, request: Request, model: type[M]) -> M:
        """The JSON body as `model`.

        Raises the SidecarError that says what is wrong with it, and ClientDisconnect; nothing of it is kept then.
        """
        raw = bytearray()
        held = 0
        # A conversation may come with its message.
        beside = getattr(model, "most_bytes", 0)
        most, most_raw = self._most + beside, self._most_raw + beside
        try:
            now = asyncio.get_running_loop().time
            end = now() + WHOLE_SECONDS
            size = 0
            async with asyncio.timeout(PROGRESS_SECONDS) as deadline:
                async for chunk in request.stream():
                    deadline.reschedule(min(now() + PROGRESS_SECONDS, end))
                    raw += chunk
                    # No more than what is left when each escape, \n or \uXXXX, has become a character.
                    size += len(chunk) - (_ESCAPED - 1) * chunk.count(b"\\")
                    if size > most or len(raw) > most_raw:
                        raise self._too_large(model, most)
                    more = max(len(raw) - INLINE_BYTES, 0) - held
                    if self._held + more > self._most_held:
                        raise TooManyUploads("Too much is being received at once. Send it again.", retry_after=5)
                    self._held += more
                    held += more
            if len(raw) <= INLINE_BYTES:
                return _parsed(raw, json.loads, model, self._max_message_bytes)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._parser, _parsed, raw, _loads_patiently, model, self._max_message_bytes
            )
        except TimeoutError:
            raise RequestTimeout(
                f"A body is received within {WHOLE_SECONDS} s, and never {PROGRESS_SECONDS} s without progress."
            ) from None
        finally:
            self._held -= held

    def _too_large(self, model: type[BaseModel], most: int) -> SidecarError:
        if "message" in model.model_fields:
            return _message_too_large(self._max_message_bytes)
        return BodyTooLarge(f"At most {most} bytes are read.")


def validated(model: type[M], data: Any) -> M:
    """`data` as `model`. Raises InvalidRequest."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        if error.error_count() > _MOST_ERRORS:
            errors = [{"field": "body", "message": f"{error.error_count()} of its fields are wrong"}]
        else:
            errors = [
                {"field": _field(e["loc"]), "message": e["msg"].removeprefix("Value error, ")}
                for e in error.errors(include_input=False, include_url=False)
            ]
        raise InvalidRequest("Nothing was started. See `errors`.", errors) from None


def _parsed(raw: bytearray, loads: Callable[..., Any], model: type[M], max_message_bytes: int) -> M:
    try:
        text = raw.decode()
        raw.clear()
        data = loads(text, parse_constant=_refuse_constant)
        size = _utf_8_bytes(_message(data))
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    except ValueError as error:
        raise InvalidJson(f"The body is not JSON in UTF-8: {_where(error)}.") from None
    if size > max_message_bytes:
        raise _message_too_large(max_message_bytes)
    return validated(model, data)


def _message(data: Any) -> Any:
    """What a body has for the model: its message, or the last of its messages."""
    if not isinstance(data, dict):
        return None
    messages = data.get("messages")
    return messages[-1] if isinstance(messages, list) and messages else data.get("message")


def _loads_patiently(text: str, *, parse_constant: Callable[[str], Any]) -> Any:
    """`json.loads`, as the Python code that the standard library has of it too.

    The C code keeps the interpreter until it is through, for a second where it makes a million lists; this gives it up
    every few milliseconds and keeps it only for one string. Values are counted, as each takes many times its text.
    """
    decoder: Any = json.JSONDecoder(parse_constant=parse_constant)
    left = _MOST_VALUES

    def counted(scan: Callable[[str, int], Any]) -> Callable[[str, int], Any]:
        def scan_next(text: str, at: int) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise BodyTooLarge(f"At most {_MOST_VALUES} JSON values are read.")
            return scan(text, at)

        return scan_next

    array, object_ = decoder.parse_array, decoder.parse_object
    decoder.parse_array = lambda start, scan: array(start, counted(scan))
    decoder.parse_object = lambda start, strict, scan, *more: object_(start, strict, counted(scan), *more)
    decoder.scan_once = scanner.py_make_scanner(decoder)  # type: ignore[attr-defined]
    return decoder.decode(text)


def _utf_8_bytes(value: Any) -> int:
    """The size of a message, without writing it out again: its texts, and what JSON puts around and between them."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    if isinstance(value, list):
        return sum(_utf_8_bytes(item) + 2 for item in value)
    if isinstance(value, dict):
        return sum(len(name) + _utf_8_bytes(item) + 6 for name, item in value.items())
    return 4


def _message_too_large(limit: int) -> MessageTooLarge:
    return MessageTooLarge(
        f"A message may have {limit} bytes of UTF-8. Shorten it, or let the agent read it as a file."
    )


def _field(loc: tuple[int | str, ...]) -> str:
    """Where in the body, without the names that pydantic gives to the members of a union."""
    return ".".join(str(part) for i, part in enumerate(loc) if loc[0] != "message" or i not in (1, 3)) or "body"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _where(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno} column {error.colno}"
    return "it holds bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
