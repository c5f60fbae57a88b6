"""Headless Chromium for the tests of pages; modules take the fixtures over by assignment.

CI_BROWSER=1 makes a missing browser a failure instead of a skip.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest

from util.display.visdom_assets import static_dir, up_to_date

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
PATIENCE = 90  # seconds for what takes a second on an idle machine

# What visdom's page shows. One entry a curve: its name, its number of points, its last value,
# whether something of it is drawn.
CURVES = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
    const drawn = plot.querySelectorAll('.scatterlayer .trace path.js-line');
    return plot.data.map((curve, i) => [curve.name, curve.x.length, curve.y.at(-1),
                                        (drawn[i]?.getAttribute('d') ?? '').length > 10]);
})"""
PICTURES = """() => [...document.querySelectorAll('.content-text img')].map(
    image => image.complete ? image.naturalWidth : 0)"""


def unavailable(reason: str) -> None:
    if os.environ.get("CI_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        unavailable("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=FLAGS.split(), timeout=1000 * PATIENCE
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def visdom_assets() -> None:
    """Skip where visdom's page would stay blue."""
    static = static_dir()
    if static is None or not up_to_date(static):
        unavailable("visdom's page lacks files, see scripts/setup_visdom.sh")


@dataclass
class Watched:
    """A page with everything it asked for and complained about."""

    page: Any
    requests: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("websocket", lambda w: self.requests.append(w.url))
        self.page.on(
            "response", lambda r: r.status >= 400 and self.bad.append(f"{r.status} {r.url}")
        )
        self.page.on("pageerror", lambda e: self.bad.append(str(e)))
        self.page.on("requestfailed", lambda r: self.bad.append(f"failed {r.url}"))

    def check(self, url: str) -> None:
        """Nothing was asked of another machine, and nothing failed."""
        local = (url, url.replace("http:", "ws:"), "data:", "blob:")
        assert self.requests, "nothing was asked for"
        elsewhere = [r for r in self.requests if not r.startswith(local)]
        assert elsewhere == [], elsewhere
        assert self.bad == [], self.bad


@pytest.fixture
def watched(browser) -> Any:
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    yield Watched(page)
    page.close()
