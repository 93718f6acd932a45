"""Agents: the operator's named presets of SDK options. A request names one; it never carries options itself."""

import asyncio
import concurrent.futures
import dataclasses
import importlib
import inspect
import json
import os
import threading
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from claude_agent_sdk import ClaudeAgentOptions
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from session_sidecar.agent.processes.orphans import CLI_VARIABLE, installed_cli
from session_sidecar.agent.processes.process import CLI_MISSING, TITLE_ARGUMENT, AgentProcess
from session_sidecar.errors import AgentMisconfigured, AgentStartFailed, UnknownAgent
from session_sidecar.settings import SettingsError
from session_store import ThreadKey

OURS = frozenset({"resume", "session_id", "fork_session", "continue_conversation", "resume_session_at",
                  "resume_drops_turn", "session_store", "session_store_flush"})  # fmt: skip
"""What the sidecar decides for itself, turn by turn; no agent may set it."""

NOT_DATA = frozenset({"stderr", "debug_stderr", "can_use_tool", "hooks"})
"""Options that hold functions: these need `package.module:function`, a TOML file cannot say them."""

OptionsFunction = Callable[[ThreadKey, str], ClaudeAgentOptions | Awaitable[ClaudeAgentOptions]]

T = TypeVar("T")

# Transcripts are the only copy of a conversation: with user settings loaded the CLI would sweep them after 30 days.
KEEP_TRANSCRIPTS = {"cleanupPeriodDays": 365 * 100}
QUIET_CLI = {
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "DISABLE_AUTOUPDATER": "1",
}
# The SDK's default of 1 MiB ends the turn at one long tool result.
MAX_LINE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
    """Which session a process is for.

    Without `resume_from`: a new session under `session_id`. With it equal to `session_id`: that session, continued.
    Otherwise: a fork of `resume_from` under `session_id`, cut after the message `at`, and called `title`.
    """

    session_id: str
    resume_from: str | None = None
    at: str | None = None
    title: str | None = None


def safe_options(**options: Any) -> ClaudeAgentOptions:
    """SDK options that are safe in front of strangers, with `options` on top.

    No tools, no settings files, no MCP servers but the ones named, nothing that waits for a person's permission, and
    prompts taken verbatim: an `@/path` or a `/command` in one is text.
    """
    settings = json.dumps({**KEEP_TRANSCRIPTS, **_settings(options.pop("settings", None))})
    safe: dict[str, Any] = {
        "tools": [],
        "setting_sources": [],
        "strict_mcp_config": True,
        "permission_mode": "dontAsk",
        "verbatim_prompts": True,
        "include_partial_messages": True,
        "max_buffer_size": MAX_LINE_BYTES,
    }
    return ClaudeAgentOptions(**{**safe, **options}, settings=settings)


