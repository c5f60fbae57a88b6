"""Records what the code does, as plain numbers and names, in the form of `golden.json`.

The golden file was recorded from the original CycleGAN/pix2pix code. Weights, batches and images
come from closed formulas, so that both see the same numbers whatever they draw; what is drawn on
purpose (initialization, dropout, crops) comes after seeding every source alike.

Each function takes the name of a record in the golden file and returns ours.
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from data import find_dataset_using_name
from models import networks
from options.test_options import TestOptions
from options.train_options import TrainOptions
from tests.helpers import files_below, run, seed_all
from util.image_pool import ImagePool

Record = dict[str, Any]


# ---------------------------------------------------------------------------------------- formulas
def wave(shape: tuple[int, ...], k: int) -> torch.Tensor:
    """A tensor in (-1, 1), a fixed mix of sines; `k` picks the mix."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    slow = torch.sin(i * i * 1e-3 * (1 + k % 7) + 2 * k)
    return (torch.sin(i * (0.37 + 0.011 * k) + k) * 0.6 + slow * 0.4).reshape(shape).float()


@torch.no_grad()
def fill(net: nn.Module, k: int) -> nn.Module:
    """Overwrite all weights and statistics by formula, on a scale that keeps signals alive."""
    for j, (name, value) in enumerate(sorted(net.state_dict().items())):
        if not value.dtype.is_floating_point:
            continue
        numbers = wave(tuple(value.shape), k + j)
        if name.endswith("running_var"):
            value.copy_(numbers.abs() + 0.5)
        elif value.dim() > 1:
            value.copy_(numbers * (2.0 / math.prod(value.shape[1:])) ** 0.5)
        else:
            value.copy_(0.1 * numbers + (1 if name.endswith("weight") else 0))
    return net


def digest(tensor: torch.Tensor) -> Record:
    """Shape, mean, mean square and twelve samples: small, and sensitive to any change."""
    flat = tensor.detach().double().reshape(-1)
    samples = [flat[int(i * (flat.numel() - 1) / 11)].item() for i in range(12)]
    mean, square = flat.mean().item(), (flat * flat).mean().item()
    return {"shape": list(tensor.shape), "mean": mean, "sq": square, "at": samples}


def sums(net: nn.Module) -> list[list[Any]]:
    """For each tensor of floats in a network: its name, the sum, and the sum of magnitudes."""
    return [
        [name, value.double().sum().item(), value.double().abs().sum().item()]
        for name, value in net.state_dict().items()
        if value.dtype.is_floating_point
    ]


def keys(net: nn.Module) -> list[list[Any]]:
    """Names and shapes of a state dictionary, in order."""
    return [[name, list(value.shape)] for name, value in net.state_dict().items()]


def pictures(folder: Path, specs: list[tuple[str, int, int]], k: int, mode: str = "RGB") -> None:
    """Write images: `specs` holds (file name, width, height)."""
    folder.mkdir(parents=True)
    for j, (name, width, height) in enumerate(specs):
        y, x = np.mgrid[0:height, 0:width].astype(np.float64)
        channels = [
            np.sin(x * (0.05 + 0.01 * c) + k + j) * 60
            + np.cos(y * (0.07 - 0.01 * c) + 2 * j + c) * 60
            + 128
            for c in range(3)
        ]
        array = np.stack(channels, -1).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(array).convert(mode).save(folder / name)


# ------------------------------------------------------------------------------------------- cases
def network(name: str) -> Record | list[Any]:
    """`G/netG/norm/drop/3to3`, `D/basic3/norm` or `init/normal`."""
    kind, *rest = name.split("/")
    if kind == "init":
        seed_all(300)
        net = networks.define_G(
            3, 3, 8, "resnet_6blocks", norm="batch", init_type=rest[0], init_gain=0.05
        )
        return sums(net)
    if kind == "D":
        seed_all(200)
        netD, layers = rest[0][:-1], int(rest[0][-1])
        net = networks.define_D(3, 8, netD, n_layers_D=layers, norm=rest[1])
        record: Record = {"keys": keys(net), "init": sums(net)}
        with torch.no_grad():
            record["train"] = digest(fill(net, 11)(wave((2, 3, 128, 128), 13)))
        return record
    netG, norm, drop, channels = rest
    cin, cout = map(int, channels.split("to"))
    seed_all(100)
    net = networks.define_G(cin, cout, 8, netG, norm=norm, use_dropout=drop == "drop")
    record = {"keys": keys(net), "init": sums(net)}
    size = 256 if netG == "unet_256" else 128
    x = wave((2, cin, size, size), 5)
    fill(net, 3)
    with torch.no_grad():
        record["eval"] = digest(net.eval()(x))
        seed_all(7)
        record["train"] = digest(net.train()(x))
    return record


