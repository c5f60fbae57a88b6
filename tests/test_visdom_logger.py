"""The live page's logger: it never keeps the training loop waiting, whatever the server does."""

from __future__ import annotations

import http.server
import json
import math
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.visdom_helpers import (
    CYCLE_GAN_LOSSES,
    LABELS,
    MadeUpTraining,
    Server,
    curve_lengths,
    free_port,
    post,
    wait_for,
    windows,
)
from util.display import visdom_server
from util.display.visdom_logger import VisdomLogger

pytest.importorskip("visdom")


def end(process) -> None:
    """End a server that a logger has started."""
    os.kill(process.pid, signal.SIGTERM)
    assert wait_for(lambda: process.poll() is not None, 10)


@pytest.fixture
def server(tmp_path: Path):
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    yield server
    server.kill()


class FakeServer:
    """Answers everything with one status; the first `healthy` requests as visdom would."""

    def __init__(self, status: int, healthy: int = 0, text: str = "no"):
        outer = self
        self.requests = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer.requests += 1
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                well = outer.requests <= healthy
                answer = body.get("win", '["main"]') if well else text
                self.send_response(200 if well else status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, format, *args):
                pass

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.httpd.server_port
        self.thread = threading.Thread(target=self.httpd.serve_forever, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.httpd.shutdown()
        self.httpd.server_close()


def make(port: int, **kwargs) -> VisdomLogger:
    return VisdomLogger("http://127.0.0.1", port, title="made up", **kwargs)


def close(logger: VisdomLogger) -> float:
    began = time.monotonic()
    logger.close()
    return time.monotonic() - began


def expected(images: int, total: dict[str, int]) -> bool:
    """Whether every loss has its curve, thinned as it should be, up to the last image."""
    return set(total) == set(CYCLE_GAN_LOSSES) and all(
        n == images if images <= 1000 else 500 <= n <= 1000 for n in total.values()
    )


def test_healthy(server, monkeypatch):
    # A proxy that leads nowhere: the logger must not use it.
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    logger = make(server.port)
    training = MadeUpTraining(logger)
    training.run(3)
    assert close(logger) < 5
    # Closing has sent the last point.
    assert expected(training.images, curve_lengths(server.port))
    (table,) = (w for w in windows(server.port).values() if w["type"] == "text")
    assert table["content"].count("data:image/png;base64,") == len(LABELS)
    assert all(f"<br>{label}</td>" in table["content"] for label in LABELS)
    assert table["content"].count("<tr>") == 2  # of four columns each
    training.check_waits("healthy")


def test_scores_of_an_earlier_training_are_gone(server):
    scores = [{"epoch": 1, "images": 9, "progress": 1.0, "phase": "val", "scores": {"L1": 0.1}}]
    # first in an environment that the server does not know, which has nothing to close
    for kept in ([], scores, []):
        logger = make(server.port, scores=kept, env="new")
        MadeUpTraining(logger).run(0.3)
        close(logger)
        titles = [window["title"] for window in windows(server.port, "new").values()]
        assert "made up: loss over time" in titles
        assert sum("scores" in title for title in titles) == 2 * len(kept)


def test_away_and_killed_and_restarted(server, capfd):
    logger = make(server.port)
    training = MadeUpTraining(logger)
    training.run(1)
    assert wait_for(lambda: curve_lengths(server.port))
    training.check_waits("before")

    server.kill()
    training.waits.clear()
    training.run(4)
    training.check_waits("away")

    server.start()
    training.waits.clear()
    training.run(1)
    training.check_waits("restarted")
    images = training.images
    # Nothing more is logged: everything comes back by itself.
    assert wait_for(lambda: expected(images, curve_lengths(server.port)), 20)
    assert wait_for(lambda: len(windows(server.port)) == 2)
    assert close(logger) < 5
    said = capfd.readouterr().out
    print(said)
    assert said.count("watch this run at") == 1
    assert said.count("does not respond") == 1
    assert said.count(f"{server.port} is back\n") == 1
    assert "Traceback" not in said


def test_restarted_between_two_checks(server):
    """An empty server that is up again before the logger has noticed anything."""
    logger = make(server.port)
    training = MadeUpTraining(logger)
    training.step(pictures=True)
    training.step()
    assert wait_for(lambda: expected(2, curve_lengths(server.port)))
    assert wait_for(lambda: len(windows(server.port)) == 2)
    server.kill()
    server.start()
    assert wait_for(lambda: expected(2, curve_lengths(server.port)))
    assert wait_for(lambda: len(windows(server.port)) == 2)
    post(server.port, "close", {"win": None, "eid": "main"})  # wiped by hand
    assert wait_for(lambda: len(windows(server.port)) == 2)
    logger.close()


def test_frozen(server, capfd):
    logger = make(server.port)
    training = MadeUpTraining(logger)
    training.run(1)
    server.freeze()
    try:
        training.waits.clear()
        training.run(5)
        training.check_waits("frozen")
        said = capfd.readouterr().out
        print(said)
        assert "does not respond (no answer in time)" in said
    finally:
        server.freeze(False)
    training.waits.clear()
    training.run(1)
    training.check_waits("thawed")
    images = training.images
    assert wait_for(lambda: expected(images, curve_lengths(server.port)), 20)
    server.freeze()
    training.step(pictures=True)
    assert close(logger) < 5
    server.freeze(False)


@pytest.mark.parametrize(
    ("status", "healthy", "why"),
    [
        (500, 0, "status 500"),
        (500, 3, "status 500"),
        (404, 0, "status 404"),  # not visdom
        (200, 0, "no sensible answer"),
    ],
)
def test_what_does_not_answer_as_visdom_does(status, healthy, why, capfd):
    with FakeServer(status, healthy) as fake:
        logger = make(fake.port)
        training = MadeUpTraining(logger)
        training.run(3)
        training.check_waits(f"{status} after {healthy} answers")
        assert close(logger) < 5
        assert healthy < fake.requests < 30  # it tried again, with pauses
    said = capfd.readouterr().out
    print(said)
    lines = [line for line in said.splitlines() if line.startswith("visdom:")]
    (line,) = (line for line in lines if "watch this run" not in line)
    assert f"http://127.0.0.1:{fake.port} does not respond ({why}); training continues" in line
    assert line.endswith("choose another --display_port")


@pytest.mark.parametrize("lack", ["package", "assets"])
def test_no_server_can_be_started(lack, monkeypatch, capfd, tmp_path):
    if lack == "package":
        monkeypatch.setattr(visdom_server, "visdom", None)
    else:
        monkeypatch.setattr(visdom_server, "static_dir", lambda: tmp_path)
    logger = make(free_port())
    assert wait_for(lambda: not logger._thread.is_alive())
    training = MadeUpTraining(logger)
    training.run(0.1)
    logger.close()
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("visdom:")]
    assert len(said) == 1
    wanted = "visdom is not installed" if lack == "package" else "scripts/setup_visdom.sh"
    assert wanted in said[0]
    assert said[0].endswith("visdom is off, training continues")