class Agents:
    """The agents there are, and how each is launched for a session."""

    def __init__(self, source: str | None, *, cwd: Path, env: Mapping[str, str], launcher: Path | None = None) -> None:
        """`source` is a TOML file, `package.module:function`, or None for the safe default alone.

        `cwd` and `env` are what the CLI gets where the agent does not say otherwise; `launcher` is what starts it (see
        `orphans.guarded_cli`). Raises SettingsError.
        """
        self._launcher = launcher
        self._cwd = cwd
        self._env = {**QUIET_CLI, "CLAUDE_CODE_MAX_RETRIES": os.environ.get("CLAUDE_CODE_MAX_RETRIES", "3"), **env}
        self._function: OptionsFunction | None = None
        self._presets: dict[str, ClaudeAgentOptions] = {"default": safe_options()}
        if source is not None and ":" in source and not Path(source).exists():
            self._function = _load_function(source)
        elif source is not None:
            self._presets |= _load_file(Path(source))

    async def options(self, name: str, key: ThreadKey, launch: Launch) -> ClaudeAgentOptions:
        """The SDK options for one process.

        Raises UnknownAgent, and AgentMisconfigured where the operator's function fails or sets what is ours.
        """
        if self._function is not None:
            return self._launched(await self._ask(name, key), launch)
        return self.preset(name, launch)

    def preset(self, name: str, launch: Launch) -> ClaudeAgentOptions:
        """The same for a preset, which is there without asking; raises UnknownAgent. Beside a function: the default."""
        if name not in self._presets:
            raise UnknownAgent(name)
        return self._launched(self._presets[name], launch)

    @property
    def presets(self) -> list[str]:
        """The names of the agents that are the same for every thread; none where a function is asked."""
        return [] if self._function is not None else list(self._presets)

    def process(self, name: str, options: ClaudeAgentOptions) -> AgentProcess:
        """A process of this agent, not started yet, with the options that it was given for it."""
        return AgentProcess(options, name if name in self.presets else None)

    def check_cli(self) -> None:
        """Raise AgentStartFailed if there is no CLI, where the agents do not bring their own."""
        if any(preset.cli_path is None for preset in self._presets.values()) and installed_cli() is None:
            raise AgentStartFailed(CLI_MISSING)

    def _launched(self, options: ClaudeAgentOptions, launch: Launch) -> ClaudeAgentOptions:
        env = {**self._env, **options.env}
        if self._launcher is not None and options.cli_path is not None:
            env[CLI_VARIABLE] = str(options.cli_path)
        extra_args = dict(options.extra_args)
        if launch.title is not None:
            extra_args[TITLE_ARGUMENT] = launch.title
        forks = launch.resume_from is not None and launch.resume_from != launch.session_id
        return dataclasses.replace(
            options,
            cwd=options.cwd or self._cwd,
            env=env,
            cli_path=self._launcher or options.cli_path,
            session_id=launch.session_id if forks or launch.resume_from is None else None,
            resume=launch.resume_from,
            fork_session=forks,
            extra_args=extra_args,
            resume_session_at=launch.at,
        )

    def check(self, name: str) -> None:
        """Raise UnknownAgent if no preset has this name; an operator's function is asked only when a turn starts."""
        if self._function is None and name not in self._presets:
            raise UnknownAgent(name)

    async def _ask(self, name: str, key: ThreadKey) -> ClaudeAgentOptions:
        assert self._function is not None  # noqa: S101 - for the type checker
        try:
            # One that blocks stops neither the other turns nor the sidecar's end.
            ask = partial(self._function, key, name)
            answer = ask() if inspect.iscoroutinefunction(self._function) else await in_daemon_thread(ask)
            options = await answer if inspect.isawaitable(answer) else answer
        except LookupError:
            raise UnknownAgent(name) from None
        except Exception as error:
            raise AgentMisconfigured(
                f"The function that SIDECAR_AGENTS names raised {type(error).__name__}."
            ) from error
        if not isinstance(options, ClaudeAgentOptions):
            raise AgentMisconfigured("The function that SIDECAR_AGENTS names must return ClaudeAgentOptions.")
        plain = ClaudeAgentOptions()
        if taken := sorted(field for field in OURS if getattr(options, field) != getattr(plain, field)):
            raise AgentMisconfigured(f"An agent cannot set {', '.join(taken)}: the sidecar decides that.")
        return dataclasses.replace(options, max_buffer_size=options.max_buffer_size or MAX_LINE_BYTES)


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """Do blocking work in a thread of its own, which nobody waits for once the caller has been cancelled."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except StopIteration:
            done.set_exception(RuntimeError("StopIteration"))  # no future of asyncio takes that
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="agents").start()
    return await asyncio.wrap_future(done)


def _settings(value: object) -> dict[str, Any]:
    """The `settings` option as a mapping: a table, a path, or inline JSON."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = json.loads(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise TypeError("settings must be a table")
    return value


def _load_function(source: str) -> OptionsFunction:
    module, _, name = source.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"SIDECAR_AGENTS: cannot import {source}: {error}") from error
    if not callable(function):
        raise SettingsError(f"SIDECAR_AGENTS: {source} is not a function")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> dict[str, ClaudeAgentOptions]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"SIDECAR_AGENTS: cannot read {path}: {error}") from error
    presets = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise SettingsError(f"SIDECAR_AGENTS: {path}: {name} is outside a table; an agent is a [table] of options")
        try:
            presets[name] = safe_options(**{option: _checked(option, value) for option, value in table.items()})
        except (ValueError, TypeError, OSError) as error:
            raise SettingsError(f"SIDECAR_AGENTS: {path}: [{name}]: {error}") from error
    return presets


def _checked(option: str, value: Any) -> Any:
    """`value` if the SDK has such an option of such a type and an agent may set it. Raises ValueError."""
    hints = _hints()
    if option in OURS:
        raise ValueError(f"{option} cannot be set: the sidecar decides it")
    if option not in hints:
        raise ValueError(f"{option} is no option of ClaudeAgentOptions")
    if option in NOT_DATA:
        raise ValueError(f"{option} needs a function: name one with SIDECAR_AGENTS=package.module:function")
    if option == "settings":
        return value
    try:
        TypeAdapter(hints[option]).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join([option, *map(str, first['loc'])])}: {first['msg']}") from None
    except PydanticUserError:
        # Python 3.11 cannot check the SDK's TypedDicts; the CLI does.
        pass
    return value


def _hints() -> dict[str, Any]:
    return get_type_hints(ClaudeAgentOptions)
