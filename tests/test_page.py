"""The page `/ui` as a person meets it, in a browser: what it shows, what can be done on it, and what it never does."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from playwright.async_api import Locator, Page, expect
from starlette.applications import Starlette

from session_sidecar.api.access.tokens import TokenFile, make_token
from session_sidecar.app import create_app
from session_sidecar.settings import Settings
from session_store import ThreadKey
from session_store.sqlite import SqliteSessionMap
from tests.faults import FaultyModel, hold, say, tool, tools
from tests.server import SECONDS, Sidecar
from tests.terminal import relay
from tests.test_library import host_of, served
from tests.transcripts import messages, metadata, repeat, settled, texts

Make = Callable[..., Sidecar]
Tab = Callable[..., Awaitable["Page"]]
FILES = Path(__file__).parent.parent / "session_sidecar" / "api" / "calls" / "page"


class Ui:
    """What a person looks for on the page."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.pane = page.locator(".pane").first
        self.said = self.pane.locator(".log > .message:not(.pending)")
        self.prompts = self.pane.locator(".log > .message.user:not(.pending)")
        self.answers = self.pane.locator(".log > .message.assistant:not(.draft)")
        self.composer = self.pane.locator(".composer textarea")
        self.note = self.pane.locator(".note")
        self.tree = page.locator("#tree")
        self.threads = page.locator("#list .entry")
        self.form = self.pane.locator("form.beside")
        self.pager = self.pane.locator(".pager")

    @property
    def state(self) -> dict[str, str]:
        """What the URL says."""
        return {name: values[0] for name, values in parse_qs(urlsplit(self.page.url).fragment).items()}

    async def send(self, text: str) -> None:
        """Write a message and press Enter."""
        await self.composer.fill(text)
        await self.composer.press("Enter")

    async def press(self, name: str, within: Locator | None = None) -> None:
        """Press a button."""
        await (within or self.page.locator("body")).get_by_role("button", name=name, exact=True).click()

    async def answered(self, text: str) -> None:
        """Wait until the last answer is this, and the turn has ended."""
        await expect(self.answers.last).to_contain_text(text)
        await expect(self.note).to_have_text("Answered.")

    async def at(self, **state: str) -> None:
        """Wait until the URL says so."""
        wanted = re.compile(".*".join(re.escape(urlencode({name: value})) for name, value in state.items()))
        await expect(self.page).to_have_url(wanted)


@pytest.fixture
def ui(tab: Tab) -> Callable[..., Awaitable[Ui]]:
    """Open the page, at a thread or at none."""

    async def opened(sidecar: Sidecar | str, thread: str = "", *, resource: str = "alice", **more: Any) -> Ui:
        state = {"resource": resource, "thread": thread, **more.pop("state", {})}
        fragment = urlencode({name: value for name, value in state.items() if value})
        address = sidecar if isinstance(sidecar, str) else str(sidecar.http.base_url)
        page = Ui(await tab(f"{address.rstrip('/')}/ui#{fragment}", **more))
        await expect(page.page.locator("#feed")).to_have_text("live")
        return page

    return opened


Open = Callable[..., Awaitable[Ui]]


async def fork(sidecar: Sidecar, parent: str, thread: str, **fields: Any) -> dict[str, Any]:
    response = await sidecar.post("/v1/chat/fork", thread, from_thread_id=parent, **fields)
    assert response.status_code in {200, 201}, response.text
    made: dict[str, Any] = response.json()
    return made


async def parent_of(sidecar: Sidecar, thread: str) -> tuple[str | None, str | None]:
    mapping = (await sidecar.session(thread)).json()
    return mapping["parent_thread_id"], mapping["parent_message_id"]


# The twelve things that it is for


async def test_the_tree_marks_the_current_branch_and_follows_what_happens_elsewhere(
    ui: Open, sidecar: Sidecar, original: str, thread: str, another_thread: str, model: FaultyModel
) -> None:
    await fork(sidecar, original, thread)
    page = await ui(sidecar, thread)
    current = page.tree.locator("[aria-current=page]")
    await expect(current).to_have_attribute("title", thread)
    await expect(page.tree).to_contain_text("after “You have said 2 things.")
    await fork(sidecar, thread, another_thread)
    other = page.tree.locator(f"[data-thread='{another_thread}']")
    await expect(other).to_be_visible()
    async with sidecar.stream(another_thread, "[[hold 3]]") as stream:
        await stream.until_text()
        await expect(other).to_contain_text("running")
        model.release()
        await stream.rest()
    await expect(other).not_to_contain_text("running")
    await sidecar.at_rest()
    changed = await sidecar.http.patch(
        "/v1/session", json={"thread_id": another_thread, "resource_id": "alice", "title": "By another way"}
    )
    assert changed.status_code == 200
    await expect(other).to_contain_text("By another way")
    await sidecar.http.delete("/v1/session", params={"thread_id": another_thread, "resource_id": "alice"})
    await expect(other).to_have_count(0)


