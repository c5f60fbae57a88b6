"""Networks, losses, initialization, schedules, and weights of other origins."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import create_model, networks
from models.weights import explain_mismatch, fit_state_dict
from options.train_options import TrainOptions
from tests.helpers import seed_all
from util.errors import UserError
from util.scores.validation import undisturbed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    seed_all(1)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) * 2 - 1


# ------------------------------------------------------------------------------------ any size
def padded(net: nn.Module, x: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """What the layers of `net` give on `x` padded to a size by hand, and cut back."""
    pad = (0, width - x.shape[3], 0, height - x.shape[2])
    return net.model(F.pad(x, pad, mode=mode))[..., : x.shape[2], : x.shape[3]]


@pytest.mark.parametrize(
    ("size", "enlarged", "mode"),
    [
        ((97, 131), (100, 132), "reflect"),
        ((64, 33), (64, 36), "reflect"),
        ((5, 9), (8, 12), "reflect"),
        ((1, 1), (8, 8), "replicate"),
        ((3, 40), (8, 40), "replicate"),
    ],
)
def test_resnet_takes_any_size(size, enlarged, mode):
    net = networks.ResnetGenerator(3, 2, ngf=4, n_blocks=2).eval()
    x = noise(1, 3, *size)
    with torch.no_grad():
        y = net(x)
        assert y.shape == (1, 2, *size)
        torch.testing.assert_close(y, padded(net, x, *enlarged, mode), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "enlarged", "mode"),
    [
        ((100, 60), (128, 64), "reflect"),
        ((33, 31), (64, 32), "reflect"),
        ((10, 40), (32, 64), "replicate"),
    ],
)
def test_unet_takes_any_size(size, enlarged, mode):
    net = networks.UnetGenerator(3, 1, 5, ngf=4).eval()
    x = noise(2, 3, *size)
    with torch.no_grad():
        y = net(x)
        assert y.shape == (2, 1, *size)
        torch.testing.assert_close(y, padded(net, x, *enlarged, mode), rtol=0, atol=0)


@pytest.mark.parametrize(("netG", "size"), [("resnet_6blocks", (36, 44)), ("unet_128", (128, 256))])
def test_sizes_that_fit_go_through_untouched(netG, size):
    net = networks.define_G(3, 3, 4, netG).eval()
    x = noise(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.model(x), rtol=0, atol=0)


@pytest.mark.parametrize("depth", [5, 6, 7, 8])
def test_unet_of_each_depth(depth):
    net = networks.UnetGenerator(3, 3, depth, ngf=4)
    downs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    ups = [m for m in net.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert len(downs) == len(ups) == depth
    sizes = []
    for conv in downs:
        conv.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    with torch.no_grad():
        y = net(noise(2, 3, 2**depth, 2**depth))
    assert y.shape == (2, 3, 2**depth, 2**depth)
    assert sizes == [2**i for i in reversed(range(depth))]  # to one pixel at the bottleneck
    # 1, 2, 4 and then 8 times ngf
    assert [c.out_channels for c in downs] == [4 * min(8, 2**i) for i in range(depth)]


def test_unet_has_dropout_in_the_middle_only():
    # pix2pix, section 6.1.1: in the first three decoder layers after the bottleneck, at 50%
    net = networks.UnetGenerator(3, 3, 8, ngf=4, use_dropout=True)
    dropouts = [m for m in net.modules() if isinstance(m, nn.Dropout)]
    assert [d.p for d in dropouts] == [0.5] * 3


# ------------------------------------------------------------------------------- discriminators
@pytest.mark.parametrize("size", [96, 100, 127])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_patchgan_output_size(layers, size):
    net = networks.NLayerDiscriminator(3, ndf=2, n_layers=layers, norm_layer=nn.Identity)
    y = net(noise(1, 3, size, 2 * size))
    # each layer of stride 2 halves, rounding down; each of the two of stride 1 takes one away
    assert y.shape == (1, 1, size // 2**layers - 2, 2 * size // 2**layers - 2)


@pytest.mark.parametrize(
    ("layers", "patch"), [(0, 16), (1, 16), (2, 34), (3, 70), (4, 142), (5, 286)]
)
def test_patchgan_receptive_field(layers, patch):
    """The sizes that pix2pix, section 6.2, names: 16, 70 and 286."""
    net = networks.NLayerDiscriminator(1, ndf=1, n_layers=layers, norm_layer=nn.Identity)
    net.double()
    size = 512
    x = torch.rand(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    y = net(x)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    rows, columns = x.grad[0, 0].nonzero(as_tuple=True)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (patch, patch)


def test_pixelgan_judges_each_pixel_by_itself():
    net = networks.PixelDiscriminator(3, ndf=4, norm_layer=nn.Identity)
    x = noise(1, 3, 12, 10).requires_grad_()
    y = net(x)
    assert y.shape == (1, 1, 12, 10)
    y[0, 0, 5, 6].backward()
    assert x.grad.abs().sum(1)[0].nonzero().tolist() == [[5, 6]]


def test_patchgan_says_which_size_it_needs():
    net = networks.define_D(3, 4, "basic")
    assert net(noise(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=r"--n_layers_D 3 .*40x23.* at least 24x24"):
        net(noise(1, 3, 23, 40))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: networks.define_G(3, 3, 4, "resnet_7blocks"), networks.GENERATORS),
        (lambda: networks.define_D(3, 4, "patch"), networks.DISCRIMINATORS),
        (lambda: networks.get_norm_layer("layer"), networks.NORMS),
        (lambda: networks.init_weights(nn.Conv2d(1, 1, 1), "uniform"), networks.INIT_TYPES),
        (lambda: networks.GANLoss("relative"), networks.GAN_MODES),
    ],
)
def test_unknown_names_are_errors_that_list_the_known(call, names):
    with pytest.raises(ValueError, match="unknown") as error:
        call()
    assert all(name in str(error.value) for name in names)


# --------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("mode", networks.GAN_MODES)
def test_gan_loss_in_closed_form(mode, real):
    logits = torch.linspace(-6, 8, 30).reshape(2, 1, 3, 5)
    x = logits.double().numpy()
    expected = {
        ("lsgan", True): ((x - 1) ** 2).mean(),
        ("lsgan", False): (x**2).mean(),
        ("vanilla", True): np.log1p(np.exp(-x)).mean(),  # -log sigmoid(x)
        ("vanilla", False): np.log1p(np.exp(x)).mean(),  # -log(1 - sigmoid(x))
        ("wgangp", True): -x.mean(),
        ("wgangp", False): x.mean(),
        ("hinge", True): np.maximum(0, 1 - x).mean(),
        ("hinge", False): np.maximum(0, 1 + x).mean(),
        ("nonsaturating", True): np.log1p(np.exp(-x)).mean(),
        ("nonsaturating", False): np.log1p(np.exp(x)).mean(),
    }
    loss = networks.GANLoss(mode)(logits, real)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected[mode, real], rel=1e-6)


def test_hinge_of_the_generator_is_not_clipped():
    logits = torch.linspace(-6, 8, 30).reshape(2, 1, 3, 5)
    loss = networks.GANLoss("hinge")(logits, True, for_discriminator=False)
    assert loss.item() == pytest.approx(-1.0, rel=1e-6)  # the mean of -6 ... 8, negated


def test_gan_loss_with_other_labels():
    loss = networks.GANLoss("lsgan", target_real_label=0.9, target_fake_label=0.1)
    prediction = torch.full((1, 1, 2, 2), 0.4)
    assert loss(prediction, True).item() == pytest.approx(0.25, rel=1e-5)
    assert loss(prediction, False).item() == pytest.approx(0.09, rel=1e-5)


class Linear(nn.Module):
    """D(x) = <w, x>, whose gradient is w everywhere."""

    def __init__(self, weights: torch.Tensor):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weights).flatten(1).sum(1)


@pytest.mark.parametrize("kind", ["real", "fake", "mixed"])
@pytest.mark.parametrize("constant", [1.0, 2.5])
def test_gradient_penalty_of_a_linear_discriminator(kind, constant):
    weights = noise(3, 4, 5)
    net = Linear(weights.clone())
    penalty, gradients = networks.cal_gradient_penalty(
        net, noise(2, 3, 4, 5), noise(2, 3, 4, 5), CPU, kind, constant, lambda_gp=7.0
    )
    norm = float(np.linalg.norm(weights.double().numpy()))
    assert penalty.item() == pytest.approx(7 * (norm - constant) ** 2, rel=1e-5)
    torch.testing.assert_close(gradients, weights.flatten().expand(2, -1))
    penalty.backward()  # d/dw of 7 (|w| - c)^2
    torch.testing.assert_close(net.weights.grad, 14 * (norm - constant) * weights / norm)


class HalfSquare(nn.Module):
    """D(x) = |x|^2 / 2, whose gradient is x: it shows where the penalty was taken."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().flatten(1).sum(1) / 2


