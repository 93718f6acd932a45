"""What the sidecar relies on in the Claude Agent SDK and its CLI: DESIGN.md section 5, fact by fact.

All through the real SDK and the real CLI, with only the Messages API stood in for. A new release of the SDK may be
trusted when this file passes; where it does not, the sentence that fails says what has to be thought about again.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import select
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import claude_agent_sdk
import pytest
from claude_agent_sdk import (
    AssistantMessage,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    CLIJSONDecodeError,
    ProcessError,
    ResultError,
    ResultMessage,
    fork_session,
    get_session_info,
    get_session_messages,
)

from session_sidecar.agent.transcripts.files import session_info
from tests.faults import Behaviour, FaultyModel, big, fail, hold, silent, think, tool, tools
from tests.modes import CLI_TRACES

Json = dict[str, Any]
Connect = Callable[..., contextlib.AbstractAsyncContextManager["Cli"]]

SECONDS = 15
BUNDLED = (Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude").resolve()
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


# --- a connected CLI, as the sidecar has it -------------------------------------------------------------------------


class Cli:
    """A connected client, read through the SDK's raw messages."""

    def __init__(self, options: ClaudeAgentOptions) -> None:
        self.client = ClaudeSDKClient(options)
        self.idle = True  # no turn is under way, so the next test may have it
        self._messages: AsyncIterator[Json] | None = None

    @property
    def process(self) -> Any:
        return getattr(self.client._transport, "_process")  # noqa: B009 # not in the Transport protocol

    @property
    def pid(self) -> int:
        pid: int = self.process.pid
        return pid

    async def connect(self) -> None:
        await self.client.connect()
        assert self.client._query is not None
        self._messages = self.client._query.receive_messages()

    async def say(self, content: str | list[Json], **fields: str) -> None:
        async def prompt() -> AsyncIterator[Json]:
            message = {"role": "user", "content": content}
            yield {"type": "user", "message": message, "parent_tool_use_id": None, **fields}

        self.idle = False
        await self.client.query(prompt())

    async def until(self, match: Callable[[Json], bool], times: int = 1) -> list[Json]:
        """The messages up to the one that matches for the nth time."""
        assert self._messages is not None
        seen: list[Json] = []
        async with asyncio.timeout(SECONDS):
            async for message in self._messages:
                seen.append(message)
                times -= match(message)
                if message["type"] == "result":
                    self.idle = True
                if times == 0:
                    return seen
        raise AssertionError(f"the messages ended: {[(m['type'], m.get('subtype')) for m in seen]}")

    async def rest(self) -> list[Json]:
        return await self.until(is_result)

    async def turn(self, content: str | list[Json]) -> list[Json]:
        await self.say(content)
        return await self.rest()

    async def interrupted(self) -> Json:
        """Interrupt, drain, and the result; within the second that a person would grant it."""
        async with asyncio.timeout(1):
            await self.client.interrupt()
            return (await self.rest())[-1]

    async def close(self) -> None:
        stdout = getattr(self.client._transport, "_stdout_stream", None)
        await self.client.disconnect()
        if stdout is not None:
            async for _ in stdout:  # after a CLIJSONDecodeError the SDK leaves an unread pipe to the garbage collector
                pass
        if self.client._query is not None:
            self.client._query.close_receive_stream()


def is_init(message: Json) -> bool:
    return (message["type"], message.get("subtype")) == ("system", "init")


def is_result(message: Json) -> bool:
    return bool(message["type"] == "result")


def is_delta(message: Json) -> bool:
    return bool(message["type"] == "stream_event" and message["event"]["type"] == "content_block_delta")


def of(messages: list[Json], subtype: str) -> list[Json]:
    return [message for message in messages if message["type"] == "system" and message["subtype"] == subtype]


def outcome(result: Json) -> tuple[bool, str, str]:
    return result["is_error"], result["subtype"], result["terminal_reason"]


# --- what the tests share -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The CLI's config directory, for this process too: the SDK's session functions read its environment."""
    home = tmp_path_factory.mktemp("contract")
    (home / "workspace").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLAUDE_CONFIG_DIR", str(home))
        yield home


@pytest.fixture(scope="module")
def options(home: Path, model_env: dict[str, str]) -> Callable[..., ClaudeAgentOptions]:
    def make(**overrides: Any) -> ClaudeAgentOptions:
        quiet = dict.fromkeys(
            [
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
                "DISABLE_TELEMETRY",
                "DISABLE_ERROR_REPORTING",
                "DISABLE_AUTOUPDATER",
            ],
            "1",
        )
        given: Json = {
            "tools": ["Bash"],
            "allowed_tools": ["Bash"],
            "setting_sources": [],
            "strict_mcp_config": True,
            "verbatim_prompts": True,
            "permission_mode": "dontAsk",
            "include_partial_messages": True,
            "max_buffer_size": 64 << 20,
            "settings": json.dumps({"cleanupPeriodDays": 36500}),
            "cwd": str(home / "workspace"),
            "env": {**quiet, **model_env, "CLAUDE_CODE_MAX_RETRIES": "1", "CLAUDE_CODE_TMPDIR": str(home)},
        }
        return ClaudeAgentOptions(**{**given, **overrides})

    return make