def loss(name: str) -> Any:
    """`lsgan/True`, `lsgan/state`, ... or `gp/mixed`."""
    mode, what = name.split("/")
    if mode == "gp":
        layers = [nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3)]
        net = fill(nn.Sequential(*layers), 19)
        real, fake, cpu = wave((2, 3, 12, 12), 1), wave((2, 3, 12, 12), 2), torch.device("cpu")
        if what == "off":
            value, gradients = networks.cal_gradient_penalty(net, real, fake, cpu, lambda_gp=0.0)
            return [float(value), gradients is None]
        seed_all(23)
        value, gradients = networks.cal_gradient_penalty(
            net, real, fake, cpu, type=what, constant=1.0, lambda_gp=10.0
        )
        return [value.item(), digest(gradients)]
    criterion = networks.GANLoss(mode)
    if what == "state":
        return sorted(criterion.state_dict())
    return criterion(wave((2, 1, 9, 7), 17) * 3, what == "True").item()


def schedule(name: str) -> list[float]:
    """The rate of each epoch; `linear/3+4@1` is 3 epochs and 4 of decay from epoch 1 on."""
    policy, numbers = name.split("/")
    epochs, start = numbers.split("@")
    n1, n2 = map(int, epochs.split("+"))
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.0002)
    opt = argparse.Namespace(
        lr_policy=policy, n_epochs=n1, n_epochs_decay=n2, epoch_count=int(start), lr_decay_iters=2
    )
    scheduler = networks.get_scheduler(optimizer, opt)
    rates = []
    for _ in range(n1 + 1 if policy == "cosine" else n1 + n2 + 8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(1.0) if policy == "plateau" else scheduler.step()
    return rates


def pool(name: str) -> list[list[float]]:
    """What comes back from a pool; `3/2` is of size 3, with 2 images at a time."""
    size, batch = map(int, name.split("/"))
    random.seed(31)
    history = ImagePool(size)
    stream = torch.arange(batch, dtype=torch.float32).reshape(batch, 1, 1, 1)
    return [history.query(stream + 10 * i).flatten().tolist() for i in range(24)]


TINY = "--ngf 8 --ndf 8"


def options(program: str, folder: Path, *words: str) -> TrainOptions | TestOptions:
    """Parsed options, on the CPU, of an experiment `x` below `folder`; see their `opt`."""
    kind = TrainOptions if program == "train" else TestOptions
    where = ["--checkpoints_dir", str(folder), "--name", "x", "--gpu_ids", "-1"]
    parsed = kind([*where, *words])
    parsed.parse()
    return parsed


def data_pictures(folder: Path) -> None:
    """The datasets that `dataset` reads."""
    specs = [("a.png", 300, 200), ("b.PNG", 256, 256), ("c.png", 190, 310), ("d.png", 97, 131)]
    for k, side in enumerate(("trainA", "trainB", "testA", "testB"), start=1):
        pictures(folder / "un" / side, specs if side.endswith("A") else specs[:3], k)
    pictures(folder / "un" / "trainA" / "deep" / "er", [("z.png", 260, 260)], 9)
    (folder / "un" / "trainA" / "notes.txt").write_text("not an image")
    for k, phase in enumerate(("train", "test"), start=5):
        pictures(folder / "al" / phase, [("p.png", 600, 260), ("q.png", 512, 256)], k)
    pictures(folder / "gray" / "trainA", specs[:2], 7, "L")
    pictures(folder / "gray" / "trainB", specs[:2], 8)


DATA_MODELS = {"unaligned": "cycle_gan", "aligned": "pix2pix", "single": "test"}


def dataset(name: str, folder: Path) -> Record:
    """The items of a dataset; `08 aligned train al --load_size 160` is the ninth set-up."""
    number, mode, program, root, *flags = name.split()
    model = DATA_MODELS.get(mode, mode)
    words = ["--dataroot", str(folder / root), "--model", model, "--dataset_mode", mode, *flags]
    opt = options(program, folder / "checkpoints", *words).opt
    items = find_dataset_using_name(mode)(opt)
    record: Record = {"len": len(items), "items": []}
    for j in range(len(items)):
        seed_all(1000 * int(number) + j)
        item = items[j]
        record["items"].append(
            {
                k: str(Path(v).relative_to(folder)) if isinstance(v, str) else digest(v)
                for k, v in sorted(item.items())
            }
        )
    return record


def command_line(name: str, folder: Path) -> Record | list[str]:
    """Default and kind of each option of `train/cycle_gan`, or the files that parsing writes."""
    program, model, *file = name.split("/")
    parsed = options(program, folder, "--dataroot", str(folder), "--model", model)
    if file:
        return sorted(p.name for p in (folder / "x").iterdir())
    record = {}
    for action in parsed.parser._actions:
        default = parsed.parser.get_default(action.dest)
        if default == float("inf"):
            default = "inf"
        elif not isinstance(default, (int, float, str, type(None))):
            default = str(default)
        record[action.option_strings[-1]] = [default, "flag" if action.nargs == 0 else "value"]
    return record


TESTING = {
    "cycle": "--dataroot {tmp}/un --name cyc --model cycle_gan --netG resnet_6blocks",
    "pix_eval": (
        "--dataroot {tmp}/al --name pix --model pix2pix --netG unet_128 --direction BtoA --epoch 7 "
        "--eval"
    ),
    "single": (
        "--dataroot {tmp}/un/testA --name one --model test --no_dropout --model_suffix _A "
        "--num_test 2"
    ),
    "single_none": (
        "--dataroot {tmp}/un/testA --name one --model test --no_dropout --preprocess none "
        "--epoch 3 --phase odd"
    ),
}


def testing(name: str, folder: Path) -> Record:
    """The files that test.py writes for known weights, and samples of their pixels."""
    specs = [("one.png", 140, 100), ("two.x.png", 128, 128), ("three.png", 96, 150)]
    pictures(folder / "un" / "testA", specs, 61)
    pictures(folder / "un" / "testB", [("uno.png", 128, 128), ("dos.png", 200, 140)], 62)
    pictures(folder / "al" / "test", [("p.png", 300, 130), ("q.png", 256, 128)], 63)

    def weights(file: str, k: int, netG: str, norm: str = "instance", more: Record = {}) -> None:
        net = networks.define_G(3, 3, 8, netG, norm=norm, use_dropout=norm == "batch")
        path = folder / "checkpoints" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**fill(net, k).state_dict(), **more}, path)

    weights("cyc/latest_net_G_A.pth", 71, "resnet_6blocks")
    weights("cyc/latest_net_G_B.pth", 72, "resnet_6blocks")
    weights("pix/7_net_G.pth", 73, "unet_128", "batch")
    weights("one/latest_net_G_A.pth", 74, "resnet_9blocks")
    # as written before PyTorch 0.4: with statistics of instance norms
    statistics = {"model.2.running_mean": torch.zeros(8), "model.2.running_var": torch.ones(8)}
    weights("one/3_net_G.pth", 75, "resnet_9blocks", more=statistics)
    common = "--checkpoints_dir {tmp}/checkpoints --results_dir {tmp}/res --gpu_ids -1 --ngf 8 "
    common += "--load_size 128 --crop_size 128 --num_threads 0 "
    result = run("test.py", *(common + TESTING[name]).format(tmp=folder).split())
    found = files_below(folder / "res")
    return {
        "rc": result.code,
        "files": found,
        "pixels": {f: samples(folder / "res" / f) for f in found if f.endswith(".png")},
        "error": result.err,
    }


