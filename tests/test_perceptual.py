"""--lambda_vgg: the same as torchvision's VGG19 layer by layer, with random weights."""

from __future__ import annotations

import argparse
import hashlib
from typing import Any

import pytest
import torch
from torchvision.models import vgg19

from models import create_model
from models.perceptual import VGGLoss
from options.train_options import TrainOptions
from tests.helpers import SHORT, TINY, aligned, run, seed_all, succeed

RELUS = {1: 1 / 32, 6: 1 / 16, 11: 1 / 8, 20: 1 / 4, 29: 1}  # relu1_1 ... relu5_1


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Random weights of VGG19 that keep the size of features, without the classifier."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = vgg19(weights=None).features
    net = net.to_empty(device="cpu")
    for layer in net:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
            torch.nn.init.uniform_(layer.bias, -0.1, 0.1)
    path = tmp_path_factory.mktemp("vgg") / "own.pth"
    torch.save({f"features.{key}": value for key, value in net.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return aligned(tmp_path_factory.mktemp("pictures"), 2)


def by_hand(file, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """From torchvision's layers, one after the other, in float64."""
    with torch.device("meta"):
        net = vgg19(weights=None).features
    net = net.to_empty(device="cpu").double()
    state = torch.load(file, weights_only=True)
    net.load_state_dict({k.removeprefix("features."): v for k, v in state.items()})
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    x, y = (((p.double() + 1) / 2 - mean) / std for p in (fake, real))
    total = torch.zeros((), dtype=torch.float64)
    for number, layer in enumerate(net):
        x, y = layer(x), layer(y)
        if number in RELUS:
            total = total + RELUS[number] * (x - y).abs().mean()
            x, y = x.clone(), y.clone()  # what follows works in place
    return total


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_the_sum_over_five_layers(file, capsys):
    seed_all(1)
    fake, real = (torch.rand(2, 3, 36, 40) * 2 - 1 for _ in range(2))
    loss = VGGLoss(str(file))
    fake.requires_grad_()
    value = loss(fake, real)
    wanted = by_hand(file, fake, real)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    ours, theirs = (torch.autograd.grad(v, fake)[0] for v in (value, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    assert loss(real, real) == 0
    printed = capsys.readouterr()
    assert f"own.pth, SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}" in printed.out
    assert "is not the released vgg19-dcbb9e9d.pth" in printed.err


def options(folder, *words: str) -> argparse.Namespace:
    where = ["--dataroot", str(folder), "--checkpoints_dir", str(folder), "--model", "pix2pix"]
    return TrainOptions([*where, *TINY, *words]).parse(save=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_part_of_what_the_generator_learns_and_of_no_file(file, precision, tmp_path):
    words = ["--lambda_vgg", "7", "--vgg_weights", str(file), "--precision", precision]
    model: Any = create_model(opt := options(tmp_path, *words))
    model.setup(opt)
    pair = {k: torch.rand(1, 3, 32, 32) * 2 - 1 for k in "AB"}
    model.set_input({**pair, "A_paths": ["a"], "B_paths": ["b"]})
    model.optimize_parameters()
    losses = model.get_current_losses()
    assert model.loss_G.item() == pytest.approx(
        losses["G_GAN"] + losses["G_L1"] + losses["G_VGG"], rel=1e-5
    )
    wanted = 7 * by_hand(file, model.fake_B.detach(), model.real_B).item()
    assert losses["G_VGG"] == pytest.approx(wanted, rel=1e-3 if precision == "fp32" else 0.05)
    saved = model.training_state()
    assert saved["modules"].keys() == {"criterionGAN"}
    assert not saved["tensors"]


def test_a_resumed_run_goes_on_as_if_nothing_had_been(file, pictures, tmp_path):
    found = []
    for folder, rounds in (("a", [["--n_epochs", "2"]]), ("b", [[], ["--n_epochs", "2"]])):
        for number, more in enumerate(rounds):
            where = ["--dataroot", pictures, "--checkpoints_dir", tmp_path / folder, "--name", "x"]
            words = ["--model", "pix2pix", "--lambda_vgg", 1, "--vgg_weights", file, "--no_html"]
            again = ["--continue_train"] if number else []
            succeed("train.py", *where, *TINY, *SHORT, *words, *more, *again)
        found.append(torch.load(tmp_path / folder / "x" / "latest_net_G.pth", weights_only=True))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--lambda_vgg 1 --vgg_weights nothing.pth", 1, "nothing.pth: there is no such file"),
        ("--lambda_vgg 1 --vgg_weights OTHER", 1, "no weights of torchvision's VGG19"),
        ("--lambda_vgg 1", 1, "--lambda_vgg needs VGG19: its weights can't be downloaded (no way)"),
        ("--vgg_weights x.pth", 2, "--vgg_weights has no effect without --lambda_vgg"),
        ("--lambda_vgg 1 --output_nc 1", 2, "3 channels, and --output_nc is 1"),
    ],
)
def test_mistakes_are_one_line(words, code, said, pictures, tmp_path, monkeypatch):
    torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, tmp_path / "other.pth")

    def refused(*args: object, **more: object) -> None:
        raise OSError("no way")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    where = ["--dataroot", pictures, "--checkpoints_dir", tmp_path, "--name", "x"]
    words = words.replace("OTHER", str(tmp_path / "other.pth"))
    result = run("train.py", *where, *TINY, *SHORT, "--model", "pix2pix", *words.split())
    assert result.code == code
    assert said in result.err.strip().splitlines()[-1]
