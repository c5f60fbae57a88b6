"""The training page as a file: what is on it, and what becomes of the one of an earlier run."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.helpers import SHORT, TINY, run_process, succeed, unaligned
from util.background import BackgroundWork, map_in_threads
from util.display.page import PageLogger
from util.html import HTML
from util.visualizer import save_images, write_visuals

PICTURE = np.zeros((4, 4, 3), np.uint8)


def shown(folder: Path) -> list[str]:
    """The images on the page, from top to bottom."""
    return re.findall(r'src="images/([^"]*)"', (folder / "web" / "index.html").read_text())


def run(folder: Path, epochs: range, resumed_at: int | None = None) -> PageLogger:
    page = PageLogger(folder, "run", resumed_at=resumed_at)
    for epoch in epochs:
        for save in (False, False):  # the second is not kept
            step = {"epoch": epoch, "iters": 1, "images": epoch, "save": save}
            page.show_pictures({"real_B": PICTURE, "fake_A": PICTURE}, step)
    page.close()
    return page


def names(*epochs: int) -> list[str]:
    """In the order in which the model has its images, not that of the alphabet."""
    return [f"epoch{e:03d}_{label}.png" for e in epochs for label in ("real_B", "fake_A")]


def test_newest_first(tmp_path):
    run(tmp_path, range(1, 4))
    assert shown(tmp_path) == names(3, 2, 1)


def test_only_pictures_that_exist(tmp_path):
    page = run(tmp_path, range(1, 4))
    for name in names(2):
        (page.web_dir / "images" / name).unlink()
    page.close()
    assert shown(tmp_path) == names(3, 1)


def test_resumed_from_an_earlier_epoch(tmp_path):
    run(tmp_path, range(1, 6))
    run(tmp_path, range(2, 4), resumed_at=2)
    assert shown(tmp_path) == names(3, 2, 1)


def test_a_new_run_puts_the_old_page_aside(tmp_path):
    run(tmp_path, range(1, 6))
    run(tmp_path, range(1, 3))
    assert shown(tmp_path) == names(2, 1)
    (old,) = tmp_path.glob("web.*")
    assert len(list((old / "images").iterdir())) == 10
    assert "epoch 5" in (old / "index.html").read_text()
    run(tmp_path, range(1, 2))  # by the same program, which has begun once
    assert [p.name for p in sorted(tmp_path.glob("web.*"))] == [old.name, f"{old.name}-2"]


def test_writing_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    page = PageLogger(tmp_path, "run")
    written = []

    def write() -> None:
        written.append(now[0])
        now[0] += 2

    monkeypatch.setattr(page, "_write", write)
    for _ in range(1000):
        now[0] += 1
        page.write()
    assert 4 <= len(written) <= 6
    page.close()
    assert written[-1] == now[0] - 2  # at the end in any case


def test_plots_are_drawn_beside_training(tmp_path):
    """The loop neither waits for a drawing nor imports what draws; the end has the last one."""
    code = f"""
import json, pathlib, sys, time
import util.display.page as page_module
from util.display.page import PageLogger

folder = pathlib.Path({str(tmp_path)!r})
page = PageLogger(folder, "run")
record = {{"images": 1, "progress": 1, "losses": {{"G": 1.0}}}}
(folder / "losses.jsonl").write_text(json.dumps(record))
page.end_epoch(1)
assert page.plotting is None  # not in the first minute
page.plotted_at -= page_module.PLOT_SECONDS
start = time.perf_counter()
page.end_epoch(2)
print("end_epoch took", time.perf_counter() - start)
assert not (folder / "loss.png").exists()
page.end_epoch(3)  # is busy
assert page.plotting.wait(60) == 0
assert (folder / "web" / "loss.png").exists()
assert "matplotlib" not in sys.modules
(folder / "web" / "loss.png").unlink()
page.close()
assert (folder / "web" / "loss.png").exists()
assert "loss_narrow.png" in (folder / "web" / "index.html").read_text()
"""
    result = run_process("-c", code)
    assert result.code == 0, result.err
    assert float(result.out.split()[-1]) < 0.5


def test_without_matplotlib_the_page_has_no_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(tmp_path, range(1, 3)).end_epoch(2)
    assert shown(tmp_path) == names(2, 1)
    assert capsys.readouterr().err.count("matplotlib is not installed") == 1


def test_each_epoch_shows_pictures_at_least_once(tmp_path):
    """At its end, where --display_freq has not come by in it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = unaligned(tmp_path / "data", 3)
    where = ["--dataroot", data, "--checkpoints_dir", tmp_path, "--name", "x"]
    words = [*TINY, *SHORT, "--n_epochs", 2, "--display_freq", 4, "--use_tensorboard"]
    succeed("train.py", *where, *words)
    files = shown(tmp_path / "x")
    assert len(files) == 2 * 8
    assert {name.split("_")[0] for name in files} == {"epoch001", "epoch002"}
    size = {accumulator.IMAGES: 0}
    events = accumulator.EventAccumulator(str(tmp_path / "x" / "tb"), size).Reload()
    assert [image.step for image in events.Images("pictures/fake_B")] == [3, 4]


def test_pictures_that_are_to_be_kept_replace_those_of_their_epoch(tmp_path):
    """Those of --display_freq stand only until there are some of --update_html_freq."""
    page = PageLogger(tmp_path, "run")
    path = tmp_path / "web" / "images" / "epoch001_fake_B.png"
    levels = []
    for level, save in ((10, False), (20, False), (30, True)):
        step = {"epoch": 1, "iters": 1, "images": 1, "save": save}
        page.show_pictures({"fake_B": np.full((8, 8, 3), level, np.uint8)}, step)
        with Image.open(path) as image:
            levels.append(int(np.asarray(image).max()))
    page.close()
    assert levels == [10, 10, 30]


