"""The live page in a real browser: curves, images and labels, and that they come back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import browser_helpers
from tests.browser_helpers import CURVES, PATIENCE, PICTURES
from tests.visdom_helpers import CYCLE_GAN_LOSSES, LABELS, MadeUpTraining, Server, wait_for
from util.display.visdom_logger import VisdomLogger

browser, watched = browser_helpers.browser, browser_helpers.watched
visdom_assets = browser_helpers.visdom_assets

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("visdom_assets")]


@dataclass
class LiveRun:
    """A run that the page shows; the tests know nothing else about where it comes from."""

    url: str
    losses: tuple[str, ...]
    labels: tuple[str, ...]
    picture_width: int
    points: Callable[[], int]  # of each curve, so far
    advance: Callable[[], Any]  # one more point and new images
    restart_server: Callable[[], Any]  # killed, and an empty one started


@pytest.fixture
def live_run(tmp_path: Path):
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    history = [MadeUpTraining.record(i) for i in range(1, 301)]
    logger = VisdomLogger("http://127.0.0.1", server.port, title="made up", history=history)
    training = MadeUpTraining(logger, size=64, images=300)

    def restart() -> None:
        server.kill()
        server.start()

    training.step(pictures=True)
    yield LiveRun(
        url=f"http://127.0.0.1:{server.port}/",
        losses=CYCLE_GAN_LOSSES,
        labels=LABELS,
        picture_width=64,
        points=lambda: training.images,
        advance=lambda: training.step(pictures=True),
        restart_server=restart,
    )
    logger.close()
    server.kill()


def shows(run: LiveRun, page: Any, seconds: float = PATIENCE) -> bool:
    """Whether the page has all curves with all points, all images, and their labels."""

    def now() -> bool:
        curves = page.evaluate(CURVES)
        widths = page.evaluate(PICTURES)
        text = " ".join(page.locator(".content-text").all_inner_texts())
        return (
            [name for name, *_ in curves] == list(run.losses)
            and all(points == run.points() for _, points, *_ in curves)
            and all(drawn for *_, drawn in curves)
            and page.locator(".scatterlayer .trace").count() == len(run.losses)
            and widths == [run.picture_width] * len(run.labels)
            and all(label in text for label in run.labels)
        )

    return wait_for(now, seconds)


def test_page_of_a_run(live_run, watched):
    page = watched.page
    page.goto(live_run.url)
    assert shows(live_run, page), (page.evaluate(CURVES), page.evaluate(PICTURES))

    # plotly's buttons cover neither the legend nor the curves
    buttons = page.locator(".modebar").bounding_box()
    for part in (".legend", ".nsewdrag"):
        box = page.locator(part).first.bounding_box()
        assert box["x"] + box["width"] <= buttons["x"], part

    # A new point comes by itself.
    page.evaluate("window.sameDocument = true")
    before = live_run.points()
    live_run.advance()
    assert live_run.points() == before + 1
    assert shows(live_run, page)
    assert page.evaluate("window.sameDocument")

    # visdom's button for smoothing works on the curves.
    page.click('button[title="smooth lines"]')
    page.wait_for_selector("input[type=range]")
    watched.check(live_run.url)


def test_page_after_a_restart_of_the_server(live_run, watched):
    page = watched.page
    page.goto(live_run.url)
    assert shows(live_run, page)
    watched.check(live_run.url)
    live_run.restart_server()
    # An open page does not connect again, as visdom is; a reloaded one has everything.
    watched.bad.clear()
    page.reload()
    assert shows(live_run, page), page.evaluate(CURVES)
    live_run.advance()
    assert shows(live_run, page)
    watched.check(live_run.url)


def test_names_are_not_taken_for_html(tmp_path, watched):
    server = Server(tmp_path)
    try:
        evil = "<img src=x onerror='window.hit=1'>"
        logger = VisdomLogger("http://127.0.0.1", server.port, title=evil)
        training = MadeUpTraining(logger, size=64)
        record = training.record(1)
        logger.log_losses({**record, "losses": {evil: 1.0, "<b>bold</b>": 2.0}})
        logger.log_losses({**record, "progress": 1.0, "losses": {evil: 2.0, "<b>bold</b>": 3.0}})
        picture = next(iter(training.pictures.values()))
        logger.show_pictures({evil: picture}, {"epoch": 1, "iters": 1, "images": 1})
        logger.close()
        page = watched.page
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_selector(".scatterlayer .trace")
        page.wait_for_selector(".content-text img")
        legend = page.locator(".legendtext").all_text_contents()
        assert legend == [evil, "<b>bold</b>"]
        assert evil in page.locator(".content-text").inner_text()
        assert page.evaluate("window.hit") is None
        watched.check(f"http://127.0.0.1:{server.port}/")
    finally:
        server.kill()
