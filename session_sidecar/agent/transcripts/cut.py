"""Where a branch leaves a conversation: never between a tool call and its result, never in the middle of a reply."""

from session_sidecar.agent.transcripts.reading.chain import TranscriptMessage
from session_sidecar.errors import MessageNotFound, UnsafeForkPoint


def cut(messages: list[TranscriptMessage], at: str | None) -> str:
    """The UUID of the last message of a branch at `at`, or at the end. Raises MessageNotFound, UnsafeForkPoint."""
    if not messages:
        raise UnsafeForkPoint("This session has no completed turn yet. Fork it when its first one has ended.")
    index = len(messages) - 1
    if at is not None:
        found = next((i for i, message in enumerate(messages) if message.uuid == at), None)
        if found is None:
            raise MessageNotFound(
                "`at_message_id` must be the uuid of a message of a completed answer in this session."
            )
        index, reply = found, messages[found].reply
        if _is_prompt(messages[index]):
            raise UnsafeForkPoint("This message is a prompt. Name a message of the answer before it, or after it.")
        if reply is not None and messages[index].type == "assistant":
            index = max(i for i, m in enumerate(messages) if m.type == "assistant" and m.reply == reply)
    # Since the last prompt: calls before it that a crash cut off were answered by the CLI itself when it went on.
    begin = next((i for i in range(index, -1, -1) if _is_prompt(messages[i])), 0)
    turn = messages[begin : index + 1]
    if {call for m in turn for call in m.calls} - {result for m in turn for result in m.results}:
        end = "the result" if at is not None else "it, or send a message first: the agent then goes on from there"
        where = "after" if at is not None else "before"
        raise UnsafeForkPoint(f"Cut there, a tool call would be without its result. Name a message {where} {end}.")
    return messages[index].uuid


def _is_prompt(message: TranscriptMessage) -> bool:
    return message.type == "user" and not message.results
