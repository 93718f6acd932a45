"""The command line over HTTP: for scripts in a pipe, for people on a terminal, and whatever goes wrong between."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from session_sidecar import __version__
from session_sidecar.cli import main
from session_sidecar.settings import Settings
from session_store import ThreadKey
from session_store.sqlite import SqliteSessionMap
from tests.faults import Behaviour, FaultyModel, hold, say, tool
from tests.forked import PROGRAM
from tests.server import SECONDS, Sidecar
from tests.terminal import CTRL_C, CTRL_D, Terminal, command, environment, relay, shell
from tests.transcripts import messages

Make = Callable[..., Sidecar]


def url(sidecar: Sidecar) -> str:
    return str(sidecar.http.base_url)


async def have(sidecar: Sidecar, original: str, thread: str, resource: str = "alice") -> None:
    """A thread with the original's conversation and no parent. Its session is a copy, so no process is started."""
    copied = await sidecar.post("/v1/chat/fork", thread, from_thread_id=original)
    assert copied.status_code == 201, copied.text
    session_id = await sidecar.session_id(thread)
    await sidecar.http.delete("/v1/session", params={"thread_id": thread, "resource_id": "alice"})
    body = {"thread_id": thread, "resource_id": resource, "sdk_session_id": session_id}
    assert (await sidecar.http.put("/v1/session", json=body)).status_code == 201


# A conversation


async def test_chat_prints_the_answer_and_nothing_else(sidecar: Sidecar, thread: str) -> None:
    ended = await command(url(sidecar), "chat", "-r", "alice", "-t", thread, "Hello")
    assert (ended.code, ended.out, ended.err) == (0, "You have said 1 thing: Hello\n", "")
    ended = await command(url(sidecar), "chat", "--resource", "alice", "--thread", thread, "Again")
    assert ended.out == "You have said 2 things. First: Hello; last: Again\n"