def test_names_and_texts_are_escaped(tmp_path):
    page = HTML(tmp_path, "<i>title</i>", refresh=5)
    page.add_header("<b>head</b>")
    page.add_text("a & b")
    page.add_images(["<b>x&y.png"], ['"><script>'], ["a#b?c%20.png"], width=100)
    page.save()
    text = (tmp_path / "index.html").read_text()
    body = text.split("<body>")[1]
    assert "<i>" not in text
    assert "<b>" not in text
    assert "<script" not in text
    assert "&lt;b&gt;head" in body
    assert "a &amp; b" in body
    assert 'src="images/%3Cb%3Ex%26y.png"' in body
    assert 'href="images/a%23b%3Fc%2520.png"' in body
    assert 'http-equiv="refresh"' in text
    page.save()  # again: the same page
    assert (tmp_path / "index.html").read_text() == text
    assert page.get_image_dir() == tmp_path / "images"


@pytest.mark.parametrize("label", ["real", "real_A", "real_B"])
@pytest.mark.parametrize("kind", ["same", "other pixels", "grey", "profile", "jpg", "broken"])
def test_an_input_of_the_same_pixels_is_copied(kind, label, tmp_path):
    """To the byte, and only where nothing but pixels is in the file."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    source = tmp_path / ("in.jpg" if kind == "jpg" else "in.png")
    image = Image.fromarray(pixels).convert("L" if kind == "grey" else "RGB")
    # without compression: nothing here writes such files
    more = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    image.save(source, compress_level=0, **(more if kind == "profile" else {}))
    if kind == "broken":
        source.write_bytes(source.read_bytes()[:-200])
    shown = np.full_like(pixels, 7) if kind == "other pixels" else pixels
    tensor = torch.from_numpy(shown).permute(2, 0, 1)[None] / 127.5 - 1
    page = HTML(tmp_path, "title")
    save_images(page, {label: tensor}, [str(source)])
    result = tmp_path / "images" / f"in_{label}.png"
    assert np.array_equal(np.asarray(Image.open(result)), shown)
    copied = result.read_bytes() == source.read_bytes()
    assert copied == (kind == "same" and label != "real_B")


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_a_picture_may_be_overwritten_while_it_waits(kind, tmp_path):
    """As by a model that uses the memory of its results again."""
    shown = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    tensor = torch.from_numpy(shown).permute(2, 0, 1)[None] / 127.5 - 1
    picture = tensor if kind == "tensor" else shown.copy()
    go = threading.Event()
    with BackgroundWork(1) as encoders:
        encoders.submit(go.wait, 60)
        files = write_visuals(tmp_path, {"fake": picture}, "in.png", "in", 1.0, encoders)
        assert files == ["in_fake.png"]
        picture[:] = 0
        go.set()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "in_fake.png")), shown)


def test_background_work_outlives_what_fails_in_it():
    """An error that is no Exception does not end a thread, for which the next would wait."""

    def fail() -> None:
        raise SystemExit

    done: list[int] = []
    work = BackgroundWork(1)
    for _ in range(9):  # more than have a place
        with contextlib.suppress(SystemExit):
            work.submit(fail)
    with contextlib.suppress(SystemExit):
        work.close()
    work.submit(done.append, 9)  # closed: at once
    assert done == [9]


@pytest.mark.parametrize("error", [OSError, SystemExit])
@pytest.mark.parametrize("threads", [0, 1])
def test_who_asks_for_a_result_gets_its_error(error, threads):
    def fail() -> None:
        raise error

    with BackgroundWork(threads) as work:
        results = [work.call(int, "7"), work.call(fail), work.call(int, "8")]
        with pytest.raises(error):
            results[1]()
        assert [results[0](), results[2]()] == [7, 8]


def test_the_error_of_a_block_comes_before_those_of_its_work():
    begun, go = threading.Event(), threading.Event()

    def fail() -> None:
        begun.set()
        go.wait(60)
        raise OSError("full")

    work = BackgroundWork(1)

    def block() -> None:
        with work:
            work.submit(fail)
            begun.wait(60)
            threading.Timer(0.1, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert isinstance(work.error, OSError)


def test_results_of_threads_are_in_order():
    go = threading.Event()

    def square(x: int) -> int:
        if x == 0:
            go.wait(60)  # the first is the last to end
        if x == 15:
            go.set()
        return x * x

    assert map_in_threads(square, range(16), 8) == [x * x for x in range(16)]


@pytest.mark.parametrize(("threads", "waiting"), [(1, 1), (20, 2), (20, 30)])
def test_an_interrupt_waits_for_what_has_begun_only(threads, waiting):
    """So that nothing is written any more when the folder is removed."""
    done: list[int] = []
    go = threading.Event()

    def work(x: int) -> None:
        go.wait(60)
        done.append(x)

    def interrupt(*_: object) -> None:
        threading.Timer(0.2, go.set).start()
        raise KeyboardInterrupt

    pool = BackgroundWork(threads)
    main = threading.get_ident()

    def block() -> None:
        with pool:
            for x in range(waiting):
                pool.submit(work, x)
            while pool.work.qsize() > max(0, waiting - threads):
                time.sleep(0.01)
            # the block ends long before, and waits for the work
            threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGUSR1)).start()

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            block()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(done) == [*range(min(waiting, threads))]
