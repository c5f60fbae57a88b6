"""Four iterations of each model, and its networks and defaults, in float64.

In float64 rounding does not grow to anything in four steps of Adam, so that the numbers are those
of the published codes to seven digits on any processor. What codes may draw in their own way is
fixed: all patches are compared, and whether images are mirrored does not depend on chance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from models import BaseModel, create_model
from tests.conformance.probe import Record, digest, fill, keys, options, sums, wave
from tests.helpers import seed_all

SMALL = "--ngf 8 --ndf 8 --load_size 32 --crop_size 32"
ALL_PATCHES = f"{SMALL} --num_patches 1000000"
CUT = f"--model cut {ALL_PATCHES}"
FAST = f"{CUT} --CUT_mode FastCUT"
DCL = f"--model dcl {ALL_PATCHES} --netF_nc 16"
CYCLE = f"--model cycle_gan {SMALL}"
PAIRS = "--model pix2pix --netG unet_128 --ngf 8 --ndf 8 --load_size 128 --crop_size 128"
PLAIN = "--no_antialias --no_antialias_up --gan_mode vanilla --lr 0.001"
BACK = "--direction BtoA"

DEFAULTS = {"CUT": "--model cut", "FastCUT": "--model cut --CUT_mode FastCUT", "DCL": "--model dcl"}
# command line, images in a batch, and what random numbers are
STEPS: dict[str, tuple[str, int, float | None]] = {
    "CUT": (CUT, 1, 0.9),
    "CUT/batch2": (CUT, 2, 0.9),
    "CUT/all_negatives": (f"{CUT} --nce_includes_all_negatives_from_minibatch True", 2, 0.9),
    "CUT/BtoA": (f"{CUT} {BACK} --lambda_NCE 3 --nce_T 0.2 --nce_layers 4,12", 1, 0.9),
    "CUT/no_antialias": (f"{CUT} {PLAIN}", 1, 0.9),
    "FastCUT": (FAST, 1, 0.9),
    "FastCUT/mirrored": (FAST, 1, 0.1),
    "FastCUT/mirrored/batch2": (f"{FAST} --lambda_GAN 0.5", 2, 0.1),
    "DCL": (DCL, 1, 0.9),
    "DCL/weights": (f"{DCL} --lambda_IDT 2 --lambda_NCE 1 --nce_T 0.2", 1, 0.9),
    "DCL/lsgan": (f"{DCL} --gan_mode lsgan --nce_layers 4,8", 1, 0.9),
    "DCL/BtoA": (f"{DCL} {BACK} --lambda_GAN 0.5", 1, 0.9),
    "cycle_gan": (f"{CYCLE} --netG resnet_6blocks", 1, None),
    "cycle_gan/pool": (f"{CYCLE} --netG resnet_6blocks --pool_size 2", 2, None),
    "cycle_gan/BtoA": (f"{CYCLE} {BACK} --lambda_A 3 --lambda_B 7", 1, None),
    "cycle_gan/no_identity": (
        f"{CYCLE} --netG resnet_6blocks --lambda_identity 0 --gan_mode vanilla",
        *(1, None),
    ),
    "cycle_gan/batch_norm": (f"{CYCLE} --netG resnet_6blocks --norm batch --lr 0.001", 2, None),
    "pix2pix": (f"{PAIRS} --no_dropout", 1, None),
    "pix2pix/dropout": (PAIRS, 2, None),
    "pix2pix/lsgan": (
        f"{PAIRS} --norm instance --gan_mode lsgan {BACK} --lambda_L1 10",
        *(1, None),
    ),
}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within, new networks are of float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(words: str, batch: int, folder: Path) -> BaseModel:
    """A model with all of its networks filled by formula."""
    seed_all(1)
    argv = [*words.split(), "--num_threads", "0", "--batch_size", str(batch)]
    opt = options("train", folder, "--dataroot", "none", *argv).opt
    model = create_model(opt)
    model.setup(opt)
    for k, net in enumerate(model.networks().values()):
        fill(net, 3 * k)
    return model


def defaults(name: str, folder: Path, names: list[str]) -> Record:
    """What these options are if only the model is given."""
    argv = ["--dataroot", "none", *DEFAULTS[name].split()]
    found = vars(options("train", folder, *argv).opt)
    return {option: found[option] for option in names if option in found}


def nets(name: str, folder: Path) -> Record:
    """Names, shapes and outputs of a CUT's networks; `name` holds the flags."""
    flags = name.split("/")
    whole = not name.startswith("--")
    if whole:
        layers = "0,4,8,12,16" if flags[0].endswith("9blocks") else "0,4,8,12"
        flags = ["--netG", flags[0], "--nce_layers", layers, *flags[1:]]
    model: Any = build(f"{CUT} {' '.join(flags)}", 1, folder)
    judged = wave((2, 3, 64, 64), 6).double()
    with torch.no_grad():
        if not whole:
            translated = model.netG(wave((2, 3, 32, 32), 6).double())
            return {
                "keys": keys(model.netD),
                "D": digest(model.netD(judged)),
                "G": digest(translated),
            }
        record: Record = {name: {"keys": keys(net)} for name, net in model.networks().items()}
        record["G"]["out"] = digest(model.netG(wave((2, 3, 64, 32), 5).double()))
        record["D"]["out"] = digest(model.netD(judged))
    return record


def steps(name: str, folder: Path) -> Record:
    """Losses of four iterations, and the weights and images after them."""
    words, batch, draw = STEPS[name]
    model = build(words, batch, folder)
    size = model.opt.crop_size
    always = mock.patch("random.random", return_value=draw)
    with contextlib.nullcontext() if draw is None else always:
        seed_all(9)
        losses = []
        for i in range(4):
            shape = (batch, 3, size, size)
            sides = {"A": wave(shape, 50 + 2 * i).double(), "B": wave(shape, 51 + 2 * i).double()}
            model.set_input({**sides, "A_paths": ["a"] * batch, "B_paths": ["b"] * batch})
            model.optimize_parameters()
            values = {n: torch.as_tensor(getattr(model, "loss_" + n)) for n in model.loss_names}
            losses.append([[n, float(value.detach())] for n, value in values.items()])
    return {
        "losses": losses,
        "names": list(model.model_names),
        **{"net" + n: sums(net) for n, net in model.networks().items()},
        "visuals": [[n, digest(x)] for n, x in model.get_current_visuals().items()],
    }