@pytest.fixture(scope="module")
def connect(options: Callable[..., ClaudeAgentOptions]) -> Connect:
    @contextlib.asynccontextmanager
    async def connect(**given: Any) -> AsyncIterator[Cli]:
        cli = Cli(options(**given))
        try:
            await cli.connect()
            yield cli
        finally:
            await cli.close()

    return connect


@dataclasses.dataclass
class Warm:
    """The one CLI that tests share, each with turns of its own."""

    session: str
    cli: Cli | None = None


@pytest.fixture(scope="module")
async def _warm() -> AsyncIterator[Warm]:
    warm = Warm(str(uuid.uuid4()))
    yield warm
    if warm.cli is not None:
        await warm.cli.close()


@pytest.fixture
async def warm(_warm: Warm, options: Callable[..., ClaudeAgentOptions], model: FaultyModel) -> AsyncIterator[Cli]:
    """A connected CLI that has had at least one turn, with no turn under way."""
    if _warm.cli is None:
        _warm.cli = Cli(options(session_id=_warm.session))
        await _warm.cli.connect()
        await _warm.cli.turn("hello")
        model.reset()
    yield _warm.cli
    if not _warm.cli.idle:  # its test failed in mid-turn: the next one gets another
        await _warm.cli.close()
        _warm.cli, _warm.session = None, str(uuid.uuid4())


@pytest.fixture
def session(_warm: Warm, warm: Cli) -> str:
    """The warm CLI's session."""
    return _warm.session


@pytest.fixture(scope="module")
async def _second(connect: Connect) -> AsyncIterator[Cli]:
    """Another one, for tests that leave something running in it."""
    async with connect() as cli:
        yield cli


@pytest.fixture(scope="module")
async def separated(connect: Connect) -> AsyncIterator[tuple[Cli, str]]:
    """A third, and its session, of which a fork without a message has only the end."""
    session = str(uuid.uuid4())
    async with connect(session_id=session) as cli:
        yield cli, session


def transcript(home: Path, session_id: str) -> Path | None:
    return next(home.glob(f"projects/*/{session_id}.jsonl"), None)


def history(session_id: str) -> list[tuple[str, str]]:
    """Who said what, as the SDK reads it back."""
    found: list[tuple[str, str]] = []
    for message in get_session_messages(session_id):
        said: Any = message.message
        content = said["content"]
        texts = [content] if isinstance(content, str) else [block.get("text", block["type"]) for block in content]
        found.append((message.type, " ".join(texts)))
    return found


def program(pid: int) -> Path:
    return Path(f"/proc/{pid}/exe").resolve()