async def test_a_fork_at_any_message_without_a_prompt_calls_no_model(
    ui: Open, sidecar: Sidecar, original: str, thread: str, model: FaultyModel
) -> None:
    asked = len(model.requests)
    page = await ui(sidecar, original)
    await page.press("Fork here", page.answers.first)
    await page.form.get_by_label("New thread").fill(thread)
    await page.press("Fork", page.form)
    await page.at(thread=thread)
    await expect(page.said).to_have_count(2)
    assert await parent_of(sidecar, thread) == (original, (await messages(sidecar, original))[1]["uuid"])
    assert len(model.requests) == asked


async def test_a_fork_with_a_prompt_streams_its_answer_below_what_it_has_inherited(
    ui: Open, sidecar: Sidecar, original: str, thread: str, model: FaultyModel
) -> None:
    model.script(hold(3))
    page = await ui(sidecar, original)
    await page.press("Fork before", page.prompts.nth(1))
    await page.form.get_by_label("Message").fill("I like coffee")
    await page.form.get_by_label("New thread").fill(thread)
    await page.press("Fork", page.form)
    await expect(page.pane.locator(".draft")).to_contain_text("You have said")
    await expect(page.prompts).to_have_text([re.compile("My name is Ada"), re.compile("I like coffee")])
    model.release()
    await page.answered("You have said 2 things. First: My name is Ada; last: I like coffee")
    await expect(page.said).to_have_count(4)
    await expect(page.prompts).to_have_text([re.compile("My name is Ada"), re.compile("I like coffee")])
    assert await parent_of(sidecar, thread) == (original, (await messages(sidecar, original))[1]["uuid"])


async def test_a_prompt_is_edited_by_asking_another_in_a_fork_that_ends_before_it(
    ui: Open, sidecar: Sidecar, original: str
) -> None:
    page = await ui(sidecar, original)
    before = await sidecar.history(original)
    await page.press("Edit", page.prompts.nth(1))
    await expect(page.form.get_by_label("Message")).to_have_value("I like tea")
    await page.form.get_by_label("Message").fill("I like milk")
    await page.press("Ask in a fork", page.form)
    await page.answered("You have said 2 things. First: My name is Ada; last: I like milk")
    parent, message = await parent_of(sidecar, page.state["thread"])
    assert (parent, message) == (original, (await messages(sidecar, original))[1]["uuid"])
    assert await sidecar.history(original) == before


async def test_the_first_prompt_is_edited_in_a_new_conversation_and_the_page_says_so(
    ui: Open, sidecar: Sidecar, original: str, thread: str
) -> None:
    page = await ui(sidecar, original)
    await page.press("Edit", page.prompts.first)
    await expect(page.form).to_contain_text("this begins a new conversation")
    await page.form.get_by_label("Message").fill("My name is Eve")
    await page.form.get_by_label("New thread").fill(thread)
    await page.press("Begin anew", page.form)
    await page.answered("You have said 1 thing: My name is Eve")
    assert await parent_of(sidecar, thread) == (None, None)


async def test_an_answer_is_asked_for_once_more_in_a_fork(ui: Open, sidecar: Sidecar, original: str) -> None:
    page = await ui(sidecar, original)
    await page.press("Regenerate", page.answers.nth(1))
    await page.answered("You have said 2 things. First: My name is Ada; last: I like tea")
    assert page.state["thread"] != original
    assert await parent_of(sidecar, page.state["thread"]) == (original, (await messages(sidecar, original))[1]["uuid"])