def samples(path: Path) -> Record:
    """Shape, mean and forty samples of the pixels of an image."""
    array = np.asarray(Image.open(path).convert("RGB")).astype(float)
    flat = array.reshape(-1)
    at = [flat[int(i * (flat.size - 1) / 39)] for i in range(40)]
    return {"shape": list(array.shape), "mean": flat.mean(), "at": at}


TRAINING = {
    "cycle": (
        "--dataroot {tmp}/un --name cyc --model cycle_gan --netG resnet_6blocks --load_size 72 "
        "--crop_size 64"
    ),
    "pix_iter": (
        "--dataroot {tmp}/al --name pix --model pix2pix --netG unet_128 --load_size 136 "
        "--crop_size 128 --save_by_iter --suffix {{netG}}_{{load_size}} --no_html"
    ),
}
TRAINING["cycle_continue"] = f"{TRAINING['cycle']} --continue_train --epoch_count 2"


def training(name: str, folder: Path) -> Record:
    """The files that train.py leaves, and the words in its log; `cycle` goes before its sequel."""
    if not (folder / "un").exists():
        for k, side in enumerate(("trainA", "trainB"), start=1):
            pictures(folder / "un" / side, [(f"{i}.png", 80, 80) for i in range(4)], k)
        pictures(folder / "al" / "train", [(f"{i}.png", 256, 128) for i in range(4)], 3)
    common = (
        "--checkpoints_dir {tmp}/checkpoints --gpu_ids -1 --display_id 0 --num_threads 0 --ngf 8 "
        "--ndf 8 --n_epochs 1 --n_epochs_decay 1 --save_epoch_freq 1 --save_latest_freq 2 "
        "--print_freq 2 --display_freq 2 --update_html_freq 2 "
    )
    result = run("train.py", *(common + TRAINING[name]).format(tmp=folder).split())
    checkpoints = folder / "checkpoints"
    logs = {
        str(path.relative_to(checkpoints)): names_in_log(path.read_text())
        for path in checkpoints.rglob("loss_log.txt")
    }
    found = files_below(checkpoints)
    return {"rc": result.code, "files": found, "log_names": logs, "error": result.err}


def names_in_log(text: str) -> list[str]:
    """All words before a colon in the lines of a loss log."""
    words: set[str] = set()
    for line in text.splitlines():
        if "epoch:" in line:
            for mark in "),":
                line = line.replace(mark, " ")
            words |= {w.strip(" ,:") for w in line.split() if w.endswith(":")}
    return sorted(words)
