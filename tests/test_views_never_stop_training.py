"""Training ends well whatever is wrong with what shows it."""

from __future__ import annotations

import http.server
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from tests import forked
from tests.helpers import Finished, files_below, run, run_process, unaligned
from tests.visdom_helpers import Server, free_port, windows
from util.display.console import TextFileLogger
from util.display.loggers import RecordLogger
from util.display.loss_record import read_records
from util.display.page import PageLogger
from util.display.visdom_logger import VisdomLogger
from util.display.visdom_server import VisdomServer

FLAGS = (
    "--name run --model cycle_gan --gpu_ids -1 --netG resnet_6blocks --ngf 4 --ndf 4 --seed 1 "
    "--load_size 40 --crop_size 32 --num_threads 0 --print_freq 1 --display_freq 2 "
    "--n_epochs_decay 0 --display_server http://127.0.0.1"
).split()
PICTURES = 4
PATIENCE = 90  # seconds for what takes a few on an idle machine
CLOSING = 5  # seconds that the end of training waits for a view at most


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return unaligned(tmp_path_factory.mktemp("pictures"), PICTURES)


@pytest.fixture
def command(pictures, tmp_path) -> list[str]:
    where = ["--dataroot", str(pictures), "--checkpoints_dir", str(tmp_path / "checkpoints")]
    return [*where, *FLAGS]


def recorded(folder: Path) -> int:
    return len(read_records(folder / "checkpoints" / "run" / "losses.jsonl"))


def check_trained(folder: Path, epochs: int = 2) -> None:
    """Everything that a training leaves behind is there, but for what a view may lack."""
    run_folder = folder / "checkpoints" / "run"
    assert recorded(folder) == PICTURES * epochs
    assert len(list(run_folder.glob("latest_net_*.pth"))) == 4
    assert (run_folder / "web" / "index.html").exists()
    assert (run_folder / "loss.png").exists()


def lines_of_visdom(text: str) -> list[str]:
    return re.findall(r"^visdom: (.*)$", text, re.MULTILINE)


def train(command: list[str], folder: Path, *more: str, epochs: int = 2) -> str:
    """Train to the end; returns what was said."""
    log = folder / "log.txt"
    code = forked.run([*command, "--n_epochs", str(epochs), *more], log, seconds=PATIENCE)
    assert code == 0, log.read_text()
    check_trained(folder, epochs)
    text = log.read_text()
    assert "Traceback" not in text
    return text


