"""A running sidecar as its callers see it, and what becomes of a call that fails."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import click
import httpx2

Json = dict[str, Any]

MOST_PER_PAGE = 200
# A stream is pinged every few seconds, and every other call is answered at once: longer silence is a dead connection.
SILENCE_SECONDS = 60


class Failed(click.ClickException):
    """The sidecar refused. Told in one line: `error: code: detail (field: message)`."""

    exit_code = 1

    def __init__(self, code: str, detail: object) -> None:
        """`code` is the problem's, or the command line's own for what no sidecar can tell."""
        super().__init__(" ".join(f"{code}: {detail}".split()))

    def show(self, file: Any = None) -> None:
        """Print it to stderr."""
        click.echo(f"error: {self.message}", file, err=True)


class Broken(Failed):
    """The sidecar is not there, or the connection to it broke."""

    exit_code = 3

    def __init__(self, url: str, reason: object) -> None:
        super().__init__("unreachable", f"{url}: {reason or 'the connection broke'}")


class TurnFailed(Failed):
    """The turn began and did not complete."""

    exit_code = 4


class Interrupted(Failed):
    """The person pressed Ctrl-C."""

    exit_code = 130


class Sidecar:
    """Calls to one sidecar; every failure is a `Failed`. Use it as a context."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = httpx2.Timeout(SILENCE_SECONDS, connect=10)
        try:
            # Loading the machine's certificates takes longer than a call; without TLS nothing is done with them.
            has_tls = not url.lower().startswith("http:")
            self._http = httpx2.Client(base_url=url, headers=headers, timeout=timeout, verify=has_tls)
        except httpx2.InvalidURL as error:
            raise click.UsageError(f"--url {url}: {error}") from None

    def __enter__(self) -> "Sidecar":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, **fields: Any) -> Json:
        """One call that is answered once; fields that are None are left out."""
        with self.open(method, path, fields) as response:
            response.read()
            try:
                return dict(response.json()) if response.content else {}
            except (ValueError, TypeError):
                raise self._stranger(response) from None

    def pages(self, path: str, limit: int | None = None, **fields: Any) -> Iterator[Json]:
        """All items of a list, or the first `limit` of them, however many pages they take."""
        after = None
        while limit is None or limit > 0:
            page = self.call("GET", path, **fields, after=after, limit=min(limit or MOST_PER_PAGE, MOST_PER_PAGE))
            yield from page["data"]
            after = page["next"]
            if after is None:
                return
            limit = limit and limit - len(page["data"])

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, fields: Json, headers: dict[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """An answer whose body is still to be read. Reading it inside the block fails as the call itself does."""
        given = {name: value for name, value in fields.items() if value is not None}
        where: Json = {"params": given} if method in ("GET", "DELETE") else {"json": given}
        try:
            with self._http.stream(method, path, headers=headers, **where) as response:
                if not response.is_success:
                    response.read()
                    raise self._refusal(response)
                yield response
        except httpx2.UnsupportedProtocol as error:
            raise click.UsageError(f"--url {self.url}: {error}") from None
        except httpx2.RequestError as error:
            raise Broken(self.url, error) from None

    def _refusal(self, response: httpx2.Response) -> Failed:
        try:
            return Failed(*told(response.json()))
        except (ValueError, TypeError, KeyError):
            return self._stranger(response)

    def _stranger(self, response: httpx2.Response) -> Failed:
        return Broken(self.url, f"answered {response.status_code} {response.reason_phrase}, but not as a sidecar does")


def told(problem: Json) -> tuple[str, str]:
    """A problem of the API as its code and a detail that names every field that is wrong."""
    fields = "; ".join(f"{error['field']}: {error['message']}" for error in problem.get("errors", []))
    return problem["code"], problem["detail"] + (f" ({fields})" if fields else "")


def dumps(item: Any) -> str:
    """One of the API's objects, as it came, in one line."""
    return json.dumps(item, ensure_ascii=False, separators=(",", ":"))
