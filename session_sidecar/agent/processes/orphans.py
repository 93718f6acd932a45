"""No CLI outlives the sidecar: each dies with its parent, and what a crash left behind is ended at the next start.

A CLI whose parent was killed goes on: it runs tools and calls the model, on a session that a new turn may be given. And
what it has started goes on when it has gone itself: see `descendants`.
"""

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import claude_agent_sdk

from session_sidecar.agent.processes.descendants import HOME_VARIABLE, Descendants, home_mark, stat_fields

logger = logging.getLogger(__name__)

TERMINATE_SECONDS = 3.0

CLI_VARIABLE = "SESSION_SIDECAR_CLI"
"""Which CLI the launcher starts, for an agent that brings its own."""


def installed_cli() -> str | None:
    """The CLI that the SDK would start: the one that it brings, or else the one on the PATH."""
    bundled = Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"
    return str(bundled) if bundled.exists() else shutil.which("claude")


def guarded_cli(directory: Path) -> Path | None:
    """Write a launcher for the CLI into `directory`, under which the kernel ends the CLI when this process ends.

    None where the system has no `setpriv --pdeathsig` (util-linux 2.33 or newer) or no CLI is found; the SDK then
    starts the CLI itself, and `end_orphans` is what is left.
    """
    setpriv, cli = shutil.which("setpriv"), installed_cli()
    if setpriv is None or cli is None or os.uname().sysname != "Linux":
        return None
    launcher = directory / "launch-cli"
    # SIGTERM, so that the CLI ends what it has started itself. The kernel tells of no death that came before it was
    # asked to: a CLI whose parent is another by then is not begun.
    text = f"""#!/bin/sh
bundled={shlex.quote(cli)}
exec {shlex.quote(setpriv)} --pdeathsig TERM -- /bin/sh -c '[ "$PPID" = {os.getpid()} ] && exec "$0" "$@"' \\
    "${{{CLI_VARIABLE}:-$bundled}}" "$@"
"""
    fresh = launcher.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.chmod(0o700)
    fresh.replace(launcher)
    return launcher


@dataclass(frozen=True, slots=True)
class LiveCli:
    """A CLI process that runs in our config directory."""

    pid: int
    session_id: str


def live_clis(claude_config: Path) -> list[LiveCli]:
    """The CLIs running in this config directory, by the CLI's own registry; only those that are provably the same.

    The registry's file may be of a process long gone and its PID another's. So the process must have started at the
    moment the file names (field 22 of /proc/PID/stat) and have this directory as its CLAUDE_CONFIG_DIR.
    """
    found = []
    for file in claude_config.glob("sessions/*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(file.read_bytes())
            if _is_same(int(entry["pid"]), str(entry["procStart"]), claude_config):
                found.append(LiveCli(int(entry["pid"]), str(entry["sessionId"])))
    return found


def end_orphans(claude_config: Path) -> int:
    """End every CLI that an earlier run left behind, and whatever it has started; return how many CLIs there were.

    Blocks for some seconds at worst. Only for whoever holds the database's lock: then no other sidecar has this home.
    """
    orphans = live_clis(claude_config)
    for orphan in orphans:
        logger.warning("ending the CLI %d that an earlier run left on session %s", orphan.pid, orphan.session_id)
    left = _signal(orphans, signal.SIGTERM, claude_config)
    Descendants(HOME_VARIABLE, home_mark(claude_config)).kill()
    _signal(left, signal.SIGKILL, claude_config)  # what a version without the mark has started
    # A CLI that was killed while it started leaves its lock on the config, and every other waits for it in vain.
    if not live_clis(claude_config):
        shutil.rmtree(claude_config / ".claude.json.lock", ignore_errors=True)
    return len(orphans)


def _signal(orphans: list[LiveCli], number: signal.Signals, claude_config: Path) -> list[LiveCli]:
    """Send a signal, and wait a while for the end; those that still run."""
    left = [orphan for orphan in orphans if orphan in live_clis(claude_config)]
    for orphan in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(orphan.pid, number)
    deadline = time.monotonic() + TERMINATE_SECONDS
    while left and time.monotonic() < deadline:
        time.sleep(0.01)
        left = [orphan for orphan in left if orphan in live_clis(claude_config)]
    return left


def _is_same(pid: int, started: str, claude_config: Path) -> bool:
    mine = b"CLAUDE_CONFIG_DIR=" + os.fsencode(claude_config)
    environ = Path(f"/proc/{pid}/environ").read_bytes()
    return stat_fields(pid)[22] == started and mine in environ.split(b"\0")
