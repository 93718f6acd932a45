"""A turn is a span where OpenTelemetry was set up, and a part of the trace that its caller names."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultyModel
from tests.modes import CLI_TRACES, KEPT, WARM
from tests.server import SECONDS, Sidecar, a_moment

CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{CALLER[0]}-{CALLER[1]}-01"}
# Python imports it at start, as it does that of `opentelemetry-instrument`.
SET_UP = """
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
provider = TracerProvider()
out = open({file!r}, "a")
exporter = ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(indent=None) + "\\n")
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
"""
Span = dict[str, Any]


@pytest.fixture
def spans_file(tmp_path: Path) -> Path:
    """Where a sidecar that is `traced` puts its spans, one JSON object a line."""
    return tmp_path / "spans"


@pytest.fixture
def traced(tmp_path: Path, spans_file: Path) -> dict[str, str]:
    """The environment of a sidecar whose operator has set OpenTelemetry up."""
    spans_file.touch()
    return program_at_start(tmp_path, SET_UP.format(file=str(spans_file)))


@pytest.fixture(scope="module")
async def _shared(
    _model: FaultyModel, model_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Sidecar]:
    place = tmp_path_factory.mktemp("traced")
    env = program_at_start(place, SET_UP.format(file=str(place / "spans")))
    async with Sidecar(place / "home", model_env | KEPT | env) as sidecar:
        yield sidecar


@pytest.fixture
def shared(_shared: Sidecar, model: FaultyModel) -> tuple[Sidecar, Path]:
    """A sidecar that is traced, for tests with threads of their own; and where the spans of this test will be."""
    spans_file = _shared.home.with_name("spans")
    spans_file.write_text("")
    return _shared, spans_file


def program_at_start(place: Path, program: str) -> dict[str, str]:
    """The environment in which Python begins with this program."""
    (place / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])}


async def spans(sidecar: Sidecar, file: Path, count: int) -> list[Span]:
    """The spans, once there are so many."""
    async with asyncio.timeout(SECONDS):
        while len(found := file.read_text().splitlines()) < count:
            await a_moment()
    assert len(found) == count
    return [json.loads(line) for line in found]


async def say(sidecar: Sidecar, thread: str, message: str) -> dict[str, Any]:
    """Run a turn as a caller who is traced; the answer."""
    body = {"thread_id": thread, "resource_id": "alice", "message": message}
    headers = {"accept": "application/json", **TRACEPARENT}
    answer: dict[str, Any] = (await sidecar.http.post("/v1/chat", json=body, headers=headers)).json()
    return answer


async def test_a_turn_is_a_span_by_the_conventions_in_the_trace_of_its_caller(shared: tuple[Sidecar, Path]) -> None:
    sidecar, spans_file = shared
    answer = await say(sidecar, "my-thread", "My name is Ada")
    (span,) = await spans(sidecar, spans_file, 1)
    assert span["name"] == "invoke_agent default"
    assert span["kind"] == "SpanKind.INTERNAL"
    assert span["context"]["trace_id"] == f"0x{CALLER[0]}"
    assert span["parent_id"] == f"0x{CALLER[1]}"
    assert span["status"]["status_code"] == "UNSET"
    (used,) = answer["result"]["model_usage_since_last_result"].values()
    attributes = span["attributes"]
    assert attributes.pop("gen_ai.response.time_to_first_chunk") > 0
    assert attributes == {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.agent.name": "default",
        "gen_ai.conversation.id": answer["session"]["sdk_session_id"],
        "gen_ai.usage.input_tokens": used["inputTokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.cache_creation.input_tokens": 0,
        "gen_ai.usage.output_tokens": used["outputTokens"],
        "session_sidecar.turn.id": answer["session"]["turn_id"],
        "session_sidecar.turn.status": "completed",
        "session_sidecar.turn.outcome": "started",
        "session_sidecar.turn.origin": "message",
        "session_sidecar.turn.process": "cold",
    }
    assert [event["name"] for event in span["events"]] == ["running", "init", "first_delta"]
    times = [span["start_time"], *(event["timestamp"] for event in span["events"]), span["end_time"]]
    assert times == sorted(times)
    for private in ("my-thread", "alice", "Ada"):
        assert private not in spans_file.read_text()


async def test_a_turn_without_a_caller_to_name_is_a_trace_of_its_own(shared: tuple[Sidecar, Path], thread: str) -> None:
    sidecar, spans_file = shared
    for _ in range(2):
        await sidecar.say(thread, "Hello")
    first, second = await spans(sidecar, spans_file, 2)
    assert first["parent_id"] is second["parent_id"] is None
    assert first["context"]["trace_id"] != second["context"]["trace_id"]


async def test_a_turn_that_fails_is_an_error_of_its_problems_code(shared: tuple[Sidecar, Path], thread: str) -> None:
    sidecar, spans_file = shared
    assert (await say(sidecar, thread, "[[fail 400]]"))["code"] == "api_error"
    (span,) = await spans(sidecar, spans_file, 1)
    assert span["status"] == {"status_code": "ERROR", "description": "api_error"}
    assert span["attributes"]["error.type"] == "api_error"


async def test_what_the_agent_does_by_itself_belongs_to_the_turn_that_it_stems_from(
    a_sidecar: Callable[..., Sidecar], traced: dict[str, str], spans_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "agents.toml").write_text('[default]\ntools = ["Bash"]\nallowed_tools = ["Bash"]\n')
    async with a_sidecar("--agents", str(tmp_path / "agents.toml"), **KEPT, **traced) as sidecar:
        call = {"command": "sleep 0.5", "run_in_background": True}
        await say(sidecar, "t1", f"[[tool Bash {json.dumps(call)}]]")
        turn, background = await spans(sidecar, spans_file, 2)
    assert background["attributes"]["session_sidecar.turn.origin"] == "background"
    assert background["parent_id"] == turn["context"]["span_id"]


async def test_a_process_of_one_turn_is_told_of_the_turns_span(
    a_sidecar: Callable[..., Sidecar], model: FaultyModel, traced: dict[str, str], spans_file: Path
) -> None:
    async with a_sidecar(**traced, **CLI_TRACES) as sidecar:
        await say(sidecar, "t1", "Hello")
        await say(sidecar, "t1", "Hello again")
        await spans(sidecar, spans_file, 2)
    told = [request.headers["traceparent"] for request in model.requests]
    assert [header.split("-")[1] for header in told] == [CALLER[0]] * 2


async def test_a_process_that_is_kept_takes_no_later_turn_for_a_part_of_the_first(
    a_sidecar: Callable[..., Sidecar], model: FaultyModel, traced: dict[str, str]
) -> None:
    async with a_sidecar(**traced, **CLI_TRACES, **WARM) as sidecar:
        for thread in ("t1", "t2"):
            await say(sidecar, thread, "Hello")
            await say(sidecar, thread, "Hello again")
    traces = {request.headers["traceparent"].split("-")[1] for request in model.requests}
    assert len(traces) == 4
    assert CALLER[0] not in traces


async def test_where_nothing_is_set_up_the_callers_trace_is_handed_on_as_it_is(
    a_sidecar: Callable[..., Sidecar], model: FaultyModel
) -> None:
    async with a_sidecar(**CLI_TRACES) as sidecar:
        assert (await say(sidecar, "t1", "Hello"))["status"] == "completed"
        assert (await say(sidecar, "t2", "Hello"))["status"] == "completed"
    assert {request.headers["traceparent"].split("-")[1] for request in model.requests} == {CALLER[0]}


async def test_a_traceparent_that_is_none_is_let_be(shared: tuple[Sidecar, Path], thread: str) -> None:
    sidecar, spans_file = shared
    body = {"thread_id": thread, "resource_id": "alice", "message": "Hello"}
    for nonsense in ("00-nonsense", f"00-{'0' * 32}-{'0' * 16}-01", "x" * 4000):
        answer = await sidecar.http.post("/v1/chat", json=body, headers={"traceparent": nonsense})
        assert answer.status_code == 200
    assert [span["parent_id"] for span in await spans(sidecar, spans_file, 3)] == [None] * 3
