"""What an operator sees at `/metrics`, and that the dashboard asks for what is there."""

import asyncio
import json
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import Metric

from session_sidecar.observe.metrics import MOST_NAMES, OTHER, Load, Metrics, Usage
from tests.faults import FaultyModel
from tests.figures import PREFIX, families, figure, labels_of, until
from tests.modes import KEPT, WARM
from tests.prometheus import need_prometheus, scraping
from tests.server import Sidecar

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "examples" / "grafana" / "dashboard.json").read_text())
LABELS = {"agent", "status", "outcome", "process", "code", "model", "kind"}
LABELS |= {"if_missing", "purpose", "result", "operation", "state"}


def complaints(text: str) -> str:
    """What Prometheus' own linter says of an exposition."""
    lint = subprocess.run(["promtool", "check", "metrics"], check=False, input=text, capture_output=True, text=True)
    return lint.stdout + lint.stderr


@pytest.fixture
async def counted(a_sidecar: Callable[..., Sidecar]) -> AsyncIterator[Sidecar]:
    """A sidecar that nobody else uses, with a spare that waits."""
    async with a_sidecar(**WARM) as sidecar:
        await until(sidecar, "processes", 1, state="spare")
        yield sidecar


async def every_kind(sidecar: Sidecar, model: FaultyModel, suffix: str = "") -> None:
    """A spare turn, a warm one, a cold one, a failed one, a refused one and one of a lost transcript."""
    one, fork, lost = f"one{suffix}", f"fork{suffix}", f"lost{suffix}"
    await sidecar.say(one, "My name is Ada")
    await sidecar.say(one, "I like tea")
    forked = await sidecar.post("/v1/chat/fork", fork, from_thread_id=one, message="Another way")
    assert forked.status_code == 200
    failed = await sidecar.chat(fork, "[[fail 400]]")
    assert failed.json()["code"] == "api_error"
    async with sidecar.stream(fork, "[[hold 1]]") as stream:
        await stream.until_text()
        assert (await sidecar.chat(fork, "Me too")).status_code == 409
        model.release()
        await stream.rest()
    await sidecar.say(lost, "Remember me")
    sidecar.transcript(await sidecar.session_id(lost)).unlink()
    await sidecar.say(lost, "Do you?")


@pytest.fixture(scope="module")
async def _after_all(
    _model: FaultyModel, model_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Sidecar, list[Metric]]]:
    _model.reset()
    async with Sidecar(tmp_path_factory.mktemp("counted") / "home", model_env | WARM) as sidecar:
        await until(sidecar, "processes", 1, state="spare")
        await every_kind(sidecar, _model)
        await until(sidecar, "turns_total", 7)
        yield sidecar, await families(sidecar)


@pytest.fixture
def after_all(_after_all: tuple[Sidecar, list[Metric]], model: FaultyModel) -> Sidecar:
    """A sidecar that has had a turn of every kind, once or more often; what is said to it is of every kind again."""
    return _after_all[0]


@pytest.fixture
def of_all(_after_all: tuple[Sidecar, list[Metric]]) -> Callable[..., float]:
    """Its figures when it had had each turn once, and no other: the sum of the samples that have these labels."""

    def total(name: str, **labels: str) -> float:
        samples = [sample for family in _after_all[1] for sample in family.samples]
        return sum(s.value for s in samples if s.name == PREFIX + name and labels.items() <= s.labels.items())

    return total


def test_turns_are_counted_by_how_they_ended_and_by_how_their_process_came(of_all: Callable[..., float]) -> None:
    assert of_all("turns_total", agent="default") == 7
    for outcome, process, status in (
        ("started", "spare", "completed"),
        ("resumed", "warm", "completed"),
        ("forked", "cold", "completed"),
        ("resumed", "warm", "failed"),
        ("resumed", "cold", "completed"),
        ("restarted", "cold", "completed"),
    ):
        labels = {"outcome": outcome, "process": process, "status": status}
        assert of_all("turns_total", **labels) >= 1, labels
    assert of_all("turns_total", status="failed") == 1
    assert of_all("turn_errors_total", code="api_error") == 1
    for stage in ("init", "first_delta"):
        assert of_all(f"turn_{stage}_seconds_count", process="cold") >= 2
        assert 0 < of_all(f"turn_{stage}_seconds_sum", process="warm") < 10
    assert of_all("turn_seconds_count") == 7


async def test_a_turn_costs_what_it_has_used_itself_also_after_a_resume_and_in_a_fork(
    a_sidecar: Callable[..., Sidecar],
) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.say("t1", "One")
        await sidecar.say("t1", "Two")
        fork = await sidecar.post("/v1/chat/fork", "t2", from_thread_id="t1", message="Three")
        # The CLI's own total goes on from turn to turn and into the fork, so the last one has all that was spent.
        result = fork.json()["result"]
        await until(sidecar, "turns_total", 3)
        assert await figure(sidecar, "cost_usd_total") == pytest.approx(result["total_cost_usd"])
        (used,) = result["modelUsage"].values()
        assert await figure(sidecar, "tokens_total", kind="input") == used["inputTokens"] > 0
        assert await figure(sidecar, "tokens_total", kind="output") == used["outputTokens"] > 0


