"""Transcripts as the CLI writes them, made up at random: tools in parallel, compactions, subagents, notes, rewinds."""

import json
import random
import uuid
from typing import Any


def conversation(seed: int, turns: int = 8) -> list[bytes]:
    """The lines of a transcript; the same ones for the same seed."""
    return _Writer(random.Random(seed)).lines(turns)


def damaged(lines: list[bytes], seed: int, share: float = 0.08) -> list[bytes]:
    """The same with some lines torn, lost or made into something else."""
    dice = random.Random(seed)
    found = []
    for line in lines:
        if dice.random() > share:
            found.append(line)
        elif dice.random() < 0.7:
            found.append(dice.choice([line[: len(line) // 2] + b"\n", b"\x00" * 9 + b"\n", b"[]\n", b'{"uuid": 5}\n']))
    return found


class _Writer:
    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._session = self._id()
        self._last: str | None = None
        self._ends: list[str] = []  # of turns
        self._seconds = 0
        self._lines: list[bytes] = []

    def lines(self, turns: int) -> list[bytes]:
        self._note("queue-operation", operation="enqueue")
        for _ in range(turns):
            self._dice.choices((self._turn, self._compact, self._rewind, self._aside), (12, 2, 1, 2))[0]()
        return self._lines

    def _turn(self) -> None:
        self._say("user", f"prompt {self._seconds}", promptId=self._id(), slug="a-name")
        for kind in self._dice.sample(("environment", "date", "model"), self._dice.randrange(3)):
            self._link("attachment", attachment={"type": kind})
        for _ in range(self._dice.randrange(4)):
            self._call_tools()
        match self._dice.randrange(8):
            case 0:
                return  # killed
            case 1:
                self._say("user", "[Request interrupted by user]")
            case 2:
                self._say("user", "Caveat: a command", isMeta=True)
            case _:
                self._reply(
                    [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "answer \u2028\U0001f600"}]
                )
        self._note("last-prompt", lastPrompt="so", leafUuid=self._last)
        assert self._last is not None
        self._ends.append(self._last)

    def _call_tools(self) -> None:
        calls = [
            {"type": "tool_use", "id": f"toolu_{self._id()}", "name": "Bash"} for _ in range(self._dice.randint(1, 3))
        ]
        entries = self._reply(calls)
        answered = list(zip(calls, entries, strict=True))
        self._dice.shuffle(answered)
        for call, entry in answered:
            if self._dice.random() < 0.3:
                self._link("progress", parent=entry, data={"type": "hook"})
            result = [{"type": "tool_result", "tool_use_id": call["id"], "content": "done"}]
            source = {"sourceToolAssistantUUID": entry} if self._dice.random() < 0.8 else {}
            self._say("user", result, parent=entry, toolUseResult={"uuid": self._id()}, **source)

    def _compact(self) -> None:
        self._link("system", parent=None, subtype="compact_boundary", logicalParentUuid=self._last)
        self._say("user", "This session is being continued", isCompactSummary=True)
        self._note("content-replacement", replacements=[{"kind": "x", "n": self._seconds}])

    def _rewind(self) -> None:
        if self._ends:
            self._last = self._dice.choice(self._ends)

    def _aside(self) -> None:
        main, self._last = self._last, None
        for _ in range(self._dice.randint(1, 3)):
            self._say("user", "to a subagent", isSidechain=True, agentId="a1")
            self._reply([{"type": "text", "text": "from a subagent"}], isSidechain=True, agentId="a1")
        self._last = main

    def _reply(self, blocks: list[dict[str, Any]], **fields: Any) -> list[str]:
        reply = f"msg_{self._id()}"
        usage = {"input_tokens": 3, "output_tokens": self._seconds}
        return [
            self._link(
                "assistant", message={"id": reply, "role": "assistant", "content": [b], "usage": usage}, **fields
            )
            for b in blocks
        ]

    def _say(self, role: str, content: Any, **fields: Any) -> str:
        return self._link(role, message={"role": role, "content": content}, **fields)

    def _link(self, kind: str, *, parent: str | None = "", **fields: Any) -> str:
        name = self._id()
        parent = self._last if parent == "" else parent
        self._write({"parentUuid": parent, "isSidechain": False, "type": kind, "uuid": name, **fields})
        self._last = name
        return name

    def _note(self, kind: str, **fields: Any) -> None:
        self._write({"type": kind, **fields})

    def _write(self, entry: dict[str, Any]) -> None:
        self._seconds += self._dice.randrange(2)
        time = f"2026-01-01T{self._seconds // 3600:02}:{self._seconds // 60 % 60:02}:{self._seconds % 60:02}.000Z"
        whole = {**entry, "timestamp": time, "sessionId": self._session, "version": "2"}
        self._lines.append(json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")

    def _id(self) -> str:
        return str(uuid.UUID(int=self._dice.getrandbits(128), version=4))