def started(pid: int) -> str:
    """When a process started, in ticks since the machine did: field 22 of its stat, which is 20th after its name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


async def eventually(true: Callable[[], bool], problem: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, problem
        await asyncio.sleep(0.01)


@contextlib.contextmanager
def watching(pid: int) -> Iterator[Callable[[float], Awaitable[bool]]]:
    """Whether a process, not necessarily our child, ends within so many seconds; it is killed in the end."""
    pidfd = os.pidfd_open(pid)

    def has_ended() -> bool:
        return bool(select.select([pidfd], [], [], 0)[0])

    async def ends_within(seconds: float) -> bool:
        if has_ended():
            return True
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(seconds):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            asyncio.get_running_loop().remove_reader(pidfd)
        return True

    try:
        yield ends_within
    finally:
        if not has_ended():
            os.kill(pid, 9)
        os.close(pidfd)


# --- session IDs ----------------------------------------------------------------------------------------------------


class TestSessionIds:
    async def test_a_new_session_has_the_id_that_was_chosen_and_cannot_be_made_twice(
        self, connect: Connect, model: FaultyModel, home: Path
    ) -> None:
        chosen = str(uuid.uuid4())
        async with connect(session_id=chosen) as cli:
            assert transcript(home, chosen) is None  # it is made by the first turn
            messages = await cli.turn("My name is Ada")
        assert {message["session_id"] for message in messages} == {chosen}
        assert transcript(home, chosen) is not None
        assert history(chosen) == [("user", "My name is Ada"), ("assistant", "You have said 1 thing: My name is Ada")]

        with pytest.raises(ProcessError) as refused:
            async with connect(session_id=chosen):
                pass
        assert refused.value.exit_code == 1

        async with connect(resume=chosen) as cli:
            messages = await cli.turn("What did I say first?")
        assert of(messages, "init")[0]["session_id"] == chosen
        assert "You have said 2 things. First: My name is Ada" in messages[-1]["result"]

    async def test_killed_before_it_had_a_transcript_a_session_is_missing_and_its_id_free(
        self, connect: Connect, model: FaultyModel, home: Path
    ) -> None:
        chosen = str(uuid.uuid4())
        async with connect(session_id=chosen) as cli:
            await cli.say("lost")
            await cli.until(is_init)
            cli.process.kill()
        assert transcript(home, chosen) is None
        assert get_session_info(chosen) is None  # which is how to tell beforehand

        model.reset()
        with pytest.raises(ResultError) as refused:
            async with connect(resume=chosen):
                pass  # it does not come this far, so there is no init
        error = refused.value
        assert (error.subtype, error.terminal_reason, error.exit_code) == ("error_during_execution", None, 1)
        assert model.requests == []

        async with connect(session_id=chosen) as cli:
            assert of(await cli.turn("found"), "init")[0]["session_id"] == chosen
        assert history(chosen)[0] == ("user", "found")

    async def test_init_comes_with_every_turn_before_anything_of_the_model(self, warm: Cli, session: str) -> None:
        for prompt in ("once", "again"):
            said = await warm.turn(prompt)  # the end of the lifecycle of a prompt before may still come
            first, *others = [message for message in said if message["type"] != "command_lifecycle"]
            assert is_init(first)
            assert first["session_id"] == session
            assert not any(is_init(message) for message in others)

    async def test_a_session_goes_on_in_the_file_below_its_cwd_or_in_the_one_file_elsewhere(
        self, connect: Connect, home: Path
    ) -> None:
        """Whatever the other project's directory is called; an empty file is none."""
        chosen = str(uuid.uuid4())
        async with connect(session_id=chosen) as cli:
            await cli.turn("one")
        own = transcript(home, chosen)
        assert own is not None
        elsewhere, third = home / "projects" / "-re stored", home / "projects" / "-third"
        elsewhere.mkdir(parents=True, exist_ok=True)
        stale = own.read_bytes()
        copy = elsewhere / own.name
        copy.write_bytes(stale)

        async with connect(resume=chosen) as cli:  # in its cwd's directory and elsewhere
            assert (await cli.turn("two"))[-1]["result"].startswith("You have said 2 things.")
        assert copy.read_bytes() == stale

        whole = own.read_bytes()
        own.write_bytes(b"")
        async with connect(resume=chosen) as cli:  # elsewhere alone
            assert (await cli.turn("from the copy"))[-1]["result"].startswith("You have said 2 things.")
        assert (own.read_bytes(), copy.read_bytes().startswith(stale)) == (b"", True)

        third.mkdir(exist_ok=True)  # now, as a CLI takes empty directories away at times
        (third / own.name).write_bytes(whole)
        with pytest.raises(ResultError, match="No conversation found"):
            async with connect(resume=chosen):  # in two others
                pass

    async def test_a_new_session_takes_no_notice_of_a_file_elsewhere(self, connect: Connect, home: Path) -> None:
        chosen = str(uuid.uuid4())
        elsewhere = home / "projects" / "-elsewhere"
        elsewhere.mkdir(parents=True, exist_ok=True)
        (elsewhere / f"{chosen}.jsonl").write_text("{}\n")
        async with connect(session_id=chosen) as cli:
            await cli.turn("a second file")
        assert len(list(home.glob(f"projects/*/{chosen}.jsonl"))) == 2

    async def test_an_empty_resume_is_silently_a_new_session(self, connect: Connect, model: FaultyModel) -> None:
        async with connect(resume="") as cli:
            assert (await cli.turn("hello"))[-1]["result"] == "You have said 1 thing: hello"

    async def test_resume_also_takes_a_title_so_only_uuids_of_ours_may_reach_it(
        self, connect: Connect, session: str
    ) -> None:
        known = fork_session(session, title="A title, not an ID").session_id
        async with connect(resume="A title, not an ID") as cli:
            assert of(await cli.turn("again"), "init")[0]["session_id"] == known

    async def test_a_slash_command_that_is_not_verbatim_moves_to_another_session(
        self, connect: Connect, model: FaultyModel
    ) -> None:
        chosen = str(uuid.uuid4())
        async with connect(session_id=chosen, verbatim_prompts=False) as cli:
            await cli.turn("hello")
            messages = await cli.turn("/clear")
            kinds = [message["type"] for message in messages]
            reset = messages[kinds.index("conversation_reset")]
            moved = next(message["session_id"] for message in messages if is_init(message))
            assert reset["session_id"] == chosen
            assert len({chosen, moved, reset["new_conversation_id"]}) == 3  # the reset's own ID is no session's
            assert (messages[-1]["session_id"], messages[-1].get("terminal_reason")) == (moved, None)
            assert {message["session_id"] for message in await cli.turn("after")} == {moved}
        assert model.requests[-1].prompts == ["after"]


# --- messages and prompts -------------------------------------------------------------------------------------------


