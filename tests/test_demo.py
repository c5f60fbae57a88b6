"""The page of scripts/demo.py in a real browser: drop an image, see what becomes of it.

The program runs with the Python that `scripts/setup.sh --demo` makes, where gradio is; without that
one, with the Python of the tests.

CI_BROWSER=1 makes a missing browser a failure instead of a skip.
"""

from __future__ import annotations

import importlib.util
import io
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures.values import normalize
from models import load_generator
from models.networks import define_G
from scripts.demo import error_message, shrink, to_8_bits
from tests import browser_helpers
from tests.browser_helpers import PATIENCE
from tests.helpers import (
    ROOT,
    SHORT,
    TINY,
    Finished,
    picture,
    pixels,
    succeed,
    truncated,
    unaligned,
)
from util.errors import UserError
from util.picture_files import is_image_file, open_image

DEMO = ROOT / ".venv" / "demo" / "bin" / "python"
PYTHON = str(DEMO) if DEMO.exists() else sys.executable
browser = browser_helpers.browser
WIDTHS = """selector => [...document.querySelectorAll(selector + ' img')].map(
    image => image.complete ? image.naturalWidth : 0)"""


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_large_pictures_keep_their_range_when_they_are_shrunk(dtype):
    most = 1 if dtype is np.float32 else np.iinfo(dtype).max // 2
    square = np.zeros((200, 100, 1), dtype)
    square[80:120, 30:70] = most  # around an edge bicubic weights go beyond both values
    small = shrink(square, 60)
    assert (small.shape, small.dtype) == ((60, 30, 1), dtype)
    assert (small.min(), small.max()) == (0, most)


def test_pictures_are_shown_by_the_range_of_the_model():
    levels = np.array([[[0], [2048], [4095]]], np.uint16)
    assert np.asarray(to_8_bits(levels, None, (0.0, 4095.0))).tolist() == [[0, 128, 255]]
    floats = np.array([[[-1000.0], [1000.0], [5000.0]]], np.float32)
    assert np.asarray(to_8_bits(floats, None, (-1000.0, 3000.0))).tolist() == [[0, 128, 255]]
    assert np.asarray(to_8_bits(levels * 16, None, None)).tolist() == [[0, 128, 255]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    where = ["--dataroot", unaligned(root / "data"), "--checkpoints_dir", root, "--name", "x"]
    succeed("train.py", *where, "--model", "cycle_gan", *TINY, *SHORT)
    return root


@pytest.mark.parametrize("values", [np.float32([[0, 7]]), np.int16([[0, 7]])])
def test_a_picture_without_a_known_range_is_told_what_the_page_can_do(values):
    with pytest.raises(UserError) as e:
        normalize(values[..., None])
    said = error_message(e.value, "/tmp/gradio/abc/a.tif")
    assert "range: save 8 or 16 bits, or floats in [0, 1], or give --value_range to test.py" in said
    assert "LOW" not in said
    assert (
        error_message(UserError("/tmp/gradio/a.tif is odd"), "/tmp/gradio/a.tif") == "a.tif is odd"
    )


def demo(*words: object, before: str = "pass", python: str = PYTHON) -> list[str]:
    """The command that runs the program after the statement `before`."""
    code = (
        f"import sys, runpy; {before}; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return [python, "-c", code, str(ROOT / "scripts/demo.py"), *map(str, words)]


def finish(command: list[str]) -> Finished:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Finished(done.returncode, done.stdout, done.stderr)


def test_without_gradio_one_line_says_so(trained):
    words = ["--checkpoints_dir", trained, "--name", "x"]
    result = finish(demo(*words, before="sys.modules['gradio'] = None"))
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "error: the page needs the package gradio: bash scripts/setup.sh --demo, or pip install "
        "gradio\n"
    )


def test_an_unknown_experiment_is_one_line(trained):
    if not DEMO.exists():
        pytest.importorskip("gradio")
    # not the Python that has gradio, where there is another: the program finds that by itself
    words = ["--checkpoints_dir", trained, "--name", "y"]
    result = finish(demo(*words, python=sys.executable))
    assert result.code == 1
    assert result.err == (
        f"error: no weights {trained}/y/latest_net_G.pth: there is no experiment --name y; "
        "there are x\n"
    )


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--port", "99999"], 2, "99999 is too large"),
        (["--port", "-1"], 2, "-1 is too small"),
        (["--largest", "0"], 2, "0 is too small"),
        (["--host", "no such host"], 1, "can't listen on --host no such host --port 7860"),
        (["--port", "taken"], 1, "Address already in use"),
    ],
)
def test_where_it_can_not_listen_is_one_line(trained, more, code, said):
    if not DEMO.exists():
        pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        more = [str(taken.getsockname()[1]) if word == "taken" else word for word in more]
        result = finish(demo("--checkpoints_dir", trained, "--name", "x", *more))
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result.err
    assert said in result.err


def test_a_model_for_which_there_is_no_page_is_one_line(tmp_path):
    if not DEMO.exists():
        pytest.importorskip("gradio")
    (tmp_path / "lab").mkdir()
    net = define_G(1, 2, 2, "unet_128", "batch")
    torch.save(net.state_dict(), tmp_path / "lab" / "latest_net_G.pth")
    result = finish(demo("--checkpoints_dir", tmp_path, "--name", "lab"))
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "lab goes from 1 to 2 channels: use test.py" in result.err


