"""ag-ui-claude-sdk behind its own FastAPI endpoint, with a way to end a thread's process."""

import os
from pathlib import Path

from ag_ui_claude_sdk import ClaudeAgentAdapter, add_claude_fastapi_endpoint
from fastapi import FastAPI

from bench.options import options

_HOME = Path(os.environ["BENCH_HOME"])
_adapter = ClaudeAgentAdapter("bench", options(_HOME / "claude", _HOME / "workspace", os.environ["BENCH_MODEL"]))
app = FastAPI()
add_claude_fastapi_endpoint(app, _adapter, "/chat")


@app.post("/forget")  # type: ignore[untyped-decorator]
async def forget(thread_id: str) -> None:
    """End a thread's process."""
    await _adapter.clear_session(thread_id)
