"""A stand-in for `POST /v1/messages` that answers from what it was sent.

It remembers nothing. "You have said 2 things. First: …; last: …" therefore shows what the CLI had in its history,
and so whether a resume, a fork or a restart did what it should.

A prompt may ask for more: `[[slow 20]]` is answered for twenty seconds (`[[slow]]`: for thirty), `[[think]]` after some
thinking, `[[tool]]` after the use of a tool, where the agent has Bash or Glob.
"""

import base64
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Block = tuple[Json, Sequence[Json]]  # a content block as it starts, and the deltas that fill it

SLOW_SECONDS = 30.0
PAUSE_SECONDS = 0.25  # between two words of a slow answer
_WISH = re.compile(r"\[\[(slow|think|tool)(?: (\d{1,4}(?:\.\d+)?))?\]\]")
_THOUGHT = "The person has asked me to think, so I look at what was said before and count it."
_CALLS: Mapping[str, Json] = {  # the first of them that the agent has
    "Bash": {"command": "echo Hello from the tool", "description": "Say hello"},
    "Glob": {"pattern": "*"},
}

QUOTED = 80  # longer prompts are quoted shortened to this many characters

# What the CLI writes into user messages beside the person's words, each as a text block of its own.
_BOOKKEEPING = re.compile(
    r"\s*(<(system-reminder|command-|local-command-).*>|\[(Request interrupted by user|Image: source: )[^\]]*\])\s*",
    re.DOTALL,
)


def prompts(messages: Iterable[Json]) -> list[str]:
    """The person's own prompts: no system turns, tool results, reminders or interrupt markers."""
    return [prompt for message in messages if message["role"] == "user" for prompt in _prompts(message["content"])]


def _prompts(content: str | list[Json]) -> list[str]:
    """Those of one user message: the CLI makes one of several that got no answer, with a line feed after each."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    said: list[list[str]] = [[]]
    for block in blocks:
        text = block["text"] if block["type"] == "text" else f"[{block['type']}]"
        if block["type"] != "tool_result" and not _BOOKKEEPING.fullmatch(text):
            said[-1].append(text)
            if text.endswith("\n") and block is not blocks[-1]:
                said[-1][-1] = text[:-1]
                said.append([])
    return [" ".join(parts) for parts in said if parts]


def sentence(said: Sequence[str]) -> str:
    """The one thing this model knows to say."""
    quoted = [prompt if len(prompt) <= QUOTED else prompt[: QUOTED - 1] + "…" for prompt in said]
    if len(quoted) < 2:
        return f"You have said 1 thing: {quoted[0]}" if quoted else "You have said nothing yet."
    return f"You have said {len(quoted)} things. First: {quoted[0]}; last: {quoted[-1]}"


def text_block(text: str) -> Block:
    """A text block that arrives word by word."""
    deltas = [{"type": "text_delta", "text": word} for word in _words(text)]
    return {"type": "text", "text": "", "citations": None}, deltas


def _words(text: str) -> list[str]:
    found: list[str] = re.findall(r"\s*\S+\s*", text)
    return found


def thinking_block(thinking: str) -> Block:
    """A thinking block that arrives word by word, with a signature as the API's have."""
    deltas = [{"type": "thinking_delta", "thinking": word, "estimated_tokens": None} for word in _words(thinking)]
    signature = {"type": "signature_delta", "signature": base64.b64encode(thinking.encode()).decode()}
    return {"type": "thinking", "thinking": "", "signature": ""}, [*deltas, signature]


def tool_block(name: str, arguments: Json) -> Block:
    """A call of a tool."""
    start = {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex[:24]}", "name": name, "input": {}}
    return start, [{"type": "input_json_delta", "partial_json": json.dumps(arguments)}]


def whole(block: Block) -> Json:
    """A block as it is when all of its deltas have come."""
    start, deltas = block
    content = dict(start)
    for delta in deltas:
        for name in ("text", "thinking", "signature"):
            content |= {name: content[name] + delta[name]} if name in delta else {}
        content |= {"input": json.loads(delta["partial_json"])} if "partial_json" in delta else {}
    return content


@dataclass(frozen=True)
class Reply:
    """What is said to a request, and how slowly: seconds before each delta."""

    blocks: Sequence[Block]
    stop_reason: str = "end_turn"
    pause: float = 0


def answer(body: Json) -> Reply:
    """What this model says: its one sentence, and what the prompt asks for beside it."""
    said = prompts(body["messages"])
    text = sentence(said)
    # What is asked for is done once: when the tool's result has come, only the sentence is left to say.
    last = prompts([message for message in body["messages"] if message["role"] == "user"][-1:])
    wishes = {wish[1]: wish[2] for wish in _WISH.finditer(last[-1])} if last else {}
    before = [thinking_block(_THOUGHT)] if "think" in wishes else []
    if "tool" in wishes:
        there = {tool.get("name") for tool in body.get("tools", ())}
        if (name := next((name for name in _CALLS if name in there), None)) is not None:
            return Reply([*before, tool_block(name, _CALLS[name])], "tool_use")
        text += ". This agent has neither Bash nor Glob: see examples/agents.toml"
    if "slow" in wishes:
        seconds = float(wishes["slow"] or SLOW_SECONDS)
        counted = range(1, max(1, round(seconds / PAUSE_SECONDS) - len(text.split())) + 1)
        slowly = f"{text}. I count: {' '.join(map(str, counted))}"
        return Reply([*before, text_block(slowly)], pause=PAUSE_SECONDS)
    return Reply([*before, text_block(text)])


def count_tokens(body: Json) -> int:
    """A word is a token here."""
    return sum(len(prompt.split()) for message in body["messages"] for prompt in _prompts(message["content"]))