# ---------------------------------------------------------------------------- the server is not one
@pytest.mark.slow
def test_visdom_is_not_installed(command, tmp_path):
    argv = ["train.py", *command, "--n_epochs", "2", "--display_port", str(free_port())]
    code = (
        "import runpy, sys\n"
        "sys.modules['visdom'] = sys.modules['visdom.server'] = None\n"
        f"sys.argv = {argv!r}\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    result = run_process("-c", code)
    assert result.code == 0, result.err
    check_trained(tmp_path)
    (line,) = lines_of_visdom(result.out)
    assert "the package visdom is not installed" in line
    assert line.endswith("visdom is off, training continues")
    assert result.err == ""


class Silent:
    """Takes connections and never says a word."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.taken: list[socket.socket] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        try:
            while True:
                self.taken.append(self.socket.accept()[0])
        except OSError:
            return

    def close(self) -> None:
        self.socket.close()
        for connection in self.taken:
            connection.close()


class Stranger:
    """A web server that is not visdom."""

    def __init__(self):
        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Rude:
    """Answers with what is not HTTP, and hangs up."""

    def __init__(self):
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        try:
            while True:
                # one that was only looked at is reset: on to the next
                with self.socket.accept()[0] as connection, suppress(OSError):
                    connection.sendall(b"220 mail ready\r\n")
                    connection.shutdown(socket.SHUT_WR)
                    # to close with something unread would be a reset, which may overtake the answer
                    connection.settimeout(5)
                    while connection.recv(1 << 16):
                        pass
        except OSError:
            return

    def close(self) -> None:
        self.socket.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Stranger, "(status 501); training continues"),
        (Rude, "(ConnectionError); training continues"),
        (Silent, None),
    ],
    ids=lambda kind: getattr(kind, "__name__", ""),
)
def test_the_port_is_taken(kind, said, command, tmp_path):
    other = kind()
    try:
        text = train(command, tmp_path, "--display_port", str(other.port))
        if kind is Silent:
            assert other.taken, "it was not even asked"
    finally:
        other.close()
    lines = lines_of_visdom(text)
    assert len(lines) <= 1
    if said:
        assert lines
        assert said in lines[0]
        assert lines[0].endswith("choose another --display_port")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["ends by itself", "Ctrl-C"])
def test_the_server_is_frozen_in_the_middle(end, command, tmp_path):
    """Training goes on, and neither its end nor Ctrl-C waits long for the dashboard."""
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server")
    log = tmp_path / "log.txt"
    epochs = 30 if end == "ends by itself" else 100_000
    argv = [*command, "--display_port", str(server.port), "--n_epochs", str(epochs)]
    process = forked.start(argv, log)
    try:
        assert wait(lambda: windows(server.port)), log.read_text()
        server.freeze()
        before = recorded(tmp_path)
        assert wait(lambda: recorded(tmp_path) >= before + 2 * PICTURES), log.read_text()
        if end == "Ctrl-C":
            os.kill(process.pid, signal.SIGINT)
            done = f"got {signal.Signals(signal.SIGINT).name}: finishing this iteration"
        else:
            done = f"End of epoch {epochs} / {epochs}"
        assert wait(lambda: done in log.read_text()), log.read_text()
        began = time.monotonic()
        process.join(PATIENCE)
        seconds = time.monotonic() - began
        print(f"\nfrozen, {end}: {seconds:.1f} s until the process was gone")
        text = log.read_text()
        assert process.exitcode == (130 if end == "Ctrl-C" else 0), text
        assert seconds < CLOSING + 10  # the last save, and a busy machine
        assert "Traceback" not in text
        lines = lines_of_visdom(text)
        assert lines[0].startswith("watch this run at")
        assert len(lines) <= 2
    finally:
        process.kill()
        process.join()
        server.freeze(False)
        server.kill()


def wait(condition) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


# ----------------------------------------------------------------------------- packages are missing
@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line(package, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as if it was not installed
    result = run("train.py", *command, "--display_id", "0", f"--use_{package}")
    assert result.code == 2
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert f"--use_{package} needs the package {package}" in line
    assert f"pip install {package}" in line
    assert files_below(tmp_path) == []


# ----------------------------------------------------------------------------------- a view breaks
BREAKS: list[tuple[type, str]] = [
    (VisdomLogger, "__init__"),
    (VisdomLogger, "log_losses"),
    (PageLogger, "__init__"),
    (PageLogger, "show_pictures"),
    (PageLogger, "end_epoch"),
    (PageLogger, "close"),
    (RecordLogger, "log_losses"),
    (TextFileLogger, "log_losses"),
]


@pytest.fixture
def run_short(command) -> Callable[..., Finished]:
    def run_it(*more: str) -> Finished:
        port = ["--display_port", str(free_port())]
        # a server must not be started for each of these
        with mock.patch.object(VisdomServer, "_start_server"):
            return run("train.py", *command, "--n_epochs", "2", *port, *more)

    return run_it


@pytest.mark.parametrize(
    ("logger", "method"), BREAKS, ids=[f"{logger.__name__}.{method}" for logger, method in BREAKS]
)
def test_a_view_that_raises_is_switched_off(logger, method, run_short, tmp_path):
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the view is broken")

    before = set(threading.enumerate())  # of other tests
    with mock.patch.object(logger, method, broken):
        result = run_short()
    assert result.code == 0, result.err
    warnings = [line for line in result.err.splitlines() if "the view is broken" in line]
    assert len(warnings) == 1, result.err
    if method == "__init__":
        assert "can't be opened and is disabled" in warnings[0]
    else:
        name = "losses.jsonl" if logger is RecordLogger else logger.name
        assert f"warning: {name} is switched off: RuntimeError" in warnings[0]

    if logger is VisdomLogger:
        threads = [t for t in set(threading.enumerate()) - before if t.name == "visdom"]
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)

    # the others are as they would have been
    folder = tmp_path / "checkpoints" / "run"
    assert len(list(folder.glob("latest_net_*.pth"))) == 4
    assert "End of epoch 2 / 2" in result.out
    assert len(re.findall(r"^\(epoch: ", result.out, re.MULTILINE)) == 2 * PICTURES
    if logger is not RecordLogger:
        assert recorded(tmp_path) == 2 * PICTURES
    if logger is not TextFileLogger:
        assert (folder / "loss_log.txt").read_text().count("(epoch: ") == 2 * PICTURES
    if logger is not PageLogger:
        assert len(list((folder / "web" / "images").iterdir())) == 2 * 8


def test_the_web_folder_can_not_be_made(run_short, tmp_path):
    folder = tmp_path / "checkpoints" / "run"
    folder.mkdir(parents=True)
    (folder / "web").write_text("in the way")
    result = run_short()
    assert result.code == 0, result.err
    (warning,) = [line for line in result.err.splitlines() if line.startswith("warning:")]
    assert "is disabled" in warning
    assert (folder / "web").read_text() == "in the way"
    assert recorded(tmp_path) == 2 * PICTURES