async def test_the_answer_is_in_the_pipe_while_the_model_still_speaks(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(hold(3))
    process = await asyncio.create_subprocess_exec(
        *(PROGRAM, "chat", "-r", "alice", "-t", thread, "Hello"),
        env=environment(url(sidecar)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(SECONDS):
        assert await process.stdout.readexactly(len("You have said ")) == b"You have said "
        (await model.requested()).release()
        assert await process.stdout.read() == b"1 thing: Hello\n"
        assert await process.wait() == 0


async def test_a_thread_that_was_not_named_is_made_up_and_told_on_stderr(sidecar: Sidecar) -> None:
    ended = await command(url(sidecar), "chat", "-r", "alice", "Hello")
    told = re.fullmatch(r"thread: (\S+)\n", ended.err)
    assert told is not None
    assert (await sidecar.history(told[1]))[0] == ("user", "Hello")


@pytest.mark.parametrize("arguments", [[], ["-"]])
async def test_what_is_piped_in_is_the_message(sidecar: Sidecar, thread: str, arguments: list[str]) -> None:
    ended = await command(url(sidecar), "chat", "-r", "alice", "-t", thread, *arguments, stdin="Grüße\nund Küsse\n")
    assert ended.out == "You have said 1 thing: Grüße\nund Küsse\n"


async def test_tools_are_told_on_stderr_in_one_line(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.script(tool("Bash", {"command": "ls\n-l"}))
    ended = await command(url(sidecar), "chat", "-r", "alice", "-t", thread, "Hello")
    assert (ended.out, ended.err) == ("You have said 1 thing: Hello\n", '· Bash {"command":"ls\\n-l"}\n')


async def test_an_agent_that_does_not_stream_is_printed_too(
    a_sidecar: Make, thread: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    agents = tmp_path_factory.mktemp("agents") / "agents.toml"
    agents.write_text("[whole]\ninclude_partial_messages = false\n")
    async with a_sidecar("--agents", str(agents)) as sidecar:
        ended = await command(url(sidecar), "chat", "-r", "alice", "-t", thread, "--agent", "whole", "Hello")
    assert (ended.code, ended.out) == (0, "You have said 1 thing: Hello\n")


async def test_a_person_converses_interrupts_and_leaves(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    async with Terminal(url(sidecar), "chat", "-r", "alice", "-t", thread) as terminal:
        await terminal.until("> ")
        terminal.type("Hello\n")
        await terminal.until("You have said 1 thing: Hello\n")
        await terminal.until("> ")
        model.script(hold(3))
        terminal.type("Go on\n")
        await terminal.until("You have said ")
        terminal.type(CTRL_C)
        await terminal.until("error: interrupted: by Ctrl-C\n")
        await terminal.until("> ")
        terminal.type("Still there?\n")
        await terminal.until("You have said 3 things. First: Hello; last: Still there?\n")
        await terminal.until("> ")
        terminal.type(CTRL_D)
        assert await terminal.ended() == 0
    assert ("assistant", "You have said ") in await sidecar.history(thread)


async def test_at_the_prompt_the_second_ctrl_c_leaves(sidecar: Sidecar) -> None:
    async with Terminal(url(sidecar), "chat", "-r", "alice") as terminal:
        await terminal.prompted("> ")
        terminal.type(CTRL_C)
        await terminal.until("Ctrl-C again or Ctrl-D leaves\n")
        await terminal.prompted("> ")
        terminal.type(CTRL_C)
        assert await terminal.ended() == 130


@pytest.mark.smoke
async def test_a_conversation_survives_a_turn_that_is_refused(sidecar: Sidecar, thread: str) -> None:
    async with Terminal(url(sidecar), "chat", "-r", "alice", "-t", thread, "--agent", "nobody") as terminal:
        await terminal.until("> ")
        terminal.type("Hello\n")
        await terminal.until("error: unknown_agent: ")
        await terminal.until("> ")
        terminal.type(CTRL_D)
        assert await terminal.ended() == 0


async def test_an_answer_cannot_steer_the_terminal(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.default = say("one\x1b[2Jtwo")
    async with Terminal(url(sidecar), "chat", "-r", "alice", "-t", thread, "Hello") as terminal:
        assert await terminal.ended() == 0
    assert "one\ufffd[2Jtwo" in terminal.raw
    ended = await command(url(sidecar), "chat", "-r", "alice", "-t", thread, "Hello")
    assert ended.out == "one\x1b[2Jtwo\n"


# Stopping, breaking


async def test_ctrl_c_stops_the_turn_and_shows_what_there_was(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(hold(3))
    async with Terminal(url(sidecar), "chat", "-r", "alice", "-t", thread, "Hello") as terminal:
        await terminal.until("You have said ")
        terminal.type(CTRL_C)
        assert await terminal.ended() == 130
    assert terminal.screen == "You have said ^C\nerror: interrupted: by Ctrl-C\n"
    await model.gone()
    assert (await sidecar.session(thread)).json()["status"] == "idle"
    assert ("assistant", "You have said ") in await sidecar.history(thread)


async def test_ctrl_c_before_the_answer_began_is_not_lost(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.default = hold(0)
    async with Terminal(url(sidecar), "chat", "-r", "alice", "-t", thread, "Hello") as terminal:
        while (await sidecar.session(thread)).status_code == 404:
            pass  # it has not reached the sidecar yet
        terminal.type(CTRL_C)
        assert await terminal.ended() == 130
    assert (await sidecar.post("/v1/chat/interrupt", thread)).json().get("turn_id") is None


async def test_a_second_ctrl_c_leaves_a_sidecar_that_does_not_answer(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(hold(3))
    async with (
        relay(url(sidecar)) as (between, address),
        Terminal(address, "chat", "-r", "alice", "-t", thread, "Hello") as terminal,
    ):
        await terminal.until("You have said ")
        between.target = "http://127.0.0.1:9"  # so that the interrupt does not arrive
        terminal.type(CTRL_C)
        await between.refused.wait()
        terminal.type(CTRL_C)
        assert await terminal.ended() == 130
    assert (await sidecar.session(thread)).json()["status"] == "running"


async def test_a_stream_that_breaks_is_rejoined_where_it_broke(
    sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(hold(3))
    async with relay(url(sidecar)) as (between, address):
        async with Terminal(address, "chat", "-r", "alice", "-t", thread, "Hello") as terminal:
            await terminal.until("You have said ")
            between.cut()
            (await model.requested()).release()
            assert await terminal.ended() == 0
        assert terminal.screen == "You have said 1 thing: Hello\n"
        assert b"last-event-id: " in between.sent.lower()


@pytest.mark.long
async def test_a_turn_that_the_sidecar_lost_is_said_to_be_lost(
    a_sidecar: Make, thread: str, model: FaultyModel
) -> None:
    model.script(hold(3))
    async with a_sidecar() as sidecar, relay(url(sidecar)) as (between, address):
        async with Terminal(address, "chat", "-r", "alice", "-t", thread, "Hello") as terminal:
            await terminal.until("You have said ")
            await sidecar.stop(signal.SIGKILL)
            await sidecar.restart()
            between.target = url(sidecar)
            between.cut()
            assert await terminal.ended() == 4
        assert "\nerror: turn_lost: " in terminal.screen


async def test_an_answer_that_starts_over_says_so(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.script(Behaviour(cut_after=4, pause=0.1))  # so slow that each delta gets through before the end does
    ended = await command(url(sidecar), "chat", "-r", "alice", "-t", thread, "Hello")
    first, last = ended.out.splitlines()
    assert "You have said 1 thing: ".startswith(first)
    assert last == "You have said 1 thing: Hello"
    assert ended.err == "the connection to the model broke: the answer starts over\n"


# Threads


async def test_a_pipe_gets_the_apis_own_objects_one_a_line(
    sidecar: Sidecar, original: str, thread: str, another_thread: str
) -> None:
    await have(sidecar, original, thread)
    forked = await command(url(sidecar), "fork", "-r", "alice", thread, another_thread)
    where = {"thread_id": another_thread, "resource_id": "alice"}
    branch = (await sidecar.http.get("/v1/session", params=where)).json()
    assert json.loads(forked.out)["parent_thread_id"] == thread
    shown = await command(url(sidecar), "show", "-r", "alice", another_thread)
    assert json.loads(shown.out) == branch
    listed = await command(url(sidecar), "ls", "-r", "alice", "--prefix", another_thread)
    assert [json.loads(line)["thread_id"] for line in listed.out.splitlines()] == [another_thread]
    assert (forked.code, shown.code, listed.code) == (0, 0, 0)


async def test_a_fork_at_a_message_forgets_what_came_later(sidecar: Sidecar, original: str, thread: str) -> None:
    answer = (await messages(sidecar, original))[1]["uuid"]
    ended = await command(url(sidecar), "fork", "-r", "alice", original, thread, "--at", answer)
    assert ended.code == 0, ended.err
    assert await sidecar.say(thread, "Three") == "You have said 2 things. First: My name is Ada; last: Three"


async def test_messages_title_and_tree_come_from_the_sdk(
    sidecar: Sidecar, original: str, thread: str, another_thread: str
) -> None:
    await have(sidecar, original, thread)
    said = (await command(url(sidecar), "messages", "-r", "alice", thread)).out.splitlines()
    found = [json.loads(line) for line in said]
    assert [message["type"] for message in found] == ["user", "assistant"] * 2
    await command(url(sidecar), "fork", "-r", "alice", thread, another_thread, "--at", found[-1]["uuid"])
    titled = await command(url(sidecar), "title", "-r", "alice", thread, "A week in Lisbon")
    assert json.loads(titled.out)["metadata"]["title"] == "A week in Lisbon"
    listed = await command(url(sidecar), "ls", "-r", "alice", "--prefix", thread, "--metadata")
    assert "A week in Lisbon" in [json.loads(line)["metadata"]["title"] for line in listed.out.splitlines()]
    family = json.loads((await command(url(sidecar), "tree", "-r", "alice", another_thread)).out)
    assert family["root"]["children"][0]["thread_id"] == another_thread


async def test_a_turn_is_interrupted_from_another_terminal(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    async with sidecar.stream(thread, "[[hold 3]]") as stream:
        await stream.until_text()
        ended = await command(url(sidecar), "interrupt", "-r", "alice", thread)
        assert (ended.code, json.loads(ended.out)["status"]) == (0, "interrupted")
        assert (await stream.rest())[-1].data["status"] == "interrupted"


async def test_a_session_is_adopted_and_warmed_up(
    sidecar: Sidecar, original: str, thread: str, another_thread: str
) -> None:
    await have(sidecar, original, thread)
    session_id = await sidecar.session_id(thread)
    await command(url(sidecar), "rm", "-r", "alice", thread, "--yes")
    adopted = await command(url(sidecar), "adopt", "-r", "alice", another_thread, session_id)
    assert (adopted.code, json.loads(adopted.out)["sdk_session_id"]) == (0, session_id), adopted.err
    warmed = await command(url(sidecar), "warm", "-r", "alice", another_thread)
    assert (warmed.code, json.loads(warmed.out)["object"]) == (0, "warm")
    assert "First: My name is Ada" in await sidecar.say(another_thread, "Who am I?")


async def test_ls_without_a_resource_lists_all(sidecar: Sidecar, original: str, thread: str) -> None:
    await have(sidecar, original, thread, "bob")
    await have(sidecar, original, thread, "alice")
    listed = await command(url(sidecar), "ls", "--prefix", thread)
    rows = [json.loads(line) for line in listed.out.splitlines()]
    assert [row["resource_id"] for row in rows if row["thread_id"] == thread] == ["alice", "bob"]


async def test_a_person_sees_the_messages_and_the_branches(
    sidecar: Sidecar, original: str, thread: str, another_thread: str
) -> None:
    await have(sidecar, original, thread)
    async with Terminal(url(sidecar), "messages", "-r", "alice", thread) as terminal:
        assert await terminal.ended() == 0
    answer = re.search(
        r"^(\S{36})  assistant  .*  You have said 1 thing: My name is Ada *$", terminal.screen, re.MULTILINE
    )
    assert answer is not None, terminal.screen
    await command(url(sidecar), "title", "-r", "alice", thread, "Lisbon")
    await command(url(sidecar), "fork", "-r", "alice", thread, another_thread, "--at", answer[1])
    async with Terminal(url(sidecar), "tree", "-r", "alice", thread) as terminal:
        assert await terminal.ended() == 0
    root, branch = terminal.screen.splitlines()
    assert root == f"{thread}  Lisbon"
    assert branch.startswith(f"└── {another_thread}  ")
    assert "after “You have said 1 thing: My name is Ada”" in branch
    async with Terminal(url(sidecar), "ls", "-r", "alice", "--prefix", thread, "--metadata") as terminal:
        assert await terminal.ended() == 0
    assert "Lisbon" in terminal.screen


async def test_ls_follows_the_pages_and_stops_at_its_limit(a_sidecar: Make) -> None:
    sidecar = a_sidecar()
    sidecar.home.mkdir()
    sessions = await SqliteSessionMap.open(sidecar.home / "sidecar.db")
    for number in range(205):
        await sessions.add(ThreadKey(f"thread-{number}", "alice"), f"00000000-0000-4000-8000-{number:012}")
    await sessions.close()
    async with sidecar:
        everything = (await command(url(sidecar), "ls", "-r", "alice")).out.splitlines()
        newest = (await command(url(sidecar), "ls", "-r", "alice", "--limit", "202")).out.splitlines()
    names = [json.loads(line)["thread_id"] for line in everything]
    assert names == [f"thread-{number}" for number in reversed(range(205))]
    assert newest == everything[:202]


async def test_a_terminal_gets_a_table_with_names_as_they_are(sidecar: Sidecar, original: str, thread: str) -> None:
    name = f"{thread} [bold]:smile:[/bold]"
    await have(sidecar, original, name)
    async with Terminal(url(sidecar), "ls", "-r", "alice", "--prefix", thread + " ") as terminal:
        assert await terminal.ended() == 0
    head, row = terminal.screen.splitlines()
    assert head.split() == ["thread", "status", "updated", "forked", "from"]
    assert row.startswith(f"{name}  idle    ")
    async with Terminal(url(sidecar), "show", "-r", "alice", name) as terminal:
        assert await terminal.ended() == 0
    assert re.search(rf"^sdk_session_id +{await sidecar.session_id(name)}", terminal.screen, re.MULTILINE)


async def test_rm_asks_a_person_and_no_script(
    sidecar: Sidecar, original: str, thread: str, another_thread: str
) -> None:
    for name in (thread, another_thread):
        await have(sidecar, original, name)
    for answer, code, status in (("n\n", 1, 200), (CTRL_C, 130, 200), ("y\n", 0, 404)):
        async with Terminal(url(sidecar), "rm", "-r", "alice", thread) as terminal:
            await terminal.prompted(f"Forget '{thread}' of 'alice'? [y/N]: ")
            terminal.type(answer)
            assert await terminal.ended() == code
        assert (await sidecar.session(thread)).status_code == status
    ended = await command(url(sidecar), "rm", "-r", "alice", another_thread)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert (await sidecar.session(another_thread)).status_code == 404


# What goes wrong


async def test_a_refusal_is_one_line_that_names_the_field(sidecar: Sidecar) -> None:
    ended = await command(url(sidecar), "chat", "-r", "alice", "-t", "a\tb", " ")
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert ended.err.startswith("error: invalid_request: ")
    assert "(thread_id: control characters" in ended.err
    assert "; message: must not be blank)" in ended.err
    ended = await command(url(sidecar), "show", "-r", "alice", "nowhere")
    assert (ended.code, ended.err) == (1, "error: session_not_found: There is no such thread of this resource.\n")


async def test_a_wrong_command_line_exits_2_without_a_traceback(sidecar: Sidecar) -> None:
    not_utf8 = os.fsdecode(b"\xff")
    wrong = [
        ["show", "thread"],
        ["ls", "-r", "alice", "--limit", "0"],
        ["ls", "-r", "alice", "--url", "localhost:8000"],
        ["ls", "-r", "alice", "--url", "http://localhost:port"],
        ["show", "-r", not_utf8, "thread"],
        ["chat", "-r", not_utf8, "Hello"],
        ["sessions"],
    ]
    for ended in await asyncio.gather(*(command(url(sidecar), *arguments) for arguments in wrong)):
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.splitlines()[-1].startswith("Error: ")


async def test_nobody_there_exits_3() -> None:
    ended = await command("http://127.0.0.1:9", "ls", "-r", "alice")
    assert (ended.code, ended.err.count("\n")) == (3, 1)
    assert ended.err.startswith("error: unreachable: http://127.0.0.1:9: ")


async def test_a_server_that_is_no_sidecar_exits_3(model: FaultyModel) -> None:
    for arguments in (["ls", "-r", "alice"], ["chat", "-r", "alice", "-t", "t", "Hello"]):
        ended = await command(model.url, *arguments)
        assert (ended.code, ended.err.count("\n")) == (3, 1), ended
        assert "not as a sidecar does" in ended.err


@pytest.mark.smoke
async def test_a_turn_that_fails_exits_4(sidecar: Sidecar, thread: str) -> None:
    ended = await command(url(sidecar), "chat", "-r", "alice", "-t", thread, "[[fail 400]]")
    assert (ended.code, ended.out, ended.err.count("\n")) == (4, "", 1)
    assert ended.err.startswith("error: api_error: ")


async def test_a_turn_that_somebody_else_stops_exits_4(sidecar: Sidecar, thread: str, model: FaultyModel) -> None:
    model.script(hold(3))
    running = asyncio.create_task(command(url(sidecar), "chat", "-r", "alice", "-t", thread, "Hello"))
    await (await model.requested()).holding()
    await sidecar.post("/v1/chat/interrupt", thread)
    ended = await running
    assert (ended.code, ended.err) == (4, "error: interrupted: The turn did not complete.\n")


async def test_the_token_goes_with_every_call(sidecar: Sidecar, thread: str) -> None:
    async with relay(url(sidecar)) as (between, address):
        ended = await command(address, "chat", "-r", "alice", "-t", thread, "Hello", SIDECAR_TOKEN="s3cret")
        assert ended.code == 0, ended.err
        assert b"authorization: bearer s3cret" in between.sent.lower()


# Help


def commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: given for name, given in found.items() if given is not None}


@pytest.mark.long
async def test_every_example_in_the_help_works_as_it_stands(sidecar: Sidecar, tmp_path: Path) -> None:
    calls = [name for name in commands() if name != "serve"]
    helps = await asyncio.gather(*(command("", name, "--help") for name in calls))
    examples = {
        name: re.findall(r"^ {4}((?:echo .* )?session-sidecar .*)", ended.out, re.MULTILINE)
        for name, ended in zip(calls, helps, strict=True)
    }
    assert all(examples.values()), examples

    async def works(example: str) -> None:
        ended = await shell(url(sidecar), f"cd {tmp_path} && {example}", "Hello")
        assert ended.code == 0, (example, ended)

    # Of files and databases, not of a server: each has tests of its own.
    for name in ("doctor", "backup", "restore", "token", "import", "export", "rotate", "forget-key"):
        del examples[name]
    del examples["adopt"]  # its session is somebody's; there is a test above
    first, last = [*examples.pop("chat"), *examples.pop("fork")], examples.pop("rm")
    for example in first:
        await works(example)
    await asyncio.gather(*(works(example) for name in examples for example in examples[name]))
    for example in last:
        await works(example)


async def test_the_shell_completes_commands_and_options(sidecar: Sidecar) -> None:
    asked = {"_SESSION_SIDECAR_COMPLETE": "bash_complete", "COMP_CWORD": "1"}
    ended = await shell("", "session-sidecar", **asked, COMP_WORDS="session-sidecar m")
    assert ended.out.split() == ["plain,messages"]
    ended = await shell("", "session-sidecar", **{**asked, "COMP_CWORD": "2"}, COMP_WORDS="session-sidecar ls --r")
    assert ended.out.split() == ["plain,--resource"]


async def test_it_says_its_version() -> None:
    assert __version__ in (await command("", "--version")).out


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
async def test_the_line_of_the_help_gives_each_shell_its_completion(name: str) -> None:
    help_text = (await command("", "--help")).out
    (line,) = [line.strip() for line in help_text.splitlines() if f"={name}_source" in line]
    given = line.removeprefix('eval "$(').removesuffix(')"').removesuffix(" | source")
    script = await shell("", given)
    assert f"_SESSION_SIDECAR_COMPLETE={name}_complete" in script.out
    if name == "bash":
        registered = await shell("", f"{line}; complete -p session-sidecar")
        assert "-F _session_sidecar_completion" in registered.out


async def test_serve_does_not_pay_for_the_commands_beside_it() -> None:
    code = """if True:
        import sys
        from session_sidecar.cli import main
        main(["serve", "--help"], standalone_mode=False)
        sys.exit(sum(name in sys.modules for name in ("rich", "httpx2", "session_sidecar.cli.client")))
    """
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


async def test_the_help_of_serve_names_every_setting() -> None:
    told = (await command("", "serve", "--help")).out
    assert [name for name in Settings.model_fields if f"SIDECAR_{name.upper()}" not in told] == []
    assert "[default: 8000]" in told
