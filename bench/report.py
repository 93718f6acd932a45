"""What a run has shown: tables for the terminal, a file with every figure, a picture."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from claude_agent_sdk._cli_version import __cli_version__
from rich.console import Console
from rich.table import Table

from bench.bar import bars
from bench.names import AT_ONCE, CONNECTED, SIZES
from bench.samples import Samples

LIBRARIES = ("claude-agent-sdk", "starlette", "uvicorn", "uvloop", "httptools", "ag-ui-claude-sdk", "openai-agents")


def conditions() -> dict[str, Any]:
    """Where a run took place: what a figure depends on."""
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "load before": round(os.getloadavg()[0], 2),
        "Python": platform.python_version(),
        "CLI": __cli_version__,
        **{name: version(name) for name in LIBRARIES},
        "model": "the offline stand-in in a process of its own; it answers at once",
        "figures": "medians with quartiles; contenders take turns within each round",
    }


def tell(samples: Samples, run: Mapping[str, Any]) -> None:
    """The tables, on the terminal."""
    console = Console()
    console.print(", ".join(f"{name}: {value}" for name, value in run.items()), soft_wrap=True)
    parts: dict[str, dict[str, None]] = {}
    whats: dict[str, dict[str, None]] = {}
    for name in samples.all:
        part, who, what = name.split(" | ")
        parts.setdefault(part, {})[who] = None
        whats.setdefault(part, {})[what] = None
    for part, everyone in parts.items():
        table = Table(part, *whats[part], title_justify="left")
        for who in everyone:
            table.add_row(who, *(samples.told(part, who, what) for what in whats[part]))
        console.print(table)
    table = Table("the bar", "limit", "measured", "")
    for bar in bars(samples):
        table.add_row(*bar.told)
    console.print(table)


def keep(samples: Samples, run: Mapping[str, Any], path: Path, *, alone: Sequence[str] = ()) -> None:
    """Every figure, in a file, beside those of other parts that it has; `alone` are the parts that were measured so."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"conditions": {}, "samples": {}}
    measured = {name.partition(" | ")[0] for name in samples.all}
    figures = {name: of for name, of in kept["samples"].items() if name.partition(" | ")[0] not in measured}
    told = {part: dict(run) for part in alone} if alone else run
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in (figures | samples.all).items())
    conditions = json.dumps(kept["conditions"] | told)
    path.write_text(f'{{\n "conditions": {conditions},\n "samples": {{\n{lines}\n }}\n}}\n', encoding="utf-8")


def draw(samples: Samples, path: Path) -> None:
    """The picture: first deltas, and turns a second."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.4), width_ratios=(3, 1.6, 2))
    whos = ["query(resume=…)", "sidecar, cold", "sidecar, warm", "ag-ui-claude-sdk", CONNECTED]
    colours = dict(zip(whos, ("#999999", "#9ecae1", "#08519c", "#fdae6b", "#bdbdbd"), strict=True))
    first = "first delta, ms"
    for index, who in enumerate(whos):
        places = [group + (index - 2) * 0.16 for group in range(len(SIZES))]
        values = [samples.median(f"follow-up at {size}", who, first) for size in SIZES]
        drawn = left.bar(places, values, 0.15, label=who, color=colours[who])
        left.bar_label(drawn, [f"{value:.0f}" for value in values], fontsize=7)
    left.set_xticks(range(len(SIZES)), [f"{size:,} messages" for size in SIZES])
    left.set_title("follow-up turn: ms to the first delta")
    left.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    new = ["query(resume=…)", "sidecar, cold", "sidecar, spare", CONNECTED]
    values = [samples.median("new", who, first) for who in new]
    labels = ["query()", "sidecar,\ncold", "sidecar,\nspare", "client,\nconnected"]
    drawn = middle.bar(labels, values, color=["#999999", "#9ecae1", "#3182bd", "#bdbdbd"])
    middle.bar_label(drawn, [f"{value:.0f}" for value in values], fontsize=7)
    middle.tick_params("x", labelsize=7)
    middle.set_title("new thread: ms to the first delta")
    for who in (CONNECTED, "sidecar, warm", "sidecar, cold", "query(resume=…)"):
        rates = [samples.median(f"{n} at once", who, "turns a second") for n in AT_ONCE]
        right.plot(AT_ONCE, rates, "o-", label=who, color=colours[who])
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(AT_ONCE, [str(n) for n in AT_ONCE])
    right.set_xlabel("threads at once")
    right.set_title("turns a second")
    right.set_ylim(1, 100)
    right.set_yticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    right.minorticks_off()
    right.legend(fontsize=8, loc="center right", frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