def test_nonsense_address(capfd):
    logger = VisdomLogger("ftp://somewhere", 8097)
    MadeUpTraining(logger).step()
    logger.close()
    assert "no address of a server" in capfd.readouterr().out


def test_starts_a_server_that_survives(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    port = free_port()
    logger = make(port, ncols=0)
    training = MadeUpTraining(logger)
    training.run(0.3)
    training.check_waits("starting a server")
    try:
        # Even a run of a moment has shown what it had.
        assert close(logger) < 5
        assert expected(training.images, curve_lengths(port))
        pictures = [w for w in windows(port).values() if w["type"] == "image"]
        assert [w["title"] for w in pictures] == list(LABELS)
        assert capfd.readouterr().out.count(f"watch this run at http://127.0.0.1:{port}\n") == 1
        assert logger._server.process is not None
        assert os.getsid(logger._server.process.pid) == logger._server.process.pid
        assert Path(logger._server.log).is_file()

        again = make(port)  # a second run uses the server that is there
        MadeUpTraining(again).step()
        again.close()
        assert again._server.process is None
    finally:
        if logger._server.process:
            end(logger._server.process)


def test_small_pictures_are_enlarged_in_windows_of_their_own_too(monkeypatch):
    shown = []
    monkeypatch.setattr(VisdomLogger, "_show", lambda self, *a, **size: shown.append((a, size)))
    logger = VisdomLogger.__new__(VisdomLogger)
    logger.ncols, logger.winsize = 0, 256
    pixels = np.arange(64 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 64, 3)
    logger._newest = {"real_A": pixels}, {}
    logger._show_pictures()
    (((kind, _, _, (image,)), size),) = shown
    assert kind == "image"
    assert size == {"width": 128 + 20, "height": 120 + 36}
    np.testing.assert_array_equal(image, np.kron(pixels.transpose(2, 0, 1), np.ones((1, 2, 2))))


def test_two_at_once_make_one_server(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    port = free_port()
    loggers = [make(port, display_id=i) for i in (1, 2)]
    try:
        for logger in loggers:
            MadeUpTraining(logger).step()
        assert wait_for(lambda: len(windows(port)) == 2)
    finally:
        for logger in loggers:
            logger.close()
            if logger._server.process:
                end(logger._server.process)


class Idle(VisdomLogger):
    """A logger whose thread never runs; `messages` are what it would have sent."""

    def __init__(self, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(visdom_server.VisdomServer, "_start_server", lambda *_: None)
            patch.setattr(threading.Thread, "start", lambda thread: None)
            super().__init__(**kwargs)
        self._server.client._handle_post = self._post
        self.messages: list[dict] = []

    def _post(self, url, data=None):
        def fail(constant):
            pytest.fail(f"{constant} is not JSON")

        message = json.loads(data, parse_constant=fail)
        self.messages += [message] if "data" in message else []  # not one that closes a window
        return message["win"]

    def sent(self) -> list[dict]:
        """What is new, as the messages that show it."""
        self.messages.clear()
        self._take_news()
        self._send()
        return self.messages


@pytest.fixture
def idle() -> Idle:
    history = [MadeUpTraining.record(i) for i in range(1, 5001)]
    return Idle(title="a <b>", history=history, env="my/env")


def test_windows(idle):
    record = {**MadeUpTraining.record(5001), "losses": {"<i>x": math.inf, "y": 1e-30, "z": None}}
    idle.log_losses(record)
    (message,) = idle.sent()
    assert message["win"] == "a__b_-1-losses"
    assert message["eid"] == "my/env"
    curves = {trace["name"]: trace for trace in message["data"]}
    assert list(curves) == [*CYCLE_GAN_LOSSES, "&lt;i&gt;x", "y", "z"]
    for name, value in (("&lt;i&gt;x", None), ("y", 1e-30), ("z", None)):
        assert (curves[name]["x"][0], curves[name]["y"][0]) == (50.01, value)
        assert set(curves[name]["x"][1:]) == set(curves[name]["y"][1:]) == {None}
    for name in CYCLE_GAN_LOSSES:
        x, y = curves[name]["x"], curves[name]["y"]
        assert len(x) == len(y)
        assert 500 <= len(x) <= 1000
        assert (x[0], x[-1]) == (0.01, 50.0)
        assert y[-1] == pytest.approx(MadeUpTraining.record(5000)["losses"][name], rel=1e-5)
    assert idle.url == "http://localhost:8097/env/my_env"


def test_pictures_are_shrunk_and_labels_escaped(idle):
    idle.sent()
    picture = np.zeros((300, 1024, 3), np.uint8)
    idle.show_pictures({"<script>": picture}, {"epoch": 3, "iters": 40, "images": 9})
    (message,) = idle.sent()
    content = message["data"][0]["content"]
    assert message["opts"]["title"] == "a <b>: epoch 3, image 40"
    assert "<script>" not in content
    assert "&lt;script&gt;" in content
    assert 'width="256" height="75"' in content


@pytest.mark.parametrize(
    ("size", "shown"),
    [((32, 32), (128, 128)), ((20, 50), (40, 100)), ((64, 40), (128, 80)), ((128, 9), (128, 9))],
)
def test_pictures_of_small_crops_are_enlarged(idle, size, shown):
    idle.sent()
    pictures = {name: np.zeros((size[1], size[0], 3), np.uint8) for name in "ab"}
    idle.show_pictures(pictures, {"epoch": 3, "iters": 40, "images": 9})
    (message,) = idle.sent()
    assert f'width="{shown[0]}" height="{shown[1]}"' in message["data"][0]["content"]
    assert message["opts"]["width"] >= 2 * shown[0]
    assert message["opts"]["height"] >= shown[1]


def test_a_first_spike_does_not_flatten_the_rest():
    def y_axis(first: float) -> dict:
        idle = Idle()
        for i in range(1, 101):
            values = {"G": first if i == 1 else 1 + i / 100, "D": 0.5}
            idle.log_losses({**MadeUpTraining.record(i), "losses": values})
        (message,) = idle.sent()
        return message["layout"]["yaxis"]

    assert y_axis(2.5) == {"title": "loss"}
    low, high = y_axis(90.0)["range"]
    assert 0.3 < low < 0.5
    assert 2 < high < 4


def test_each_score_is_a_curve_in_axes_of_its_own():
    idle = Idle(title="t")
    for epoch, scores in ((5, {"L1": 0.3, "PSNR": 12.0}), (10, {"L1": 0.2, "PSNR": math.inf})):
        facts = {"epoch": epoch, "images": 1, "progress": float(epoch), "phase": "val"}
        idle.log_scores({**facts, "scores": scores})
    plot, table = idle.sent()
    assert (plot["win"], table["win"]) == ("t-1-score-curves", "t-1-scores")
    curves = {trace["name"]: (trace["x"], trace["y"], trace["yaxis"]) for trace in plot["data"]}
    assert curves == {
        "L1": ([5.0, 10.0], [0.3, 0.2], "y"),
        "PSNR": ([5.0, 10.0], [12.0, None], "y2"),
    }
    axes = plot["layout"]
    assert [axes[name]["title"] for name in ("yaxis", "yaxis2")] == ["L1", "PSNR"]
    assert axes["yaxis"]["domain"][0] > axes["yaxis2"]["domain"][1]


def test_server_is_started_on_the_thread_of_the_loop(tmp_path, monkeypatch):
    """Loading processes are forked there: none can inherit what is open in this moment."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = []

    def popen(*args, **kwargs):
        threads.append(threading.current_thread())
        raise OSError("no more processes")

    monkeypatch.setattr(visdom_server.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="no more processes"):
        make(free_port())
    assert threads == [threading.main_thread()]


def test_names_in_other_letters_have_windows_of_their_own():
    """`地図` and `馬車` would both be `__`."""
    loggers = [VisdomLogger("no server", title=title) for title in ("地図", "馬車", "maps", "maps")]
    prefixes = [logger._prefix for logger in loggers]
    assert len(set(prefixes)) == 3
    assert prefixes[2] == "maps-1"
    assert all(prefix.isascii() for prefix in prefixes)
