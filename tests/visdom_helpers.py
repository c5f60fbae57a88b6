"""What the tests of the live page share: a real server on 127.0.0.1, and made-up training."""

from __future__ import annotations

import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CYCLE_GAN_LOSSES = ("D_A", "G_A", "cycle_A", "idt_A", "D_B", "G_B", "cycle_B", "idt_B")
LABELS = ("real_A", "fake_B", "rec_A", "idt_B", "real_B", "fake_A", "rec_B", "idt_A")


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def post(port: int, path: str, message: dict[str, Any]) -> str:
    """Ask the server on 127.0.0.1; the text of its answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", f"/{path}", json.dumps(message))
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def windows(port: int, env: str = "main") -> dict[str, dict]:
    """All windows of an environment, as the server has them; none where it does not answer."""
    try:
        found = json.loads(post(port, "win_data", {"win": None, "eid": env}))
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def curve_lengths(port: int) -> dict[str, int]:
    """The number of points of each curve on the server."""
    return {
        trace["name"]: len(trace["x"])
        for window in windows(port).values()
        if window["type"] == "plot"
        for trace in window["content"]["data"]
    }


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> Any:
    """The first true answer of `condition`, or its last one when the time is over."""
    end = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


class Server:
    """A visdom server of the test's own, which may be killed and started again."""

    def __init__(self, folder: Path, port: int | None = None):
        self.folder = folder
        self.port = port or free_port()
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        code = "import sys; sys.modules['torch'] = None\n" + (
            "from visdom.server.run_server import main; main()"
        )
        options = ["-port", str(self.port), "-bind_local", "-eager_data_loading"]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *options, "-env_path", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        assert wait_for(lambda: "[" in self._ask(), 30), "the server did not come up"

    def _ask(self) -> str:
        try:
            return post(self.port, "env_state", {})
        except OSError:
            return ""

    def kill(self) -> None:
        """End it at once; what it showed is lost."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def freeze(self, frozen: bool = True) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP if frozen else signal.SIGCONT)


class MadeUpTraining:
    """Feeds a logger as a training loop would, and notes how long each call took."""

    def __init__(self, logger, size: int = 256, images: int = 0):
        self.logger = logger
        self.images = images
        self.waits: list[float] = []
        rng = np.random.default_rng(0)
        base = rng.integers(0, 255, (size // 8, size // 8, 3), dtype=np.uint8)
        picture = np.kron(base, np.ones((8, 8, 1), np.uint8))
        self.pictures = {label: picture + np.uint8(i) for i, label in enumerate(LABELS)}

    @staticmethod
    def record(images: int) -> dict[str, Any]:
        losses = {
            name: (i + 1) * math.exp(-images / 2000) + 0.1 * math.sin(images * (i + 1))
            for i, name in enumerate(CYCLE_GAN_LOSSES)
        }
        epoch, iters = divmod(images, 100)
        position = {"epoch": epoch + 1, "iters": iters, "images": images, "progress": images / 100}
        return {**position, "lr": 2e-4, "time": 0.1, "data": 0.01, "losses": losses}

    def _timed(self, call: Callable[[], None]) -> None:
        began = time.perf_counter()
        call()
        self.waits.append(time.perf_counter() - began)

    def step(self, pictures: bool = False) -> None:
        """One more image, with a record, and images if asked."""
        self.images += 1
        record = self.record(self.images)
        self._timed(lambda: self.logger.log_losses(record))
        if pictures:
            step = {"epoch": record["epoch"], "iters": record["iters"], "images": self.images}
            self._timed(lambda: self.logger.show_pictures(self.pictures, {**step, "save": False}))

    def run(self, seconds: float) -> None:
        """Log for some seconds, far more often than training does."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.step(pictures=self.images % 10 == 0)
            time.sleep(0.005)

    def check_waits(self, fault: str) -> None:
        """Print how long the loop's thread waited, and assert the limits: 1 ms, 20 ms.

        A call that waits for the server takes a second. But a busy machine may take the processor
        away in the middle of any call, so one in two hundred may be slower, and none 250 ms.
        """
        waits = sorted(1000 * wait for wait in self.waits)
        median, worst = waits[len(waits) // 2], waits[-1]
        slow = sum(wait > 20 for wait in waits)
        report = f"{fault}: {len(waits)} calls, median {median:.3f} ms, worst {worst:.2f} ms"
        print(f"\n{report}")
        assert median <= 1, report
        assert slow <= len(waits) // 200, f"{report}, {slow} of more than 20 ms"
        assert worst < 250, report
