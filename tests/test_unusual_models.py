"""Unusual things that model files do are right in every mode, or refused in one line."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import networks
from models.speed import acceleration, passes
from models.speed.gradient_scale import GradientScale
from models.speed.passes import forget_passes, share_pass
from models.speed.prepared import prepared
from models.speed.steps import Steps
from models.speed.sync_norm import synchronize_norms
from models.template_model import TemplateModel
from tests.plain_models import batch, build, train, weights
from tests.ranks import Group
from util import distributed
from util.errors import UserError, one_line_errors
from util.run.finite import FiniteGuard
from util.run.training_run import TrainingRun

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix", "pix2pix --norm batch"])
def test_what_a_loop_over_layers_keeps_of_a_norm_is_rectified(model, tmp_path):
    """As in the original, whose ReLUs work in place, and without the copies that it makes there."""
    m = build(model.split()[0], tmp_path, f"--netD basic {model.partition(' ')[2]}")
    net = m.netD_A if model == "cycle_gan" else m.netD
    x, kept = torch.rand(2, 3 if model == "cycle_gan" else 6, 32, 32), []
    for layer in net.model:
        x = layer(x)
        kept.append(x)
    norm = functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)
    norm = norm if "batch" in model else F.instance_norm
    for i, relu in enumerate(net.model):
        if isinstance(relu, nn.LeakyReLU) and i > 1:
            weights = {k: getattr(net.model[i - 1], k) for k in ("weight", "bias")}
            expected = F.leaky_relu(norm(kept[i - 2], **weights), 0.2)
            torch.testing.assert_close(kept[i - 1], expected)
            assert type(kept[i - 1].grad_fn).__name__.startswith("LeakyRelu")  # not CopySlices


# ------------------------------------------------------------------------------------------- fp16
class Features(nn.Module):
    """Keeps what is inside, in a list and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 3)
        self.kept: list[torch.Tensor] = []
        self.newest: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.newest = self.first(x)
        self.kept.append(self.newest)
        return self.last(self.newest.relu())


def hooked(net: Any) -> torch.Tensor:
    features: list[torch.Tensor] = []
    handle = net.first.register_forward_hook(lambda module, x, y: features.append(y))
    net(X)
    handle.remove()
    return features[0].square().mean()


def in_place(net: Any) -> torch.Tensor:
    out = net(X)
    out += 1
    return out.square().mean()


def gradient_of(net: nn.Module, loss: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    loss(net).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def in_fp16(net: nn.Module) -> nn.Module:
    net = prepared(copy.deepcopy(net))
    net.prepared_autocast = "cpu", torch.float16  # type: ignore[assignment]
    net.prepared_scale = GradientScale(2.0**10)  # type: ignore[assignment]
    return net


@pytest.mark.parametrize("loss", [hooked, in_place, lambda net: net.forward(X).square().mean()])
def test_scaled_gradients_past_the_result(loss):
    """Through hooks on the layers of a network, results changed in place, `forward`."""
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(3, 4, 3), "relu": nn.ReLU(), "last": nn.Conv2d(4, 1, 3)}
    net = nn.Sequential(OrderedDict(layers))
    ours = in_fp16(net)
    wanted, found = gradient_of(net, loss), gradient_of(ours, loss)
    torch.testing.assert_close(found, wanted, rtol=0, atol=3e-3 * float(wanted.abs().max()))


class Hidden(nn.Module):
    """Uses a layer that is not one of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.others = nn.Conv2d(3, 4, 3), [nn.Conv2d(4, 1, 3)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.others[0](self.first(x))


class Reentrant(Features):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.last, self.first(x), use_reentrant=True)


@dataclasses.dataclass
class Result:
    picture: torch.Tensor


class Structured(Features):
    def forward(self, x: torch.Tensor) -> Any:
        return Result(self.first(x))


class Recurrent(Features):
    """Goes on from what it has computed before, with its graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = 0 if self.newest is None else self.newest
        self.newest = self.first(x).tanh() + state
        return self.last(self.newest)


def each_result(net: Any) -> torch.Tensor:
    results = [net(X * k) for k in (1, 2, 3)]
    return sum(getattr(r, "picture", r).square().mean() for r in results)


@pytest.mark.parametrize("kind", [Features, Hidden, Reentrant, Structured, Recurrent])
def test_layers_of_ones_own_learn_in_float32(kind, capsys):
    """What they keep, or use besides parameters, would not be reached by a scale."""
    torch.manual_seed(0)
    net = kind()
    ours = copy.deepcopy(net)
    acceleration.prepare(ours, torch.device("cpu"), "fp16", scale=GradientScale(2.0**10))
    assert f"a {kind.__name__} has layers that are not known here" in capsys.readouterr().out
    assert torch.equal(gradient_of(ours, each_result), gradient_of(net, each_result))


