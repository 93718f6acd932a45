"""The SDK options that everybody who uses the SDK directly gets here: the sidecar's own default agent's."""

from pathlib import Path
from typing import Any

from claude_agent_sdk import ClaudeAgentOptions

from bench.servers import credentials
from session_sidecar.agent.agents import safe_options


def options(config: Path, cwd: Path, model: str, **more: Any) -> ClaudeAgentOptions:
    """Options for one process whose transcripts lie below `config`."""
    cwd.mkdir(parents=True, exist_ok=True)
    return safe_options(cwd=cwd, env={**credentials(model), "CLAUDE_CONFIG_DIR": str(config)}, **more)
