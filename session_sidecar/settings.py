"""The operator's settings, from `SIDECAR_*` in the environment; `serve`'s options come on top."""

import contextlib
import difflib
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

ENV_PREFIX = "SIDECAR_"
CLI_BYTES = 130 * 2**20
"""What a connected CLI takes of its own (97 to 107 MiB), and some."""
_MOST_WARM = 256  # each takes three descriptors of the 1,024 that a process usually may have
_UNITS = {"MiB": 2**20, "GiB": 2**30}
_SECRET_CHARS = 16
_MOST_DAYS = 36_500
_POSTGRES = ("postgresql://", "postgres://")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
CLIENT_VARIABLES = {"SIDECAR_URL", "SIDECAR_TOKEN"}  # where the command line finds a sidecar; none of the server's


class SettingsError(Exception):
    """A setting is wrong; the message is one line that names it."""


class Settings(BaseModel):
    """All settings, each `SIDECAR_` and its upper-case name in the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    home: Path = Field(Path("var"), description="where everything is kept: database, transcripts, workspace")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    uds: Path | None = Field(None, description="listen on this Unix socket instead; for this machine's user alone")
    model: Literal["live", "offline", "auto"] = Field(
        "live",
        description="`live`: the real API; `offline`: the built-in stand-in; `auto`: offline without credentials",
    )
    database: str | None = Field(
        None, description="postgresql://… for several replicas (docs/replicas.md); by default SQLite in the home"
    )
    replica_secret: str | None = Field(
        None,
        description="what replicas know each other by: the same for all, 16 characters of ASCII or more",
    )
    replica_url: str | None = Field(
        None, description="where the other replicas reach this one: http://10.0.0.3:8000; needs SIDECAR_REPLICA_SECRET"
    )
    lease_seconds: float = Field(
        15, ge=1, description="a replica that is gone for so long, and a third of it more, loses its threads to others"
    )
    encryption_keys: str | None = Field(
        None,
        description="id:base64,id:base64…, 32 bytes each: transcripts are stored sealed, with the first of these keys",
    )
    agents: str | None = Field(None, description="agents.toml, or package.module:function")
    max_message_bytes: int = Field(4 * 2**20, ge=1, description="a message larger than this is refused with 413")
    tokens_file: Path | None = Field(
        None, description="who may call: a file of `session-sidecar token`. Without it, whoever reaches loopback"
    )
    hosts: str = Field("", description="names this server is called by, beside those of loopback, between commas")
    origins: str = Field("", description="origins whose pages may call, between commas: https://chat.example.org")
    max_turns: int = Field(
        100,
        ge=1,
        description="turns at once, waiting ones and work in the background included; more are refused with 503",
    )
    max_turns_per_resource: int | None = Field(
        None, ge=1, description="the same for each resource; more are refused with 429. By default there is no bound"
    )
    queue_turns: int = Field(8, ge=0, description="turns that may wait for one thread (`multitask_strategy: enqueue`)")
    turn_seconds: float = Field(
        3600,
        gt=0,
        description="a turn that runs for so long is ended, and so is work in the background",
    )
    turn_idle_seconds: float = Field(600, gt=0, description="a turn whose CLI says nothing for so long is ended")
    warm_sessions: int | None = Field(
        None,
        ge=0,
        description="sessions that stay connected after a turn; by default as many as SIDECAR_WARM_MEMORY holds, at "
        "most 256",
    )
    warm_memory: str | None = Field(
        None,
        description="memory that they may take together, like 4GiB or 512MiB: what is measured of each when it falls "
        "idle. By default a quarter of the memory, or no bound where SIDECAR_WARM_SESSIONS is given",
    )
    warm_idle_seconds: float = Field(300, gt=0, description="an unused connected process is closed after this")
    spare_processes: int = Field(1, ge=0, description="connected processes that wait for new threads, an agent")
    interrupt_seconds: float = Field(5, gt=0, description="what an interrupted turn may take before its CLI is ended")
    shutdown_seconds: float = Field(15, gt=0, description="what open streams may take at shutdown")
    replay_seconds: float = Field(60, ge=0, description="how long an ended turn can be rejoined")
    replay_events: int = Field(20_000, ge=16, description="events held of one turn")
    replay_bytes: int = Field(32 * 2**20, ge=1024, description="memory for the events of one turn, in bytes")
    replay_bytes_total: int | None = Field(
        None,
        ge=1024,
        description="memory for the events of all turns held, in bytes; by default an eighth of the memory. The least "
        "recently used ended turns go first, then the oldest events of the turn in use that holds most",
    )
    send_seconds: float = Field(30, gt=0, description="a reader that takes nothing for so long is dropped")
    retention_days: float | None = Field(
        None,
        gt=0,
        le=_MOST_DAYS,
        description="mappings that nobody used for so many days are removed; by default none is",
    )
    retention_transcripts: Literal["keep", "delete"] = Field(
        "keep", description="what becomes of their transcripts; deleted ones are gone for good"
    )
    ping_seconds: float = Field(3, gt=0, description="seconds between comment pings on a stream")
    stream_init: Literal["show", "hide"] = Field(
        "show", description="`hide`: leave `system/init`, which names paths of this machine, out of streams"
    )
    retention_tags: str = Field(
        "", description="days of their own for threads of a tag, between commas: checkpoint:90,pinned:never"
    )
    ui: Literal["on", "off"] = Field("on", description="`off`: the page `/ui` is not there")

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Read the environment, then `overrides` (None means not given).

        Raises SettingsError for a value that is wrong and for a `SIDECAR_` name that is no setting.
        """
        environ = os.environ if environ is None else environ
        given: dict[str, Any] = {
            k[len(ENV_PREFIX) :].lower(): v
            for k, v in environ.items()
            if k.startswith(ENV_PREFIX) and k not in CLIENT_VARIABLES
        }
        given |= {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            complaint = (
                _no_such(name, cls.model_fields)
                if first["type"] == "extra_forbidden"
                else first["msg"].removeprefix("Value error, ")
            )
            raise SettingsError(f"{ENV_PREFIX}{name.upper()}: {complaint}") from None

    @field_validator("hosts")
    @classmethod
    def _names(cls, value: str) -> str:
        for name in _split(value):
            if urlsplit(f"//{name}").hostname != name.lower():
                raise ValueError(f"{name!r} is no host name; give it without scheme, port and path")
        return value

    @field_validator("origins")
    @classmethod
    def _origins(cls, value: str) -> str:
        for origin in _split(value):
            parts = urlsplit(origin)
            if (
                parts.scheme not in {"http", "https"}
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin!r} is no origin; one is like https://chat.example.org, without a path")
        return value

    @field_validator("database")
    @classmethod
    def _database(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(_POSTGRES):
            raise ValueError("is a URL that begins with postgresql://; leave it out for SQLite in the home")
        return value

    @field_validator("replica_secret")
    @classmethod
    def _replica_secret(cls, value: str | None) -> str | None:
        if value is not None and (len(value) < _SECRET_CHARS or not value.isascii() or not value.isprintable()):
            raise ValueError(f"has to be {_SECRET_CHARS} characters of ASCII or more (openssl rand -hex 32)")
        return value

    @field_validator("replica_url")
    @classmethod
    def _replica_url(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not info.data.get("replica_secret"):
            raise ValueError("needs SIDECAR_REPLICA_SECRET, the same for all replicas")
        if value is not None and (urlsplit(value).scheme not in {"http", "https"} or not urlsplit(value).hostname):
            raise ValueError(f"{value!r} is no URL; one is like http://10.0.0.3:8000")
        return value

    @field_validator("retention_tags")
    @classmethod
    def _retention_tags(cls, value: str) -> str:
        _days_of_tags(value)
        return value

    @property
    def days_of_tags(self) -> dict[str, float | None]:
        """For how many days an unused thread of a tag is kept; None is for ever."""
        return _days_of_tags(self.retention_tags)

    @field_validator("warm_memory")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value is not None and not (value[:-3].isdecimal() and value.isascii() and value[-3:] in _UNITS):
            raise ValueError(f"{value!r} is no size; one is like 4GiB or 512MiB, a whole number and its unit")
        if value is not None and _bytes_of(value) < CLI_BYTES:
            raise ValueError("is less than one process takes, 130MiB; SIDECAR_WARM_SESSIONS=0 keeps none")
        return value

    @property
    def served_hosts(self) -> frozenset[str]:
        """The names in a Host header that are this server's, beside those of loopback."""
        listening = {self.host} - {"0.0.0.0", "::"}  # noqa: S104 - compared, not listened on
        return frozenset(name.lower() for name in {*_split(self.hosts), *listening})

    @property
    def allowed_origins(self) -> frozenset[str]:
        """The origins whose pages may call, as browsers name them."""
        return frozenset(_split(self.origins))

    @property
    def most_warm_sessions(self) -> int:
        """How many sessions to keep connected, if the memory holds so many."""
        return _MOST_WARM if self.warm_sessions is None else self.warm_sessions

    @property
    def most_warm_bytes(self) -> int | None:
        """What sessions that stay connected may take together, in bytes; None where only their number is bounded."""
        if self.warm_memory is not None:
            return _bytes_of(self.warm_memory)
        return None if self.warm_sessions is not None else memory_bytes() // 4

    @property
    def most_prepared(self) -> int:
        """Of how many agents to start spares beforehand: as many as fit in a quarter of the memory; at least one."""
        return max(1, memory_bytes() // 4 // CLI_BYTES // max(1, self.spare_processes))

    @property
    def replay_bytes_of_all(self) -> int:
        """What the events of all turns held may take, in bytes."""
        return memory_bytes() // 8 if self.replay_bytes_total is None else self.replay_bytes_total

    def effective(self) -> dict[str, Any]:
        """Every setting with the value that it has here, as JSON; defaults that the machine decides, as it does."""
        return self.model_dump(mode="json") | {
            "home": str(self.home.absolute()),
            "warm_memory": None if (most := self.most_warm_bytes) is None else f"{most // 2**20}MiB",
            "replay_bytes_total": self.replay_bytes_of_all,
        }

    @property
    def database_file(self) -> Path:
        """The session map's file, where it is SQLite's."""
        return self.home.absolute() / "sidecar.db"

    @property
    def stores_transcripts(self) -> bool:
        """Whether a database has the transcripts: those here are a cache of it, and may be lost."""
        return self.database is not None or self.encryption_keys is not None

    @property
    def transcripts_file(self) -> Path:
        """Where transcripts are stored sealed, where no database of several replicas has them."""
        return self.home.absolute() / "transcripts.db"

    @property
    def database_url(self) -> str:
        """The session map, as `open_session_map` takes it."""
        return f"sqlite://{self.database_file}" if self.database is None else self.database

    @property
    def claude_config(self) -> Path:
        """The CLI's config directory, which holds the transcripts."""
        return self.home.absolute() / "claude"

    @property
    def temporary(self) -> Path:
        """The CLI's scratch directory."""
        return self.home.absolute() / "tmp"

    @property
    def workspace(self) -> Path:
        """The CLI's working directory."""
        return self.home.absolute() / "workspace"


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _days_of_tags(text: str) -> dict[str, float | None]:
    """What `SIDECAR_RETENTION_TAGS` says. Raises ValueError."""
    found: dict[str, float | None] = {}
    for part in _split(text):
        tag, colon, term = part.partition(":")
        tag = unicodedata.normalize("NFKC", tag).strip()  # as the SDK writes tags
        days = math.inf
        with contextlib.suppress(ValueError):
            days = float(term)
        if not tag or not colon or not (term.strip() == "never" or 0 < days <= _MOST_DAYS):
            raise ValueError(
                f"{part!r} is no tag with its days; one is like checkpoint:90 or pinned:never (up to {_MOST_DAYS} "
                "days), and a tag with a colon or a comma cannot be named"
            )
        if tag in found:
            raise ValueError(f"{tag!r} is there twice")
        found[tag] = None if term.strip() == "never" else days
    return found


def _no_such(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {ENV_PREFIX}{near[0].upper()}?" if near else "the README lists them all"
    return f"no such setting; {hint}"


def _bytes_of(size: str) -> int:
    return int(size[:-3]) * _UNITS[size[-3:]]


def memory_bytes() -> int:
    """The machine's memory, or what the container may use of it (cgroup v2), in bytes."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # no limit, or none that can be read
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return memory
