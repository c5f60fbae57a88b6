"""Options of discriminators: spectral norm, a norm of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import create_model, networks
from models.norms import add_spectral_norm
from models.weights import explain_mismatch
from options.train_options import TrainOptions
from tests.helpers import SHORT, TINY, aligned, run, seed_all, succeed, unaligned


@pytest.fixture(autouse=True)
def _seed():
    seed_all(1)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 2 - 1


def options(folder, words: str):
    where = f"--dataroot {folder} --checkpoints_dir {folder} --name x"
    return TrainOptions(f"{where} {' '.join(TINY)} {words}").parse(save=False)


def build(folder, words: str):
    model = create_model(opt := options(folder, words))
    model.setup(opt)
    return model


def batch(n: int = 1) -> dict:
    return {"A": noise(n, 3, 32, 32), "B": noise(n, 3, 32, 32), "A_paths": ["a"], "B_paths": ["b"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return aligned(unaligned(root, 4), 4)


def train(pictures, folder, words: str) -> dict[str, torch.Tensor]:
    """The weights that a training ends with, by file and key."""
    where = ["--dataroot", pictures, "--checkpoints_dir", folder, "--name", "x", "--no_html"]
    succeed("train.py", *where, *TINY, *SHORT, *words.split())
    return {
        f"{path.name}.{key}": value
        for path in sorted((folder / "x").glob("latest_net_*.pth"))
        for key, value in torch.load(path, weights_only=True).items()
    }


def check_resume(pictures, folder, words: str, again: str = "") -> dict[str, torch.Tensor]:
    """Two epochs in one run and in two end alike; `again` is what the second one is told."""
    whole = train(pictures, folder / "a", f"{words} --n_epochs 2")
    train(pictures, folder / "b", words)
    parts = train(pictures, folder / "b", f"{again or words} --n_epochs 2 --continue_train")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    return whole


MODELS = ["cycle_gan", "pix2pix", "cut", "dcl"]


# ----------------------------------------------------------------------------------- spectral norm
def largest(net: nn.Module) -> list[float]:
    """The largest singular value of each convolution's weights, from their full decomposition."""
    weights = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d)]
    return [float(torch.linalg.svdvals(w.detach().double().flatten(1))[0]) for w in weights]


@pytest.mark.parametrize("netD", ["basic", "pixel"])
def test_spectral_norm_makes_the_largest_singular_value_one(netD):
    net = networks.define_D(3, 8, netD)
    before = list(net.parameters())
    assert max(largest(net)) > 1.1 or min(largest(net)) < 0.9
    add_spectral_norm(net)
    assert {*map(id, before)} == {*map(id, net.parameters())}  # an optimizer may have them
    with torch.no_grad():
        for _ in range(100):  # power iterations
            net(noise(1, 3, 32, 32))
    assert largest(net.eval()) == pytest.approx([1.0] * len(largest(net)), rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_all_discriminators_get_spectral_norm_and_learn(model, tmp_path):
    model = build(tmp_path, f"--model {model} --spectral_norm --batch_passes on")
    model.set_input(batch())
    for net in model._discriminators().values():
        convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        assert all(hasattr(conv, "parametrizations") for conv in convs)
    copies = [[p.clone() for p in net.parameters()] for net in model._discriminators().values()]
    model.optimize_parameters()
    for copy, net in zip(copies, model._discriminators().values(), strict=True):
        weights = zip(copy, net.parameters(), strict=True)
        assert all((a != b).any() for a, b in weights if a.dim() > 1)


@pytest.mark.parametrize(
    "words",
    [
        "--model cycle_gan --precision bf16 --norm batch",
        "--model pix2pix --accumulate 2",
        "--model cut --batch_passes on",
    ],
)
def test_spectral_norm_comes_back_with_the_weights(words, pictures, tmp_path):
    whole = check_resume(pictures, tmp_path, f"{words} --spectral_norm", again=words)
    assert any(key.endswith("parametrizations.weight.original") for key in whole)


@pytest.mark.parametrize("netD", ["basic", "pixel"])
def test_weights_of_the_other_kind_are_explained(netD):
    plain, spectral = networks.define_D(3, 4, netD), networks.define_D(3, 4, netD)
    add_spectral_norm(spectral)
    message = explain_mismatch("D", spectral.state_dict(), plain)
    assert message is not None
    assert message.endswith("the options say no --spectral_norm; set --spectral_norm")
    message = explain_mismatch("D", plain.state_dict(), spectral)
    assert message is not None
    assert "was saved with no --spectral_norm" in message


def test_spectral_norm_needs_a_discriminator(pictures, tmp_path):
    where = ["--dataroot", pictures, "--checkpoints_dir", tmp_path, "--name", "x"]
    result = run("train.py", *where, *TINY, *SHORT, "--model", "template", "--spectral_norm")
    assert result.code == 1
    assert result.err.endswith("--model template has no discriminator: leave it out\n")


# ----------------------------------------------------------------------------- a norm of their own
@pytest.mark.parametrize(
    ("words", "norms"),
    [
        ("--model cycle_gan", (nn.InstanceNorm2d, nn.InstanceNorm2d)),
        ("--model cycle_gan --norm batch", (nn.BatchNorm2d, nn.BatchNorm2d)),
        ("--model cycle_gan --norm batch --norm_D instance", (nn.BatchNorm2d, nn.InstanceNorm2d)),
        ("--model pix2pix --normD none", (nn.BatchNorm2d, None)),
        ("--model cut --norm_D batch", (nn.InstanceNorm2d, nn.BatchNorm2d)),
    ],
)
def test_norms_of_generators_and_discriminators(words, norms, tmp_path):
    model = create_model(options(tmp_path, words))
    for name, net in model.networks().items():
        if name[0] in "GD":
            wanted = norms["GD".index(name[0])]
            kinds = (nn.InstanceNorm2d, nn.modules.batchnorm._BatchNorm)
            found = {type(m) for m in net.modules() if isinstance(m, kinds)}
            assert found == ({wanted} if wanted else set())


def test_the_discriminators_norm_comes_back_with_the_weights(pictures, tmp_path):
    words = "--model cycle_gan"
    check_resume(pictures, tmp_path, f"{words} --norm_D batch", again=words)
