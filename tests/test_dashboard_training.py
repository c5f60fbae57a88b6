"""A real training on visdom's page, in a real browser: what a user sees over the days."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import browser_helpers
from tests.browser_helpers import CURVES, PATIENCE, PICTURES
from tests.helpers import ROOT
from tests.visdom_helpers import CYCLE_GAN_LOSSES, LABELS, Server, free_port, wait_for
from util.display.loss_record import read_records, thin

browser, watched = browser_helpers.browser, browser_helpers.watched
visdom_assets = browser_helpers.visdom_assets

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.usefixtures("visdom_assets"),
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here"),
]

SIZE = 32
FLAGS = (
    "--name run --model cycle_gan --gpu_ids -1 --netG resnet_6blocks --ngf 4 --ndf 4 --seed 1 "
    f"--load_size 40 --crop_size {SIZE} --num_threads 0 --print_freq 5 --display_freq 10 "
    "--display_server http://127.0.0.1"
).split()

VALUES = """() => Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].flatMap(
    plot => plot.data.map(curve => [curve.name, [curve.x, curve.y].map(v => Array.from(v))])))"""


class Training:
    """`train.py` as a process of its own, with its own home folder."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port = folder, port
        self.log = folder / "log.txt"
        self.record = folder / "checkpoints" / "run" / "losses.jsonl"
        self.process: subprocess.Popen | None = None

    def start(self, epochs: int, *more: str) -> None:
        where = ["--dataroot", "datasets/worldmaps_mini/unaligned"]
        where += ["--checkpoints_dir", str(self.folder / "checkpoints")]
        length = ["--n_epochs", str(epochs), "--n_epochs_decay", "0"]
        port = ["--display_port", str(self.port)]
        home = {"HOME": str(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache")}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "train.py", *where, *FLAGS, *length, *port, *more],
                cwd=ROOT,
                env={**os.environ, **home, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def said(self) -> str:
        return self.log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return read_records(self.record)

    def end(self) -> int:
        """Its exit code, when it has come to its end by itself."""
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)


def server_of(port: int) -> int | None:
    """The process that was started as visdom's server of this port."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(port).encode() in words and any(b"visdom.server" in word for word in words):
                return int(folder.name)
    return None


def kill_server(port: int) -> bool:
    number = server_of(port)
    if number is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    return bool(wait_for(lambda: server_of(port) is None, 10))


@pytest.fixture
def training(tmp_path):
    training = Training(tmp_path, free_port())
    yield training
    training.kill()
    kill_server(training.port)


def state(page: Any) -> tuple:
    return page.evaluate(CURVES), page.evaluate(PICTURES)


def complete(page: Any) -> bool:
    """Whether all curves are drawn, each with as many points, and all images and labels there."""
    curves, widths = state(page)
    text = " ".join(page.locator(".content-text").all_inner_texts())
    return (
        [name for name, *_ in curves] == list(CYCLE_GAN_LOSSES)
        and len({points for _, points, *_ in curves}) == 1
        and all(drawn for *_, drawn in curves)
        and page.locator(".scatterlayer .trace").count() == len(CYCLE_GAN_LOSSES)
        and widths == [SIZE] * len(LABELS)
        and all(label in text for label in LABELS)
    )


def points(page: Any) -> int:
    return min((n for _, n, *_ in page.evaluate(CURVES)), default=0)


def shows_record(page: Any, lines: list[dict[str, Any]]) -> bool:
    """Whether the curves on the page are those of the record, point by point."""
    kept = thin(lines, 1000)
    expected = {
        name: [
            [pytest.approx(line["progress"], abs=1e-4) for line in kept],
            [pytest.approx(line["losses"][name], rel=1e-4) for line in kept],
        ]
        for name in CYCLE_GAN_LOSSES
    }
    return page.evaluate(VALUES) == expected


def test_dashboard_of_a_training(training, watched, tmp_path):
    page = watched.page
    url = f"http://127.0.0.1:{training.port}"
    training.start(10_000)

    # It starts the server, and says where the page is.
    assert wait_for(lambda: f"watch this run at {url}\n" in training.said(), PATIENCE), (
        training.said()
    )
    assert re.findall(r"^visdom: .*", training.said(), re.M) == [f"visdom: watch this run at {url}"]
    page.goto(url)
    assert wait_for(lambda: complete(page), PATIENCE), state(page)

    # New points come without a reload.
    page.evaluate("window.sameDocument = true")
    for _ in range(2):
        before = points(page)
        assert wait_for(lambda before=before: points(page) > before, PATIENCE), state(page)
    assert page.evaluate("window.sameDocument")
    watched.check(url)

    # The server is killed, with all it knew, and an empty one started.
    before = points(page)
    assert kill_server(training.port)
    page.goto("about:blank")
    watched.bad.clear()
    watched.requests.clear()
    (tmp_path / "second").mkdir()
    second = Server(tmp_path / "second", training.port)
    try:
        page.goto(url)
        assert wait_for(lambda: points(page) >= before and complete(page), PATIENCE), state(page)
        at = points(page)
        assert wait_for(lambda: points(page) > at, PATIENCE), state(page)

        # Stopped by hand, the page has everything up to the last line.
        training.process.send_signal(signal.SIGINT)
        assert training.end() == 128 + signal.SIGINT, training.said()
        first = training.lines()
        assert len(first) > before
        assert wait_for(lambda: shows_record(page, first), PATIENCE), (len(first), state(page))
        assert complete(page)
        watched.check(url)

        # Resumed on a server that knows nothing: it goes on with the old curves.
        second.kill()
        page.goto("about:blank")
        watched.bad.clear()
        second.start()
        last = int(first[-1]["epoch"]) + 2
        training.start(last, "--continue_train")
        assert training.end() == 0, training.said()
        lines = training.lines()
        assert lines[: len(first)] == first
        assert [line["images"] for line in lines] == [5 * (i + 1) for i in range(20 * last // 5)]
        page.goto(url)
        assert wait_for(lambda: shows_record(page, lines), PATIENCE), (len(lines), state(page))
        assert complete(page)
        watched.check(url)
    finally:
        second.kill()


def test_dashboard_outlives_a_training_of_its_own(training, watched):
    """Each image in a window of its own, and the page is still there afterwards."""
    training.start(1, "--display_ncols", "0")
    assert training.end() == 0, training.said()
    page = watched.page
    url = f"http://127.0.0.1:{training.port}"
    page.goto(url)

    def shown() -> bool:
        widths = page.evaluate(
            "() => [...document.querySelectorAll('img[src^=data]')].map(i => i.naturalWidth)"
        )
        enlarged = 4 * SIZE  # to the 128 pixels of LEAST_SIZE
        return widths == [enlarged] * len(LABELS) and shows_record(page, training.lines())

    assert wait_for(shown, PATIENCE), state(page)
    bars = page.locator(".window .bar").all_inner_texts()
    assert {label for label in LABELS if any(label in bar for bar in bars)} == set(LABELS)
    watched.check(url)
