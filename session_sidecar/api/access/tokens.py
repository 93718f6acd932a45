"""Tokens: random texts that a caller shows, kept as hashes in a file of the operator's.

A line of the file is a token's SHA-256 and what it is for, as JSON:

    4f1c…  {"name": "4f1c09aa", "resources": ["alice"], "read": false, "created": "2026-…", "expires": null}

A plain hash will do, as the tokens are not chosen by people: 32 random bytes are not found by trying. The file is read
again when it has changed, so a token is good, or no longer, within `LOOK_SECONDS`.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from session_sidecar.settings import SettingsError

logger = logging.getLogger(__name__)

PREFIX = "ssc_"  # so that a token is recognised where it does not belong
ALL = "*"
LOOK_SECONDS = 1.0
_LINE = re.compile(r"([0-9a-f]{64}) (\{.*\})\s*")


class Token(BaseModel):
    """What a token is for. `resources` are the IDs whose threads it may touch; `*` is all of them.

    With `read` it may only look, with `metrics` it is for /metrics and nothing else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    resources: frozenset[str]
    read: bool = False
    metrics: bool = False
    created: AwareDatetime
    expires: AwareDatetime | None = None

    @property
    def is_unrestricted(self) -> bool:
        """Whether it is good for every resource."""
        return ALL in self.resources

    def has_expired(self, now: datetime) -> bool:
        """Whether it is no longer good."""
        return self.expires is not None and self.expires <= now


class TokenFile:
    """The file, for whoever adds tokens and takes them away. Each change replaces it whole."""

    def __init__(self, path: Path) -> None:
        """It need not be there yet."""
        self._path = path

    def read(self) -> dict[str, Token]:
        """The tokens by their hashes. Raises SettingsError for a file that cannot be read, or that others may write."""
        try:
            mode = self._path.stat().st_mode
            lines = self._path.read_text(encoding="utf-8").split("\n")  # JSON may hold other separators
        except (OSError, ValueError) as error:
            raise SettingsError(f"SIDECAR_TOKENS_FILE: cannot read {self._path}: {error}") from error
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SettingsError(f"SIDECAR_TOKENS_FILE: {self._path} can be written by others; chmod 600 it")
        found = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            with contextlib.suppress(ValidationError):
                if parts := _LINE.fullmatch(line):
                    found[parts[1]] = Token.model_validate_json(parts[2])
                    continue
            raise SettingsError(
                f"SIDECAR_TOKENS_FILE: line {number} of {self._path} is none that `session-sidecar token new` writes"
            )
        return found

    def add(self, token: str, known: Token) -> None:
        """Keep a token's hash. Raises SettingsError."""
        self._write({**(self.read() if self._path.exists() else {}), digest_of(token): known})

    def revoke(self, name: str) -> bool:
        """Take a token away by its name; whether there was one. Raises SettingsError."""
        tokens = self.read()
        left = {digest: token for digest, token in tokens.items() if token.name != name}
        if len(left) < len(tokens):
            self._write(left)
        return len(left) < len(tokens)

    def _write(self, tokens: dict[str, Token]) -> None:
        lines = [f"{digest} {token.model_dump_json()}\n" for digest, token in tokens.items()]
        fresh = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        try:
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as error:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise SettingsError(f"SIDECAR_TOKENS_FILE: cannot write {self._path}: {error}") from error


def make_token(resources: Iterable[str], **known: Any) -> tuple[str, Token]:
    """A new token, to be shown once, and what is kept of it beside its hash. `known` are fields of Token."""
    token = PREFIX + secrets.token_urlsafe(32)
    return token, Token(name=digest_of(token)[:8], resources=frozenset(resources), created=datetime.now(UTC), **known)


def digest_of(token: str) -> str:
    """A token's hash, as the file has it."""
    return hashlib.sha256(token.encode()).hexdigest()


class Tokens:
    """The tokens that are good now. Watched by a task of its own while `watching`."""

    def __init__(self, path: Path) -> None:
        """Raises SettingsError: a server that is to ask for tokens does not start without them."""
        self._path = path
        self._file = TokenFile(path)
        self._state = _state(path)
        self._tokens = self._file.read()

    def find(self, token: str) -> Token | None:
        """The token, if it is known and has not expired.

        The time that this takes tells something of the hash at most, from which no token can be guessed.
        """
        digest = digest_of(token)
        for known, found in self._tokens.items():
            if hmac.compare_digest(known, digest):
                return None if found.has_expired(datetime.now(UTC)) else found
        return None

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Read the file again when it has changed, for as long as the block lasts."""
        watch = asyncio.create_task(self._watch(), name="the tokens' watch")
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.wait([watch])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        state = _state(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._tokens = self._file.read()
        except SettingsError as error:
            # An editor may be half-way through; whoever wants to lock everybody out stops the sidecar.
            logger.error("%s; the tokens stay as they were", error)  # noqa: TRY400 - it says all there is to know
        else:
            logger.info("tokens", extra={"fields": {"count": len(self._tokens)}})


def _state(path: Path) -> tuple[int, ...]:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode
    return ()


def plain(token: Token) -> dict[str, Any]:
    """A token for people and scripts."""
    return {**token.model_dump(mode="json"), "resources": sorted(token.resources)}