def test_gradient_penalty_is_taken_at_the_right_points():
    real, fake = noise(3, 1, 4, 4), noise(3, 1, 4, 4)

    def points(kind: str) -> torch.Tensor:
        penalty, gradients = networks.cal_gradient_penalty(HalfSquare(), real, fake, CPU, kind)
        norms = gradients.norm(dim=1)
        assert penalty.item() == pytest.approx(10 * ((norms - 1) ** 2).mean().item(), rel=1e-5)
        return gradients.reshape(real.shape)

    torch.testing.assert_close(points("real"), real)
    torch.testing.assert_close(points("fake"), fake)
    # on the line between the two, at a place of its own for each image
    share = (points("mixed") - fake) / (real - fake)
    places = share.flatten(1)
    torch.testing.assert_close(places, places[:, :1].expand_as(places), rtol=1e-3, atol=1e-3)
    assert ((places > 0) & (places < 1)).all()
    assert len({round(p, 4) for p in places[:, 0].tolist()}) == 3


def test_gradient_penalty_where_the_gradient_vanishes():
    net = Linear(torch.zeros(1, 2, 2))
    penalty, _ = networks.cal_gradient_penalty(net, noise(1, 1, 2, 2), noise(1, 1, 2, 2), CPU)
    assert penalty.item() == pytest.approx(10)
    penalty.backward()
    assert net.weights.grad.isfinite().all()


