"""A run that is interrupted, in whatever way, ends with the weights of one that was not."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.pix2pix_model import Pix2PixModel
from tests import forked
from tests.helpers import run, succeed

FLAGS = (
    "--gpu_ids -1 --display_id 0 --no_html --ngf 4 --ndf 4 --load_size 40 --crop_size 32 --seed 5 "
    "--n_epochs 2 --n_epochs_decay 1 --print_freq 3 --save_epoch_freq 2 --save_latest_freq 3 "
    "--pool_size 3"
).split()
MODELS = {
    "cycle_gan": "--model cycle_gan --netG resnet_6blocks".split(),
    # dropout and batch norm: random draws and running statistics that have to go on as well
    "pix2pix": "--model pix2pix --netG resnet_6blocks --batch_size 2".split(),
}
PICTURES = 7


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, width in [("trainA", 48), ("trainB", 48), ("train", 96)]:
        (folder / name).mkdir()
        for i in range(PICTURES):
            pixels = rng.integers(0, 256, (48, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def command(pictures: Path, folder: Path, model: str, *more: str) -> list[str]:
    where = ["--dataroot", str(pictures), "--checkpoints_dir", str(folder), "--name", "x"]
    return [*where, *FLAGS, *MODELS[model], *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the newest save, the optimizers' too, by file and key."""
    found = {}
    for path in sorted((folder / "x").glob("latest_*.pth")):
        content = torch.load(path, weights_only=True)
        if path.name.endswith("_train_state.pth"):
            content = {
                f"{i}.{number}.{key}": value
                for i, optimizer in enumerate(content["model"]["optimizers"])
                for number, slots in optimizer["state"].items()
                for key, value in slots.items()
            }
        found.update({f"{path.name}:{key}": value for key, value in content.items()})
    return found


