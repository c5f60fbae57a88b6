"""A model trained with --fast is as good as one trained in float32, though its numbers differ."""

from __future__ import annotations

import math

import pytest
import torch

from data import create_dataset
from models import create_model
from options.test_options import TestOptions
from options.train_options import TrainOptions
from util.randomness import seed_everything

TILES = "--netG resnet_6blocks --ngf 16 --ndf 16 --crop_size 64 --num_threads 0 --gpu_ids -1"
# what --fast stands for, without compiling, which changes only the time
FAST = "--precision bf16 --batch_passes on --cache_images auto"
pytestmark = pytest.mark.slow


def epochs(tmp_path, flags: str, count: int):
    """A model after each of so many epochs, and the losses of all iterations until then."""
    options = f"{TILES} {flags} --load_size 72 --checkpoints_dir {tmp_path} --name x"
    opt = TrainOptions(f"{options} --display_id 0").parse(save=False)
    seed_everything(opt.seed)
    dataset, model = create_dataset(opt), create_model(opt)
    model.setup(opt)
    losses: list[dict[str, float]] = []
    for _ in range(count):
        for batch in dataset:
            model.set_input(batch)
            model.optimize_parameters()
            losses.append(model.get_current_losses())
        model.update_learning_rate()
        yield model, {name: torch.tensor([loss[name] for loss in losses]) for name in losses[0]}


@pytest.mark.parametrize(
    ("model", "data"), [("cycle_gan", "unaligned"), ("pix2pix --norm instance", "aligned")]
)
def test_losses_stay_with_those_of_float32(model, data, tmp_path):
    """The running means of every loss are within 5% over 200 iterations, from the 50th on."""
    flags = f"--model {model} --dataroot datasets/worldmaps_mini/{data} --seed 1"
    *_, (_, wanted) = epochs(tmp_path, f"{flags} --precision fp32 --batch_passes off", 10)
    *_, (_, found) = epochs(tmp_path, f"{flags} {FAST}", 10)
    for name, values in wanted.items():
        assert len(values) >= 200
        assert not torch.equal(found[name], values)  # it was really another arithmetic
        ratio = found[name].cumsum(0) / values.cumsum(0)
        off = (ratio[50:200] - 1).abs().max().item()
        print(f"{model} {name}: running means at most {off:.1%} apart")
        assert off < 0.05, name


def test_psnr_is_that_of_float32(tmp_path):
    """PSNR on the test tiles, the mean of three seeds: within 0.3 dB.

    That of a single model moves by half a dB from one epoch to the next, so each one counts with
    the mean of its last six epochs.
    """
    found: dict[str, list[float]] = {}
    # no dropout: it would draw anew at test time
    pairs = (
        "--model pix2pix --norm instance --no_dropout --dataroot datasets/worldmaps_mini/aligned"
    )
    for seed in (1, 2, 3):
        for flags in ("--precision fp32 --batch_passes off", FAST):
            schedule = f"--n_epochs 6 --n_epochs_decay 9 --seed {seed} {flags}"
            models = epochs(tmp_path, f"{pairs} {schedule}", 15)
            scores = [psnr(m, tmp_path, pairs) for i, (m, _) in enumerate(models) if i >= 9]
            found.setdefault(flags, []).append(sum(scores) / len(scores))
    plain, fast = (sum(values) / 3 for values in found.values())
    print(f"PSNR of float32 {plain:.2f} dB, of --fast {fast:.2f} dB, by seed {found}")
    assert plain > 12  # it has learned something: an untrained one has about 9
    assert abs(fast - plain) < 0.3


def psnr(model, tmp_path, flags: str) -> float:
    """The mean over the test tiles, in dB, of values in [-1, 1]."""
    opt = TestOptions(f"{TILES} {flags} --checkpoints_dir {tmp_path} --name none").parse(save=False)
    opt.serial_batches = True
    values = []
    for batch in create_dataset(opt):
        model.set_input(batch)
        model.test()
        error = (model.fake_B - model.real_B).double().square().mean().item()
        values.append(10 * math.log10(4 / error))
    return sum(values) / len(values)
