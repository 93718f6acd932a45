"""The commands that call a running sidecar. Imported only when one of them is asked for."""

import contextlib
import functools
import os
import sys
import uuid
from collections.abc import Callable
from typing import Any

import click

from session_sidecar.cli.client import show, turn
from session_sidecar.cli.client.http import Failed, Interrupted, Sidecar

calls = click.Group()


def _call(name: str, *, of_one: bool = True) -> Callable[[Callable[..., None]], click.Command]:
    """A command of this name with what all of them have: where the sidecar is, whose thread it is, and how they end.

    One that is not `of_one` resource may be asked about all.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(url: str, **given: Any) -> None:
            try:
                with Sidecar(url, os.environ.get("SIDECAR_TOKEN")) as sidecar:
                    function(sidecar, **given)
            except (KeyboardInterrupt, click.Abort):
                sys.exit(Interrupted.exit_code)
            except UnicodeEncodeError:
                raise click.UsageError("the command line or the environment holds bytes that are not UTF-8") from None

        command = calls.command(name)(run)
        command.params += [
            click.Option(
                ["-r", "--resource"],
                required=of_one,
                metavar="R",
                help=f"Whose: a user, a tenant …{'' if of_one else ' [default: all of them]'}",
            ),
            click.Option(
                ["--url"],
                metavar="URL",
                envvar="SIDECAR_URL",
                default="http://127.0.0.1:8000",
                show_envvar=True,
                show_default=True,
                help="Where the sidecar is.",
            ),
        ]
        return command

    return decorate


@_call("chat")
@click.argument("message", required=False)
@click.option("-t", "--thread", metavar="T", help="The conversation. A new one by default; its name is told on stderr.")
@click.option("--agent", metavar="A", help="One of the operator's agents.")
def chat(sidecar: Sidecar, resource: str, message: str | None, thread: str | None, agent: str | None) -> None:
    """Say something and print the answer as it comes.

    Without a MESSAGE it is a conversation, or stdin where that is no terminal; MESSAGE - is stdin too. Ctrl-C stops
    the turn, and what was said so far stays in the history. At the prompt Ctrl-D leaves, and so does Ctrl-C twice.

    \b
    Examples:
      session-sidecar chat -r alice -t trip
      session-sidecar chat -r alice -t trip "Where were we?"
      echo "A new thread" | session-sidecar chat -r alice > answer.txt
    """
    if thread is None:
        thread = str(uuid.uuid4())
        show.note(f"thread: {thread}")
    key = {"thread_id": thread, "resource_id": resource}
    if message is None and sys.stdin.isatty():
        _converse(sidecar, key, agent)
    else:
        turn.run(sidecar, key, _stdin() if message in (None, "-") else message, agent)


@_call("fork")
@click.argument("from_thread", metavar="FROM")
@click.argument("new_thread", metavar="NEW")
@click.option("--at", metavar="MESSAGE_ID", help="Its last message, a uuid of `messages`. [default: the end]")
def fork(sidecar: Sidecar, resource: str, from_thread: str, new_thread: str, at: str | None) -> None:
    """Branch the thread FROM under the name NEW. FROM stays as it is.

    \b
    Examples:
      session-sidecar fork -r alice trip trip-by-train
      session-sidecar fork -r alice trip "trip, as of Monday"
    """
    where = {"resource_id": resource, "from_thread_id": from_thread, "thread_id": new_thread, "at_message_id": at}
    show.one(sidecar.call("POST", "/v1/chat/fork", **where))


@_call("adopt")
@click.argument("thread")
@click.argument("session_id")
def adopt(sidecar: Sidecar, resource: str, thread: str, session_id: str) -> None:
    """Go on with an existing session of the SDK, under a thread.

    \b
    Example:
      session-sidecar adopt -r alice trip 6c5a1f0e-3b1d-4c55-9d0e-0f7a5a1c2b3d
    """
    show.one(sidecar.call("PUT", "/v1/session", thread_id=thread, resource_id=resource, sdk_session_id=session_id))


@_call("interrupt")
@click.argument("thread")
def interrupt(sidecar: Sidecar, resource: str, thread: str) -> None:
    """Stop the turn that runs on a thread. What was said so far stays in the history.

    \b
    Example:
      session-sidecar interrupt -r alice trip
    """
    show.one(sidecar.call("POST", "/v1/chat/interrupt", thread_id=thread, resource_id=resource))


@_call("warm")
@click.argument("thread")
@click.option("--agent", metavar="A", help="One of the operator's agents.")
def warm(sidecar: Sidecar, resource: str, thread: str, agent: str | None) -> None:
    """Start a thread's process before its message comes.

    \b
    Example:
      session-sidecar warm -r alice trip
    """
    show.one(sidecar.call("POST", "/v1/session/warm", thread_id=thread, resource_id=resource, agent=agent))


@_call("ls", of_one=False)
@click.option("--prefix", metavar="P", help="Only threads whose name begins so.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the newest N. [default: all]")
@click.option("--metadata", is_flag=True, help="With titles, and what else the SDK knows.")
def ls(sidecar: Sidecar, resource: str | None, prefix: str | None, limit: int | None, *, metadata: bool) -> None:
    """List threads, newest first: those of one resource, or all.

    \b
    Examples:
      session-sidecar ls
      session-sidecar ls -r alice
      session-sidecar ls -r alice --prefix trip --metadata
      session-sidecar ls -r alice --limit 10 | cat
    """
    columns: dict[str, Callable[[Any], Any]] = {
        "thread": lambda item: item["thread_id"],
        "status": lambda item: item["status"],
        "updated": lambda item: show.when(item, "updated_at"),
        "forked from": lambda item: item["parent_thread_id"],
    }
    if resource is None:
        columns = {"resource": lambda item: item["resource_id"], **columns}
    where = {"resource_id": resource, "thread_id_prefix": prefix}
    if metadata:
        columns["title"] = lambda item: item["metadata"]["title"] or item["metadata"]["first_prompt"]
        where["include"] = "metadata"
    show.many(sidecar.pages("/v1/sessions", limit, **where), columns)


@_call("messages")
@click.argument("thread")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N. [default: all]")
def messages(sidecar: Sidecar, resource: str, thread: str, limit: int | None) -> None:
    """Print a conversation, oldest first. `synthetic` is what no person and no model wrote, but the SDK.

    \b
    Examples:
      session-sidecar messages -r alice trip
      session-sidecar messages -r alice trip | tail -n 1
    """
    columns: dict[str, Callable[[Any], Any]] = {
        "uuid": lambda item: item["uuid"],
        "from": lambda item: "synthetic" if item["synthetic"] else item["type"],
        "when": lambda item: show.when(item, "timestamp"),
        "message": show.said,
    }
    show.many(sidecar.pages("/v1/session/messages", limit, thread_id=thread, resource_id=resource), columns)


@_call("rm")
@click.argument("thread")
@click.option(
    "--transcript", type=click.Choice(["keep", "delete"]), default="keep", help="What becomes of what was said."
)
@click.option("--force", is_flag=True, help="Stop a turn that runs there first.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask. Nobody is asked where stdin is not a terminal.")
def rm(sidecar: Sidecar, resource: str, thread: str, *, transcript: str, force: bool, yes: bool) -> None:
    """Forget a thread. The SDK's transcript of it stays unless it is deleted too.

    \b
    Examples:
      session-sidecar rm -r alice trip-by-train --yes
      session-sidecar rm -r alice trip-by-train --transcript delete --force --yes
    """
    if not yes and sys.stdin.isatty() and not click.confirm(f"Forget {thread!r} of {resource!r}?", err=True):
        sys.exit(1)
    options = {"transcript": transcript, **({"force": "true"} if force else {})}
    sidecar.call("DELETE", "/v1/session", thread_id=thread, resource_id=resource, **options)


@_call("show")
@click.argument("thread")
def show_(sidecar: Sidecar, resource: str, thread: str) -> None:
    """Show a thread and what the SDK knows of its session.

    \b
    Example:
      session-sidecar show -r alice trip
    """
    show.one(sidecar.call("GET", "/v1/session", thread_id=thread, resource_id=resource))


@_call("title")
@click.argument("thread")
@click.argument("title")
def title_(sidecar: Sidecar, resource: str, thread: str, title: str) -> None:
    """Give a thread's session a title; the SDK keeps it.

    \b
    Example:
      session-sidecar title -r alice trip "A week in Lisbon"
    """
    show.one(sidecar.call("PATCH", "/v1/session", thread_id=thread, resource_id=resource, title=title))


@_call("tree")
@click.argument("thread")
def tree(sidecar: Sidecar, resource: str, thread: str) -> None:
    """Draw the family of forks that a thread belongs to.

    \b
    Example:
      session-sidecar tree -r alice trip
    """
    family = sidecar.call("GET", "/v1/session/branches", thread_id=thread, resource_id=resource)
    show.tree(family, thread)


def _converse(sidecar: Sidecar, key: dict[str, str], agent: str | None) -> None:
    """Turns until the person leaves. One that fails is told, and the next may be better."""
    with contextlib.suppress(ImportError):  # Windows has none; elsewhere it gives input() editing and a history
        import readline  # noqa: F401, PLC0415
    leaving = False
    while True:
        try:
            message = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            # One Ctrl-C may have been meant for a turn that ended just before it.
            click.echo(err=True)
            if leaving:
                raise
            leaving = True
            show.note("Ctrl-C again or Ctrl-D leaves")
            continue
        leaving = False
        if message.strip():
            try:
                turn.run(sidecar, key, message, agent)
            except Failed as error:
                error.show()


def _stdin() -> str:
    """All of stdin, without the line feed that `echo` puts at its end."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise click.UsageError("stdin is not UTF-8") from None