@pytest.fixture
def url(trained, tmp_path):
    """The page of a server of the test's own."""
    if not DEMO.exists() and importlib.util.find_spec("gradio") is None:
        browser_helpers.unavailable("gradio is not installed")
    log = tmp_path / "log"
    words = ["--checkpoints_dir", trained, "--name", "x", "--port", 0, "--device", "cpu"]
    with open(log, "wb") as output:
        process = subprocess.Popen(
            demo(*words), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + 2 * PATIENCE
        while process.poll() is None and time.monotonic() < end:
            if found := re.search(r"try it at (http://127\.0\.0\.1:\d+)", log.read_text()):
                yield found.group(1)
                break
            time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.browser
@pytest.mark.slow
def test_a_picture_is_translated(trained, browser, url, tmp_path):
    requests, bad = [], []
    page = browser.new_page(viewport={"width": 1300, "height": 1200})
    page.set_default_timeout(1000 * PATIENCE)
    page.on("request", lambda r: requests.append(r.url))
    page.on("websocket", lambda w: requests.append(w.url))
    page.on("pageerror", lambda e: bad.append(str(e)))
    page.on("response", lambda r: r.status >= 400 and bad.append(f"{r.status} {r.url}"))

    def translated() -> np.ndarray:
        """The output image, once it is there, is new and has loaded."""
        page.wait_for_function(
            f"old => ({WIDTHS})('#output').join() === '52' && "
            "document.querySelector('#output img').src !== old",
            arg=translated.shown,
        )
        translated.shown = page.locator("#output img").get_attribute("src")
        with Image.open(io.BytesIO(page.request.get(translated.shown).body())) as image:
            return np.asarray(image.convert("RGB"), int)

    translated.shown = ""
    file = picture(tmp_path / "mine.png", 52, 44, 5)
    page.goto(url)
    page.wait_for_selector("#input input[type=file]", state="attached")
    page.set_input_files("#input input[type=file]", str(file))
    there = translated()
    page.wait_for_function(f"() => ({WIDTHS})('#compare').join() === '52,52'")
    shown = [page.locator(f"#{name} img").bounding_box() for name in ("input", "output")]
    for side in ("y", "width", "height"):  # side by side, of one size, larger than 52x44 pixels
        assert shown[0][side] == pytest.approx(shown[1][side], abs=2)
    assert shown[0]["height"] > 200
    page.get_by_label("BtoA").check()
    back = translated()
    with Image.open(file) as image:
        for direction, shown in (("AtoB", there), ("BtoA", back)):
            G = load_generator(trained / "x", direction, device="cpu")
            assert np.abs(np.asarray(G(image), int) - shown).max() <= 1
    assert "latest_net_G_B.pth on cpu" in page.locator("#said").inner_text()
    page.close()
    local = (url, url.replace("http:", "ws:"), "data:", "blob:")
    assert [r for r in requests if not r.startswith(local)] == []
    assert bad == []


@pytest.mark.browser
@pytest.mark.slow
def test_pictures_of_all_kinds_on_a_phone(trained, browser, url, tmp_path):
    page = browser.new_page(viewport={"width": 390, "height": 1200})
    page.set_default_timeout(1000 * PATIENCE)
    G = load_generator(trained / "x", "AtoB", device="cpu")
    rgba = Image.fromarray(pixels(48, 40, 3)).convert("RGBA")
    rgba.putalpha(Image.fromarray(pixels(48, 40, 9)[..., 0]))
    rgba.save(tmp_path / "alpha.png")
    grey = pixels(56, 40, 4)[..., 0].astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "grey.png")
    newer = [name for name in ("a.avif", "b.heic") if is_image_file(name)]
    for name in newer:
        Image.fromarray(pixels(64, 40, 4)).save(tmp_path / name, quality=100)
    page.goto(url)
    page.wait_for_selector("#input input[type=file]", state="attached")

    def give(name: str) -> None:
        page.set_input_files("#input input[type=file]", str(tmp_path / name))

    def result(width: int) -> Image.Image:
        page.wait_for_function(f"wanted => ({WIDTHS})('#output').join() === wanted", arg=str(width))
        source = page.locator("#output img").get_attribute("src")
        return Image.open(io.BytesIO(page.request.get(source).body()))

    give("alpha.png")
    shown = result(48)
    assert shown.mode == "RGBA"
    assert np.array_equal(np.asarray(shown)[..., 3], pixels(48, 40, 9)[..., 0])
    for name in ("input", "output"):
        assert page.locator(f"#{name}").bounding_box()["width"] > 300
    give("grey.png")
    wanted = np.asarray(G(Image.fromarray(pixels(56, 40, 4)[..., 0])), int)
    assert np.abs(np.asarray(result(56).convert("RGB"), int) - wanted).max() <= 2
    for name in newer:
        give(name)
        wanted = np.asarray(G(open_image(tmp_path / name)), int)
        assert np.abs(np.asarray(result(64).convert("RGB"), int) - wanted).max() <= 2
        give("grey.png")
        result(56)
    truncated(tmp_path / "torn.png")
    give("torn.png")
    page.wait_for_selector('#said:has-text("can\'t read the image torn.png")')
    assert page.locator("#output img").count() == 0  # of the image before
    assert "/tmp" not in page.locator("body").inner_text()
    assert "Traceback" not in (tmp_path / "log").read_text()  # of the server
    page.close()