async def test_a_refusal_is_counted_by_its_code(a_sidecar: Callable[..., Sidecar], model: FaultyModel) -> None:
    async with a_sidecar(SIDECAR_MAX_TURNS="1", SIDECAR_QUEUE_TURNS="0") as sidecar:
        for code in ("thread_busy", "queue_full", "too_many_turns"):
            assert await figure(sidecar, "problems_total", code=code) == 0
        async with sidecar.stream("t1", "[[hold 1]]") as stream:
            await stream.until_text()
            assert (await sidecar.chat("t2", "Me too")).status_code == 503
            assert (await sidecar.http.get("/v1/nothing")).status_code == 404
            assert (await sidecar.http.get("/version", headers={"host": "elsewhere"})).status_code == 421
            model.release()
            await stream.rest()
        assert await figure(sidecar, "problems_total", code="too_many_turns") == 1
        assert await figure(sidecar, "problems_total", code="not_found") == 1
        assert await figure(sidecar, "problems_total", code="forbidden_host") == 1
    async with a_sidecar(SIDECAR_QUEUE_TURNS="0") as sidecar:
        async with sidecar.stream("t1", "[[hold 1]]") as stream:
            await stream.until_text()
            assert (await sidecar.chat("t1", "Me too")).status_code == 409
            assert (await sidecar.chat("t1", "Me too", multitask_strategy="enqueue")).status_code == 429
            model.release()
            await stream.rest()
        assert await figure(sidecar, "problems_total", code="thread_busy") == 1
        assert await figure(sidecar, "problems_total", code="queue_full") == 1


async def test_what_there_is_at_the_moment_is_told_when_somebody_looks(counted: Sidecar, model: FaultyModel) -> None:
    held = await figure(counted, "replay_bytes")
    async with counted.stream("t1", "[[hold 1]]") as stream:
        await stream.until_text()
        assert await figure(counted, "turns_running") == 1
        waiting = asyncio.create_task(counted.say("t1", "Then me", multitask_strategy="enqueue"))
        await until(counted, "turns_queued", 1)
        model.release()
        await stream.rest()
    await waiting
    await until(counted, "turns_running", 0)
    assert await figure(counted, "turns_queued") == 0
    assert await figure(counted, "replay_bytes") > held
    await until(counted, "processes", 1, state="warm")
    await until(counted, "processes", 1, state="spare")


async def test_what_an_agent_has_left_in_the_background_is_a_process_of_its_own_kind(
    a_sidecar: Callable[..., Sidecar], model: FaultyModel, tmp_path: Path
) -> None:
    (tmp_path / "agents.toml").write_text('[default]\ntools = ["Bash"]\nallowed_tools = ["Bash"]\n')
    async with a_sidecar("--agents", str(tmp_path / "agents.toml"), **KEPT) as sidecar:
        call = {"command": "sleep 300", "run_in_background": True}
        await sidecar.say("t1", f"[[tool Bash {json.dumps(call)}]]")
        await until(sidecar, "processes", 1, state="background")
        assert await figure(sidecar, "processes", state="warm") == 0


@pytest.mark.usefixtures("home")
async def test_a_transcript_that_is_gone_is_counted_whatever_was_asked_for_then(
    a_sidecar: Callable[..., Sidecar],
) -> None:
    async with a_sidecar() as sidecar:
        for thread, if_missing, status in (("t1", "fail", 410), ("t2", "restart", 200)):
            assert await figure(sidecar, "missing_transcripts_total", if_missing=if_missing) == 0
            sidecar.transcript(await sidecar.session_id(thread)).unlink()
            answer = await sidecar.chat(thread, "Do you?", if_missing=if_missing)
            assert answer.status_code == status
            await until(sidecar, "missing_transcripts_total", 1, if_missing=if_missing)


async def test_starts_of_processes_are_counted_with_what_they_were_for(
    a_sidecar: Callable[..., Sidecar], tmp_path: Path
) -> None:
    (tmp_path / "agents.toml").write_text('[broken]\ncli_path = "/bin/false"\n')
    async with a_sidecar("--agents", str(tmp_path / "agents.toml"), SIDECAR_SPARE_PROCESSES="1") as sidecar:
        await until(sidecar, "process_starts_total", 1, purpose="ahead", result="started")
        await until(sidecar, "process_starts_total", 1, purpose="ahead", result="failed")
        answer = await sidecar.chat("t1", "Hello", agent="broken")
        assert answer.json()["code"] == "agent_start_failed"
        await until(sidecar, "process_starts_total", 1, purpose="turn", result="failed")
        assert await figure(sidecar, "process_starts_total", purpose="turn", result="started") == 0


