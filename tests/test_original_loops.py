"""Loops in the form of the original's train.py and test.py, over these packages."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import ROOT, aligned, files_below, run_process, succeed, unaligned
from tests.ranks import Group, free_port
from util import distributed
from util.run.position import Position
from util.visualizer import Visualizer

# As of 2024: the number of images is known to the loop alone, and is told as a share of the epoch.
TRAIN_2024 = """
import time
from options.train_options import TrainOptions
from data import create_dataset
from models import create_model
from util.visualizer import Visualizer

if __name__ == '__main__':
    opt = TrainOptions().parse()
    dataset = create_dataset(opt)
    size = len(dataset)
    model = create_model(opt)
    model.setup(opt)
    visualizer = Visualizer(opt)
    total = 0
    for epoch in range(opt.epoch_count, opt.n_epochs + opt.n_epochs_decay + 1):
        start, waiting, seen = time.time(), time.time(), 0
        visualizer.reset()
        model.update_learning_rate()
        for i, batch in enumerate(dataset):
            began = time.time()
            if total % opt.print_freq == 0:
                t_data = began - waiting
            total += opt.batch_size
            seen += opt.batch_size
            model.set_input(batch)
            model.optimize_parameters()
            if total % opt.display_freq == 0:
                save = total % opt.update_html_freq == 0
                model.compute_visuals()
                visualizer.display_current_results(model.get_current_visuals(), epoch, save)
            if total % opt.print_freq == 0:
                losses = model.get_current_losses()
                t_comp = (time.time() - began) / opt.batch_size
                visualizer.print_current_losses(epoch, seen, losses, t_comp, t_data)
                visualizer.plot_current_losses(epoch, float(seen) / size, losses)
            if total % opt.save_latest_freq == 0:
                model.save_networks('iter_%d' % total if opt.save_by_iter else 'latest')
            waiting = time.time()
        if epoch % opt.save_epoch_freq == 0:
            model.save_networks('latest')
            model.save_networks(epoch)
"""

# As of 2025: processes are joined by a function, views are told the number of images seen.
TRAIN_2025 = """
import time
from options.train_options import TrainOptions
from data import create_dataset
from models import create_model
from util.visualizer import Visualizer
from util.util import init_ddp, cleanup_ddp

if __name__ == "__main__":
    opt = TrainOptions().parse()
    opt.device = init_ddp()
    dataset = create_dataset(opt)
    model = create_model(opt)
    model.setup(opt)
    visualizer = Visualizer(opt)
    visualizer.set_dataset_size(len(dataset))
    total = 0
    for epoch in range(opt.epoch_count, opt.n_epochs + opt.n_epochs_decay + 1):
        waiting, seen = time.time(), 0
        visualizer.reset()
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        for i, batch in enumerate(dataset):
            began = time.time()
            t_data = began - waiting
            total += opt.batch_size
            seen += opt.batch_size
            model.set_input(batch)
            model.optimize_parameters()
            if total % opt.display_freq == 0:
                save = total % opt.update_html_freq == 0
                model.compute_visuals()
                visuals = model.get_current_visuals()
                visualizer.display_current_results(visuals, epoch, total, save)
            if total % opt.print_freq == 0:
                losses = model.get_current_losses()
                t_comp = (time.time() - began) / opt.batch_size
                visualizer.print_current_losses(epoch, seen, losses, t_comp, t_data)
                visualizer.plot_current_losses(total, losses)
            waiting = time.time()
        model.update_learning_rate()
        if epoch % opt.save_epoch_freq == 0:
            model.save_networks("latest")
            model.save_networks(epoch)
    cleanup_ddp()
"""

TEST = """
import os
from options.test_options import TestOptions
from data import create_dataset
from models import create_model
from util.visualizer import save_images
from util import html

if __name__ == '__main__':
    opt = TestOptions().parse()
    opt.num_threads = 0
    opt.batch_size = 1
    opt.serial_batches = True
    opt.no_flip = True
    opt.display_id = -1
    dataset = create_dataset(opt)
    model = create_model(opt)
    model.setup(opt)
    web_dir = os.path.join(opt.results_dir, opt.name, '{}_{}'.format(opt.phase, opt.epoch))
    webpage = html.HTML(web_dir, 'Experiment = %s, Epoch = %s' % (opt.name, opt.epoch))
    if opt.eval:
        model.eval()
    for i, batch in enumerate(dataset):
        if i >= opt.num_test:
            break
        model.set_input(batch)
        model.test()
        visuals = model.get_current_visuals()
        image_path = model.get_image_paths()
        save_images(webpage, visuals, image_path, aspect_ratio=opt.aspect_ratio,
                    width=opt.display_winsize, use_wandb=opt.use_wandb)
    webpage.save()