class TestMessages:
    async def test_the_raw_messages_are_json_and_the_parsed_ones_have_lost_fields(self, warm: Cli) -> None:
        raw = await warm.turn("raw")
        assert json.loads(json.dumps(raw)) == raw
        assert {"system", "stream_event", "assistant", "result"} <= {message["type"] for message in raw}
        (assistant,) = [message for message in raw if message["type"] == "assistant"]
        assert assistant["timestamp"].endswith("Z")
        assert assistant["message"]["content"][0] == {"type": "text", "text": raw[-1]["result"], "citations": None}

        await warm.client.query("parsed")
        parsed = [message async for message in warm.client.receive_response()]
        (message,) = [message for message in parsed if isinstance(message, AssistantMessage)]
        lossy = dataclasses.asdict(message)
        assert not {"type", "timestamp", "message"} & set(lossy)
        assert "type" not in lossy["content"][0]
        assert isinstance(parsed[-1], ResultMessage)

    @pytest.mark.smoke
    async def test_the_private_attributes_that_the_sidecar_uses_are_there(self, warm: Cli) -> None:
        query, transport = warm.client._query, warm.client._transport
        assert query is not None
        with pytest.raises(anyio.WouldBlock):
            query._message_receive.receive_nowait()
        await warm.say("What has come can be taken without waiting")
        assert (await query._message_receive.receive())["type"] == "system"
        await warm.rest()
        process = getattr(transport, "_process")  # noqa: B009
        assert program(process.pid) == BUNDLED
        assert process.returncode is None
        assert callable(process.terminate)
        assert callable(process.kill)

    @pytest.mark.parametrize("prompt", ["/clear", "@/etc/passwd", "--resume", "!ls", "#note", "a\nb", "\t x "])
    async def test_a_verbatim_prompt_is_data(self, warm: Cli, session: str, model: FaultyModel, prompt: str) -> None:
        messages = await warm.turn(prompt)
        assert {message["session_id"] for message in messages} == {session}
        (request,) = model.requests
        assert request.prompts[-1] == prompt
        assert "root:" not in json.dumps(request.body["messages"])

    async def test_content_blocks_travel_as_they_are(self, warm: Cli, model: FaultyModel, home: Path) -> None:
        image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
        await warm.turn(
            [{"type": "text", "text": "What is this?"}, image, {"type": "text", "text": "And this: /clear"}]
        )
        first, second, third, note = model.requests[0].body["messages"][-1]["content"]
        assert (first["text"], second, third["text"].rstrip("\n")) == ("What is this?", image, "And this: /clear")
        # It keeps a copy of every image in a file: below CLAUDE_CODE_TMPDIR, or else in /tmp.
        assert note["text"].startswith(f"[Image: source: {home}/")

    async def test_the_blocks_of_one_api_reply_are_messages_that_share_its_id(
        self, warm: Cli, session: str, model: FaultyModel
    ) -> None:
        model.script(think())
        messages = [message for message in await warm.turn("think") if message["type"] == "assistant"]
        assert [message["message"]["content"][0]["type"] for message in messages] == ["thinking", "text"]
        kept: list[Any] = [m for m in get_session_messages(session) if m.type == "assistant"][-2:]
        assert [m.uuid for m in kept] == [message["uuid"] for message in messages]
        ids = {message["message"]["id"] for message in messages} | {m.message["id"] for m in kept}
        assert len(ids) == 1

    async def test_parallel_tool_calls_all_have_their_results_before_the_next_reply(
        self, warm: Cli, model: FaultyModel
    ) -> None:
        model.script(tools(("Bash", {"command": "echo a"}), ("Bash", {"command": "echo b"})))
        messages = [message for message in await warm.turn("two tools") if message["type"] in ("assistant", "user")]
        assert [message["type"] for message in messages] == ["assistant", "assistant", "user", "user", "assistant"]
        blocks = [message["message"]["content"][0] for message in messages]
        assert {block["id"] for block in blocks[:2]} == {block["tool_use_id"] for block in blocks[2:4]}

    async def test_usage_is_of_the_turn_and_the_cost_of_all_so_far(self, warm: Cli) -> None:
        first, second = (await warm.turn("one"))[-1], (await warm.turn("two"))[-1]
        assert second["total_cost_usd"] > first["total_cost_usd"] > 0
        assert 0 < second["usage"]["output_tokens"] < 2 * first["usage"]["output_tokens"]

    async def test_what_was_used_since_the_last_result_adds_up_to_the_total_over_a_resume_and_a_fork(
        self, connect: Connect, model: FaultyModel
    ) -> None:
        session, results = str(uuid.uuid4()), []
        async with connect(session_id=session) as cli:
            results += [(await cli.turn("one"))[-1], (await cli.turn("two"))[-1]]
        async with connect(resume=session) as cli:
            results += [(await cli.turn("three"))[-1]]
        async with connect(resume=session, fork_session=True) as cli:
            results += [(await cli.turn("four"))[-1]]
        used = [one for result in results for one in result["model_usage_since_last_result"].values()]
        assert sum(one["costUSD"] for one in used) == pytest.approx(results[-1]["total_cost_usd"])
        (total,) = results[-1]["modelUsage"].values()
        assert sum(one["outputTokens"] for one in used) == total["outputTokens"] > 0

    async def test_all_turns_of_a_process_are_parts_of_the_trace_in_its_environment(
        self, options: Callable[..., ClaudeAgentOptions], connect: Connect, model: FaultyModel
    ) -> None:
        given, another = (f"00-{digit * 32}-{digit * 16}-01" for digit in "ab")
        async with connect(env={**options().env, **CLI_TRACES, "TRACEPARENT": given}) as cli:
            await cli.turn("one")
            # Neither takes effect: the one is for the CLI's own cloud, the other for some variables alone.
            await cli.client._transport.write(  # type: ignore[union-attr]
                json.dumps({"type": "update_environment_variables", "variables": {"TRACEPARENT": another}}) + "\n"
            )
            await cli.say("two", uuid=str(uuid.uuid4()), trace_context=another)
            await cli.rest()
        assert [request.headers["traceparent"][:35] for request in model.requests] == [given[:35]] * 2

    async def test_a_line_over_the_buffer_size_raises(self, connect: Connect, model: FaultyModel) -> None:
        model.script(big(100_000))
        async with connect(max_buffer_size=64 << 10) as cli:
            with pytest.raises(CLIJSONDecodeError):
                await cli.turn("a lot")