def test_networks_of_known_layers_learn_in_fp16():
    torch.manual_seed(0)
    net = networks.define_D(3, 4, "basic", norm="instance")
    ours = copy.deepcopy(net)
    acceleration.prepare(ours, torch.device("cpu"), "fp16", scale=GradientScale(2.0**10))
    big = torch.rand(2, 3, 32, 32)
    loss = lambda net: net(big).square().mean()  # noqa: E731
    found, wanted = gradient_of(ours, loss), gradient_of(net, loss)
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()))


# ------------------------------------------------------------------------------------- --compile
@pytest.fixture
def quick_compiler(monkeypatch):
    """Without the last part of the compiler: what it makes of the code is run by torch."""
    quick = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", quick)
    torch.compiler.reset()


def compiled(net: nn.Module) -> Any:
    acceleration.prepare(net, torch.device("cpu"), compiled=True)
    return net


@pytest.mark.parametrize("first", ["hook", "other", "call"])
@pytest.mark.parametrize("learns", [True, False])
def test_hooks_in_compiled_networks_are_called(first, learns, quick_compiler):
    """Also where the compiler has code already: of a network of the same kind, or without hook."""
    one, other = (compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())) for _ in range(2))
    features: list[torch.Tensor] = []
    with torch.set_grad_enabled(learns):
        if first != "hook":
            (one if first == "call" else other)(X)
        one[0].register_forward_hook(lambda module, x, y: features.append(y))
        for x in (X, X + 1):
            result = one(x)
            torch.testing.assert_close(features.pop().relu(), result)


def test_a_penalty_on_a_part_of_the_input_is_one_line(quick_compiler, capsys):
    """The input is then no leaf, and looks like any other that a generator made."""
    net = compiled(nn.Sequential(nn.Conv2d(6, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3)))
    x = X.clone().requires_grad_()
    score = net(torch.cat((X, x), 1))
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    capsys.readouterr()  # what the compiler says
    with pytest.raises(SystemExit) as end, one_line_errors():
        slope.square().sum().backward()
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "error: the model takes gradients of gradients (a gradient penalty), which compiled "
        "networks do not have: leave out --compile or --fast\n"
    )


