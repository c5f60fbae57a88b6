"""Options of discriminators: spectral norm, their norm, several scales, gradient penalties."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model, discriminators, networks
from models.norms import add_spectral_norm
from models.speed.passes import share_pass
from models.speed.prepared import prepared
from models.weights import explain_mismatch
from options.train_options import TrainOptions
from tests.helpers import SHORT, TINY, aligned, run, seed_all, succeed, unaligned
from util.errors import UserError


@pytest.fixture(autouse=True)
def _seed():
    seed_all(1)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 2 - 1


def options(folder, words: str):
    where = f"--dataroot {folder} --checkpoints_dir {folder} --name x"
    return TrainOptions(f"{where} {' '.join(TINY)} {words}").parse(save=False)


def build(folder, words: str) -> Any:
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


def test_a_penalty_between_pictures_of_two_sizes_is_one_line():
    pictures = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9)
    with pytest.raises(UserError, match=r"different sizes.*--gp r1"):
        networks.cal_gradient_penalty(nn.Identity(), *pictures, torch.device("cpu"))


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


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_layers_that_two_discriminators_share_have_one_spectral_norm(tmp_path):
    model = create_model(opt := options(tmp_path, "--model cycle_gan --spectral_norm"))
    trunk = model.netD_A.model[0]
    model.netD_B.model[0] = trunk
    model.setup(opt)
    heads = model.netD_A.model[-1], model.netD_B.model[-1]
    assert [len(m.parametrizations.weight) for m in (trunk, *heads)] == [1, 1, 1]


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_a_norm_of_weights_that_hooks_make(norm):
    """There `weight` is no parameter, which torch cannot make another one of."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm(nn.Conv2d(4, 1, 3)))
    with pytest.raises(UserError, match=r"Conv2d\(4, 1.* of a Sequential, .*leave --spectra"):
        add_spectral_norm(net)


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm"])
def test_spectral_norm_comes_on_top_of_parametrizations(norm):
    net = nn.Sequential(getattr(nn.utils.parametrizations, norm)(nn.Conv2d(3, 4, 3)))
    add_spectral_norm(net)
    with torch.no_grad():
        for _ in range(100):
            net(noise(1, 3, 8, 8))
    assert largest(net.eval()) == pytest.approx([1.0], rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_all_discriminators_get_spectral_norm_and_learn(model, tmp_path):
    model = build(tmp_path, f"--model {model} --spectral_norm --batch_passes on")
    model.set_input(batch())
    for net in discriminators.find(model).values():
        convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        assert all(hasattr(conv, "parametrizations") for conv in convs)
    copies = [[p.clone() for p in net.parameters()] for net in discriminators.find(model).values()]
    model.optimize_parameters()
    for copy, net in zip(copies, discriminators.find(model).values(), strict=True):
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


# ---------------------------------------------------------------------- scales, feature matching
SCALES = "--netD multiscale --n_layers_D 2 --lambda_feat 10"


def by_hand(net: nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Predictions, and the outputs of all layers but the last, from the layers one by one."""
    predictions, features = [], []
    for scale in net.scales:
        y = x
        for layer in scale.model:
            y = layer(y)
            if isinstance(layer, nn.LeakyReLU):
                features.append(y.clone())
        predictions.append(y)
        # the mean of the 3x3 pixels around every second one, as far as they are in the image
        ones = torch.ones(x.shape[1], 1, 3, 3)
        sums = F.conv2d(x, ones, stride=2, padding=1, groups=x.shape[1])
        x = sums / F.conv2d(torch.ones_like(x), ones, stride=2, padding=1, groups=x.shape[1])
    return predictions, features


def test_scales_are_patchgans_of_smaller_pictures():
    net = networks.define_D(3, 4, "multiscale", 2, "instance", num_D=3)
    x = noise(2, 3, 64, 80)
    judged = net(x)
    predictions, features = by_hand(net, x)
    torch.testing.assert_close(judged.predictions, predictions)
    torch.testing.assert_close([f for scale in judged.features for f in scale], features)
    assert [p.shape[2:] for p in judged.predictions] == [(14, 18), (6, 8), (2, 3)]
    plain = networks.define_D(3, 4, "n_layers", 2, "instance")
    keys = {f"scales.{i}.{key}" for i in range(3) for key in plain.state_dict()}
    assert net.state_dict().keys() == keys


@pytest.mark.parametrize("mode", networks.GAN_MODES)
def test_losses_are_summed_over_scales(mode):
    loss = networks.GANLoss(mode)
    scales = [noise(2, 1, 4, 4), noise(2, 1, 2, 2)]
    for real in (True, False):
        for for_discriminator in (True, False):
            total = loss(networks.MultiscaleOutput(scales, []), real, for_discriminator)
            assert total == sum(loss(scale, real, for_discriminator) for scale in scales)


def test_feature_matching_is_equation_4():
    net = networks.define_D(3, 4, "multiscale", 2, "instance")
    fake, real = noise(2, 3, 32, 32).requires_grad_(), noise(2, 3, 32, 32).requires_grad_()
    wanted = 0.0
    for a, b in zip(by_hand(net, real)[1], by_hand(net, fake)[1], strict=True):
        wanted += (a - b).abs().sum().item() / a.numel()
    loss = networks.feature_matching(net, fake, real)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert networks.feature_matching(net, net(fake), real).item() == pytest.approx(wanted, rel=1e-5)
    loss.backward()
    assert fake.grad is not None
    assert real.grad is None
    assert networks.feature_matching(net, real, real) == 0


@pytest.mark.parametrize("model", MODELS)
def test_feature_matching_is_part_of_what_generators_learn(model, tmp_path):
    pairs = {
        "cycle_gan": [("feat_A", "D_B", "rec_A", "real_A"), ("feat_B", "D_A", "rec_B", "real_B")],
        "pix2pix": [("G_feat", "D", "fake_B", "real_B")],
        "cut": [("G_feat", "D", "idt_B", "real_B")],
        "dcl": [("feat_A", "D_A", "idt_A", "real_B"), ("feat_B", "D_B", "idt_B", "real_A")],
    }[model]
    found, built = {}, None
    for weight in (0, 10):
        words = f"--model {model} {SCALES[:-2]}{weight} --normD instance --flip_equivariance False"
        words = words if model in ("cut", "dcl") else words.rsplit(" ", 2)[0]
        built = build(tmp_path, words)
        seed_all(5)
        built.set_input(batch())
        built.forward()
        seed_all(6)
        found[weight] = built.compute_G_loss().item()
    total = 0.0
    for loss, net, fake, real in pairs:
        fake, real = getattr(built, fake), getattr(built, real)
        if model == "pix2pix":
            fake, real = (torch.cat((built.real_A, x), 1) for x in (fake, real))
        net = getattr(built, f"net{net}")
        a, b = by_hand(net, real)[1], by_hand(net, fake)[1]
        wanted = 10 * sum((x - y).abs().mean().item() for x, y in zip(a, b, strict=True))
        assert getattr(built, f"loss_{loss}").item() == pytest.approx(wanted, rel=1e-4)
        assert loss in built.loss_names
        total += wanted
    total *= 0.5 if model == "dcl" else 1
    assert found[10] == pytest.approx(found[0] + total, rel=1e-4)


def test_feature_matching_augments_both_alike(tmp_path):
    model = build(tmp_path, f"--model pix2pix {SCALES} --diffaug color,translation,cutout")
    x = noise(1, 6, 32, 32)
    assert networks.feature_matching(model.netD, model.netD(x), x) == 0


@pytest.mark.parametrize(
    "words",
    [
        "--model cycle_gan --precision bf16 --batch_passes on",
        "--model pix2pix --gan_mode wgangp --norm instance --accumulate 2 --precision fp16",
        "--model cut --spectral_norm --diffaug color",
    ],
)
def test_scales_come_back_with_the_weights(words, pictures, tmp_path):
    again = f"{words} --lambda_feat 10"
    whole = check_resume(pictures, tmp_path, f"{words} {SCALES} --num_D 1", again)
    assert any(".scales.0.model.0." in key for key in whole)
    assert not any(".scales.1." in key for key in whole)


def test_shared_passes_of_scales():
    net = prepared(networks.define_D(3, 4, "multiscale", 2, "instance"))
    a, b = noise(1, 3, 32, 32), noise(1, 3, 32, 32)
    wanted = net(a), net(b)
    share_pass(net, [a, b])
    torch.testing.assert_close((net(a), net(b)), wanted)


def test_a_gradient_penalty_counts_all_scales():
    net = networks.define_D(3, 4, "multiscale", 2, "none")
    x = noise(2, 3, 32, 32)
    _, gradients = networks.cal_gradient_penalty(net, x, x, torch.device("cpu"), "real")
    points = x.clone().requires_grad_()
    total = sum(p.sum() for p in by_hand(net, points)[0])
    (wanted,) = torch.autograd.grad(total, points)
    torch.testing.assert_close(gradients, wanted.flatten(1))


def test_weights_of_other_scales_are_explained():
    built = [networks.define_D(3, 4, "multiscale", 2, "instance", num_D=n) for n in (1, 2)]
    message = explain_mismatch("D", built[0].state_dict(), built[1])
    assert message == ("netD was saved with --num_D 1, the options say --num_D 2; set --num_D 1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num_D 3", "--num_D is for --netD multiscale, not for --netD basic"),
        ("--lambda_feat 10", "--lambda_feat is for --netD multiscale, not for --netD basic"),
        (f"--model cut {SCALES} --nce_idt False", "--nce_idt is off: say --nce_idt True"),
        ("--netD multiscale --num_D 0", "0 is too small: at least 1"),
        ("--model template --num_D 2", "unknown option '--num_D'"),
    ],
)
def test_options_that_do_not_fit(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        options(tmp_path, words)
    assert end.value.code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_picture_too_small_for_the_coarsest_scale():
    net = networks.define_D(3, 4, "multiscale")
    assert net(noise(1, 3, 48, 48)).predictions[1].shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"--n_layers_D 3 --num_D 2 .*60x47.* at least 48x48"):
        net(noise(1, 3, 47, 60))


# ------------------------------------------------------------------------------ gradient penalties
class Quadratic(nn.Module):
    """D(x) = w |x|^2 / 2, whose gradient is w x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x.square().flatten(1).sum(1) / 2


def test_r1_is_equation_9():
    net, real = Quadratic(), noise(4, 3, 5, 6)
    added = networks.GradientPenalty("lsgan", "r1", 8.0)(net, real, noise(4, 3, 5, 6))
    penalty = torch.as_tensor(added)
    squares = real.double().square().flatten(1).sum(1).mean().item()
    assert penalty.item() == pytest.approx(8 / 2 * 9 * squares, rel=1e-5)
    penalty.backward()
    assert net.w.grad is not None
    assert net.w.grad.item() == pytest.approx(8 / 2 * 2 * 3 * squares, rel=1e-5)


def value(penalty: torch.Tensor | float) -> float:
    return torch.as_tensor(penalty).item()


def test_a_lazy_penalty_comes_each_so_many_batches_and_weighs_more():
    nets, x = [Quadratic(), Quadratic()], noise(2, 3, 4, 4)
    once = value(networks.GradientPenalty("hinge", "r1", 10.0)(nets[0], x, x))
    lazy = networks.GradientPenalty("hinge", "r1", 10.0, every=3)
    found, shown = [], []
    for _ in range(7):
        found.append([value(lazy(net, x, x)) for net in nets])
        shown.append([value(lazy.latest(net)) for net in nets])
    due = pytest.approx([3 * once] * 2)
    assert [f == due for f in found] == [True, False, False, True, False, False, True]
    assert sum(f[0] for f in found[:6]) == pytest.approx(6 * once)
    assert all(values == due for values in shown)
    # another one goes on in the middle
    other = networks.GradientPenalty("hinge", "r1", 10.0, every=3)
    other.load_state_dict(lazy.state_dict())
    assert other.state_dict() == lazy.state_dict()
    assert [bool(other(nets[0], x, x)) for _ in range(3)] == [False, False, True]
    assert other.latest(nets[1]) == 0.0  # not seen yet
    assert [bool(other(nets[1], x, x)) for _ in range(3)] == [False, False, True]


def test_no_penalty_unless_it_is_asked_for():
    x = noise(1, 3, 4, 4)
    for mode in networks.GAN_MODES:
        penalty = networks.GradientPenalty(mode, None, 10.0)
        assert bool(penalty.kind) == (mode == "wgangp")
        assert bool(penalty(Quadratic(), x, x)) == (mode == "wgangp")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("more", ["", "--precision bf16 --diffaug color", "--compile"])
def test_r1_is_part_of_what_discriminators_learn(model, more, tmp_path, monkeypatch):
    """In float32, and not compiled: a compiler's double backward would raise an error."""
    eager = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", eager)
    torch.compiler.reset()
    found = {}
    for words in ("", "--gp r1 --lambda_gp 6"):
        torch.manual_seed(1)
        built = build(tmp_path, f"--model {model} {words} {more} --norm_D none --pool_size 0")
        seed_all(4)
        built.set_input(batch())
        built.forward()
        seed_all(5)
        kept = torch.zeros(())
        if model in ("cycle_gan", "dcl"):
            built.backward_D_A()
            net, loss, shown = built.netD_A, built.loss_D_A, "gp_A"
            real = built.real_B
        else:
            built.backward_D()
            net, loss, shown = built.netD, built.loss_D, "D_gp"
            real = built.real_B
            real = torch.cat((built.real_A, real), 1) if model == "pix2pix" else real
        kept = getattr(built, f"loss_{shown}")
        found[words] = loss.item(), [p.grad for p in net.parameters()], float(kept)
    (plain, without, none), (loss, gradients, penalty) = found.values()
    assert none == 0
    assert shown in built.loss_names
    points = real.clone().requires_grad_()
    if "color" not in more:  # which draws anew for the penalty
        (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
        expected = 6 / 2 * slope.square().sum()
        assert penalty == pytest.approx(expected.item(), rel=1e-5)
        added = torch.autograd.grad(expected, list(net.parameters()), allow_unused=True)
        for got, before, part in zip(gradients, without, added, strict=True):
            part = torch.zeros_like(got) if part is None else part
            torch.testing.assert_close(got, before + part, rtol=1e-3, atol=1e-5)
    assert penalty > 0
    assert loss == pytest.approx(plain + penalty, rel=1e-3)


@pytest.mark.parametrize(
    "words",
    [
        "--model cycle_gan --precision bf16",
        "--model pix2pix --accumulate 2 --netD multiscale --n_layers_D 2",
        "--model cut --batch_passes on --spectral_norm",
    ],
)
def test_a_lazy_penalty_goes_on_where_it_was(words, pictures, tmp_path):
    check_resume(pictures, tmp_path, f"{words} --gp r1 --gp_every 3 --normD instance")


def test_an_interval_without_a_penalty_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        options(tmp_path, "--gp_every 16")
    assert end.value.code == 2
    assert "--gp_every 16 needs a gradient penalty" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- all at once
TOGETHER = f"{SCALES} --spectral_norm --diffaug translation --gp r1 --gp_every 2 --normD instance"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix"])
def test_compiled_it_learns_the_same(model, tmp_path, monkeypatch):
    """By the front half of the compiler, whose code is run as it is."""
    eager = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", eager)
    torch.compiler.reset()
    found = []
    for more in ("", "--compile"):
        torch.manual_seed(1)
        built = build(tmp_path, f"--model {model} {TOGETHER} {more} --no_dropout")
        seed_all(4)
        for _ in range(2):
            built.set_input(batch())
            built.optimize_parameters()
        found.append(built.get_current_losses())
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)
    assert len(found[0]) == len(built.loss_names)