# --- stopping -------------------------------------------------------------------------------------------------------


class TestStopping:
    async def test_an_interrupt_ends_the_turn_and_keeps_what_was_said(
        self, warm: Cli, session: str, model: FaultyModel
    ) -> None:
        model.script(hold(3))
        await warm.say("stop me")
        await warm.until(is_delta, times=3)
        assert outcome(await warm.interrupted()) == (True, "error_during_execution", "aborted_streaming")
        await model.gone()
        assert history(session)[-3:] == [
            ("user", "stop me"),
            ("assistant", "You have said "),
            ("user", "[Request interrupted by user]"),
        ]
        # The marker and the next prompt go to the API as one message.
        await warm.turn("next")
        last = model.requests[-1].body["messages"][-1]["content"]
        assert [block["text"] for block in last] == ["[Request interrupted by user]\n", "next"]

    async def test_an_interrupt_in_a_tool_ends_the_tool(
        self, warm: Cli, session: str, model: FaultyModel, tmp_path: Path
    ) -> None:
        begun = tmp_path / "pid"
        model.script(tool("Bash", {"command": f"echo $$ > {begun}.new && mv {begun}.new {begun} && exec sleep 60"}))
        await warm.say("use the tool")
        await eventually(begun.exists, "the tool has not begun")
        with watching(int(begun.read_text())) as ends_within:
            assert outcome(await warm.interrupted()) == (True, "error_during_execution", "aborted_tools")
            assert await ends_within(5)
        kinds = [what for _, what in history(session)[-4:]]
        assert kinds == ["use the tool", "tool_use", "tool_result", "[Request interrupted by user for tool use]"]

    async def test_an_interrupt_while_the_api_is_silent_ends_the_turn_too(self, warm: Cli, model: FaultyModel) -> None:
        model.script(silent())
        await warm.say("anybody?")
        await model.requested()
        assert outcome(await warm.interrupted()) == (True, "error_during_execution", "aborted_streaming")
        await model.gone()

    async def test_an_interrupt_at_init_is_heard(self, warm: Cli, model: FaultyModel) -> None:
        model.script(hold(0))
        await warm.say("never mind")
        await warm.until(is_init)
        assert outcome(await warm.interrupted()) == (True, "error_during_execution", "aborted_streaming")

    async def test_a_warm_process_may_lose_an_interrupt_that_comes_before_init(
        self, warm: Cli, model: FaultyModel
    ) -> None:
        async def outlives_an_interrupt() -> bool:
            model.default = hold(0)
            await warm.say("never mind")
            await warm.client.interrupt()  # is answered either way
            model.default = Behaviour()
            model.release()
            return bool((await warm.rest())[-1]["terminal_reason"] == "completed")

        # Mostly it does; once in twenty says that it can.
        assert any([await outlives_an_interrupt() for _ in range(20)])

    async def test_a_cold_process_hears_an_interrupt_that_comes_before_init(
        self, connect: Connect, model: FaultyModel
    ) -> None:
        async with connect() as cli:
            await cli.say("never mind")
            assert (await cli.interrupted())["terminal_reason"] == "aborted_streaming"
        assert model.requests == []

    async def test_an_idle_process_may_be_interrupted_for_nothing(self, warm: Cli) -> None:
        await warm.client.interrupt()
        assert (await warm.turn("still there?"))[-1]["terminal_reason"] == "completed"

    async def test_disconnected_after_its_result_a_process_is_gone_within_a_second(
        self, connect: Connect, model: FaultyModel, home: Path
    ) -> None:
        async with connect() as cli:
            await cli.turn("hello")
            entry = home / "sessions" / f"{cli.pid}.json"
            assert entry.exists()
            with watching(cli.pid) as ends_within:
                async with asyncio.timeout(1):
                    await cli.close()
                assert await ends_within(0)
        assert not entry.exists()  # an orderly end takes the registry's entry along


