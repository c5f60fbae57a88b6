"""The training page and the result page in a real browser, on a desk and on a phone."""

from __future__ import annotations

import functools
import http.server
import os
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from tests import browser_helpers
from tests.browser_helpers import PATIENCE, Watched
from tests.helpers import SHORT, TINY, picture, succeed
from tests.visdom_helpers import LABELS
from util.display.page import PageLogger
from util.html import HTML

browser, watched = browser_helpers.browser, browser_helpers.watched

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# nothing of this may be taken for HTML, or for a part of an address
NAMES = ("<b>x&y", "a#b?c%20", "with spaces, ü and 絵", "'quotes\"", "sub/plain")
RESULT_LABELS = ("real_A", "fake_B", "rec_A", "real_B", "fake_A", "rec_B")
WIDTH = 100  # --display_winsize
EPOCHS = 3

EAGER = "() => document.querySelectorAll('img').forEach(i => i.loading = 'eager')"
LOADED = "() => [...document.querySelectorAll('img')].every(i => i.complete)"
IMAGES = """() => [...document.querySelectorAll('img')].map(i => {
    const box = i.getBoundingClientRect();
    return {src: i.currentSrc, alt: i.alt, natural: i.naturalWidth, width: box.width,
            left: box.left, top: box.top + scrollY};
})"""
HEADINGS = "() => [...document.querySelectorAll('h3')].map(h => h.textContent)"
# Each text: its size, its colour and the one behind it.
TEXTS = """() => [...document.querySelectorAll('h1, h3, figcaption, p')].map(e => {
    const style = getComputedStyle(e);
    return {text: e.textContent, size: parseFloat(style.fontSize), colour: style.color,
            behind: getComputedStyle(document.body).backgroundColor};
})"""
# How far the page, and each text and image of a row, goes beyond the right edge.
BEYOND = """() => Math.max(
    document.documentElement.scrollWidth, document.body.scrollWidth,
    ...[...document.querySelectorAll('h1, h3, figcaption, p, .row img')].map(
        e => e.getBoundingClientRect().right)) - innerWidth"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `checkpoints` and `results` of a tiny training."""
    folder = tmp_path_factory.mktemp("pages")
    for j, side in enumerate(("trainA", "trainB", "testA", "testB")):
        for i, name in enumerate(NAMES):
            picture(folder / "data" / side / f"{name}.png", 40, 40, 10 * j + i)
    where = ["--dataroot", folder / "data", "--checkpoints_dir", folder / "checkpoints"]
    both = [*where, "--name", "<i>r&n", *TINY, "--display_winsize", WIDTH]
    length = ["--n_epochs", EPOCHS, "--display_freq", 2, "--print_freq", 1]
    succeed("train.py", *both, *SHORT, *length)
    succeed("test.py", *both, "--model", "cycle_gan", "--results_dir", folder / "results")
    return folder


@pytest.fixture(scope="module", params=["file", "http"])
def address(request, trained):
    """What stands in front of a path below the folder: files, or a server for them."""
    if request.param == "file":
        yield trained.as_uri()
        return

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(trained))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


PAGES = {
    "training": f"checkpoints/{quote('<i>r&n', safe='')}/web/index.html",
    "results": f"results/{quote('<i>r&n', safe='')}/test_latest/index.html",
}


def load_all(page: Any) -> list[dict[str, Any]]:
    """All images of a page, loaded."""
    page.evaluate(EAGER)
    page.wait_for_function(LOADED)
    images = page.evaluate(IMAGES)
    broken = [i["src"] for i in images if not i["natural"]]
    assert not broken, broken
    return images


def check_links(page: Any) -> None:
    """Each link leads to an image, and it is the one that is shown in it."""
    links = page.evaluate(
        "() => [...document.querySelectorAll('a')].map(a => [a.href, a.querySelector('img').src])"
    )
    assert links
    for target, source in links:
        assert target == source
        answer = page.goto(target)
        assert answer is None or answer.ok, target  # None: a file
        assert page.evaluate("() => document.images.length == 1 && document.images[0].complete")