"""

WORDS = (
    "--gpu_ids -1 --name x --ngf 4 --load_size 36 --crop_size 32 --num_threads 0 "
    "--netG resnet_6blocks"
).split()
TRAINING = (
    "--ndf 4 --display_id 0 --n_epochs 2 --n_epochs_decay 1 --print_freq 2 --display_freq 2 "
    "--update_html_freq 4 --save_epoch_freq 1 --seed 3"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "model", "make", "count"),
    [(TRAIN_2024, "cycle_gan", unaligned, 4), (TRAIN_2025, "pix2pix", aligned, 5)],
)
def test_the_loops_of_the_original(tmp_path: Path, text, model, make, count):
    data = make(tmp_path / "data", count)
    words = ["--dataroot", data, "--checkpoints_dir", tmp_path, "--model", model, *WORDS]
    # a process of its own: nothing closes the visualizer, so its end has to
    result = run_process("-c", text, *words, *TRAINING)
    assert result.code == 0, result.err
    assert "(epoch: 3, iters: " in result.out
    folder = tmp_path / "x"
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    every = [(epoch, seen) for epoch in (1, 2, 3) for seen in range(1, count + 1)]
    due = [place for total, place in enumerate(every, 1) if total % 2 == 0]
    assert [(line["epoch"], line["iters"]) for line in lines] == due
    assert [line["images"] for line in lines] == list(range(2, 3 * count + 1, 2))
    progress = [epoch - 1 + seen / count for epoch, seen in due]
    first = 1 if text is TRAIN_2024 else 0  # how long an epoch is comes after its first losses
    assert [line["progress"] for line in lines][first:] == pytest.approx(progress[first:])
    page = (folder / "web" / "index.html").read_text()
    for epoch in (1, 2, 3):
        assert f"images/epoch{epoch:03d}_" in page
    assert (folder / "loss.png").exists()
    assert (folder / "3_net_G.pth").exists() or (folder / "3_net_G_A.pth").exists()

    program = tmp_path / "test.py"
    program.write_text(TEST)
    succeed(
        str(program), *words, "--model", model, "--results_dir", tmp_path / "r", "--num_test", 2
    )
    results = tmp_path / "r" / "x" / "test_latest"
    assert len(files_below(results / "images")) == 2 * (6 if model == "cycle_gan" else 3)
    assert "images/1_fake_B.png" in (results / "index.html").read_text()


# notes which of several processes write weights
WHO_SAVES = """
import os, torch
ordinary = torch.save
def save(*args, **more):
    open("saved_by_" + os.environ["RANK"], "w").close()
    ordinary(*args, **more)
torch.save = save
"""


@pytest.mark.slow
def test_one_of_several_processes_saves(tmp_path):
    data = aligned(tmp_path / "data", 4)
    program = tmp_path / "loop.py"
    program.write_text(WHO_SAVES + TRAIN_2025)
    words = ["--dataroot", data, "--checkpoints_dir", tmp_path, "--model", "pix2pix", *WORDS]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", free_port()]
    more = {"PYTHONPATH": str(ROOT)}
    result = run_process(*launch, program, *words, *TRAINING, cwd=tmp_path, more=more)
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.glob("saved_by_*")] == ["saved_by_0"]
    assert (tmp_path / "x" / "3_net_G.pth").exists()


def loop_of_a_rank(argv: list[str], out: str) -> None:
    sys.argv = ["train.py", *argv]
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(TRAIN_2025, names)
    torch.save(names["model"].network_states(), f"{out}.{distributed.rank()}")


def test_a_resumed_loop_has_the_same_weights_on_all_ranks(tmp_path: Path):
    """Only rank 0 reads the files, and such a loop does nothing to give them to the others."""
    data = aligned(tmp_path / "data", 4)
    argv = [*map(str, ("--dataroot", data, "--checkpoints_dir", tmp_path)), "--model", "pix2pix"]
    argv += [*WORDS, *TRAINING, "--no_html", "--n_epochs", "1", "--n_epochs_decay", "0"]
    first = Group(tmp_path / "log1", 1, loop_of_a_rank, argv, str(tmp_path / "one"))
    assert first.wait() == 0, first.text()
    argv.append("--continue_train")
    group = Group(tmp_path / "log2", 2, loop_of_a_rank, argv, str(tmp_path / "two"))
    assert group.wait() == 0, group.text()
    assert f"loading the model from {tmp_path / 'x' / 'latest_net_G.pth'}" in group.text()
    here, there = (torch.load(tmp_path / f"two.{rank}", weights_only=True) for rank in (0, 1))
    for name in ("G", "D"):
        assert here[name].keys() == there[name].keys()
        for key, value in here[name].items():
            assert torch.equal(value, there[name][key]), f"{name}.{key}"


@pytest.mark.parametrize(
    ("resumed_at", "seconds", "said"),
    [
        (0, 1800, "1800 sec, about 3.5 h left"),
        (75, 450, "450 sec, about 3.5 h left"),
        (0, 9, "9 sec"),
    ],
)
def test_what_is_left_of_a_training(tmp_path, monkeypatch, capsys, resumed_at, seconds, said):
    """Seven epochs of 100 images after this one, whose second half may be another process's."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    opt = argparse.Namespace(
        n_epochs=5, n_epochs_decay=5, no_html=True, display_id=0, val_freq=0, use_wandb=False,
        use_tensorboard=False, checkpoints_dir=str(tmp_path), name="x", num_threads=0,
    )  # fmt: skip
    position = Position(3, resumed_at, 200 + resumed_at)
    with Visualizer(opt, 100, position) as visualizer:
        for _ in visualizer.batches(range(100 - resumed_at)):
            clock[0] += seconds / (100 - resumed_at)
            position.advance(1, 100)
        visualizer.end_epoch(3)
    assert capsys.readouterr().out.endswith(f"End of epoch 3 / 10 \t Time Taken: {said}\n")