def test_gradient_penalty_off_and_unknown():
    x = noise(1, 1, 2, 2)
    assert networks.cal_gradient_penalty(HalfSquare(), x, x, CPU, lambda_gp=0.0) == (0.0, None)
    with pytest.raises(ValueError, match="'sideways'"):
        networks.cal_gradient_penalty(HalfSquare(), x, x, CPU, "sideways")


def test_a_penalty_that_is_shown_holds_no_graph():
    """With --gp_every it would hold one for many iterations, and the checkpoint, too."""
    net, x = networks.define_D(3, 4, "pixel", norm="none"), noise(1, 3, 8, 8)
    penalty = networks.GradientPenalty("lsgan", "r1", 10.0)
    assert penalty(net, x, x).requires_grad
    assert not penalty.latest(net).requires_grad
    assert not any(value.requires_grad for _, value in penalty.state_dict()["of"])


# ------------------------------------------------------------------------------- initialization
@pytest.mark.parametrize(
    ("init_type", "deviation"),
    [
        ("normal", 0.05),
        ("xavier", 0.05 * math.sqrt(2 / (64 * 9 + 32 * 9))),
        ("kaiming", math.sqrt(2 / (64 * 9))),
    ],
)
def test_initialization_draws_as_it_says(init_type, deviation):
    net = nn.Sequential(nn.Conv2d(64, 32, 3))
    networks.init_weights(net, init_type, init_gain=0.05)
    assert net[0].weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(net[0].weight.mean().item()) < 0.03 * deviation
    assert (net[0].bias == 0).all()


