"""A model that can be told to fail, and sidecars that talk to it."""

import itertools
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.faults import FaultyModel
from tests.modes import COLD, WARM
from tests.server import Sidecar

pytest_plugins = ("tests.browser", "tests.postgres", "tests.replicas")
_names = itertools.count(1)


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of what runs agents `make test` has the time for smoke tests: each start of a CLI is most of a second's CPU."""
    for item in items:
        if "_model" in getattr(item, "fixturenames", ()) and item.get_closest_marker("smoke") is None:
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
async def _model() -> AsyncIterator[FaultyModel]:
    async with FaultyModel() as model:
        yield model


@pytest.fixture
async def model(_model: FaultyModel) -> AsyncIterator[FaultyModel]:
    """The model behind every sidecar of the tests."""
    _model.reset()
    yield _model
    _model.reset()


@pytest.fixture(scope="session")
def model_env(_model: FaultyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment that leads a CLI to the model."""
    return {
        "ANTHROPIC_BASE_URL": _model.url,
        "ANTHROPIC_API_KEY": "test",
        "CLAUDE_CODE_MAX_RETRIES": "1",
        # Bash as a tool reads the start-up files of whoever runs the tests; killed in one of them, it may leave a lock.
        "HOME": str(tmp_path_factory.mktemp("person")),
    }


@pytest.fixture(scope="session")
async def _sidecar(model_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sidecar]:
    async with Sidecar(tmp_path_factory.mktemp("shared") / "home", model_env | WARM, forked=False) as sidecar:
        yield sidecar


@pytest.fixture(scope="session")
async def _cold(model_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sidecar]:
    async with Sidecar(tmp_path_factory.mktemp("cold") / "home", model_env | COLD) as sidecar:
        yield sidecar


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> str | None:
    """`warm` or `cold` for a test that is run in both modes; see tests/modes.py."""
    mode: str | None = getattr(request, "param", None)
    return mode


@pytest.fixture
def sidecar(_sidecar: Sidecar, _cold: Sidecar, mode: str | None, model: FaultyModel) -> Sidecar:
    """A running sidecar that tests share, with threads of their own. It keeps processes ready, as for users."""
    return _cold if mode == "cold" else _sidecar


@pytest.fixture
def cold(_cold: Sidecar, model: FaultyModel) -> Sidecar:
    """Another one, with a process for each turn, so that a test sees it go."""
    return _cold


@pytest.fixture
def thread() -> str:
    """A thread that no other test uses."""
    return f"thread-{next(_names)}"


@pytest.fixture
def another_thread() -> str:
    """A second one."""
    return f"thread-{next(_names)}"


@pytest.fixture
def forked(request: pytest.FixtureRequest) -> bool:
    """Whether `a_sidecar` is spared its imports. It is the installed program where a test measures it."""
    return request.node.get_closest_marker("quiet") is None


@pytest.fixture
def a_sidecar(
    model: FaultyModel, model_env: dict[str, str], mode: str | None, forked: bool, tmp_path: Path
) -> Callable[..., Sidecar]:
    """Make a sidecar of one's own: for stopping, killing and other settings. Use it as a context.

    It takes a process for each turn, unless the test is run in both modes or its settings say otherwise.
    """
    kept = WARM if mode == "warm" else COLD

    def make(*options: str, **env: str) -> Sidecar:
        return Sidecar(tmp_path / "home", {**model_env, **kept, **env}, *options, forked=forked)

    return make


@pytest.fixture(scope="session")
async def original(_sidecar: Sidecar, _model: FaultyModel) -> str:
    """A thread with two completed turns, for all to read and to copy."""
    _model.reset()
    await _sidecar.say("the original", "My name is Ada")
    await _sidecar.say("the original", "I like tea")
    await _sidecar.at_rest()
    return "the original"


@pytest.fixture
async def known(sidecar: Sidecar, mode: str | None, thread: str, _cold: Sidecar, _model: FaultyModel) -> str:
    """A thread whose first turn has completed: it said "My name is Ada".

    Where each turn has a process of its own, that one is spared: the transcript is a copy.
    """
    if mode != "cold":
        await sidecar.say(thread, "My name is Ada")
    else:
        if (await _cold.session("one to copy")).status_code == 404:
            await _cold.say("one to copy", "My name is Ada")
        copied = await _cold.post("/v1/chat/fork", thread, from_thread_id="one to copy")
        assert copied.status_code == 201, copied.text
    _model.requests.clear()
    return thread


@pytest.fixture(scope="session")
async def _home(model_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    async with Sidecar(tmp_path_factory.mktemp("stopped") / "home", model_env | COLD) as sidecar:
        for thread in ("t1", "t2"):
            await sidecar.say(thread, "My name is Ada")
    return sidecar.home


@pytest.fixture
def home(_home: Path, tmp_path: Path) -> Path:
    """The home of a sidecar that has two threads and no keys, and was stopped."""
    return shutil.copytree(_home, tmp_path / "home")