class TestOrphans:
    async def test_the_registry_tells_pid_session_and_start_of_a_live_process(
        self, warm: Cli, session: str, home: Path
    ) -> None:
        entry = json.loads((home / "sessions" / f"{warm.pid}.json").read_text())
        assert (entry["pid"], entry["sessionId"]) == (warm.pid, session)
        assert entry["procStart"] == started(warm.pid)

    async def test_a_killed_process_leaves_its_entry_and_a_session_that_can_be_resumed(
        self, connect: Connect, model: FaultyModel, home: Path
    ) -> None:
        chosen = str(uuid.uuid4())
        async with connect(session_id=chosen) as cli:
            await cli.turn("a whole answer")
            model.default = hold(3)
            await cli.say("half an answer")
            await cli.until(is_delta, times=3)
            entry = home / "sessions" / f"{cli.pid}.json"
            cli.process.kill()
            with pytest.raises(ProcessError) as ended:
                await cli.rest()
            assert ended.value.exit_code == -9
        assert entry.exists()
        # What was said of the answer is lost, and so may be its prompt: the CLI writes some 100 ms behind.
        assert [what for who, what in history(chosen) if who == "assistant"] == [
            "You have said 1 thing: a whole answer"
        ]
        model.reset()
        async with connect(resume=chosen) as cli:
            assert "First: a whole answer; last: next" in (await cli.turn("next"))[-1]["result"]

    @pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is part of util-linux")
    @pytest.mark.parametrize("guarded", [True, False], ids=["under setpriv it dies", "by itself it lives on"])
    async def test_when_its_parent_is_killed_in_mid_turn(
        self, options: Callable[..., ClaudeAgentOptions], model: FaultyModel, tmp_path: Path, *, guarded: bool
    ) -> None:
        wrapper = tmp_path / "claude"
        wrapper.write_text(f'#!/bin/sh\nexec setpriv --pdeathsig TERM -- {shlex.quote(str(BUNDLED))} "$@"\n')
        wrapper.chmod(0o700)
        given = options(cli_path=str(wrapper) if guarded else None)
        model.script(Behaviour(text="Let me see.", tools=(("Bash", {"command": "true"}),), hold_after=1))

        parent = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-c",
                PARENT,
                json.dumps({"env": given.env, "cwd": given.cwd, "cli_path": given.cli_path}),
            ),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert parent.stdout is not None
            async with asyncio.timeout(SECONDS):
                pid = int(await parent.stdout.readline())
            with watching(pid) as ends_within:
                assert program(pid) == BUNDLED
                await (await model.requested()).holding()
                parent.kill()
                await parent.wait()
                if guarded:
                    await model.gone()
                    assert await ends_within(1)
                else:
                    model.release()
                    await model.requested(2)  # it ran the tool, and called the model again
        finally:
            if parent.returncode is None:
                parent.kill()
                await parent.wait()


# A parent that asks its CLI something, says the CLI's PID, and waits for its end.
PARENT = """
import asyncio, json, sys
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKClient

async def main():
    options = ClaudeAgentOptions(
        tools=["Bash"], allowed_tools=["Bash"], setting_sources=[], permission_mode="dontAsk", **json.loads(sys.argv[1])
    )
    async with ClaudeSDKClient(options) as client:
        print(client._transport._process.pid, flush=True)
        await client.query("hello")
        async for _ in client.receive_messages():
            pass

asyncio.run(main())
"""


# --- forks ----------------------------------------------------------------------------------------------------------


class TestForks:
    async def test_a_fork_with_a_message_holds_the_parents_messages_up_to_the_one_named(
        self, connect: Connect, warm: Cli, session: str, home: Path
    ) -> None:
        for prompt in ("one", "two", "three"):
            await warm.turn(prompt)
        file, child = transcript(home, session), str(uuid.uuid4())
        assert file is not None
        before, messages = file.read_bytes(), get_session_messages(session)
        kept = messages[:-2]  # up to the answer to "two"
        async with connect(resume=session, fork_session=True, session_id=child, resume_session_at=kept[-1].uuid) as cli:
            turn = await cli.turn("another way")
        assert {message["session_id"] for message in turn} == {child}
        forked = get_session_messages(child)
        assert [(m.uuid, m.message) for m in forked[:-2]] == [(m.uuid, m.message) for m in kept]
        assert [what for who, what in history(child) if who == "user"][-2:] == ["two", "another way"]
        assert file.read_bytes() == before

    async def test_a_fork_without_a_message_copies_under_new_uuids_while_the_parent_is_live(
        self, warm: Cli, session: str, home: Path, model: FaultyModel
    ) -> None:
        await warm.turn("before the fork")
        file = transcript(home, session)
        assert file is not None
        before, messages = file.read_bytes(), get_session_messages(session)
        child = fork_session(session, up_to_message_id=messages[-1].uuid).session_id
        copied = get_session_messages(child)
        assert [(m.type, m.message) for m in copied] == [(m.type, m.message) for m in messages]
        assert not {m.uuid for m in copied} & {m.uuid for m in messages}
        assert file.read_bytes() == before
        assert (await warm.turn("after the fork"))[-1]["terminal_reason"] == "completed"
        assert get_session_messages(child) == copied

    @pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
    async def test_a_fork_without_a_message_loses_all_up_to_a_line_separator(
        self, separated: tuple[Cli, str], model: FaultyModel, separator: str
    ) -> None:
        """A defect of the SDK, which splits transcripts by `str.splitlines()`: where this fails, it has been mended."""
        cli, parent = separated
        for prompt in ("before", f"a{separator}b", "after"):
            await cli.turn(prompt)
        assert [what for who, what in history(parent) if who == "user"][-3:] == ["before", f"a{separator}b", "after"]
        assert [what for who, what in history(fork_session(parent).session_id) if who == "user"] == ["after"]


