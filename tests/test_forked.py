"""The sidecars that most tests meet are forked: they are what the installed program is, once it is started."""

import re
import signal
from pathlib import Path

import pytest

from tests.forked import can_be_forked
from tests.modes import COLD
from tests.server import Sidecar


def traits(sidecar: Sidecar) -> dict[str, object]:
    """What a process has from its start: what is open, signals, directory, group."""
    process = Path(f"/proc/{sidecar.process.pid}")
    status = dict(re.findall(r"^(\w+):\t(.*)$", (process / "status").read_text(), re.MULTILINE))
    links = [str(entry.readlink()) for entry in (process / "fd").iterdir() if entry.is_symlink()]
    return {
        "open": sorted(re.sub(r"\[\d+\]", "", link.replace(str(sidecar.home), "HOME")) for link in links),
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "SigCgt")],
        "cwd": (process / "cwd").readlink(),
        "umask": status["Umask"],
        "limits": (process / "limits").read_text(),
        "group": (process / "stat").read_text().rpartition(")")[2].split()[2:4],
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_one_that_was_forked_is_like_one_that_was_started(
    model_env: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    found = []
    for forked in (True, False):
        async with Sidecar(tmp_path / f"{forked}", model_env | COLD, forked=forked) as sidecar:
            assert (await sidecar.http.get("/readyz")).status_code == 200
            found.append((traits(sidecar), await sidecar.stop(number)))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["PYTHONPATH", "PYTHONHASHSEED", "LC_ALL"])
def test_what_the_interpreter_reads_before_it_runs_is_given_to_none_that_is_forked(name: str) -> None:
    assert can_be_forked({"SIDECAR_PORT": "1"})
    assert not can_be_forked({name: "0"})
