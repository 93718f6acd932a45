"""Node, where it is: for clients that are written for it."""

import os
import shutil
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parent / "clients"
HAS_NODE = shutil.which("node") is not None and (CLIENTS / "node_modules").exists()
INSTALL = "install node, then `npm ci --omit=optional --prefix tests/clients`"


def need_node() -> None:
    """Leave a test out, and say so, where there is no node; where CI is set it fails."""
    if not HAS_NODE:
        assert "CI" not in os.environ, INSTALL
        pytest.skip(f"LEFT OUT for want of node or its packages: {INSTALL}")