def assert_same(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    assert len(wanted) > 100
    different = [key for key in wanted if not torch.equal(ours[key], wanted[key])]
    assert not different


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that a run in one piece ends with, by model."""
    results = {}
    for model in MODELS:
        folder = tmp_path_factory.mktemp(model)
        log = folder / "log"
        code = forked.run(command(pictures, folder, model, "--num_threads", "0"), log)
        assert code == 0, log.read_text()
        results[model] = weights(folder)
    return results


def go_on_until_done(argv: list[str], log: Path, interrupt) -> int:
    """Run again and again; `interrupt(process)` ends a run early. Returns how often it did."""
    for interruptions in range(60):
        process = forked.start([*argv, "--continue_train"], log)
        interrupted = interrupt(process)
        process.join(120)
        assert process.exitcode is not None
        if process.exitcode == 0:
            return interruptions
        assert interrupted, log.read_text()[-3000:]
    raise AssertionError("never came to its end: " + log.read_text()[-3000:])


def wait_for_progress(log: Path, lines: int, process, seconds: float = 60) -> bool:
    """Wait until the log has that many lines of losses or saves."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.is_alive():
        text = log.read_text() if log.exists() else ""
        if len(re.findall(r"^(\(epoch|saving)", text, re.M)) >= lines:
            return True
        time.sleep(0.005)
    return False


def test_a_signal_while_validating_stops_before_the_next_epoch(
    pictures, uninterrupted, tmp_path, monkeypatch
):
    """Which would need the loading processes, and a scheduler's signal ends them in a minute."""

    def signalled(self, position, visualizer, stopping):
        if position.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return False

    argv = command(pictures, tmp_path, "cycle_gan", "--num_threads", "0")
    with monkeypatch.context() as patched:
        patched.setattr("util.scores.validation.Validation.end_epoch", signalled)
        stopped = run("train.py", *argv)
    assert stopped.code == 128 + signal.SIGTERM
    assert "stopped: got SIGTERM" in stopped.out
    assert "epoch: 1," in stopped.out
    assert "epoch: 2," not in stopped.out
    succeed("train.py", *argv, "--continue_train")
    assert_same(weights(tmp_path), uninterrupted["cycle_gan"])


@pytest.mark.parametrize("threads", ["0", "2"])
def test_nothing_is_lost_to_a_broken_picture(threads, pictures, uninterrupted, tmp_path):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    file = root / "train" / "6.png"  # with this seed in the third of four batches
    whole = file.read_bytes()
    start = whole.index(b"IDAT") + 4
    file.write_bytes(whole[:start] + bytes(200) + whole[start + 200 :])
    argv = command(root, tmp_path, "pix2pix", "--num_threads", threads)
    argv += ["--save_latest_freq", "100"]
    failed = run("train.py", *argv)
    assert failed.code == 1
    assert "loading failed: saving the latest model (total_iters 4)" in failed.out
    assert str(file) in failed.err
    file.write_bytes(whole)
    succeed("train.py", *argv, "--continue_train")
    assert_same(weights(tmp_path), uninterrupted["pix2pix"])


def test_nothing_is_lost_to_a_killed_loading_process(
    pictures, uninterrupted, tmp_path, monkeypatch
):
    """It is killed in the middle of an iteration, which comes to its end."""
    step = Pix2PixModel.optimize_parameters
    # as at the start of a program: a DataLoader of an earlier test leaves torch's handler behind
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def killed(self: Any) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
            time.sleep(0.3)  # torch would raise here
        step(self)

    argv = command(pictures, tmp_path, "pix2pix", "--num_threads", "1")
    argv += ["--save_latest_freq", "100"]
    with monkeypatch.context() as patched:
        patched.setattr(Pix2PixModel, "optimize_parameters", killed)
        failed = run("train.py", *argv)
    assert failed.code == 1
    assert "loading failed: saving the latest model" in failed.out
    assert failed.err.splitlines()[-1].startswith("error: a process that loads images was killed")
    succeed("train.py", *argv, "--continue_train")
    assert_same(weights(tmp_path), uninterrupted["pix2pix"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("model", "threads"), [("cycle_gan", "0"), ("cycle_gan", "2"), ("pix2pix", "2")]
)
def test_interrupted_at_random_moments(model, threads, number, pictures, uninterrupted, tmp_path):
    rng = random.Random(f"{model}{threads}{number}")
    log = tmp_path / "log"
    left = 4

    def interrupt(process) -> bool:
        nonlocal left
        if left == 0:
            return False
        text = log.read_text() if log.exists() else ""
        done = len(re.findall(r"^(\(epoch|saving)", text, re.M))
        if not wait_for_progress(log, done + rng.randint(1, 3), process):
            return False
        time.sleep(rng.random() * 0.1)
        if process.is_alive():
            os.kill(process.pid, number)
            left -= 1
        return True

    argv = command(pictures, tmp_path, model, "--num_threads", threads)
    interruptions = go_on_until_done(argv, log, interrupt)
    assert interruptions >= 1
    if number != signal.SIGKILL:
        assert f"got {signal.Signals(number).name}" in log.read_text()
    assert_same(weights(tmp_path), uninterrupted[model])


@pytest.mark.slow
def test_killed_at_every_kind_of_moment_of_a_save(pictures, uninterrupted, tmp_path):
    """Each run dies inside one of its saves, a little later every time."""
    log = tmp_path / "log"
    argv = command(pictures, tmp_path, "cycle_gan", "--num_threads", "0")
    moments = iter([1, 7, 40, 95, 150, 210, 250, 300, 333, 338, 340, 342, 343, 344, 345, 346, 347])
    killed = 0
    for moment in moments:
        code = forked.run([*argv, "--continue_train"], log, crash_at=moment)
        if code == 0:
            break
        assert code == -signal.SIGKILL, log.read_text()[-3000:]
        killed += 1
    code = forked.run([*argv, "--continue_train"], log)
    assert code == 0, log.read_text()[-3000:]
    assert killed >= 10
    assert_same(weights(tmp_path), uninterrupted["cycle_gan"])
    assert not list((tmp_path / "x").glob(".*.tmp")), "temporary files were left behind"


@pytest.mark.parametrize(("other", "data"), [("cycle_gan", "unaligned"), ("template", "aligned")])
def test_another_model_is_told_which_one_was_trained(other, data, pictures, tmp_path):
    """CycleGAN has other networks; template has one of the two, and one optimizer less."""
    argv = command(pictures, tmp_path, "pix2pix", "--n_epochs", "1", "--n_epochs_decay", "0")
    succeed("train.py", *argv, "--no_dropout")
    words = ["--model", other, "--dataset_mode", data, "--no_dropout", "--continue_train"]
    done = run("train.py", *argv, *words)
    assert done.code == 1
    assert "--model pix2pix" in done.err.splitlines()[-1]
