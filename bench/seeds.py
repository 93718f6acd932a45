"""Conversations of a given length: the CLI's own transcripts, copied under new session IDs."""

import uuid
from pathlib import Path

from claude_agent_sdk import ClaudeSDKClient, project_key_for_directory

from bench.options import options


class Seeds:
    """Transcripts to continue from, made once by the real CLI."""

    def __init__(self, config: Path, cwd: Path, model: str) -> None:
        """`config` is the CLI's config directory for making them, `cwd` where it runs."""
        self._config = config
        self._cwd = cwd
        self._model = model
        self._made: dict[int, tuple[str, bytes]] = {}

    async def make(self, messages: int) -> None:
        """Have a conversation of so many messages, two a turn."""
        session_id = str(uuid.uuid4())
        mine = options(self._config, self._cwd, self._model, session_id=session_id)
        async with ClaudeSDKClient(mine) as client:
            for number in range(messages // 2):
                await client.query(f"This is thing number {number}, and I would like to hear what you make of it.")
                async for _ in client.receive_response():
                    pass
        path = _transcripts(self._config, self._cwd) / f"{session_id}.jsonl"
        self._made[messages] = (session_id, path.read_bytes())

    def copy(self, messages: int, config: Path, cwd: Path) -> str:
        """Put a copy below another config directory; its session ID."""
        session_id = str(uuid.uuid4())
        made_as, transcript = self._made[messages]
        directory = _transcripts(config, cwd)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{session_id}.jsonl"
        path.write_bytes(transcript.replace(made_as.encode(), session_id.encode()))
        return session_id


def _transcripts(config: Path, cwd: Path) -> Path:
    return config / "projects" / project_key_for_directory(cwd)
