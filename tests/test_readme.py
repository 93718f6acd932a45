"""The README is true: every setting, call and field that it names is there, and none is missing."""

import re
from pathlib import Path

from sidecar.api.routes import ROUTES
from sidecar.settings import Settings

README = (Path(__file__).parent.parent / "README.md").read_text()


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
    served = {(method, route.path) for route in ROUTES for method in route.methods or () if method != "HEAD"}
    assert named == served


def test_every_test_that_a_promise_names_is_there() -> None:
    table = README.partition("## What it promises")[2].partition("## What it does not do")[0]
    tests = Path(__file__).parent
    file = ""
    for name in re.findall(r"`((?:test_\w+\.py|…)(?:::\w+)?)`", table):
        named, _, test = name.partition("::")
        file = file if named == "…" else named
        assert f"def {test}(" in (tests / file).read_text() if test else (tests / file).exists(), name