def test_orthogonal_initialization():
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(20, 12))
    networks.init_weights(net, "orthogonal", init_gain=0.5)
    for layer in net:
        rows = layer.weight.detach().flatten(1)
        torch.testing.assert_close(rows @ rows.T, 0.25 * torch.eye(len(rows)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda norm: networks.define_G(3, 3, 4, "resnet_6blocks", norm),
        lambda norm: networks.define_D(3, 4, "basic", norm=norm),
    ],
)
def test_synchronized_norm_is_initialized_like_batch_norm(build):
    states = []
    for norm in ("batch", "syncbatch"):
        seed_all(5)
        states.append(build(norm).state_dict())
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    scales = [v for k, v in states[1].items() if k.endswith("weight") and v.dim() == 1]
    drawn = torch.cat(scales)
    assert drawn.mean().item() == pytest.approx(1, abs=0.01)
    assert drawn.std().item() == pytest.approx(0.02, rel=0.25)


# ------------------------------------------------------------------------------------ schedules
def rates(policy: str, n_epochs: int, decay: int, start: int = 1, steps: int = 3) -> list[float]:
    """The rates of the epochs from `start` to the last one, of a run with a rate of 1."""
    opt = argparse.Namespace(
        lr_policy=policy,
        n_epochs=n_epochs,
        n_epochs_decay=decay,
        epoch_count=start,
        lr_decay_iters=steps,
    )
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = networks.get_scheduler(optimizer, opt)
    result = []
    for _ in range(start, n_epochs + decay + 1):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return result


CLOSED_FORMS = {
    # epoch e of 4 + 5, counted from 1, in steps of 3
    "linear": lambda e, start=1: 1 - max(0, e - 4) / 6,
    "step": lambda e, start=1: 0.1 ** ((e - start) // 3),
    "cosine": lambda e, start=1: (1 + math.cos(math.pi * (e - 1) / 9)) / 2,
}


@pytest.mark.parametrize("start", [1, 2, 6, 9])
@pytest.mark.parametrize("policy", ["linear", "step", "cosine"])
def test_rate_of_each_epoch(policy, start):
    expected = [CLOSED_FORMS[policy](epoch, start) for epoch in range(start, 10)]
    assert rates(policy, 4, 5, start) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n_epochs", "decay"), [(4, 5), (9, 0), (0, 9), (1, 0)])
@pytest.mark.parametrize("policy", ["linear", "cosine"])
def test_rates_never_rise_and_the_last_epoch_still_learns(policy, n_epochs, decay):
    found = rates(policy, n_epochs, decay)
    assert found[0] > 0.85
    assert all(a >= b for a, b in itertools.pairwise(found))
    assert found[-1] > 0.01


@pytest.mark.parametrize("policy", ["step", "cosine"])
def test_rates_are_those_of_torch(policy):
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1.0)
    kinds = {
        "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.1),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9),
    }
    theirs, found = kinds[policy](optimizer), []
    for _ in range(9):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(policy, 4, 5) == pytest.approx(found, rel=1e-12)


def template_model(folder, *words: str):
    """A tiny model that trains, whose loss can be set."""
    where = ["--dataroot", str(folder), "--checkpoints_dir", str(folder), "--name", "x"]
    flags = ["--model", "template", "--gpu_ids", "-1", "--netG", "resnet_6blocks", "--ngf", "2"]
    opt = TrainOptions([*where, *flags, *words]).parse(save=False)
    model = create_model(opt)
    model.setup(opt)
    return model


@pytest.mark.parametrize("start", [1, 3])
@pytest.mark.parametrize("change", list(itertools.permutations([*CLOSED_FORMS, "plateau"], 2)))
def test_rates_after_a_change_of_policy(change, start, tmp_path):
    before, after = change
    words = "--n_epochs 4 --n_epochs_decay 5 --lr_decay_iters 3 --lr 1".split()
    words += ["--epoch_count", str(start)]
    old = template_model(tmp_path, *words, "--lr_policy", before)
    for _ in range(3):
        old.update_learning_rate()
    new = template_model(tmp_path, *words, "--lr_policy", after)
    new.load_training_state(old.training_state(), vars(old.opt))
    for epoch in (start + 3, start + 4):
        wanted = 1.0 if after == "plateau" else CLOSED_FORMS[after](epoch, start)
        assert new.learning_rate() == pytest.approx(wanted, rel=1e-6)
        new.update_learning_rate()


