"""What commands print: for a person on a terminal, or one JSON object a line in a pipe."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from session_sidecar.cli.client.http import Json, dumps

NOTE_CHARS = 200
# Escape sequences in somebody's text could move the cursor, or worse.
_UNSAFE = {code: "\ufffd" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\n\t"}


def write(text: str) -> None:
    """Put text on stdout at once: verbatim in a pipe, without control characters on a terminal."""
    shown = text.translate(_UNSAFE) if sys.stdout.isatty() else text
    # A lone surrogate is no UTF-8; inside JSON its backslash form is the same string.
    click.echo(shown.encode(errors="backslashreplace"), nl=False)


def note(text: str) -> None:
    """Say something beside the answer: one dim, short line on stderr."""
    line = " ".join(_safe(text).split())
    click.secho(line if len(line) <= NOTE_CHARS else line[:NOTE_CHARS] + "…", dim=True, err=True)


@contextlib.contextmanager
def working() -> Iterator[Callable[[str], None]]:
    """A line on a person's terminal that says how far something is, as it is told, until the block ends."""
    console = Console(stderr=True)
    if not (sys.stdout.isatty() and console.is_terminal):
        yield lambda _: None
        return
    with console.status("") as status:
        yield lambda text: status.update(Text(_safe(text)))


def many(items: Iterable[Json], columns: dict[str, Callable[[Json], Any]]) -> None:
    """A table with these columns, or a JSON object for each item as it arrives."""
    if not sys.stdout.isatty():
        for item in items:
            write(dumps(item) + "\n")
        return
    Console().print(_table([[cell(item) for cell in columns.values()] for item in items], *columns))


def one(item: Json) -> None:
    """One object: its members as rows, those of objects within it too."""
    if not sys.stdout.isatty():
        write(dumps(item) + "\n")
        return
    Console().print(_table(_rows(item)))


def tree(family: Json, here: str) -> None:
    """A family of forks drawn with lines, the thread asked for in bold."""
    if not sys.stdout.isatty():
        write(dumps(family) + "\n")
        return
    Console().print(_branch(family["root"], here))


def when(item: Json, name: str) -> str:
    """A time of the API as this machine's local time."""
    value = item.get(name)
    return datetime.fromisoformat(value).astimezone().strftime("%Y-%m-%d %H:%M:%S") if value else ""


def said(message: Json) -> str:
    """What a message of the API says, tools named in brackets."""
    content = message["message"]["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "\n".join(block["text"] if block["type"] == "text" else f"[{tool(block)}]" for block in blocks)


def tool(block: Json) -> str:
    """A content block that is not text, in short: a tool by its name and input."""
    return f"{block['name']} {dumps(block['input'])}" if block["type"] == "tool_use" else str(block["type"])


def _rows(item: Json, prefix: str = "") -> list[list[Any]]:
    rows: list[list[Any]] = []
    for name, value in item.items():
        rows += _rows(value, f"{prefix}{name}.") if isinstance(value, dict) else [[prefix + name, value]]
    return rows


def _table(rows: Sequence[Sequence[Any]], *names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=bool(names))
    for name in names or ("name", "value"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_safe("" if cell is None else str(cell))) for cell in row))
    return table


def _branch(node: Json, here: str) -> Tree:
    point = (node["branch_point"] or {}).get("preview")
    more = [node["title"], point and f"after “{point}”", node["status"] if node["status"] != "idle" else None]
    name = Text(_safe(node["thread_id"]), "bold" if node["thread_id"] == here else "")
    name.append("".join(f"  {' '.join(_safe(text).split())}" for text in more if text), "not bold dim")
    drawn = Tree(name)
    drawn.children.extend(_branch(child, here) for child in node["children"])
    return drawn


def _safe(text: str) -> str:
    return text.translate(_UNSAFE)
