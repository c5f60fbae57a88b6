"""The training page as a file: what is on it, and what becomes of the one of an earlier run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from util.display.page import PageLogger
from util.html import HTML

PICTURE = np.zeros((4, 4, 3), np.uint8)


def shown(folder: Path) -> list[str]:
    """The pictures on the page, from top to bottom."""
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
    """In the order in which the model has its pictures, not that of the alphabet."""
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


def test_writing_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    page = PageLogger(tmp_path, "run")
    written = []

    def write() -> None:
        written.append(now[0])
        now[0] += 2

    page.write.do = write
    for _ in range(1000):
        now[0] += 1
        page.write()
    assert 4 <= len(written) <= 6
    page.close()
    assert written[-1] == now[0] - 2  # at the end in any case


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
