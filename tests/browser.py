"""A browser, where there is one: Debian's headless Chromium, which playwright of PyPI drives."""

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from playwright.async_api import Browser, BrowserContext, Page, async_playwright, expect

_NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, _NAMES)), None)
INSTALL = "apt-get install --no-install-recommends chromium-headless-shell"
SECONDS = 20
OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What the policy has refused, and what would have been run of somebody's message.
_WATCH = """
window.refused = [];
addEventListener("securitypolicyviolation", (event) => refused.push(`${event.violatedDirective} ${event.blockedURI}`));
"""

expect.set_options(timeout=SECONDS * 1000)


def need_browser() -> str:
    """Its program. Where there is none a test is left out, and says so; where CI is set it fails."""
    if CHROMIUM is None:
        assert "CI" not in os.environ, INSTALL
        pytest.skip(f"LEFT OUT for want of a browser: {INSTALL}")
    return CHROMIUM


class Tabs:
    """Makes tabs, each a person of its own: with no storage, and nothing in a cache."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.contexts: list[BrowserContext] = []
        self.errors: list[str] = []  # of scripts, and dialogs that one has opened

    async def __call__(self, url: str, **options: Any) -> Page:
        """A tab that shows this."""
        context = await self._browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.contexts.append(context)
        context.set_default_timeout(SECONDS * 1000)
        await context.add_init_script(_WATCH)
        page = await context.new_page()
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        await page.goto(url)
        return page

    async def close(self) -> None:
        """Close them; nothing must have gone wrong in any."""
        for context in self.contexts:
            for page in context.pages:
                self.errors += await page.evaluate("window.refused ?? []")
            await context.close()
        assert self.errors == []


@pytest.fixture(scope="session")
async def _browser() -> AsyncIterator[Browser]:
    program = need_browser()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        await browser.close()


@pytest.fixture
async def tab(_browser: Browser) -> AsyncIterator[Callable[..., Awaitable[Page]]]:
    """Open tabs; each test ends with a look at what went wrong in them."""
    tabs = Tabs(_browser)
    yield tabs
    await tabs.close()
