"""The pictures of the page in `docs/`, made anew: python -m tests.screenshots.

The sidecar, the CLI and the browser are real; what the model says is written here.
"""

import asyncio
import tempfile
from pathlib import Path

from playwright.async_api import Page, ViewportSize, async_playwright, expect

from tests.browser import OPTIONS, need_browser
from tests.faults import FaultyModel, say, tool
from tests.modes import WARM
from tests.server import Sidecar

DOCS = Path(__file__).parent.parent / "docs"
WIDE: ViewportSize = {"width": 1280, "height": 800}
PLAN = """Three things before you book:

1. **When.** May and October are mild; August is full.
2. **Where.** Stay near a metro station: the hills are steeper than the map says.
3. **How.** The train from the airport takes 20 minutes."""
BY_TRAIN = """By train it takes a day:

- Leave in the morning, change in Hendaye.
- The last stretch follows the coast. Sit on the **left**.

```
07:12  Paris
11:50  Hendaye   change
19:40  Lisbon
```"""
BY_PLANE = """A flight takes two and a half hours. With the way to both airports it comes to about six.

- Mornings are cheaper, and on time more often.
- From the airport the metro goes to the centre."""


async def _ask(page: Page, text: str) -> None:
    await page.get_by_role("textbox", name="Message").fill(text)
    await page.get_by_role("button", name="Send").click()
    await expect(page.locator(".note").first).to_have_text("Answered.")


async def _edit(page: Page, prompt: str, text: str) -> None:
    await page.locator(".message.user", has_text=prompt).get_by_role("button", name="Edit").click()
    await page.locator("form.beside textarea").fill(text)
    await page.get_by_role("button", name="Ask in a fork").click()
    await expect(page.locator(".note").first).to_have_text("Answered.")


async def _pictures(sidecar: Sidecar, model: FaultyModel, page: Page) -> None:
    await page.goto(f"{sidecar.http.base_url}/ui#resource=ada&thread=trip")
    model.script(tool("Bash", {"command": "cat notes/lisbon.txt"}), say(PLAN))
    await _ask(page, "Plan a week in Lisbon. My notes are in a file.")
    model.script(say(BY_PLANE))
    await _ask(page, "How do I get there?")
    model.script(say(BY_TRAIN))
    await _edit(page, "How do I get there?", "How do I get there by train?")
    await page.get_by_role("button", name="Checkpoint").click()
    await page.get_by_label("Name").fill("Before booking")
    await page.get_by_role("button", name="Keep this point").click()
    await expect(page.locator("#tree .node")).to_have_count(3)
    await page.locator(".pager").scroll_into_view_if_needed()
    await page.mouse.move(0, 0)
    await page.screenshot(path=DOCS / "page.png")
    await page.locator("#tree [data-thread=trip]").get_by_role("button", name="Compare").click()
    await expect(page.locator(".common")).to_have_count(2)
    await page.emulate_media(color_scheme="dark")
    await page.mouse.move(0, 0)
    await page.screenshot(path=DOCS / "page-compare.png")


async def main() -> None:
    """Write `docs/page.png` and `docs/page-compare.png`."""
    with tempfile.TemporaryDirectory() as place:
        home = Path(place) / "home"
        agents = Path(place) / "agents.toml"
        agents.write_text('[default]\ntools = ["Bash"]\nallowed_tools = ["Bash"]\n')
        notes = home / "workspace" / "notes"
        notes.mkdir(parents=True)
        (notes / "lisbon.txt").write_text("A week, two people, no car.\n")
        async with FaultyModel() as model, async_playwright() as playwright:
            env = {"ANTHROPIC_BASE_URL": model.url, "ANTHROPIC_API_KEY": "test", "HOME": place}
            async with Sidecar(home, {**env, **WARM}, "--agents", str(agents), forked=False) as sidecar:
                browser = await playwright.chromium.launch(executable_path=need_browser(), args=OPTIONS)
                await _pictures(sidecar, model, await browser.new_page(viewport=WIDE))
                await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