async def test_an_answer_that_runs_is_joined_after_a_reload_and_stopped_by_escape(
    ui: Open, sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(hold(3))
    page = await ui(sidecar, thread)
    await page.send("Hello")
    draft = page.pane.locator(".draft")
    await expect(draft).to_contain_text("You have said")
    await page.page.reload()
    await expect(draft).to_contain_text("You have said")
    await expect(page.prompts).to_have_count(1)
    await page.composer.press("Escape")
    await expect(page.note).to_contain_text("Stopped.")
    await expect(page.answers).to_contain_text("You have said")
    await expect(page.pane.get_by_role("button", name="Send")).to_be_visible()
    assert [who for who, _ in await sidecar.history(thread)][:2] == ["user", "assistant"]


async def test_between_the_branches_of_a_message_one_goes_back_and_forth(
    ui: Open, sidecar: Sidecar, thread: str, another_thread: str
) -> None:
    """A copy (a fork without a message) has other uuids than its parent for the same messages."""
    for text in ("My name is Ada", "I like tea"):
        await sidecar.say(another_thread, text)
    await sidecar.at_rest()
    copy = f"{thread}-copy"
    await fork(sidecar, another_thread, copy)
    at = (await messages(sidecar, copy))[1]["uuid"]
    await fork(sidecar, copy, thread, message="I like coffee", at_message_id=at)
    await fork(sidecar, copy, f"{thread}-empty", at_message_id=at)
    page = await ui(sidecar, thread)
    await expect(page.pager.get_by_text("2/3")).to_be_visible()
    await expect(page.pager.locator("xpath=..")).to_contain_text("I like coffee")
    await page.press("Previous branch")
    await page.at(thread=copy)
    await expect(page.pager.get_by_text("1/3")).to_be_visible()
    await expect(page.pager.locator("xpath=..")).to_contain_text("I like tea")
    await expect(page.page.get_by_role("button", name="Next branch")).to_be_focused()
    await page.page.keyboard.press("Enter")
    await page.at(thread=thread)
    await expect(page.page.get_by_role("button", name="Next branch")).to_be_focused()


@pytest.fixture
async def with_tools(a_sidecar: Make, tmp_path: Path) -> AsyncIterator[Sidecar]:
    agents = tmp_path / "agents.toml"
    agents.write_text('[default]\ntools = ["Agent", "Bash"]\nallowed_tools = ["Agent", "Bash"]\n')
    async with a_sidecar("--agents", str(agents)) as sidecar:
        yield sidecar


async def test_tool_calls_are_folded_with_their_input_result_and_error_and_subagents_are_inside(
    ui: Open, with_tools: Sidecar, model: FaultyModel
) -> None:
    aside = {
        "description": "look",
        "prompt": "Look around",
        "subagent_type": "general-purpose",
        "run_in_background": False,
    }
    model.script(
        tools(("Bash", {"command": "echo one"}), ("Bash", {"command": "echo two >&2; false"})),
        tool("Agent", aside),
        tool("Bash", {"command": "echo inside"}),
        say("I see a room."),
        say("All done."),
    )
    page = await ui(with_tools, "t1")
    await page.send("Do it")
    await page.answered("All done.")
    good, bad, agent = (page.pane.locator(".log > .message > .tool").nth(number) for number in range(3))
    await expect(good.locator("> summary")).to_have_text("Bash echo one done")
    await expect(good.get_by_text("Result", exact=True)).to_be_hidden()
    await good.locator("> summary").click()
    await expect(good.locator("pre").first).to_contain_text('"command": "echo one"')
    await expect(good.locator("pre").last).to_have_text("one")
    await expect(bad.locator("> summary")).to_contain_text("error")
    await bad.locator("> summary").click()
    await expect(bad.locator("pre").last).to_contain_text("two")
    await agent.locator("> summary").click()
    await expect(agent.locator(".nested > .user")).to_contain_text("Look around")
    await expect(agent.locator(".nested .tool > summary")).to_have_text("Bash echo inside done")
    await expect(agent.locator("> div > .code").last).to_contain_text("I see a room.")
    # As the history has it: the same calls, without what the subagent said to itself.
    await page.page.reload()
    await expect(page.pane.locator(".log > .message > .tool")).to_have_count(3)
    await expect(page.pane.locator(".log > .message > .tool").first).to_contain_text("done")


async def test_what_is_inherited_is_dimmed_and_the_parent_is_a_link(
    ui: Open, sidecar: Sidecar, original: str, thread: str
) -> None:
    await fork(sidecar, original, thread)
    await sidecar.say(thread, "And now?")
    page = await ui(sidecar, thread)
    await expect(page.pane.locator(".message.inherited")).to_have_count(4)
    await expect(page.said).to_have_count(6)
    await page.press(original, page.pane.locator(".facts"))
    await page.at(thread=original)
    await expect(page.said).to_have_count(4)
    await expect(page.pane.locator(".message.inherited")).to_have_count(0)


async def test_a_checkpoint_is_named_and_tagged_and_deleted_only_after_a_question(
    ui: Open, sidecar: Sidecar, original: str, thread: str
) -> None:
    page = await ui(sidecar, original)
    await page.press("Checkpoint")
    await page.form.get_by_label("Name").fill("Before lunch")
    await page.form.get_by_label("New thread").fill(thread)
    await page.press("Keep this point")
    kept = page.tree.locator(f"[data-thread='{thread}']")
    await expect(kept).to_contain_text("Before lunch")
    assert page.state["thread"] == original
    await kept.locator(".name").click()
    await page.at(thread=thread)
    await page.press("Name and tag")
    await page.form.get_by_label("Tag").fill("lunch")
    await page.press("Save")
    await expect(page.pane.locator(".facts .tag")).to_have_text("lunch")
    known = await metadata(sidecar, thread)
    assert (known["title"], known["tag"]) == ("Before lunch", "lunch")
    question = page.page.get_by_role("dialog")
    for answer in ("Cancel", "Delete"):
        assert (await sidecar.session(thread)).status_code == 200
        await page.pane.get_by_text("More").click()
        await page.press("Delete…")
        await expect(question).to_contain_text("Before lunch")
        await page.press(answer, question)
        await expect(question).to_have_count(0)
    await page.at(thread=original)
    await expect(kept).to_have_count(0)
    assert (await sidecar.session(thread)).status_code == 404


async def test_two_branches_are_side_by_side_from_where_they_part(
    ui: Open, sidecar: Sidecar, original: str, thread: str
) -> None:
    copy = f"{thread}-copy"
    await fork(sidecar, original, copy)
    first = (await messages(sidecar, copy))[1]["uuid"]
    await fork(sidecar, copy, thread, message="I like coffee", at_message_id=first)
    page = await ui(sidecar, thread)
    await page.tree.locator(f"[data-thread='{copy}']").get_by_role("button", name="Compare").click()
    await page.at(thread=thread, compare=copy)
    left, right = page.page.locator(".pane").nth(0), page.page.locator(".pane").nth(1)
    for pane, said in ((left, "I like coffee"), (right, "I like tea")):
        await expect(pane.locator(".common")).to_contain_text("2 messages in common")
        await expect(pane.locator(".message:visible")).to_have_count(2)
        await expect(pane.locator(".message:visible").first).to_contain_text(said)
    boxes = [await pane.bounding_box() for pane in (left, right)]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    await page.press("Show them", left)
    await expect(left.locator(".message:visible")).to_have_count(4)
    await page.press("Close", right)
    await expect(right).to_have_count(0)


async def test_a_branch_tells_its_tokens_and_a_turn_its_cost(ui: Open, sidecar: Sidecar, thread: str) -> None:
    page = await ui(sidecar, thread)
    costs = []
    for number, text in enumerate(("Hello", "Hello again"), 1):
        await page.send(text)
        bill = page.pane.locator(".bill")
        await expect(bill).to_have_count(number)
        found = re.search(r"([\d,]+) tokens in, (\d+) out · \$(\d+\.\d{4}) · ", await bill.last.inner_text())
        assert found is not None
        costs.append(float(found[3]))
    assert costs[0] > 0
    assert costs[1] < 2 * costs[0]  # it is the turn's and not the sum
    usage = (await metadata(sidecar, thread))["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
    await expect(page.pane.locator(".facts")).to_contain_text(f"{read:,} tokens in, {usage['output_tokens']:,} out")


async def test_a_search_and_whose_threads_they_are_are_in_the_url_and_go_back_with_it(
    ui: Open, sidecar: Sidecar, thread: str, another_thread: str
) -> None:
    for name, resource, text in ((thread, "carol", "A red bicycle"), (another_thread, "dave", "A blue boat")):
        await sidecar.say(name, text, resource_id=resource)
    page = await ui(sidecar, resource="carol")
    await expect(page.threads).to_have_text([re.compile("A red bicycle")])
    await page.threads.first.click()
    await page.at(resource="carol", thread=thread)
    await expect(page.said).to_have_count(2)
    await page.page.get_by_label("Search").fill("nothing of the kind")
    await expect(page.page.locator("#list")).to_contain_text("Nothing was found.")
    await page.page.get_by_label("Search").fill("BICYCLE")
    await expect(page.threads).to_have_count(1)
    assert page.state == {"resource": "carol", "thread": thread, "q": "BICYCLE"}
    await page.page.reload()
    await expect(page.page.get_by_label("Search")).to_have_value("BICYCLE")
    await expect(page.said).to_have_count(2)
    await page.page.get_by_label("Search").fill("")
    await page.page.get_by_label("Resource").fill("dave")
    await page.page.get_by_label("Resource").press("Enter")
    await expect(page.threads).to_have_text([re.compile("A blue boat")])
    await page.page.go_back()
    await page.at(resource="carol", thread=thread)
    await expect(page.threads).to_have_text([re.compile("A red bicycle")])
    await expect(page.said).to_have_count(2)


async def test_what_came_is_shown_raw_and_goes_out_as_curl_markdown_and_jsonl(
    ui: Open, sidecar: Sidecar, thread: str
) -> None:
    page = await ui(sidecar, thread, permissions=["clipboard-read", "clipboard-write"])
    await page.send("It's `code`")
    await page.answered("You have said 1 thing")
    await page.pane.get_by_text("More").click()
    await page.press("Raw events")
    kinds = page.pane.locator(".raw li b")
    await expect(kinds.first).to_have_text("session")
    await expect(kinds.last).to_have_text("end")
    await page.composer.fill("And 'now'?")
    await page.press("Copy as curl")
    await expect(page.note).to_have_text("Copied.")
    command = await page.page.evaluate("navigator.clipboard.readText()")
    process = await asyncio.create_subprocess_shell(
        f"{command} -s", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(SECONDS):
        told, _ = await process.communicate()
    assert b"last: And 'now'?" in told
    expected = await messages(sidecar, thread)
    for kind, name in (("Markdown", "md"), ("JSONL", "jsonl")):
        async with page.page.expect_download() as download:
            await page.pane.get_by_text("More").click()
            await page.press(f"Export {kind}")
        file = await download.value
        assert file.suggested_filename == f"{thread}.{name}"
        text = Path(await file.path()).read_text()
        if name == "jsonl":
            assert [json.loads(line) for line in text.splitlines()] == expected
        else:
            assert re.findall(r"^## (.*)$", text, re.M) == ["You", "Claude"] * 2
            assert all(said in text for said in texts(expected))


# Whatever is said is text


HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> [link](javascript:alert(3)) javascript:alert(4)\n\n"
    "- <svg onload=alert(5)>\n- `<b>code</b>`\n\n```html\n<iframe srcdoc='<script>alert(6)</script>'></iframe>\n```"
)


async def test_a_message_full_of_scripts_is_text_everywhere(ui: Open, with_tools: Sidecar, model: FaultyModel) -> None:
    thread = '"><script>alert(7)</script>'
    script = "echo '<script>alert(8)</script>'"
    model.script(tool("Bash", {"command": script}), say(HOSTILE))
    page = await ui(with_tools, thread)
    await page.send(HOSTILE)
    await page.answered("<script>alert(1)</script>")
    await expect(page.prompts.locator(".said")).to_have_text(HOSTILE, use_inner_text=True)
    await expect(page.answers.last.locator("pre")).to_contain_text("<iframe srcdoc=")
    await page.pane.locator(".tool > summary").click()
    await expect(page.pane.locator(".tool pre").last).to_have_text("<script>alert(8)</script>")
    await page.press("Name and tag")
    await page.form.get_by_label("Title").fill("<img src=x onerror=alert(9)>")
    await page.press("Save")
    await expect(page.pane.locator("h2")).to_have_text("<img src=x onerror=alert(9)>")
    await page.press("Fork here", page.answers.last)
    await page.press("Fork", page.form)
    await expect(page.tree.locator(".node")).to_have_count(2)
    await page.page.reload()
    await expect(page.answers.last).to_contain_text("<script>alert(1)</script>")
    made = "script, iframe, svg, img, a, b > b, [onerror], [onload]"
    assert await page.page.locator(f"main :is({made}), nav :is({made})").count() == 0
    # `tab` has the rest: no dialog, no error and nothing that the policy had to refuse.


def test_nothing_on_the_page_makes_markup_of_a_string_or_comes_from_elsewhere() -> None:
    script, html = (FILES / "page.js").read_text(), (FILES / "index.html").read_text()
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|ContextualFragment|\beval\b|Function\("
    assert not re.search(sinks + r"|srcdoc|setHTML|\bimport\b(?!\.meta)", script)
    assert re.findall(r'(?:src|href)="([^"]*)"', html)[1:] == ["ui/page.css", "ui/page.js"]
    assert not re.search(r"<style|style=|\son\w+=|<script(?! type=\"module\" src=)", html)
    assert not re.search(r"@import|url\(|https?:", (FILES / "page.css").read_text())


# Much of it


async def test_of_a_thousand_messages_the_last_are_there_first_and_the_others_when_they_are_wanted(
    ui: Open, sidecar: Sidecar, original: str, thread: str
) -> None:
    await fork(sidecar, original, thread)
    transcript = await settled(sidecar, thread)
    transcript.write_bytes(repeat(transcript.read_bytes().splitlines(), 1000))
    page = await ui(sidecar, thread)
    await expect(page.said).to_have_count(50)
    await expect(page.said.last).to_be_in_viewport()
    assert await page.page.locator("main *").count() < 1500
    await page.pane.get_by_role("button", name="Earlier messages").scroll_into_view_if_needed()
    await expect(page.said).not_to_have_count(50)
    shown = await page.said.count()
    assert shown in {100, 150}
    await page.composer.press_sequentially("Typing is not held up")
    await expect(page.composer).to_have_value("Typing is not held up")
    await page.composer.press("Enter")
    await page.answered("things. First: My name is Ada; last: Typing is not held up")
    assert await page.said.count() >= shown + 2
    await expect(page.said.last).to_be_in_viewport()


async def test_a_family_of_two_hundred_is_a_tree_that_stays_usable(ui: Open, home: Path, a_sidecar: Make) -> None:
    sessions = await SqliteSessionMap.open(home / "sidecar.db")
    root = await sessions.get(ThreadKey("t1", "alice"))
    assert root is not None
    point = "00000000-0000-4000-8000-000000000000"
    for number in range(199):
        parent = "t1" if number % 3 else f"f{number - 1:03}" if number else "t1"
        name = f"{number:08}-0000-4000-8000-000000000000"
        await sessions.add(ThreadKey(f"f{number:03}", "alice"), name, parent_thread_id=parent, parent_message_id=point)
    await sessions.close()
    async with a_sidecar() as sidecar:
        page = await ui(sidecar, "t1")
        await expect(page.tree.locator(".node")).to_have_count(200)
        await expect(page.said).to_have_count(2)
        await page.send("Still quick?")
        await page.answered("You have said 2 things. First: My name is Ada; last: Still quick?")
        await expect(page.tree.locator(".node")).to_have_count(200)
        await page.tree.locator(".name").last.click()
        await expect(page.pane.get_by_role("alert")).to_contain_text("session_missing")
        await expect(page.tree.locator("[aria-current=page]")).to_have_attribute("title", page.state["thread"])


# What goes wrong


async def test_an_answer_goes_on_over_a_connection_that_breaks(
    ui: Open, sidecar: Sidecar, thread: str, model: FaultyModel
) -> None:
    model.script(hold(3))
    async with relay(str(sidecar.http.base_url)) as (between, url):
        page = await ui(url, thread)
        await page.send("Hello")
        exchange = await model.requested()
        await exchange.holding()
        await expect(page.pane.locator(".draft")).to_contain_text("You have said")
        between.target = "http://127.0.0.1:9"
        between.cut()
        await expect(page.note).to_contain_text("The connection is lost.")
        await expect(page.page.locator("#feed")).to_have_text("offline")
        between.target = str(sidecar.http.base_url)
        exchange.release()
        await page.answered("You have said 1 thing: Hello")
        await expect(page.page.locator("#feed")).to_have_text("live")
        await expect(page.said).to_have_count(2)
        assert await page.answers.locator(".text").inner_text() == "You have said 1 thing: Hello"
    assert [who for who, _ in await sidecar.history(thread)] == ["user", "assistant"]
    assert b"last-event-id: " in between.sent.lower()


async def test_a_sidecar_that_was_restarted_in_mid_answer_is_found_again(
    ui: Open, a_sidecar: Make, model: FaultyModel
) -> None:
    model.script(hold(3))
    async with a_sidecar() as sidecar, relay(str(sidecar.http.base_url)) as (between, url):
        page = await ui(url, "t1")
        await page.send("Hello")
        await (await model.requested()).holding()
        await expect(page.pane.locator(".draft")).to_contain_text("You have said")
        sidecar.process.send_signal(9)
        await sidecar.wait()
        await expect(page.note).to_contain_text("The connection is lost.")
        await sidecar.restart()
        between.target = str(sidecar.http.base_url)
        await expect(page.pane.locator(".log .aside")).to_contain_text("What is here is what the transcript has.")
        await page.send("Are you there?")
        await page.answered("Are you there?")


async def test_what_is_refused_is_said_with_what_to_do_and_nothing_that_was_written_is_lost(
    ui: Open, sidecar: Sidecar, original: str, thread: str, model: FaultyModel
) -> None:
    await fork(sidecar, original, thread)
    page = await ui(sidecar, original)
    await page.press("Fork here", page.answers.first)
    await page.form.get_by_label("Message").fill("Is this kept?")
    await page.form.get_by_label("New thread").fill(thread)
    await page.press("Fork", page.form)
    await expect(page.pane.get_by_role("alert")).to_contain_text("thread_exists")
    await expect(page.form.get_by_label("Message")).to_have_value("Is this kept?")
    await page.press("Cancel", page.form)
    page = await ui(sidecar, thread)
    await page.send("[[fail 400]]")
    await expect(page.pane.get_by_role("alert")).to_contain_text("api_error")


# Who may see it, and where it is


async def test_a_token_is_asked_for_and_kept_in_this_tab_alone(
    ui: Open, tab: Tab, a_sidecar: Make, tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    text, known = make_token(["alice"])
    TokenFile(path).add(text, known)
    async with a_sidecar(SIDECAR_TOKENS_FILE=str(path)) as sidecar:
        sidecar.keep_secret(text)
        page = Ui(await tab(f"{sidecar.http.base_url}/ui#resource=alice&thread=t1"))
        question = page.page.get_by_role("dialog")
        await question.get_by_label("Token").fill("ssc_wrong")
        await page.press("Use it", question)
        await expect(question).to_contain_text("not known, or has expired")
        await question.get_by_label("Token").fill(text)
        await page.press("Use it", question)
        await page.send("My name is Alice")
        await page.answered("You have said 1 thing: My name is Alice")
        await page.page.reload()
        await expect(page.said).to_have_count(2)
        await expect(question).to_have_count(0)
        kept = await page.page.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage)]")
        assert kept == [0, "", [text]]
        assert text not in page.page.url
        await page.composer.fill("Hello")
        await page.press("Copy as curl")
        copied = page.page.get_by_role("dialog").get_by_label("Text to copy")
        await expect(copied).to_have_value(re.compile(r'"authorization: Bearer \$SIDECAR_TOKEN"'))
        assert text not in await copied.input_value()
        await page.press("Done")
        other = await page.page.context.new_page()
        await other.goto(page.page.url)
        await expect(other.get_by_role("dialog")).to_contain_text("asks for a token")
        await page.press("Forget token")
        await expect(question).to_contain_text("asks for a token")


async def test_it_is_not_there_where_the_operator_says_so(a_sidecar: Make) -> None:
    async with a_sidecar(SIDECAR_UI="off") as sidecar:
        nowhere = await sidecar.http.get("/nowhere")
        for path in ("/ui", "/ui/page.css", "/ui/page.js"):
            for method in ("GET", "POST"):
                refused = await sidecar.http.request(method, path)
                told = {name: value for name, value in refused.json().items() if name != "request_id"}
                assert told.items() <= nowhere.json().items()
                assert refused.status_code == 404


@pytest.mark.smoke
async def test_its_files_say_what_they_may_do_and_are_sent_once(sidecar: Sidecar) -> None:
    for path, kind in (("/ui", "text/html"), ("/ui/page.css", "text/css"), ("/ui/page.js", "text/javascript")):
        answer = await sidecar.http.get(path)
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= set(policy)
        assert {"require-trusted-types-for 'script'", "trusted-types 'none'", "frame-ancestors 'none'"} <= set(policy)
        again = await sidecar.http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.long
async def test_below_a_path_of_another_application_it_calls_what_is_there(ui: Open, tmp_path: Path) -> None:
    sidecar = create_app(Settings.load({}, home=tmp_path / "home", model="offline"))
    async with served(host_of(sidecar, Starlette)) as client:
        page = await ui(f"{client.base_url}/agents", "t1")
        await page.send("My name is Ada")
        await page.answered("You have said 1 thing: My name is Ada")
        assert urlsplit(page.page.url).path == "/agents/ui"
        await page.page.goto("about:blank")  # or the server waits for its streams


async def test_a_server_that_is_called_by_a_name_of_its_own_has_the_page_there(a_sidecar: Make) -> None:
    async with a_sidecar(SIDECAR_HOSTS="chat.test") as sidecar:
        body = {"thread_id": "t1", "resource_id": "alice"}
        port = sidecar.http.base_url.port
        for origin, status in (
            (f"https://chat.test:{port}", 404),
            ("https://evil.test", 403),
            ("https://chat.test", 403),
        ):
            headers = {"host": f"chat.test:{port}", "origin": origin}
            answer = await sidecar.http.post("/v1/chat/interrupt", json=body, headers=headers)
            assert answer.status_code == status, origin


# For everybody


async def test_from_an_empty_sidecar_to_a_forked_conversation_with_the_keyboard_alone(
    tab: Tab, a_sidecar: Make
) -> None:
    async with a_sidecar() as sidecar:
        page = Ui(await tab(f"{sidecar.http.base_url}/ui"))
        keyboard = page.page.keyboard
        await expect(page.composer).to_be_focused()
        await keyboard.type("My name is Ada")
        await keyboard.press("Enter")
        await page.answered("You have said 1 thing: My name is Ada")
        await expect(page.composer).to_be_focused()
        edit = page.prompts.get_by_role("button", name="Edit")
        for _ in range(12):
            await keyboard.press("Shift+Tab")
            if await edit.evaluate("node => node === document.activeElement"):
                break
        await keyboard.press("Tab")
        for _ in range(3):
            await keyboard.press("Tab")
            if await page.answers.get_by_role("button", name="Fork here").evaluate(
                "one => one === document.activeElement"
            ):
                break
        await keyboard.press("Enter")
        await expect(page.form.get_by_label("Message")).to_be_focused()
        await keyboard.type("I like tea")
        await keyboard.press("Enter")
        await page.answered("You have said 2 things. First: My name is Ada; last: I like tea")
        await expect(page.tree.locator(".node")).to_have_count(2)
        await keyboard.press("Tab")
        await keyboard.press("Escape")
        await page.page.locator("body").press("/")
        await expect(page.page.get_by_label("Search")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_at_375_pixels_nothing_is_cut_off_and_every_text_has_contrast(
    ui: Open, sidecar: Sidecar, original: str, thread: str, scheme: str
) -> None:
    await fork(sidecar, original, thread)
    await sidecar.say(thread, "word" * 100)
    page = await ui(sidecar, thread, viewport={"width": 375, "height": 740}, color_scheme=scheme)
    await expect(page.said).to_have_count(6)
    await expect(page.page.locator("#side")).to_be_hidden()
    await page.press("Fork here", page.answers.last)
    await expect(page.pane.locator(".message.inherited")).to_have_count(4)
    await expect(page.form).to_be_visible()
    assert await page.page.evaluate(WIDER_THAN_THE_SCREEN) == []
    assert await page.page.evaluate(TOO_FAINT) == []
    await page.press("Threads")
    await expect(page.page.locator("#side")).to_be_visible()
    assert await page.page.evaluate(WIDER_THAN_THE_SCREEN) == []
    assert await page.page.evaluate(TOO_FAINT) == []
    await page.tree.locator(f"[data-thread='{original}'] .name").click()
    await page.at(thread=original)
    await expect(page.page.locator("#side")).to_be_hidden()


WIDER_THAN_THE_SCREEN = """() => {
  const scrolls = (one) => getComputedStyle(one).overflowX === "auto" && one.scrollWidth > one.clientWidth;
  return [...document.querySelectorAll("body *")]
    .filter((one) => one.checkVisibility() && !one.closest("pre, .skip, textarea"))
    .filter((one) => one.getBoundingClientRect().right > innerWidth + 1 || scrolls(one))
    .map((one) => one.outerHTML.slice(0, 200));
}"""

# The contrast of each text that is seen, by WCAG 2: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
TOO_FAINT = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) =>
    [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
      .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const [r, g, b, a = 1] = parts(getComputedStyle(one).backgroundColor);
      if (a === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !one.checkVisibility() || one.closest(":disabled, .skip, datalist, noscript")) continue;
    const [a, b] = [light(parts(getComputedStyle(one).color)), light(ground(one))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(`${one.outerHTML.slice(0, 120)} ${(a + 0.05) / (b + 0.05)}`);
  }
  return faint;
}"""