def plateau_rates(folder: Path, epochs: list[list[float]]) -> list[float]:
    """The rate after each epoch of `--lr_policy plateau`, from the losses of its iterations."""
    model = template_model(folder, "--lr_policy", "plateau", "--lr", "1")
    seen = []
    for losses in epochs:
        for loss in losses:
            model.loss_G = torch.tensor(loss)
            model.track_metric()
        model.update_learning_rate()
        seen.append(model.learning_rate())
    return seen


def test_plateau_watches_the_losses(tmp_path):
    # two iterations an epoch, whose mean stays at 3: the best is the first of them
    seen = plateau_rates(tmp_path, [[3.0 + epoch, 3.0 - epoch] for epoch in range(10)])
    # patience of 5 epochs: the seventh in a row without progress is followed by a lower rate
    assert seen == pytest.approx([1.0] * 6 + [0.2] * 4)


def test_plateau_waits_while_losses_fall(tmp_path):
    assert plateau_rates(tmp_path, [[0.9**epoch] for epoch in range(12)])[-1] == 1.0


def test_plateau_takes_less_than_a_hundredth_for_no_progress(tmp_path):
    losses = (1.0, 0.999, 0.998, 0.997, 0.996, 0.995, 0.994, 0.99, 0.97)
    assert plateau_rates(tmp_path, [[loss] for loss in losses]) == pytest.approx(
        [1.0] * 6 + [0.2] * 3
    )


def test_plateau_watches_the_finite_losses_of_each_epoch(tmp_path):
    # after a bad first epoch the mean of all would fall, and with infinite losses counted as
    # iterations so would that of each: both look like progress
    epochs = [[100.0 if epoch == 0 else 1.0, *[math.inf] * epoch] for epoch in range(10)]
    assert plateau_rates(tmp_path, epochs) == pytest.approx([1.0] * 7 + [0.2] * 3)


def test_a_changed_rate_counts_for_plateau_too(tmp_path):
    old = template_model(tmp_path, "--lr_policy", "plateau", "--lr", "1")
    old.optimizers[0].param_groups[0]["lr"] = 0.2  # lowered once
    new = template_model(tmp_path, "--lr_policy", "plateau", "--lr", "3")
    new.load_training_state(old.training_state(), vars(old.opt))
    assert new.learning_rate() == pytest.approx(0.6)


def test_validation_leaves_the_statistics_of_all_modules(tmp_path):
    model = template_model(tmp_path)
    model.teacher = nn.BatchNorm2d(3)  # not in model_names
    before = copy.deepcopy(model.teacher.state_dict())
    with undisturbed(model):
        model.teacher(torch.rand(2, 3, 4, 4))
        assert model.teacher.num_batches_tracked == 1
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_validation_leaves_the_modes_of_all_modules(tmp_path):
    model = template_model(tmp_path)
    model.netG.model[1].eval()  # a layer that is frozen
    modules = list(model.netG.modules())
    modes = [module.training for module in modules]
    with undisturbed(model):
        model.eval()
    assert [module.training for module in modules] == modes


def test_an_iteration_that_is_skipped_does_not_count_for_the_penalty(tmp_path):
    model, x = template_model(tmp_path), torch.rand(1, 3, 4, 4)
    net = nn.Conv2d(3, 1, 1)
    model.penalty = networks.GradientPenalty("lsgan", "r1", 1.0, 2)
    undo = model.snapshot()
    assert model.penalty(net, x, x) > 0
    undo()
    assert model.penalty.latest(net) == 0
    assert model.penalty(net, x, x) > 0  # as if for the first time
    assert model.penalty(net, x, x) == 0


