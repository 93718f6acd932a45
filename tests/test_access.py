"""Who is admitted at all, by where they come in and what they call us."""

import pytest
from starlette.types import Scope

from session_sidecar.api.access.admission import Access
from session_sidecar.errors import ForbiddenHost, ForbiddenOrigin
from session_sidecar.settings import Settings

HERE = ("127.0.0.1", 8000)
admit = Access(Settings.load({})).admit


def scope(
    server: tuple[str, int | None] | None, host: str = "localhost:8000", path: str = "/v1/chat", **headers: str
) -> Scope:
    named = {"host": host, **headers}
    return {
        "type": "http",
        "path": path,
        "server": server,
        "headers": [(n.encode(), v.encode()) for n, v in named.items()],
    }


@pytest.mark.parametrize(
    "server", [HERE, ("127.8.9.1", 8000), ("::1", 8000), ("/run/sidecar.sock", None), None], ids=str
)
def test_whoever_is_on_this_machine_is_admitted(server: tuple[str, int | None] | None) -> None:
    admit(scope(server))


@pytest.mark.parametrize("address", ["10.0.0.5", "0.0.0.0", "fe80::1", "example.org"])
def test_nobody_else_is_however_the_server_was_started(address: str) -> None:
    with pytest.raises(ForbiddenHost, match="loopback only"):
        admit(scope((address, 8000)))


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "", "[", "0.0.0.0:8000"])
def test_another_name_for_us_is_refused(host: str) -> None:
    with pytest.raises(ForbiddenHost, match="Host header"):
        admit(scope(HERE, host))


def test_a_probe_may_name_the_machine_as_it_likes() -> None:
    for path in ("/healthz", "/readyz"):
        admit(scope(HERE, "10.1.2.3:8000", path))


def test_a_page_of_another_origin_is_refused() -> None:
    admit(scope(HERE, origin="http://localhost:3000"))
    with pytest.raises(ForbiddenOrigin):
        admit(scope(HERE, origin="https://example.org"))


def test_the_page_of_a_name_of_ours_is_of_our_own_origin() -> None:
    ours = Access(Settings.load({"SIDECAR_HOSTS": "chat.test"})).admit
    ours(scope(HERE, "chat.test", origin="https://chat.test"))
    for origin in ("https://chat.test:8000", "https://evil.test", "https://chat.test.evil.test", "null", "chat.test"):
        with pytest.raises(ForbiddenOrigin):
            ours(scope(HERE, "chat.test", origin=origin))