def luminance(colour: str) -> float:
    channels = [float(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour: str, behind: str) -> float:
    """The ratio of WCAG 2: 1 is invisible, 4.5 is asked of text."""
    low, high = sorted((luminance(colour), luminance(behind)))
    return (high + 0.05) / (low + 0.05)


def test_training_page(address, watched):
    page = watched.page
    page.goto(f"{address}/{PAGES['training']}")
    images = load_all(page)
    assert page.locator("h1").text_content() == "Experiment name = <i>r&n"
    assert page.title() == "Experiment name = <i>r&n"
    assert page.locator("i, b").count() == 0
    assert page.evaluate(HEADINGS) == [f"epoch {e}" for e in range(EPOCHS, 0, -1)]

    # the plot comes first, and as large as it was drawn
    plot, *rest = images
    assert plot["src"].endswith("/loss.png")
    assert plot["width"] == plot["natural"] == 1200
    assert all(i["top"] > plot["top"] for i in rest)
    assert [i["alt"] for i in rest] == list(LABELS) * EPOCHS
    assert {(i["natural"], i["width"]) for i in rest} == {(32, WIDTH)}
    assert page.locator("figcaption").all_text_contents() == [i["alt"] for i in rest]
    check_links(page)
    watched.check(address)


def test_result_page(address, watched, trained):
    page = watched.page
    page.goto(f"{address}/{PAGES['results']}")
    images = load_all(page)
    assert "<i>r&n" in page.locator("h1").text_content()
    assert page.locator("i, b").count() == 0
    assert page.evaluate(HEADINGS) == sorted(NAMES)
    assert page.locator("figcaption").all_text_contents() == list(RESULT_LABELS) * len(NAMES)

    # inputs and outputs in columns, as wide as was asked, and two inputs fit beside each other
    assert [i["alt"] for i in images] == list(RESULT_LABELS) * len(NAMES)
    assert {i["width"] for i in images} == {WIDTH}
    for label in RESULT_LABELS:
        assert len({i["left"] for i in images if i["alt"] == label}) == 2
    for k in range(len(NAMES)):
        row = images[k * len(RESULT_LABELS) : (k + 1) * len(RESULT_LABELS)]
        lefts = [i["left"] for i in row]
        assert lefts == sorted(set(lefts))
        assert len({i["top"] for i in row}) == 1
    assert len({i["top"] for i in images}) == (len(NAMES) + 1) // 2
    (facts,) = page.locator("p").all_text_contents()
    data = Path(trained / "data")
    assert f"Direction AtoB. {len(NAMES)} of {len(NAMES)} images (test) of {data}." in facts
    assert "Weights latest_net_G_A.pth, latest_net_G_B.pth in " in facts
    year = str(time.localtime().tm_year)
    assert f"(saved {year}-" in facts
    assert f"Made {year}-" in facts
    check_links(page)
    watched.check(address)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_on_a_phone(name, scheme, trained, browser):
    context = browser.new_context(
        viewport={"width": 390, "height": 800},
        device_scale_factor=2,
        is_mobile=True,
        has_touch=True,
        color_scheme=scheme,
    )
    try:
        watched = Watched(context.new_page())
        page = watched.page
        page.goto(f"{trained.as_uri()}/{PAGES[name]}")
        images = load_all(page)
        assert page.evaluate("innerWidth") == 390  # not zoomed out for something wide
        assert page.evaluate(BEYOND) <= 0
        texts = page.evaluate(TEXTS)
        assert min(t["size"] for t in texts) >= 12
        assert min(contrast(t["colour"], t["behind"]) for t in texts) >= 4.5
        behind = luminance(texts[0]["behind"])
        assert behind < 0.05 if scheme == "dark" else behind > 0.8
        rows = [i for i in images if "/images/" in i["src"]]
        assert min(i["width"] for i in rows) >= min(WIDTH, 100)
        if name == "training":  # a plot of its own, whose letters are 12 pixels high at 390
            (plot,) = (i for i in images if i not in rows)
            assert plot["natural"] == 2 * 390
            assert plot["left"] + plot["width"] <= 390  # nothing is cut off
            assert plot["width"] >= 390 * 10 / 12
        watched.check(trained.as_uri())
    finally:
        context.close()


@pytest.mark.parametrize(
    ("count", "width", "page_width", "columns"),
    [
        (6, 256, 1600, 6),
        (6, 256, 1300, 6),  # a bit smaller, but in one line
        (6, 256, 1000, 3),
        (6, 256, 390, 3),
        (8, 256, 1400, 4),
        (8, 256, 390, 2),
        (3, 256, 390, 3),
        (2, 512, 390, 2),
        (1, 1024, 390, 1),
        (5, 64, 390, 5),
        (7, 256, 320, 2),
        (3, 256, 1400, 6),  # two rows side by side, a bit smaller
        (2, 256, 1400, 4),
        (3, 100, 700, 6),
        (3, 100, 600, 3),
    ],
)
def test_columns(count, width, page_width, columns, tmp_path, browser):
    page = HTML(tmp_path, "columns")
    Image.new("RGB", (8, 8)).save(page.get_image_dir() / "x.png")
    for _ in range(2):
        page.add_header("row")
        page.add_images(["x.png"] * count, ["x"] * count, ["x.png"] * count, width=width)
    page.save()
    shown = browser.new_page(viewport={"width": page_width, "height": 800})
    try:
        shown.goto((tmp_path / "index.html").as_uri())
        images = load_all(shown)
        assert len({i["left"] for i in images}) == columns
        assert max(i["width"] for i in images) <= width
        assert shown.evaluate(BEYOND) <= 0
    finally:
        shown.close()


def test_epoch_500(tmp_path, watched):
    """500 epochs of 8 images: quickly written, and only what is in view is loaded."""
    logger = PageLogger(tmp_path, "long run", resumed_at=500)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    for epoch in range(1, 501):
        for label in LABELS:
            os.link(tmp_path / "x.png", logger.web_dir / f"images/epoch{epoch:03d}_{label}.png")
    cost = []
    for _ in range(3):
        start = time.perf_counter()
        logger._write()
        cost.append(time.perf_counter() - start)
    size = (logger.web_dir / "index.html").stat().st_size

    page = watched.page
    start = time.perf_counter()
    page.goto((logger.web_dir / "index.html").as_uri())
    seconds = time.perf_counter() - start
    at_once = sum(r.endswith(".png") for r in watched.requests)
    page.locator("h3").last.scroll_into_view_if_needed()
    last = "() => { const i = [...document.images].at(-1); return i.complete && i.naturalWidth; }"
    page.wait_for_function(last, timeout=1000 * PATIENCE)
    whole = sum(r.endswith(".png") for r in watched.requests)
    print(
        f"\n500 epochs: {size / 1e6:.1f} MB written in {min(cost):.2f} s, shown in {seconds:.2f} s;"
        f" {at_once} of 4000 images loaded at first, {whole} with the end in view"
    )
    assert page.evaluate(HEADINGS) == [f"epoch {e}" for e in range(500, 0, -1)]
    assert min(cost) < 5
    assert seconds < 30
    assert size < 2e6
    assert 0 < at_once < 100  # 168 if images to come had no height
    assert whole < 200
    watched.check(tmp_path.as_uri())