def test_what_a_subclass_of_the_loss_learns_is_saved(tmp_path):
    class Tempered(networks.GANLoss):
        def __init__(self):
            super().__init__("lsgan")
            self.temperature = nn.Parameter(torch.ones(()))

    model = template_model(tmp_path)
    model.plain, model.tempered = networks.GANLoss("lsgan"), Tempered()
    model.tempered.temperature.data.fill_(0.5)
    state = copy.deepcopy(model.training_state())
    model.tempered.temperature.data.fill_(1)
    model.load_training_state(state, vars(model.opt))
    assert model.tempered.temperature == 0.5
    assert state["modules"]["plain"]["real_label"] == 1  # which a model may change as it trains


def test_an_unknown_policy_is_raised_not_returned():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match=r"'sawtooth'.*linear, step, plateau, cosine"):
        networks.get_scheduler(optimizer, argparse.Namespace(lr_policy="sawtooth"))


# ------------------------------------------------------------------------ weights of other origins
def test_weights_of_several_gpus_and_of_old_torch_load(tmp_path):
    model = template_model(tmp_path, "--seed", "1")
    source = networks.define_G(3, 3, 2, "resnet_6blocks", norm="batch")
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    # batch norms kept no counters before 0.4.1
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    (tmp_path / "x").mkdir(exist_ok=True)
    torch.save(state, tmp_path / "x" / "9_net_G.pth")
    counters = [k for k in model.netG.state_dict() if k.endswith("num_batches_tracked")]
    assert len(counters) == 17
    with torch.no_grad():
        before = model.netG.eval()(x := noise(1, 3, 8, 8))
    model.load_networks("9")
    with torch.no_grad():
        after, wanted = model.netG(x), source.eval()(x)
    assert torch.equal(after, wanted)
    assert not torch.equal(after, before)


def test_statistics_of_old_instance_norms_are_left_out():
    net = networks.define_G(3, 3, 2, "resnet_6blocks", norm="instance")
    own = net.state_dict()
    old = dict(own)
    for name, module in net.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            old[f"{name}.running_mean"] = torch.zeros(module.num_features)
            old[f"{name}.running_var"] = torch.ones(module.num_features)
    assert len(old) == len(own) + 2 * 17
    assert list(fit_state_dict(old, net)) == list(own)
    # those of a batch norm are kept
    batch = networks.define_G(3, 3, 2, "resnet_6blocks", norm="batch")
    assert list(fit_state_dict(batch.state_dict(), batch)) == list(batch.state_dict())


def generator(netG="resnet_6blocks", ngf=2, norm="instance", no_dropout=True, nc=(3, 3)):
    return networks.define_G(*nc, ngf, netG, norm, not no_dropout)


@pytest.mark.parametrize(
    ("saved", "built", "flag"),
    [
        ({"netG": "resnet_9blocks"}, {}, "--netG resnet_9blocks"),
        ({}, {"netG": "resnet_9blocks"}, "--netG resnet_6blocks"),
        ({"netG": "unet_128"}, {}, "--netG unet_128"),
        ({}, {"netG": "unet_128"}, "--netG resnet_6blocks"),
        ({"netG": "unet_256"}, {"netG": "unet_128"}, "--netG unet_256"),
        ({"ngf": 4}, {}, "--ngf 4"),
        ({"netG": "unet_128", "ngf": 4}, {"netG": "unet_128"}, "--ngf 4"),
        ({"norm": "batch"}, {}, "--norm batch"),
        ({"norm": "none"}, {}, "--norm none"),
        ({}, {"norm": "batch"}, "--norm instance"),
        ({}, {"norm": "none"}, "--norm instance"),
        ({"norm": "none"}, {"norm": "batch"}, "--norm none"),
        ({"netG": "unet_128", "norm": "batch"}, {"netG": "unet_128"}, "--norm batch"),
        ({"netG": "unet_128"}, {"netG": "unet_128", "norm": "none"}, "--norm instance"),
        ({"no_dropout": False}, {}, "--dropout"),
        ({}, {"no_dropout": False}, "--no_dropout"),
        ({"no_dropout": False, "norm": "batch"}, {"norm": "batch"}, "--dropout"),
        ({"nc": (1, 3)}, {}, "--input_nc 1"),
        ({"nc": (3, 2)}, {}, "--output_nc 2"),
        ({"netG": "unet_128", "nc": (1, 2)}, {"netG": "unet_128"}, "--input_nc 1 --output_nc 2"),
    ],
)
def test_misfit_of_a_generator_names_the_flag(saved, built, flag):
    state, net = generator(**saved).state_dict(), generator(**built)
    message = explain_mismatch("G", state, net)
    assert message is not None
    assert "\n" not in message
    advice = message.rpartition("; ")[2]
    assert advice.startswith("set ")
    if "these flags" in advice:
        assert flag in message
    else:
        assert advice == f"set {flag}"
    # what it says is what fits
    assert explain_mismatch("G", state, generator(**saved)) is None


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("netG", list(networks.GENERATORS))
def test_weights_that_fit_are_not_complained_of(netG, norm):
    state = generator(netG, norm=norm).state_dict()
    assert explain_mismatch("G", state, generator(netG, norm=norm)) is None