class TestReading:
    async def test_the_session_functions_read_the_config_dir_of_this_process(
        self, warm: Cli, session: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert get_session_info(session) is not None
        assert get_session_messages(session)
        monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
        assert get_session_info(session) is None
        assert get_session_messages(session) == []
        with pytest.raises(FileNotFoundError):
            fork_session(session)

    async def test_a_session_can_be_told_from_its_file_as_from_its_id(
        self, warm: Cli, session: str, home: Path, tmp_path: Path
    ) -> None:
        """The private functions that the sidecar uses: the public one takes the first file that it comes to."""
        file = transcript(home, session)
        assert file is not None
        assert session_info(file) == get_session_info(session) is not None
        for content in ("", "garbage\n"):
            other = tmp_path / file.name
            other.write_text(content)
            assert session_info(other) is None

    @pytest.mark.parametrize(
        ("left", "resumed", "known"),
        [
            ("user", True, True),
            ("user, long", True, False),
            ("attachment", True, False),
            ("assistant", True, False),
            ("user, of a subagent", False, False),
            ("queue-operation", False, False),
            ("last-prompt", False, True),
            ("custom-title", False, True),
        ],
    )
    async def test_the_cli_resumes_whatever_has_a_message_and_the_sdk_knows_what_has_a_title(
        self, connect: Connect, warm: Cli, session: str, home: Path, left: str, resumed: bool, known: bool
    ) -> None:
        """Neither knows of the other: the sidecar looks for a message itself."""
        await warm.turn("hello")
        file = transcript(home, session)
        assert file is not None
        there = [json.loads(line) for line in file.read_bytes().splitlines()]
        notes = ({"type": "last-prompt", "lastPrompt": "hello"}, {"type": "custom-title", "customTitle": "A title"})
        entry = next(entry for entry in (*there, *notes) if entry["type"] == left.partition(",")[0])
        if left == "user, long":
            entry["message"]["content"] = "x" * 100_000
        elif left == "user, of a subagent":
            entry["isSidechain"] = True
        other = str(uuid.uuid4())
        copy = file.with_name(f"{other}.jsonl")
        copy.write_text(json.dumps({**entry, "sessionId": other}, separators=(",", ":")) + "\n")
        assert (get_session_info(other) is not None) == known
        assert (session_info(copy) is not None) == resumed
        if resumed:
            async with connect(resume=other) as cli:
                assert (await cli.turn("hello"))[-1]["session_id"] == other
        else:
            with pytest.raises(ResultError):
                async with connect(resume=other) as cli:
                    await cli.turn("hello")

    @pytest.mark.parametrize(("seconds", "again", "known"), [(4, False, True), (6, False, False), (6, True, True)])
    async def test_a_link_into_nothing_is_followed_to_what_was_said_just_before_or_the_model_forgets(
        self, connect: Connect, warm: Cli, session: str, home: Path, seconds: int, again: bool, known: bool
    ) -> None:
        """Five seconds before. An entry that is there again takes the place of the first."""
        await warm.turn("hello")
        file = transcript(home, session)
        assert file is not None
        prompts = (json.loads(line) for line in file.read_bytes().splitlines() if b'"uuid"' in line)
        prompt = next(entry for entry in prompts if entry["type"] == "user")
        other, nowhere, first, second = (str(uuid.uuid4()) for _ in range(4))

        def said(text: str, name: str, parent: str | None, at: int) -> Json:
            links = {
                "uuid": name,
                "parentUuid": parent,
                "sessionId": other,
                "timestamp": f"2026-01-01T00:00:{at:02}.000Z",
            }
            return {**prompt, **links, "message": {"role": "user", "content": text}}

        entries = [said("before", first, None, 0), said("after", second, nowhere, seconds)]
        if again:
            entries.append(said("after", second, first, seconds))
        copy = file.with_name(f"{other}.jsonl")
        copy.write_text("".join(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries))
        async with connect(resume=other) as cli:
            text = (await cli.turn("now"))[-1]["result"]
        assert ("First: before" in text) == known
        assert ("First: after" in text) != known


# --- a failing API --------------------------------------------------------------------------------------------------


class TestApiErrors:
    @pytest.mark.parametrize(
        ("status", "name"), [(401, "authentication_failed"), (500, "server_error"), (529, "overloaded")]
    )
    async def test_an_error_is_retried_as_often_as_it_may_be_and_then_reported(
        self, warm: Cli, model: FaultyModel, status: int, name: str
    ) -> None:
        model.default = fail(status)
        *messages, result = await warm.turn("please")
        (retry,) = of(messages, "api_retry")
        assert (retry["attempt"], retry["max_retries"]) == (1, 1)
        assert (retry["error_status"], retry["error"]) == (status, name)
        assert 0 < retry["retry_delay_ms"] < 1000
        assert outcome(result) == (True, "success", "api_error")  # the subtype says nothing
        assert result["api_error_status"] == status
        assert len(model.requests) == 2

    async def test_a_prompt_that_failed_stays_in_the_history(self, warm: Cli, model: FaultyModel) -> None:
        model.default = fail(400)
        await warm.turn("failed")
        model.reset()
        await warm.turn("next")
        assert model.requests[0].prompts[-2:] == ["failed", "next"]

    async def test_a_bad_request_is_tried_again_without_a_word(self, warm: Cli, model: FaultyModel) -> None:
        model.default = fail(400)
        *messages, result = await warm.turn("please")
        assert of(messages, "api_retry") == []
        assert (outcome(result), result["api_error_status"]) == ((True, "success", "api_error"), 400)
        assert len(model.requests) > 1

    async def test_a_request_too_large_has_a_reason_of_its_own(self, warm: Cli, model: FaultyModel) -> None:
        model.default = fail(413)
        *messages, result = await warm.turn("please")
        assert of(messages, "api_retry") == []
        assert result["is_error"]
        assert (result["api_error_status"], result["terminal_reason"]) == (413, "image_error")

    async def test_a_short_retry_after_is_the_least_delay_of_the_retry(self, warm: Cli, model: FaultyModel) -> None:
        model.script(fail(429, retry_after=1))
        *messages, result = await warm.turn("please")
        (retry,) = of(messages, "api_retry")
        assert (retry["error_status"], retry["error"]) == (429, "rate_limit")
        assert 1000 <= retry["retry_delay_ms"] < 2000
        assert result["terminal_reason"] == "completed"

    async def test_a_long_retry_after_fails_at_once_and_reaches_nobody(self, warm: Cli, model: FaultyModel) -> None:
        model.script(fail(429, retry_after=4242424))  # long enough to be in no UUID
        *messages, result = await warm.turn("please")
        assert of(messages, "api_retry") == []
        assert (result["api_error_status"], result["terminal_reason"]) == (429, "api_error")
        assert "4242424" not in json.dumps([*messages, result])

    async def test_a_refused_connection_has_no_status(self, warm: Cli, model: FaultyModel) -> None:
        await model.hang_up()
        try:
            *messages, result = await warm.turn("anybody?")
        finally:
            await model.listen()
        assert [retry["error_status"] for retry in of(messages, "api_retry")] == [None]
        assert (outcome(result), result["api_error_status"]) == ((True, "success", "api_error"), None)

    async def test_after_a_cut_stream_the_answer_starts_over(self, warm: Cli, model: FaultyModel) -> None:
        model.script(Behaviour(hold_after=3, cut_after=3))
        await warm.say("cut me")
        messages = await warm.until(is_delta, times=3)  # what the CLI had before the cut
        model.release()
        messages += await warm.rest()
        events = [message["event"]["type"] for message in messages if message["type"] == "stream_event"]
        assert events.count("message_start") == 2
        assert len([message for message in messages if message["type"] == "assistant"]) == 1
        assert len(of(messages, "api_retry")) == 1
        assert messages[-1]["terminal_reason"] == "completed"
        text = "".join(m["event"]["delta"]["text"] for m in messages if is_delta(m))
        assert text == "You have said " + messages[-1]["result"]


# --- background work --------------------------------------------------------------------------------------------------


class TestWorkInTheBackground:
    @pytest.fixture
    async def working(self, _second: Cli, model: FaultyModel, home: Path) -> AsyncIterator[tuple[Cli, Path]]:
        """A CLI whose last turn has left a task in the background, and the file that ends it."""
        end = home / f"end-{uuid.uuid4()}"
        command = f"until [ -e {end} ]; do sleep 0.01; done"
        model.script(tool("Bash", {"command": command, "run_in_background": True, "description": "wait"}))
        seen = await _second.turn("Begin")
        assert [len(message["tasks"]) for message in of(seen, "background_tasks_changed")] == [1]
        yield _second, end
        end.touch()

    async def test_the_end_of_a_task_makes_the_cli_begin_a_turn_by_itself(self, working: tuple[Cli, Path]) -> None:
        cli, end = working
        end.touch()
        seen = await cli.rest()
        assert [message["tasks"] for message in of(seen, "background_tasks_changed")] == [[]]
        (init,) = of(seen, "init")
        assert "user_message_uuids" not in init
        assert "msg_lifecycle_v1" in init["capabilities"]
        assert seen[-1]["origin"]["kind"] == "task-notification"
        assert "user_message_uuids" not in seen[-1]

    async def test_a_turn_names_the_prompt_that_it_answers(self, warm: Cli) -> None:
        prompt = str(uuid.uuid4())
        await warm.say("Hello", uuid=prompt)
        seen = await warm.rest()
        (init,) = of(seen, "init")
        assert init["user_message_uuids"] == seen[-1]["user_message_uuids"] == [prompt]
        assert "origin" not in seen[-1]
        lives = [(m["command_uuid"], m["state"]) for m in seen if m["type"] == "command_lifecycle"]
        assert lives == [(prompt, "queued"), (prompt, "started")]
        assert get_session_messages(init["session_id"])[-2].uuid == prompt

    @pytest.mark.parametrize("priority", ["later", None])
    async def test_only_a_prompt_that_may_come_later_has_a_turn_of_its_own_beside_one_in_a_tool(
        self, working: tuple[Cli, Path], model: FaultyModel, home: Path, priority: str | None
    ) -> None:
        cli, end = working
        gate, prompt = home / f"gate-{uuid.uuid4()}", str(uuid.uuid4())
        model.script(tool("Bash", {"command": f"until [ -e {gate} ]; do sleep 0.01; done", "description": "wait"}))
        end.touch()
        await cli.until(lambda message: message["type"] == "assistant")  # it is about to use its tool
        await cli.say("While it works", uuid=prompt, **({"priority": priority} if priority else {}))
        await cli.until(lambda message: message.get("command_uuid") == prompt)
        gate.touch()
        by_itself = (await cli.rest())[-1]
        assert by_itself["origin"]["kind"] == "task-notification"
        if priority is None:
            assert by_itself["user_message_uuids"] == [prompt]  # there will be no other answer
            return
        assert "user_message_uuids" not in by_itself
        assert (await cli.rest())[-1]["user_message_uuids"] == [prompt]
