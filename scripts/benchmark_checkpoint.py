#!/usr/bin/env python3
"""Time saving and resuming the default CycleGAN on the CPU.

    python scripts/benchmark_checkpoint.py [--folder FOLDER] [--rounds 9]

Saving the full state (weights, optimizers, full image pools) is compared with writing as many bytes
to as many files and flushing them to disk, in turn. FOLDER is on the disk to be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from models import create_model
from models.base_model import BaseModel
from options.train_options import TrainOptions
from util import randomness
from util.run import checkpoint


def default_model(folder: Path) -> BaseModel:
    """A CycleGAN that has been trained for a step, with full pools."""
    words = ["--dataroot", ".", "--gpu_ids", "-1", "--checkpoints_dir", str(folder), "--name", "x"]
    with contextlib.redirect_stdout(io.StringIO()):
        opt = TrainOptions(words).parse(save=False)
        model = create_model(opt)
        model.setup(opt)
    for optimizer in model.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    for pool in (model.fake_A_pool, model.fake_B_pool):  # type: ignore[attr-defined]
        pool.images = [torch.rand(1, 3, 256, 256) for _ in range(pool.pool_size)]
    return model


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes, after the disk has finished earlier writes."""
    os.sync()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Time saving and resuming.")
    parser.add_argument("--folder", default=".", help="where to write [.]")
    parser.add_argument("--rounds", type=int, default=9, help="how often [9]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        model = default_model(Path(name))
        folder = model.save_dir
        state = {"run": checkpoint.new_run(folder), "epoch": 1, "epoch_iter": 0, "total_iters": 0}
        state |= {"seed": 0, "options": {}, "random": randomness.get_state()}

        def save() -> None:
            weights, full = model.network_states(), model.training_state()
            complete = {**state, "weights": weights, "model": full}
            checkpoint.save_checkpoint(folder, ["latest"], complete, model.save_networks)

        save()
        blobs = [os.urandom(path.stat().st_size) for path in sorted(folder.glob("*.pth"))]

        def write() -> None:
            for i, blob in enumerate(blobs):
                with open(folder / f"plain{i}", "wb") as file:
                    file.write(blob)
                    file.flush()
                    os.fsync(file.fileno())

        def resume() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                model.load_saved(model.opt)
            assert model.resumed is not None
            assert model.resumed.state is not None
            model.load_training_state(model.resumed.state["model"], vars(model.opt))

        write()
        rounds = [(timed(write), timed(save), timed(resume)) for _ in range(given.rounds)]
        written, saved, resumed = (statistics.median(times) for times in zip(*rounds, strict=True))
        size = sum(map(len, blobs)) / 1e6
        print(f"{size:.0f} MB in {len(blobs)} files, medians of {given.rounds} rounds")
        print(f"writing as many bytes  {written:.2f} s ({size / written:.0f} MB/s)")
        print(f"saving the full state  {saved:.2f} s ({saved / written:.2f} times as long)")
        print(f"finding and loading it {resumed:.2f} s")


if __name__ == "__main__":
    main()