def test_a_view_of_gradients_in_channels_last_layout_is_one_line(tmp_path, capsys):
    """As most code for WGAN-GP has it."""
    model = build("ttur", tmp_path, "--channels_last on")
    x = torch.rand(2, 6, 32, 32, requires_grad=True)
    (slope,) = torch.autograd.grad(model.netD(x).sum(), x, create_graph=True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end, one_line_errors():
        slope.view(len(slope), -1)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: {re.escape(__file__)}:\d+: view\(\) needs .* reshape.*\n", said)


# ---------------------------------------------------------------------------------- shared passes
class MinibatchStd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.std(0, keepdim=True)


def test_networks_that_count_calls_or_mix_pictures_keep_their_own_passes(monkeypatch):
    conv = nn.Conv2d(3, 4, 3)
    assert passes.can_batch(nn.Sequential(conv, nn.ReLU()), X, X)
    mixing = nn.Sequential(conv, MinibatchStd())
    assert not passes.can_batch(mixing, X, X)
    monkeypatch.setattr(MinibatchStd, "__module__", "models.networks")  # as the docs say
    assert not passes.can_batch(mixing, X, X)
    normed = nn.utils.parametrizations.spectral_norm(copy.deepcopy(conv))
    assert not passes.can_batch(nn.Sequential(normed), X, X)
    assert not passes.can_batch(nn.Sequential(nn.utils.spectral_norm(conv)), X, X)
    net = networks.define_D(3, 4, "basic", norm="none")
    assert passes.can_batch(net, X, X)
    net.model[0].register_forward_hook(lambda *_: None)
    assert not passes.can_batch(net, X, X)


def test_a_shared_pass_ends_at_a_step():
    """A fused optimizer changes weights without a new version of them."""
    net = nn.Conv2d(3, 1, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    share_pass(prepared(net), [X, X + 1])
    net(X).mean().backward()
    y = X + 1
    share_pass(prepared(net), [X, y])
    optimizer.step()
    torch.testing.assert_close(net(y), nn.functional.conv2d(y, net.weight, net.bias))
    forget_passes()


# ------------------------------------------------------------------------------- --accumulate 2
def backward(model: Any) -> None:
    model.optimizer_G.zero_grad()
    model.netG(batch(0)["A"]).square().mean().backward()


def test_one_backward_for_two_optimizers_is_refused(tmp_path):
    model = build("ttur", tmp_path, "--accumulate 2")
    model.second = torch.optim.SGD(model.netG.parameters(), lr=0.1)
    for optimizer in (model.optimizer_G, model.second):  # a backward for each is right
        backward(model)
        optimizer.step()
    backward(model)
    model.optimizer_G.step()
    with pytest.raises(UserError, match=r"two optimizers step the same weights .*--accumulate 2"):
        model.second.step()


def test_optimizers_that_take_turns_at_a_weight_have_sums_of_their_own():
    p = nn.Parameter(torch.zeros(()))
    steps = Steps(lambda: [p], accumulate=2)
    steps.activate()
    first, second = (torch.optim.SGD([p], lr=lr) for lr in (1.0, 10.0))
    for slopes in ((2.0, 5.0), (4.0, 9.0)):
        for optimizer, slope in zip((first, second), slopes, strict=True):
            optimizer.zero_grad()
            (slope * p).backward()
            optimizer.step()
    assert p.item() == -1 * 3.0 - 10 * 7.0


def test_optimizers_of_the_same_weights_of_which_a_loss_reaches_some():
    """Such as a path length penalty with an optimizer of its own, which has no bias."""
    weight, bias = (nn.Parameter(torch.zeros(())) for _ in range(2))
    steps = Steps(lambda: [weight, bias], accumulate=2)
    steps.activate()
    first, second = (torch.optim.SGD([weight, bias], lr=lr) for lr in (1.0, 10.0))
    for _ in range(2):
        for optimizer, loss in ((first, weight + bias), (second, 2 * weight)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (weight.item(), bias.item()) == (-1 - 20, -1)


def test_hooks_on_weights_are_refused(tmp_path):
    model = build("ttur", tmp_path, "--accumulate 2")
    for p in model.netG.parameters():
        p.register_hook(lambda grad: grad.clamp(-1, 1))
    backward(model)
    with pytest.raises(UserError, match=r"register_hook\) on weights.*register_step_pre_hook"):
        model.optimizer_G.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_of_its_own_is_refused(fused, tmp_path):
    model = build("ttur", tmp_path, "--accumulate 2")
    model.optimizer_G = torch.optim.Adam(model.netG.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model.netG(batch(0)["A"]).mean()).backward()
    with pytest.raises(UserError, match=r"GradScaler|changes gradients"):
        scaler.step(model.optimizer_G)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_in_an_attribute_is_refused_with_fp16(enabled, tmp_path, monkeypatch):
    """With fp16 two scales would fight: no step for tens of iterations, without a word."""
    make = TemplateModel.__init__

    def with_scaler(self, opt):
        make(self, opt)
        self.scaler = torch.amp.GradScaler("cpu", enabled=enabled)

    monkeypatch.setattr(TemplateModel, "__init__", with_scaler)
    build("template", tmp_path, "--precision bf16")
    if not enabled:
        build("template", tmp_path, "--precision fp16")
        return
    with pytest.raises(UserError, match="with --precision fp16: make it with enabled=False"):
        build("template", tmp_path, "--precision fp16")


def test_a_network_that_loading_replaces_is_refused(tmp_path, monkeypatch):
    """Its weights would stay as they are loaded, since the optimizer has those of the old one."""
    build("template", tmp_path).save_networks("latest")
    load = TemplateModel.load_networks

    def load_networks(self, epoch):
        self.netG = copy.deepcopy(self.netG)
        load(self, epoch)

    monkeypatch.setattr(TemplateModel, "load_networks", load_networks)
    with pytest.raises(UserError, match="load_networks of TemplateModel replaces a network"):
        build("template", tmp_path, "--continue_train")

    def drop(self, epoch):  # what only the first part of training needs
        load(self, epoch)
        self.netHead = None

    make = TemplateModel.__init__

    def with_head(self, opt):
        make(self, opt)
        self.netHead = nn.Conv2d(3, 3, 1)
        self.optimizers.append(torch.optim.Adam(self.netHead.parameters()))

    monkeypatch.setattr(TemplateModel, "__init__", with_head)
    monkeypatch.setattr(TemplateModel, "load_networks", drop)
    build("template", tmp_path, "--continue_train")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_networks_that_a_model_compiles_do_not_ignore_the_precision(precision):
    with pytest.raises(UserError, match=r"does not reach a Features .* say --compile"):
        acceleration.prepare(torch.compile(Features()), torch.device("cpu"), precision)  # type: ignore[arg-type]


def test_names_that_stand_for_nothing_are_told_once(tmp_path, capsys):
    model = build("ttur", tmp_path)
    model.loss_names.append("loss_TV")
    model.visual_names.append("fake_C")
    model.get_current_visuals()  # before the first iteration nothing is missing
    assert capsys.readouterr().err == ""
    train(model, batch(0))
    for _ in range(2):
        assert list(model.get_current_losses()) == ["G_GAN", "G_L1", "D"]
        assert list(model.get_current_visuals()) == ["real_A", "fake_B", "real_B"]
    losses, visuals = capsys.readouterr().err.splitlines()
    assert losses.startswith("warning: TturModel: loss_names has 'loss_TV'")
    assert "no attribute loss_loss_TV" in losses
    assert "visual_names has 'fake_C'" in visuals


def test_a_visual_that_is_no_picture_is_left_out(tmp_path, capsys):
    """A mask without its channels, say: it must not end a training that is under way."""
    model = train(build("oneway", tmp_path), batch(0))
    model.mask, model.later, model.all = model.fake_B[:, 0], None, [model.fake_B]
    model.drawn = np.zeros((32, 32, 3), np.uint8)
    model.visual_names = ["fake_B", "mask", "later", "all", "drawn"]
    for _ in range(2):
        assert list(model.get_current_visuals()) == ["fake_B", "drawn"]
    told = capsys.readouterr().err
    assert told.count("'mask', a tensor of shape (1, 32, 32), and imag") == 1
    assert told.count("'later', a NoneType, and") == told.count("'all', a list, and") == 1


def test_what_plain_objects_hold_is_found(tmp_path):
    """Such as a helper that has a network and its optimizer."""
    model = build("ttur", tmp_path, "--accumulate 2")
    net = nn.Conv2d(3, 3, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model.helper = types.SimpleNamespace(net=net, tools=[optimizer])
    assert model.all_modules()["helper.net"] is net
    assert optimizer in model.all_optimizers()
    before = net.weight.clone()
    net(X).mean().backward()
    optimizer.step()
    assert torch.equal(net.weight, before)


# ---------------------------------------------------------------------------------- --on_nan skip
@pytest.mark.parametrize("flags", ["", "--accumulate 2"])
def test_a_skipped_iteration_leaves_nothing(flags, tmp_path):
    """Also not in averages of weights, nor in what --accumulate adds up."""
    model, wanted = (build("teacher", tmp_path, flags) for _ in range(2))
    guard = FiniteGuard(model, "skip")
    bad = batch(1)
    bad["A"] = bad["A"] * float("nan")
    for i, data in enumerate([batch(0), bad, batch(2), bad, batch(3), batch(4)]):
        guard.start()
        train(model, data)
        guard.finish(f"iteration {i}", data)
    guard.close()
    train(wanted, *(batch(i) for i in (0, 2, 3, 4)))
    assert guard.skipped == ["iteration 1", "iteration 3"]
    found = weights(model)
    for key, value in weights(wanted).items():
        assert torch.equal(found[key], value), key


def test_of_several_steps_in_an_iteration_all_are_undone(tmp_path):
    """The last step first, as the states of earlier ones are those from before them."""
    model = build("critic", tmp_path)
    train(model, batch(0))  # so that there are moments
    guard, before = FiniteGuard(model, "skip"), weights(model)
    bad = batch(3)
    bad["A"] = bad["A"] * float("nan")
    guard.start()
    train(model, batch(1), batch(2), bad)
    guard.finish("iteration 1", bad)
    guard.close()
    assert guard.skipped == ["iteration 1"]
    found = weights(model)
    for key, value in before.items():
        assert torch.equal(found[key], value), key


# ------------------------------------------------------------------------------ several processes
def in_two_processes(folder: str) -> None:
    rank = distributed.rank()
    model = build("ttur", folder)
    model.broadcast_weights()
    train(model, batch(rank))
    assert distributed.same_on_all_ranks(model.stepped_tensors())

    model.netE = nn.Conv2d(3, 3, 1)  # as one made in the first iteration
    optimizer = torch.optim.SGD(model.netE.parameters(), lr=0.1)
    with pytest.raises(UserError, match="made after the start of training"):
        optimizer.step()

    # batch norms of any kind have the statistics of all
    net, whole = (nn.Sequential(nn.BatchNorm1d(3, momentum=1.0)) for _ in range(2))
    assert synchronize_norms(net) == 1
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(x[3 * rank :][:3]), whole(x)[3 * rank :][:3])
    torch.testing.assert_close(net[0].running_var, whole[0].running_var)

    # weights changed by something else than steps are not saved
    run = TrainingRun(model.opt, model, [])
    with torch.no_grad():
        for p in model.netG.parameters():
            p -= 0.001 * rank
    with pytest.raises(UserError, match="weights have diverged between processes"):
        run.save("latest", position=None)  # type: ignore[arg-type]


def test_in_two_processes(tmp_path: Path):
    group = Group(tmp_path / "log", 2, in_two_processes, str(tmp_path))
    assert group.wait() == 0, group.text()
