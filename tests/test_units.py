"""What is handed to systemd is understood by it, and gives the sidecar the time that it takes."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from session_sidecar.settings import Settings
from tests.forked import PROGRAM

UNIT = Path(__file__).parent.parent / "examples" / "systemd" / "session-sidecar.service"


def test_systemd_takes_the_unit_as_it_stands(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        assert "CI" not in os.environ, "install systemd"
        pytest.skip("LEFT OUT for want of systemd-analyze: install systemd")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/session-sidecar/bin/session-sidecar", str(PROGRAM)))
    done = subprocess.run(["systemd-analyze", "verify", unit], check=False, capture_output=True, text=True)
    # A name or a value that it does not know is a warning to it, and no failure.
    assert [line for line in done.stderr.splitlines() if UNIT.name in line] == []
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("systemd/session-sidecar.service", r"^TimeoutStopSec=(\d+)$"),
        ("docker/compose.yaml", r"stop_grace_period: (\d+)s"),
        ("replicas/compose.yaml", r"stop_grace_period: (\d+)s"),
    ],
)
def test_a_stop_is_given_the_time_for_streams_and_for_processes(file: str, pattern: str) -> None:
    found = re.search(pattern, (UNIT.parent.parent / file).read_text(), re.MULTILINE)
    plain = Settings.load({})
    assert found is not None
    assert int(found[1]) > plain.shutdown_seconds + plain.interrupt_seconds + 10
