"""Titles and tags: notes in a session's transcript, as the SDK writes them."""

from claude_agent_sdk import (
    InMemorySessionStore,
    SessionKey,
    project_key_for_directory,
    rename_session_via_store,
    tag_session_via_store,
)

from session_sidecar.agent.transcripts.lines import written


async def lines_of(session_id: str, changes: dict[str, str | None]) -> bytes:
    """What the SDK would append to a transcript for a `title` or a `tag`. Raises ValueError as its functions do.

    Those that append themselves look for the file by this process's CLAUDE_CONFIG_DIR, which an application around this
    one may have for itself.
    """
    notes = InMemorySessionStore()
    if "tag" in changes:
        await tag_session_via_store(notes, session_id, changes["tag"])
    if (title := changes.get("title")) is not None:
        await rename_session_via_store(notes, session_id, title)
    entries = notes.get_entries(SessionKey(project_key=project_key_for_directory(), session_id=session_id))
    return b"".join(written(dict(entry)) for entry in entries)
