"""The house keeps its floors: imports go down, each room knows only what it may, and the wheel holds nothing else."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = "session_sidecar"
# From below: a room imports from its own floor and from those below it. `errors` and `settings` are the ground.
FLOORS = (
    {"session_store"},
    {f"{HOUSE}.errors", f"{HOUSE}.settings", f"{HOUSE}.cli.client", f"{HOUSE}.offline"},
    {f"{HOUSE}.observe"},
    {f"{HOUSE}.agent"},
    {f"{HOUSE}.replicas.archive"},
    {f"{HOUSE}.replicas"},
    {f"{HOUSE}.turns"},
    {f"{HOUSE}.sessions"},
    {f"{HOUSE}.api.access"},
    {f"{HOUSE}.api"},
    {f"{HOUSE}.server"},
    {f"{HOUSE}.app"},
    {f"{HOUSE}.cli", "app"},
)
SDK, HTTP, DATABASE = (
    "claude_agent_sdk",
    ("starlette", "sse_starlette", "uvicorn"),
    ("aiosqlite", "sqlite3", "psycopg", "psycopg_pool"),
)
STRANGERS = {  # what a room must not know, though it lies no higher
    "session_store": (SDK, *HTTP),
    f"{HOUSE}.cli.client": (SDK, *HTTP, *DATABASE, "session_store"),
    f"{HOUSE}.observe": (SDK, *HTTP, *DATABASE, "session_store"),
    f"{HOUSE}.agent": (*HTTP, *DATABASE),
    f"{HOUSE}.replicas.archive": (SDK, *HTTP, "aiosqlite"),
    **{
        f"{HOUSE}.replicas.archive.{name}": DATABASE
        for name in ("chunks", "sealing", "local", "compare", "sync", "outlines", "rotation")
    },
    f"{HOUSE}.turns": (SDK, *HTTP, *DATABASE),
    f"{HOUSE}.sessions": (SDK, *HTTP, *DATABASE),
    f"{HOUSE}.api": (SDK, *DATABASE, f"{HOUSE}.agent"),
}


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def floor(module: str) -> int | None:
    """The floor of the smallest room that it is in: `api.access` lies below the rest of `api`."""
    rooms = [(len(room), number) for number, rooms in enumerate(FLOORS) for room in rooms if is_in(module, room)]
    return max(rooms)[1] if rooms else None


def imports() -> Iterator[tuple[str, str]]:
    """Which module imports which."""
    for path in (ROOT / "app.py", *ROOT.glob("session_store/**/*.py"), *ROOT.glob(f"{HOUSE}/**/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(), path)):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert not node.level, f"{module}: a relative import"
                yield from ((module, f"{node.module}.{alias.name}") for alias in node.names)


def test_no_import_goes_up() -> None:
    ups = [f"{a} -> {b}" for a, b in imports() if (floor(a) or 0) < (floor(b) or 0)]
    assert not ups


def test_every_room_is_on_a_floor() -> None:
    assert not [a for a, _ in imports() if floor(a) is None and a != HOUSE]


def test_no_room_knows_a_stranger() -> None:
    known = [
        f"{a} -> {b}"
        for a, b in imports()
        for room, strangers in STRANGERS.items()
        if is_in(a, room) and any(is_in(b, stranger) for stranger in strangers)
    ]
    assert not known


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_and_function_that_is_named_to_newcomers_is_there(page: str) -> None:
    named = re.findall(r"`([\w/]+/[\w.]+\.(?:py|js|sql|md))(?::([\w.]+))?`", (ROOT / page).read_text())
    assert len(named) > 20
    for name, symbol in named:
        files = [path for path in (ROOT / name, ROOT / HOUSE / name) if path.is_file()]
        assert len(files) == 1, name
        for part in symbol.split("."):
            assert re.search(rf"(?:def|class) {part}\b", files[0].read_text()) or not part, f"{name}:{symbol}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has who installs the wheel."""
    place = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place, ROOT], check=True)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"


def test_the_wheel_installs_two_packages_and_nothing_else(installed: Path) -> None:
    packages = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"session_store", HOUSE}
    assert (installed / "session_store" / "sqlite" / "schema.sql").exists()
    assert (installed / HOUSE / "api" / "documents" / "docs.html").exists()
    page = installed / HOUSE / "api" / "calls" / "page"
    assert {path.name for path in page.iterdir() if path.is_file()} == {
        "__init__.py",
        "index.html",
        "page.css",
        "page.js",
    }


@pytest.mark.long
def test_somebodys_own_package_called_app_can_define_the_agents(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").touch()
    (tmp_path / "app" / "agents.py").write_text("def f(key, agent): raise AssertionError('not called at start')\n")
    program = f"""
import sys
sys.path[:0] = [{str(installed)!r}, {str(tmp_path)!r}]
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
import asyncio
import app
import session_sidecar
from session_sidecar.app import create_app
from session_sidecar.settings import Settings
assert session_sidecar.__file__.startswith({str(installed)!r})
assert app.__file__.startswith({str(tmp_path)!r})
async def main():
    sidecar = create_app(Settings.load({{}}, home={str(tmp_path / "home")!r}, agents="app.agents:f", model="offline"))
    async with sidecar.router.lifespan_context(sidecar):
        print("started")
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "started\n", done.stderr
