"""TensorBoard and W&B: what they hold after a run and a resumed one, and what is said without."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.visdom_helpers import MadeUpTraining
from util.display.base import BackgroundLogger
from util.display.tensorboard_logger import TensorBoardLogger
from util.display.wandb_logger import ID_FILE, WandbLogger
from util.errors import UserError

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


def test_wandb_offline_and_resume(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "run"
    first = WandbLogger("project", "run", {"lr": 2e-4}, folder)
    drive(first, 1, 5)
    second = WandbLogger("project", "run", {"lr": 2e-4}, folder, resumed=True)
    drive(second, 4, 8)
    assert first.run_id == second.run_id == (folder / ID_FILE).read_text().strip()
    kept = list(folder.glob(f"wandb/offline-run-*/run-{first.run_id}.wandb"))
    assert kept
    assert all(path.stat().st_size for path in kept)
    assert list(folder.glob("wandb/offline-run-*/files/media/images/pictures/*.png"))

    third = WandbLogger("project", "run", {}, folder)  # a new run in the same folder
    third.close()
    assert third.run_id != first.run_id

    def no_run(**kwargs):
        raise wandb.errors.CommError("no net")

    monkeypatch.setattr(wandb, "init", no_run)
    with pytest.raises(UserError, match=r"--use_wandb.*no net.*WANDB_MODE=offline"):
        WandbLogger("project", "run", {}, folder)


def test_wandb_has_pictures_at_the_images_seen_in_all(tmp_path, monkeypatch):
    logged: list[dict] = []
    run = SimpleNamespace(log=logged.append, define_metric=lambda *a, **k: None, finish=int)
    fake = SimpleNamespace(init=lambda **k: run, Settings=dict, Image=lambda array, caption: array)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    drive(WandbLogger("project", "run", {}, tmp_path), 7, 7)
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