async def test_each_statement_of_the_session_map_is_timed(a_sidecar: Callable[..., Sidecar]) -> None:
    async with a_sidecar() as sidecar:
        await sidecar.say("t1", "Hello")
        await sidecar.http.get("/v1/sessions")
        await sidecar.http.get("/readyz")
        await sidecar.http.delete("/v1/session", params={"thread_id": "t1", "resource_id": "alice"})
        for operation in ("get", "add", "replace", "remove", "page", "check"):
            assert await figure(sidecar, "store_statement_seconds_count", operation=operation) >= 1, operation
            assert 0 < await figure(sidecar, "store_statement_seconds_sum", operation=operation) < 5, operation


async def test_no_label_names_a_thread_a_resource_or_a_session(after_all: Sidecar) -> None:
    found = {name: labels for name, labels in labels_of(await families(after_all)).items() if name.startswith(PREFIX)}
    assert set().union(*found.values()) == LABELS
    text = (await after_all.http.get("/metrics")).text
    for private in ("alice", "lost", "Ada", await after_all.session_id("one")):
        assert private not in text


async def test_a_scrape_is_no_line_in_the_log(after_all: Sidecar) -> None:
    await after_all.http.get("/metrics")
    await after_all.http.get("/version")
    await after_all.until_logged("request", path="/version")
    assert not after_all.logged("request", path="/metrics")


def test_an_agent_that_is_none_and_those_beyond_the_hundredth_have_no_label_of_their_own() -> None:
    metrics = Metrics()
    summary: dict[str, Any] = {"status": "failed", "outcome": None, "process": None, "ms": {}}
    metrics.turn_ended({**summary, "agent": "invented", "code": "unknown_agent"}, {})
    for number in range(MOST_NAMES + 50):
        usage = {f"model-{number}": Usage(1, 1, 1, 1, 1.0)}
        metrics.turn_ended({**summary, "agent": f"agent-{number}", "code": None}, usage)
    metrics.turn_ended({**summary, "agent": "agent-0", "code": "unknown_agent"}, {})
    text = metrics.exposition().decode()
    turns = dict(re.findall(r'^session_sidecar_turns_total\{agent="([^"]+)".*\} (\S+)$', text, re.M))
    assert len(turns) == MOST_NAMES + 1
    assert (turns[OTHER], turns["agent-0"]) == ("51.0", "2.0")
    assert len(set(re.findall(r'^session_sidecar_cost_usd_total\{.*model="([^"]+)"', text, re.M))) == MOST_NAMES + 1


def test_two_applications_in_one_process_have_figures_of_their_own() -> None:
    one, two = Metrics(), Metrics()
    one.watch(lambda: Load(1, 0, 0, 0, 0, 0))
    two.watch(lambda: Load(0, 0, 0, 0, 0, 0))
    one.problem("thread_busy")
    assert b'problems_total{code="thread_busy"} 1.0' in one.exposition()
    assert b'problems_total{code="thread_busy"} 0.0' in two.exposition()
    assert b"turns_running 0.0" in two.exposition()


async def test_the_page_lists_every_figure_with_its_labels_and_no_other(after_all: Sidecar) -> None:
    found = await families(after_all)
    labels = labels_of(found)
    rows = []
    for family in found:
        if family.name.startswith(PREFIX):
            name = family.name + ("_total" if family.type == "counter" else "")
            named = ", ".join(f"`{label}`" for label in sorted(labels[family.name]))
            rows.append(f"| `{name}` | {family.type} | {named} | {family.documentation} |")
    page = (ROOT / "docs" / "metrics.md").read_text()
    listed = re.findall(rf"^\| `{PREFIX}.*\|$", page, re.M)
    assert listed == rows, "the table should be:\n" + "\n".join(rows)


async def test_every_query_of_the_dashboard_has_figures_in_prometheus(
    after_all: Sidecar, model: FaultyModel, tmp_path: Path
) -> None:
    need_prometheus()
    scraped = await after_all.http.get("/metrics")
    assert complaints(scraped.text) == ""
    queries = [(target["expr"], target["legendFormat"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert len(queries) >= len(DASHBOARD["panels"]) > 10
    async with scraping(str(after_all.http.base_url), tmp_path) as prometheus:
        await prometheus.until(f"sum({PREFIX}turns_total) >= 7")
        await every_kind(after_all, model, suffix="-again")
        await until(after_all, "turns_total", 14)
        await prometheus.until(f"sum({PREFIX}turns_total) >= 14")
        for query, legend in queries:
            whole = query.replace("$__rate_interval", "5m").replace("$__range", "6h").replace("$instance", ".*")
            assert "$" not in whole
            for series in await prometheus.until(whole):
                for label in re.findall(r"\{\{(\w+)\}\}", legend):
                    assert series["metric"].get(label), (query, legend, series)
        page = (ROOT / "docs" / "metrics.md").read_text()
        alerts = page.partition("Worth an alert:\n\n```\n")[2].partition("\n```")[0].splitlines()
        assert len(alerts) > 3
        for alert in alerts:
            await prometheus.until(alert.rpartition(" > ")[0])
