"""The README is true: every setting, call and field that it names is there, and none is missing."""

import json
import re
from pathlib import Path

import pytest

from bench import speed
from bench.bar import bars
from bench.names import KEPT, PEOPLE, SIZES
from bench.samples import Samples
from session_sidecar.api.routes import CALLS
from session_sidecar.settings import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCH = (ROOT / "bench" / "README.md").read_text()


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `SIDECAR_(\w+)` \| (\S*) ?\|", README, re.M))
    plain = {name.upper(): field.default for name, field in Settings.model_fields.items()}
    assert rows.keys() == plain.keys()
    for name, default in plain.items():
        assert rows[name].strip("`") == ("" if default is None else str(default)), name


def test_every_call_stands_in_the_readme_and_every_one_of_them_is_there() -> None:
    table = README.partition("## Calls")[2].partition("\n\nThe options")[0]
    named = set()
    for row in re.findall(r"^\| (`.*?) \|", table, re.M):
        for cell in re.findall(r"`([^`]+)`", row):
            words = cell.split()
            method, path = words if len(words) == 2 else ("GET", words[0])
            named.add((method, path.partition("?")[0]))
    served = {(call.method, call.path) for call in CALLS}
    assert named == served


PROMISES = README.partition("## What it promises")[2].partition("## What it does not do")[0]


@pytest.mark.parametrize("table", [PROMISES, (ROOT / "docs" / "security.md").read_text()], ids=["README", "security"])
def test_every_test_that_a_promise_names_is_there(table: str) -> None:
    tests = Path(__file__).parent
    file = ""
    assert "::test_" in table
    for name in re.findall(r"`((?:test_\w+\.py|…)(?:::\w+)?)`", table):
        named, _, test = name.partition("::")
        file = file if named == "…" else named
        assert f"def {test}(" in (tests / file).read_text() if test else (tests / file).exists(), name


def test_every_figure_is_of_the_run_that_is_kept() -> None:
    kept = Samples()
    kept.all.update(json.loads((ROOT / "bench/results.json").read_text())["samples"])
    section = README.partition("## Speed")[2].partition("## What it promises")[0]
    parts = [*(f"follow-up at {size}" for size in SIZES), "new"]
    rows = re.findall(r"^\| ([^|]+) \|" + r" (\d*) ?\|" * len(parts) + "$", section, re.M)
    assert len(rows) == 6
    for who, *told in rows:
        for part, figure in zip(parts, told, strict=True):
            if figure:
                assert figure == f"{kept.median(part, who.strip('`'), 'first delta, ms'):.0f}", (who, part)
    told_of = re.findall(r"^\| (.+) \| (.+) \| `(\w+)` \|$", section, re.M)
    assert told_of == list(speed.rows(kept))
    rows = [bar.told for bar in bars(kept)]
    assert rows == [tuple(row) for row in re.findall(r"^\| (\S[^|]+) " + r"\| ([^|]+) " * 3 + r"\|$", BENCH, re.M)]


def test_every_share_of_warm_turns_is_of_the_simulation_that_is_kept() -> None:
    kept = Samples()
    kept.all.update(json.loads((ROOT / "bench/results.json").read_text())["samples"])
    rows = re.findall(r"^\| ([\d,]+) " + r"\| (\d+) " * len(KEPT) + r"\|$", BENCH, re.M)
    assert [row[0] for row in rows] == [f"{people:,}" for people in PEOPLE]
    for people, *told in rows:
        assert told == [f"{kept.median(f'{people} people', f'{many} kept', 'warm, %'):.0f}" for many in KEPT]


def test_the_recipes_for_reconnecting_are_the_programs_that_are_tested() -> None:
    page = (ROOT / "docs" / "reconnecting.md").read_text()
    recipes = list((ROOT / "examples" / "reconnecting").iterdir())
    assert len(recipes) == 4
    for recipe in recipes:
        assert recipe.read_text() in page, recipe.name