@pytest.mark.parametrize(
    ("saved", "built", "flag"),
    [
        (("pixel", 3, 4, "instance"), ("basic", 3, 4, "instance"), "--netD pixel"),
        (("basic", 3, 4, "instance"), ("pixel", 3, 4, "instance"), "--netD n_layers"),
        (("n_layers", 2, 4, "instance"), ("basic", 3, 4, "instance"), "--n_layers_D 2"),
        (("n_layers", 5, 4, "batch"), ("n_layers", 1, 4, "batch"), "--n_layers_D 5"),
        (("basic", 3, 8, "instance"), ("basic", 3, 4, "instance"), "--ndf 8"),
        (("pixel", 3, 8, "batch"), ("pixel", 3, 4, "batch"), "--ndf 8"),
        (("basic", 3, 4, "batch"), ("basic", 3, 4, "instance"), "--norm batch"),
        (("basic", 3, 4, "instance"), ("basic", 3, 4, "none"), "--norm instance"),
        (("n_layers", 1, 4, "none"), ("n_layers", 1, 4, "instance"), "--norm none"),
        (("pixel", 3, 4, "batch"), ("pixel", 3, 4, "instance"), "--norm batch"),
        (("pixel", 3, 4, "instance"), ("pixel", 3, 4, "none"), "--norm instance"),
        (("pixel", 3, 4, "none"), ("pixel", 3, 4, "instance"), "--norm none"),
    ],
)
def test_misfit_of_a_discriminator_names_the_flag(saved, built, flag):
    def discriminator(netD: str, layers: int, ndf: int, norm: str) -> nn.Module:
        return networks.define_D(3, ndf, netD, layers, norm)

    state = discriminator(*saved).state_dict()
    message = explain_mismatch("D", state, discriminator(*built))
    assert message is not None
    assert flag in message
    if saved[0] == built[0] and saved[1] == built[1]:
        assert message.endswith(f"; set {flag}")
    assert explain_mismatch("D", state, discriminator(*saved)) is None


def test_misfit_of_another_kind_of_network_is_told_too():
    net = generator()
    message = explain_mismatch("G", {"stem.weight": torch.zeros(2, 3)}, net)
    count = len(net.state_dict())
    assert message == (
        f"netG has {count} weights, from which the file differs: {count} missing "
        f"({next(iter(net.state_dict()))}), 1 unknown (stem.weight); it was saved from another "
        "network, or is incomplete"
    )


def test_a_missing_weight_is_named():
    """Where all options are those of the training."""
    net = generator()
    state = net.state_dict()
    gone = [*state][-1]
    del state[gone]
    assert f"1 missing ({gone})" in str(explain_mismatch("G", state, net))


def test_a_generator_of_ones_own_is_not_taken_for_a_discriminator():
    """Its first layer is `model.0`, as in a discriminator."""
    own = nn.ModuleDict({"model": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))})
    message = explain_mismatch("G_A", own.state_dict(), generator("resnet_6blocks"))
    assert "saved from another network" in str(message)
    assert "--netD" not in str(message)
