"""TensorBoard and W&B: what they hold after a run and a resumed one, and what is said without."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from models.networks import define_G
from tests.helpers import TINY, succeed, unaligned
from tests.visdom_helpers import MadeUpTraining
from util.display.base import BackgroundLogger
from util.display.tensorboard_logger import TensorBoardLogger
from util.display.wandb_logger import ID_FILE, WandbLogger, log_result
from util.errors import UserError
from util.html import HTML
from util.visualizer import save_images

OPT = Namespace(wandb_project_name="project", name="run", lr=2e-4)
PICTURES = {"real_A": np.zeros((32, 48, 3), np.uint8), "fake_B": np.ones((32, 48, 3), np.uint8)}


def record(images: int) -> dict:
    position = {"epoch": 1, "iters": images, "images": images, "progress": images / 100}
    return {**position, "lr": 2e-4, "time": 0.1, "data": 0.01, "losses": {"G": 1 / images}}


def drive(logger, first: int, last: int) -> None:
    for images in range(first, last + 1):
        logger.log_losses(record(images))
    logger.show_pictures(PICTURES, {"epoch": 2, "iters": 1, "images": last, "save": False})
    logger.close()
    logger.close()  # twice is fine


def test_tensorboard_and_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drive(TensorBoardLogger(tmp_path), 1, 30)
    time.sleep(1.1)  # the files' names hold the second, and are read in the order of their names
    drive(TensorBoardLogger(tmp_path, resumed_at=20), 21, 25)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {"loss/G", "lr", "time/compute", "time/data"}
    assert set(tags["images"]) == {"pictures/real_A", "pictures/fake_B"}
    # of all epochs, else those of each would replace those of the one before
    assert [x.step for x in events.Images("pictures/real_A")] == [25]
    scalars = events.Scalars("loss/G")
    assert [s.step for s in scalars] == list(range(1, 26))  # no second 21, no stale 26 to 30
    assert scalars[9].value == pytest.approx(0.1)
    (picture,) = events.Images("pictures/real_A")
    assert (picture.step, picture.width, picture.height) == (25, 48, 32)
    time.sleep(1.1)
    drive(TensorBoardLogger(tmp_path), 1, 3)  # a new training under the same name
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [s.step for s in events.Scalars("loss/G")] == [1, 2, 3]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The package, offline."""
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    yield package
    package.finish()


def images_in(folder: Path) -> list[bytes]:
    """The pixels of all PNG files of a folder."""
    return sorted(np.asarray(Image.open(path)).tobytes() for path in folder.glob("**/*.png"))


def test_results_of_test_py_on_wandb(wandb, tmp_path):
    net = define_G(3, 3, 4, "resnet_6blocks", norm="instance")
    (tmp_path / "x").mkdir()
    torch.save(net.state_dict(), tmp_path / "x" / "latest_net_G.pth")
    data = unaligned(tmp_path / "data", 2) / "testA"
    words = ["--dataroot", data, "--name", "x", "--checkpoints_dir", tmp_path, "--no_dropout"]
    words += ["--results_dir", tmp_path / "results", "--model", "test", "--use_wandb"]
    succeed("test.py", *TINY, *words)
    wandb.finish()
    results = images_in(tmp_path / "results")
    assert len(results) == 4
    assert images_in(tmp_path / "x" / "wandb") == results


def test_save_images_logs_to_the_run_of_a_loop_of_ones_own(wandb, tmp_path):
    wandb.init(project="project", dir=str(tmp_path))
    page = HTML(tmp_path / "page", "title")
    save_images(page, PICTURES, ["a.png"], use_wandb=True)
    wandb.finish()
    assert images_in(tmp_path / "wandb") == sorted(x.tobytes() for x in PICTURES.values())


def test_results_that_wandb_does_not_take_are_a_warning(wandb, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "Image", lambda *a, **k: 1 / 0)
    log_result("a", {"fake": tmp_path / "a.png"})
    assert capsys.readouterr().err.startswith("warning: --use_wandb: the images of a are not log")


def test_wandb_offline_and_resume(wandb, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    first = WandbLogger(OPT, folder)
    drive(first, 1, 5)
    second = WandbLogger(OPT, folder, resumed=True)
    drive(second, 4, 8)
    assert first.run_id == second.run_id == (folder / ID_FILE).read_text().strip()
    kept = list(folder.glob(f"wandb/offline-run-*/run-{first.run_id}.wandb"))
    assert kept
    assert all(path.stat().st_size for path in kept)
    assert list(folder.glob("wandb/offline-run-*/files/media/images/pictures/*.png"))

    third = WandbLogger(OPT, folder)  # a new run in the same folder
    third.close()
    assert third.run_id != first.run_id

    def no_run(**kwargs):
        raise wandb.errors.CommError("no net")

    monkeypatch.setattr(wandb, "init", no_run)
    with pytest.raises(UserError, match=r"--use_wandb.*no net.*WANDB_MODE=offline"):
        WandbLogger(OPT, folder)


def test_wandb_has_pictures_at_the_images_seen_in_all(tmp_path, monkeypatch):
    logged: list[dict] = []
    run = SimpleNamespace(log=logged.append, define_metric=lambda *a, **k: None, finish=int)
    fake = SimpleNamespace(init=lambda **k: run, Settings=dict, Image=lambda array, caption: array)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    drive(WandbLogger(OPT, tmp_path), 7, 7)
    assert [("pictures/real_A" in x, x["images"]) for x in logged] == [(False, 7), (True, 7)]


def test_the_loop_never_waits_for_a_slow_or_broken_sink(capfd):
    class Slow(BackgroundLogger):
        name = "slow"
        close_seconds = 0.2

        def _run(self):
            time.sleep(1)
            raise RuntimeError("disk\ngone")

    logger = Slow()
    logger._thread.start()
    training = MadeUpTraining(logger)
    training.run(0.3)
    training.check_waits("a logger that hangs")
    began = time.monotonic()
    logger.close()
    assert time.monotonic() - began < 0.5
    logger._thread.join()
    said = "slow: RuntimeError: disk gone; slow is off, training continues\n"
    assert capfd.readouterr().out.endswith(said)
