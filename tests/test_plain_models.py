"""Model files in the form of the original give the same in every mode.

What they are compared with is a plain loop: by default, in one process, nothing of this code's own
stands between a model, torch's optimizers and its networks (the first test says so).
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import io
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import models
from models import discriminators, networks
from models.speed.gradient_scale import GradientScale
from models.speed.prepared import prepared
from models.speed.steps import _active, parameters_of
from models.training_state import load_optimizer
from tests import plain_models
from tests.helpers import SHORT, TINY, run, succeed, unaligned
from tests.plain_models import NAMES, batch, build, picture, resume, train, weights
from tests.ranks import Group
from util import distributed
from util.errors import UserError
from util.image_pool import ImagePool
from util.run.finite import FiniteGuard

# these do something else in every second iteration, or in each; --accumulate has more of them
BY_ITERATIONS = ("alternate", "lazyreg", "ownsave", "replay", "unfreeze")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """The front half of the compiler only: what it makes of the code is run as it is."""
    eager = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", eager)
    monkeypatch.setattr("options.base_options.why_not_compile", lambda *a: None)
    torch.compiler.reset()


def assert_same(found: dict, wanted: dict, rtol: float = 1e-8, atol: float = 1e-9) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=atol, msg=key)


def whole_batches(name: str, folder: Path, steps: int = 4) -> dict[str, torch.Tensor]:
    """Weights after steps with batches of two, in one process."""
    model = build(name, folder)
    return weights(train(model, *(batch(2 * i, 2 * i + 1) for i in range(steps))))


@pytest.mark.parametrize("name", NAMES)
def test_by_default_nothing_is_in_between(name, tmp_path):
    model = build(name, tmp_path)
    assert model._steps not in _active
    for net in model.all_modules().values():
        assert net.__class__.__call__ is nn.Module.__call__
        assert not any(p._backward_hooks for p in net.parameters())
    for optimizer in model.all_optimizers():
        assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("name", [n for n in NAMES if n not in BY_ITERATIONS])
def test_accumulate_is_one_large_batch(name, tmp_path, float64):
    parts = build(name, tmp_path, "--accumulate 2")
    before = weights(parts)
    train(parts, batch(0))
    if name != "teacher":
        assert_same(weights(parts), before, 0, 0)  # no step yet, nor decay of weights
    whole, parts = build(name, tmp_path), build(name, tmp_path, "--accumulate 2")
    if name == "teacher":  # its averages go by iterations, of which there are twice as many
        for model in (whole, parts):
            model.teachers[0].load_state_dict(model.netG.state_dict())
    steps = 1 if name in ("teacher", "critic") else 3
    train(whole, *(batch(2 * i, 2 * i + 1) for i in range(steps)))
    train(parts, *(batch(i) for i in range(2 * steps)))
    for net, wanted in whole.networks().items():
        if (name, net) == ("critic", "G"):
            continue  # half of its batch has seen D before its step
        assert_same(parts.networks()[net].state_dict(), wanted.state_dict())


def several_processes(folder: str, out: str) -> None:
    torch.set_default_dtype(torch.float64)
    found = {}
    for name in NAMES:
        model = build(name, folder)
        if distributed.rank() == 1:  # as one that did not read the files
            with torch.no_grad():
                for tensor in model.trained_tensors():
                    tensor.add_(1.0)
        model.broadcast_weights()
        # half of a batch each
        train(model, *(batch(2 * i + distributed.rank()) for i in range(4)))
        found[name] = weights(model)
        if name == "ttur":
            assert model.netG.module is model.netG
    torch.save(found, f"{out}.{distributed.rank()}")


def test_two_processes_are_one_with_whole_batches(tmp_path, float64):
    group = Group(tmp_path / "log", 2, several_processes, str(tmp_path), str(tmp_path / "out"))
    wanted = {name: whole_batches(name, tmp_path) for name in NAMES}
    assert group.wait() == 0, group.text()
    first, second = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    for name in NAMES:
        if name != "replay":  # what it remembers is of the batches of one process
            assert_same(first[name], wanted[name])
        assert_same(second[name], first[name], 0, 0)


def gradients(model: Any) -> list[dict[str, torch.Tensor]]:
    """What each optimizer steps by in two iterations; with --lr 0 weights stay as they are."""
    found: list[dict[str, torch.Tensor]] = []
    names = {
        p: f"{n}.{k}" for n, net in model.all_modules().items() for k, p in net.named_parameters()
    }
    for optimizer in model.all_optimizers():
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.register_step_pre_hook(
            lambda o, *_: found.append(
                {
                    names.get(p, "loose"): p.grad.clone()
                    for p in parameters_of(o)
                    if p.grad is not None
                }
            )
        )
    train(model, batch(0), batch(1))
    return found


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_half_precision_are_near(name, precision, tmp_path):
    """Also those of penalties on gradients, and of losses of the weights themselves."""
    plain, half = build(name, tmp_path), build(name, tmp_path, f"--precision {precision}")
    if precision == "fp16":
        half._gradient_scale.factor = 64.0
    wanted, found = gradients(plain), gradients(half)
    assert len(found) == len(wanted)
    different = False
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(g.dtype == torch.float32 for g in ours.values())
        a, b = (torch.cat([g[k].flatten() for k in theirs]) for g in (ours, theirs))
        cosine = a @ b / a.norm() / b.norm()
        assert cosine > (0.8 if precision == "bf16" else 0.95)
        assert a.norm() / b.norm() == pytest.approx(1, abs=0.2)
        different |= not torch.equal(a, b)
    assert different
    assert all(v.dtype == torch.float32 for v in weights(half).values())


@pytest.mark.parametrize("name", NAMES)
def test_compiled(name, tmp_path):
    """Also gradients of gradients, which compiled networks do not have."""
    plain, compiled = build(name, tmp_path), build(name, tmp_path, "--compile --precision fp32")
    for model in (plain, compiled):
        train(model, batch(0), batch(1))
    assert any(net._compiled_call_impl is not None for net in compiled.networks().values())
    assert_same(weights(compiled), weights(plain), 1e-4, 1e-6)


@pytest.mark.parametrize("flags", ["", "--accumulate 2", "--precision fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_resume(name, flags, tmp_path):
    """Saved in the middle of a step, also with --accumulate."""
    straight, first, second = (build(name, tmp_path, flags) for _ in range(3))
    train(straight, *(batch(i) for i in range(6)))
    train(first, *(batch(i) for i in range(3)))
    resume(first, second)
    train(second, *(batch(i) for i in range(3, 6)))
    assert_same(weights(second), weights(straight), 0, 0)


def test_sums_of_another_number_of_batches_are_given_up(tmp_path):
    """Resumed with another --accumulate, a step begins anew."""
    first, second, wanted = (build("ttur", tmp_path, f"--accumulate {n}") for n in (3, 2, 2))
    resume(train(first, batch(0)), second)
    train(second, batch(1), batch(2))
    train(wanted, batch(1), batch(2))
    assert_same(weights(second), weights(wanted), 0, 0)


def with_parts(model: Any) -> Any:
    """The model with things that people keep beside networks."""
    model.pools = {"A": ImagePool(2)}
    model.queue = nn.BatchNorm1d(3, affine=False)  # buffers alone
    model.warm_up = [torch.optim.lr_scheduler.ExponentialLR(model.optimizer_G, 0.5)]
    return model


def test_what_is_held_in_lists_and_modules_without_parameters_comes_back(tmp_path, capsys):
    first, second = (with_parts(build("ttur", tmp_path)) for _ in range(2))
    first.pools["A"].query(picture(0, torch.float32)[0])
    first.queue(torch.rand(4, 3))
    for _ in range(3):
        first.warm_up[0].step()
    resume(first, second)
    assert torch.equal(second.pools["A"].images[0], picture(0, torch.float32)[0])
    assert_same(second.queue.state_dict(), first.queue.state_dict(), 0, 0)
    assert second.warm_up[0].state_dict() == first.warm_up[0].state_dict()
    assert "is lost" not in capsys.readouterr().err
    resume(first, build("ttur", tmp_path))
    err = capsys.readouterr().err
    lost = "the checkpoint has state for pools.A, queue, warm_up.0, which this model lacks"
    assert lost in err


def test_tensors_of_a_part_that_saves_them_itself_differ_by_process(tmp_path):
    """What the first process holds must not replace the queue that each restores by itself."""

    class Queue:
        def __init__(self) -> None:
            self.rows = torch.zeros(3)

        def state_dict(self) -> dict[str, Any]:
            return {"rows": self.rows}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.rows.copy_(state["rows"])

    def with_queue() -> Any:
        model = build("ttur", tmp_path)
        model.queue = Queue()
        model.watch_attributes()
        return model

    first, second, resumed = (with_queue() for _ in range(3))
    first.queue.rows += 1
    second.queue.rows += 2
    own = second.training_state()
    state = first.training_state() | {k: own[k] for k in second.PER_RANK_STATE}
    resumed.load_training_state(state, vars(second.opt))
    assert torch.equal(resumed.queue.rows, second.queue.rows)


def test_plain_values_differ_by_process(tmp_path):
    """Each remembers its own batches."""
    first, second, resumed = (build("replay", tmp_path) for _ in range(3))
    train(first, batch(0))
    train(second, batch(1))
    own = second.training_state()
    state = first.training_state() | {k: own[k] for k in second.PER_RANK_STATE}
    resumed.load_training_state(state, vars(second.opt))
    assert resumed.recent == second.recent != first.recent
    kept, wanted = resumed.buffers["B"].data, second.buffers["B"].data
    assert len(kept) == 1
    assert torch.equal(kept[0], wanted[0])
    (resharded,) = first.reshard_state([first.training_state(), own], 1)
    assert "plain" not in resharded


def test_a_pool_keeps_no_batches():
    """A part of a batch would keep all of its memory."""
    pool = ImagePool(2)
    for _ in range(9):  # as it fills, and as it exchanges
        pool.query(torch.rand(2, 3, 4, 4))
        assert [x.untyped_storage().nbytes() for x in pool.images] == [4 * 3 * 4 * 4] * 2


class CountingPool(ImagePool):
    """Keeps each second image, in the way of the original's `query`."""

    def query(self, images: torch.Tensor) -> torch.Tensor:
        for image in images[::2]:
            if self.num_imgs < self.pool_size:
                self.num_imgs = self.num_imgs + 1
                self.images.append(image)
            else:
                self.images[0] = image
        return images


def test_a_pool_of_ones_own_counts_as_in_the_original():
    pool, resumed = CountingPool(3), CountingPool(3)
    pool.query(torch.rand(4, 3, 2, 2))
    assert (pool.num_imgs, len(pool.images)) == (2, 2)
    resumed.load_state_dict(pool.state_dict())
    resumed.query(torch.rand(4, 3, 2, 2))
    assert (resumed.num_imgs, len(resumed.images)) == (3, 3)


def test_schedules_of_a_model_go_on_as_they_are(tmp_path):
    """Those of the options follow new ones; the model's own do not know them."""

    def own(flags: str) -> Any:
        model = build("ttur", tmp_path, flags)
        kind = torch.optim.lr_scheduler.ExponentialLR
        model.schedulers = [kind(o, 0.5) for o in model.optimizers]
        return model

    first = own("--n_epochs 10")
    for _ in range(3):
        first.update_learning_rate()
    second = resume(first, own("--n_epochs 20"))
    for model in (first, second):
        assert model.learning_rate() == pytest.approx(0.0001 / 8)


LAST, FIRST = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize("after", [(FIRST, True), (LAST, False), (LAST, True)])
@pytest.mark.parametrize("before", [(FIRST, False), (FIRST, True), (LAST, False), (LAST, True)])
def test_resume_with_other_kernels_and_another_layout(before, after):
    """Fused steps take Adam's moments to lie in memory as the weights do, and do not look."""

    def steps(layout: torch.memory_format, fused: bool, state: Any, pictures: Any) -> Any:
        torch.manual_seed(0)
        net = nn.Conv2d(8, 8, 3).to(memory_format=layout)  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=fused)
        if state is not None:
            net.load_state_dict(state[0])
            load_optimizer(optimizer, copy.deepcopy(state[1]))
        for x in pictures:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        assert optimizer.param_groups[0]["fused"] is fused
        return net.state_dict(), optimizer.state_dict()

    pictures = torch.rand(5, 2, 8, 8, 8)
    saved = steps(*before, None, pictures[:3])
    wanted, _ = steps(FIRST, False, saved, pictures[3:])
    found, _ = steps(*after, saved, pictures[3:])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_setup_that_replaces_that_of_the_base_class(tmp_path, monkeypatch):
    """As people copy it from the original: it trains, and what then does not work is said."""

    def setup(self: Any, opt: Any) -> None:
        self.schedulers = [networks.get_scheduler(o, opt) for o in self.optimizers]
        if opt.continue_train:
            self.load_networks(opt.epoch)

    plain_models.put_in_place()
    monkeypatch.setattr(models.find_model_using_name("oneway"), "setup", setup)
    data = unaligned(tmp_path / "data", 2)
    where = ["--dataroot", data, "--checkpoints_dir", tmp_path, "--name", "x", "--model", "oneway"]
    flags = [*where, *TINY, "--dataset_mode", "unaligned", *SHORT, "--no_html"]
    result = succeed("train.py", *flags)
    assert "warning: setup() of --model oneway does not call BaseModel.setup" in result.err
    result = run("train.py", *flags, "--continue_train")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: setup() of --model oneway does not call")


def test_an_optimizer_made_during_training_is_told_at_the_save(tmp_path, monkeypatch):
    """As pix2pixHD does when it unfreezes its global generator."""

    def update_learning_rate(self: Any) -> None:
        self.optimizer_later = torch.optim.Adam(self.netG_A.parameters(), lr=1e-4)

    plain_models.put_in_place()
    kind = models.find_model_using_name("oneway")
    monkeypatch.setattr(kind, "update_learning_rate", update_learning_rate)
    data = unaligned(tmp_path / "data", 2)
    where = ["--dataroot", data, "--checkpoints_dir", tmp_path, "--name", "x", "--model", "oneway"]
    flags = [*where, *TINY, "--dataset_mode", "unaligned", *SHORT, "--no_html", "--n_epochs"]
    result = succeed("train.py", *flags, 2)
    assert result.err.count("warning: the model has made an optimizer, or given it more") == 1
    result = run("train.py", *flags, 3, "--continue_train")
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert "(ValueError: it has 3 optimizers, the model now 2: a model has to make all" in last


@pytest.mark.parametrize("name", NAMES)
def test_programs(name, tmp_path):
    """train.py with validation, again with --continue_train, and test.py --eval."""
    plain_models.put_in_place()
    data = unaligned(tmp_path / "data", 2)
    where = ["--dataroot", data, "--checkpoints_dir", tmp_path, "--name", "x", "--model", name]
    more = ["--norm", "instance", "--no_dropout", "--dataset_mode", "unaligned"]
    flags = [*where, *TINY, *more, *SHORT, "--print_freq", 1, "--no_html"]
    out = succeed("train.py", *flags, "--val_freq", 1, "--val_phase", "test").out
    assert "End of epoch 1 / 1" in out
    out += succeed("train.py", *flags, "--n_epochs", 2, "--continue_train").out
    assert "resuming from 'latest': epoch 2" in out
    results = ["--results_dir", tmp_path / "results", "--eval", "--num_test", 1]
    out += succeed("test.py", *where, *TINY, *more, *results).out
    images = list((tmp_path / "results").rglob("*.png"))
    assert len(images) >= 1
    if name == "ownsave":
        for called in ("update_learning_rate", "test", "print_networks"):
            assert f"own {called}" in out
        assert any("own" in path.name for path in images)
        mean = torch.load(tmp_path / "x" / "latest_mean.pth", weights_only=True)["mean"]
        assert mean.tolist() == pytest.approx([0.04] * 3)  # two epochs of two images
        (tmp_path / "x" / "latest_mean.pth").write_bytes(b"cut off")  # it has no exact resume
        result = succeed("train.py", *flags, "--n_epochs", 3, "--continue_train")
        assert "training goes on from" in result.err
        assert "resuming from 'latest': epoch 3" in result.out


# ---------------------------------------------------------------- what can't be done, in one line
def step_once(model: Any, change: Any = None, closure: Any = None) -> None:
    model.optimizer_G.zero_grad()
    model.netG(batch(0)["A"]).square().mean().backward()
    if change is not None:
        change([p for p in model.netG.parameters() if p.grad is not None])
    model.optimizer_G.step(closure)


def clip_data(parameters: list) -> None:
    for p in parameters:
        p.grad.data.clamp_(-1e-6, 1e-6)


def replace(parameters: list) -> None:
    for p in parameters:
        p.grad = p.grad.clamp(-1e-6, 1e-6)


def hook_late(parameters: list) -> None:
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: p.grad.clamp_(-1e-6, 1e-6))


CHANGES = {
    "clip_grad_norm_": lambda ps: nn.utils.clip_grad_norm_(ps, 1e-3),
    "data": clip_data,
    "replace": replace,
    "hook": hook_late,
}


@pytest.mark.parametrize("change", CHANGES)
def test_gradients_changed_behind_the_hook(change, tmp_path):
    """Right in one process; of a part of the batch it is refused in front of the first step."""
    step_once(build("ttur", tmp_path), CHANGES[change])
    model = build("ttur", tmp_path, "--accumulate 2")
    before = weights(model)
    with pytest.raises(UserError, match=r"--accumulate 2 .* optimizer.register_step_pre_hook"):
        step_once(model, CHANGES[change])
    assert_same(weights(model), before, 0, 0)


def test_gradients_forgotten_are_not_changed(tmp_path):
    model = build("ttur", tmp_path, "--accumulate 2")
    step_once(model)
    model.optimizer_G.zero_grad(set_to_none=False)
    model.netG.model[1](torch.ones(1, 3, 40, 40)).mean().backward()
    model.optimizer_G.zero_grad(set_to_none=False)
    model.optimizer_G.step()


def test_a_hook_of_the_model_sees_the_gradients_of_the_whole_batch(tmp_path, float64):
    """The way that the refusal names: clipping, then, is that of one large batch."""
    whole, parts = build("several", tmp_path), build("several", tmp_path, "--accumulate 2")

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        nn.utils.clip_grad_norm_(parameters_of(optimizer), 1e-3)

    for model in (whole, parts):
        for optimizer in model.opts.values():
            optimizer.register_step_pre_hook(clip)
    train(whole, batch(0, 1), batch(2, 3))
    train(parts, *(batch(i) for i in range(4)))
    assert_same(weights(parts), weights(whole))


def test_a_closure_is_refused(tmp_path):
    model = build("ttur", tmp_path, "--accumulate 2")
    with pytest.raises(
        UserError, match=r"Adam is called with a closure, which does not work with .*--accumulate"
    ):
        step_once(model, closure=lambda: 1.0)


def test_something_that_is_no_optimizer(tmp_path):
    model = build("ttur", tmp_path)
    model.optimizers.append(object())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="object in `optimizers` is no"):
        model.setup(model.opt)


def test_an_optimizer_that_comes_later(tmp_path, float64):
    """One that is made in the first iteration is found at its first step."""
    model = build("ttur", tmp_path, "--accumulate 2")
    model.optimizer_G = torch.optim.SGD(model.netG.parameters(), lr=0.1)
    before = weights(model)
    step_once(model)
    assert_same(weights(model), before, 0, 0)
    step_once(model)
    changed = weights(model)
    assert any(not torch.equal(changed[k], before[k]) for k in before if k.startswith("netG"))


# ------------------------------------------------------------------------------ numbers and names
def test_scaled_gradients_are_those_of_plain_ones(float64):
    """First and second order, of weights, inputs and frozen networks; powers of two are exact."""
    net = networks.define_D(3, 4, "basic", norm="none")
    ours = prepared(copy.deepcopy(net))
    ours.prepared_scale = GradientScale(2.0**10)
    found = []
    for d in (net, ours):
        x = picture(0, torch.float64)[0].clone().requires_grad_(True) * 1.0  # not a leaf
        x.retain_grad()
        score = d(x)
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        penalty = slope.square().sum() + sum(p.square().sum() for p in d.parameters())
        (penalty + score.mean()).backward()
        found.append([slope.detach(), x.grad, *(p.grad for p in d.parameters())])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)


def test_scale_goes_by_the_rule_of_loss_scaling():
    scale = GradientScale(8.0)
    scale.update(False)
    assert scale.factor == 4.0
    for _ in range(2000):
        scale.update(True)
    assert scale.factor == 8.0
    old = torch.amp.GradScaler("cpu", init_scale=32.0)
    old.scale(torch.ones(1))
    scale.load_state_dict(old.state_dict())
    assert scale.factor == 32.0
    scale.factor = 2.0**-16
    with pytest.raises(UserError, match="not finite at any scale"):
        scale.update(False)


def test_an_overflow_is_skipped(tmp_path):
    model = build("ttur", tmp_path, "--precision fp16")
    model._gradient_scale.factor = 2.0**60
    before = weights(model)
    train(model, batch(0))
    assert_same(weights(model), before, 0, 0)
    assert model._gradient_scale.factor == 2.0**58  # two optimizers


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_copy_computes_with_its_own_weights(precision, tmp_path):
    model = build("ttur", tmp_path, f"--precision {precision}")
    other = copy.deepcopy(model.netG)
    assert type(other).__name__ == "ResnetGenerator"
    assert isinstance(other, networks.ResnetGenerator)
    with torch.no_grad():
        x = batch(0)["A"]
        same = other(x)
        torch.testing.assert_close(same, model.netG(x))
        assert same.dtype == torch.float32
        for p in model.netG.parameters():
            p.zero_()
        assert torch.equal(other(x), same)
        assert not torch.equal(model.netG(x), same)
    assert other.state_dict().keys() == model.netG.state_dict().keys()


@pytest.mark.parametrize("flags", ["bf16", "fp16", "bf16 --diffaug color", "fp32 --compile"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_whole_network_is_saved_as_without_modes(flags, protocol, tmp_path):
    """By `torch.save(net)`, in a `save_networks` of a model's own."""
    plain, model = build("ttur", tmp_path), build("ttur", tmp_path, f"--precision {flags}")
    pair = torch.cat((batch(0)["A"], batch(0)["B"]), 1)
    for wanted, net, x in ((plain.netG, model.netG, pair[:, :3]), (plain.netD, model.netD, pair)):
        torch.save(net, tmp_path / "net.pth", pickle_protocol=protocol)
        loaded = torch.load(tmp_path / "net.pth", weights_only=False)
        assert type(loaded) is type(wanted) is not type(net)
        assert vars(loaded).keys() == vars(wanted).keys()
        assert torch.equal(loaded(x), wanted(x))


def test_the_module_of_a_network_is_itself_and_not_a_part_of_it(tmp_path):
    """As where the original wraps it in a DataParallel, but with the keys of what is inside."""
    plain = nn.Sequential(nn.Conv2d(3, 3, 1))
    net: Any = prepared(copy.deepcopy(plain), with_module=True)
    assert net.module is net
    assert [*net.modules()][1:] == [net[0]]
    assert net.state_dict().keys() == plain.state_dict().keys()
    copied: Any = copy.deepcopy(net)
    assert copied.module is copied
    torch.save(net, tmp_path / "net.pth")
    loaded = torch.load(tmp_path / "net.pth", weights_only=False)
    assert vars(loaded).keys() == vars(plain).keys()
    assert torch.equal(loaded[0].weight, plain[0].weight)


def test_rates_follow_new_options_and_keep_their_ratios(tmp_path):
    first = build("ttur", tmp_path)
    first.update_learning_rate()

    def resumed(flags: str) -> list[float]:
        model = resume(first, build("ttur", tmp_path, flags))
        return [g["lr"] for o in model.optimizers for g in o.param_groups]

    assert resumed("") == pytest.approx([0.0001, 0.0002, 0.0008])
    assert resumed("--n_epochs 50") == pytest.approx([0.0001, 0.0002, 0.0008])
    assert resumed("--lr 0.0004") == pytest.approx([0.0002, 0.0004, 0.0008])
    assert resumed("--lr_D 0.001") == pytest.approx([0.0001, 0.0002, 0.001])


def test_rates_that_a_model_sets_by_itself_stay(tmp_path):
    """Also when training is made longer; those of a schedule follow a second time, too."""
    first = build("oneway", tmp_path)
    for group in first.optimizers[0].param_groups:  # as its own update_learning_rate does
        group["lr"] = 0.00007
    second = resume(first, build("oneway", tmp_path, "--n_epochs 150 --lr 0.0004"))
    third = resume(second, build("oneway", tmp_path, "--lr 0.0008"))
    for model, others in ((second, 0.0004), (third, 0.0008)):
        rates = [[g["lr"] for g in o.param_groups] for o in model.optimizers]
        assert rates == [[0.00007], *[[others]] * (len(rates) - 1)]
        assert len(rates) > 1
    third.update_learning_rate()  # as at the end of a warm-up: the schedule knows the new --lr
    assert [g["lr"] for o in third.optimizers for g in o.param_groups] == [0.0008] * len(rates)


def test_losses_of_discriminators_by_name(tmp_path):
    model = build("several", tmp_path, "--lr_policy plateau")
    model.model_names = ["G", "D", "D_A", "D2", "Depth"]
    names = ["D", "D_A", "D_real", "D_fake", "gp", "gp_A", "D2", "D2_fake"]
    assert all(discriminators.owns_loss(model, name) for name in names)
    for name in ["Dice", "Depth", "DSSIM", "G", "G_GAN", "gpl"]:
        assert not discriminators.owns_loss(model, name)


def test_a_subclass_has_all_the_losses(tmp_path):
    """The identity losses, though its forward knows nothing of them, and all of that of D."""
    model = train(build("oneway", tmp_path), batch(0))
    losses = model.get_current_losses()
    assert losses["idt_A"] > 0
    assert list(losses) == model.loss_names
    real, fake = model.real_B, model.fake_B.detach()
    loss = model.backward_D_basic(model.netD_A, real, fake)
    wanted = (model.netD_A(real) - 1).square().mean() + model.netD_A(fake).square().mean()
    assert loss.item() == pytest.approx(wanted.item() / 2)


def test_losses_that_are_missing_or_infinite(tmp_path):
    model = build("alternate", tmp_path)
    guard = FiniteGuard(model)
    for i in range(3):
        train(model, batch(i))
        guard.finish(f"iteration {i}", ["a.png"])
        names = ["D", "psnr"] if i == 0 else ["G", "D", "psnr"]
        assert list(model.get_current_losses()) == names
    assert model.get_current_losses()["psnr"] == float("inf")
    next(model.netG.parameters()).data.fill_(float("nan"))
    train(model, batch(4))
    with pytest.raises(UserError, match="not finite at iteration 4"):
        guard.finish("iteration 4", ["a.png"])


def test_the_folder_is_a_path_and_a_string(tmp_path):
    model = build("ttur", tmp_path)
    assert model.save_dir + "/x" == f"{tmp_path}/x/x"
    assert model.save_dir / "y" == tmp_path / "x" / "y"


def test_values_that_a_checkpoint_could_not_read_are_left_out(tmp_path):
    """Loading runs no code, so a class of a model's own would make the whole file unreadable."""

    class Own(torch.Tensor):
        pass

    class Side(enum.Enum):
        A = "A"

    model = build("replay", tmp_path)
    model.counts, model.own, model.several = {Side.A: 0}, torch.zeros(2).as_subclass(Own), []
    model.seen = {"A": 0, 7: None}
    model.watch_attributes()
    model.counts[Side.A], model.seen["A"], model.several = 3, 4, [torch.ones(1).as_subclass(Own)]
    model.own += 1
    file = io.BytesIO()
    torch.save(model.training_state(), file)
    file.seek(0)
    plain = torch.load(file, weights_only=True)["plain"]
    assert plain["seen"] == {"A": 4, 7: None}
    assert not {"counts", "own", "several"} & plain.keys()


@pytest.mark.parametrize(
    ("at_first", "changed"),
    [
        (10.0, np.float64(6.5)),
        (1, np.float32(0.1)),
        (np.int64(0), np.int64(3)),
        (False, np.bool_(True)),
        ("warm-up", "training"),
        ((0.9, 0), (0.99, 7)),
        ({"D": [], "G": {}}, {"D": [0.5, (1, "x")], "G": {2: np.float32(0.1)}}),
        (np.zeros(3), np.array([1.0, np.nan, 2.0])),
        ([np.zeros(2)], [np.ones(2)]),
        ([0, 1], [False, True]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({}, {np.int64(3): 1, (np.float32(0.5), "x"): 2}),
    ],
)
def test_plain_values_of_all_kinds_come_back_as_they_were(at_first, changed, tmp_path):
    first, second = (build("ttur", tmp_path) for _ in range(2))
    for model in (first, second):
        model.own, model.opt.own, model.unchanged = *copy.deepcopy((at_first, at_first)), "as now"
        model.watch_attributes()
    first.own, first.opt.own, second.unchanged = changed, changed, "as the options say"
    resume(first, second)
    for found in (second.own, second.opt.own):
        assert type(found) is type(changed)
        np.testing.assert_equal(found, changed)
        assert repr(found) == repr(changed)
        assert getattr(found, "dtype", None) == getattr(changed, "dtype", None)
    assert second.unchanged == "as the options say"


def test_nested_tensors_come_back_wherever_they_are(tmp_path):
    """Also where too deep, or in a module or the options, for a name of their own."""

    def with_bank() -> Any:
        model = build("ttur", tmp_path)
        model.helper = FoldedBank()
        model.deep = {"a": {"b": {"c": torch.zeros(2)}}}
        model.netG.history, model.opt.kept = [torch.zeros(2)], (1, [torch.zeros(2)])
        model.watch_attributes()
        return model

    def tensors(model: Any) -> list[torch.Tensor]:
        deep = model.deep["a"]["b"]["c"]
        return [model.helper.bank["x"][0], deep, model.netG.history[0], model.opt.kept[1][0]]

    first, second = with_bank(), with_bank()
    for i, x in enumerate(tensors(first)):
        x += i + 1
    resume(first, second)
    assert [x.tolist() for x in tensors(second)] == [[i, i] for i in (1, 2, 3, 4)]
    resume(with_bank(), third := with_bank())
    assert not {"deep", "helper.bank"} & third._changes().keys()


class FoldedBank:
    def __init__(self) -> None:
        self.bank = {"x": [torch.zeros(2)]}


FoldedBank.__module__ = "models.own_model"


def test_the_previous_frame_comes_back(tmp_path):
    first, second = (build("ttur", tmp_path) for _ in range(2))
    for model in (first, second):
        model.previous = None
        model.watch_attributes()
    train(first, batch(0))
    first.previous = first.fake_B  # with its graph, which is not saved
    resume(first, second)
    assert torch.equal(second.previous, first.previous)
    assert not second.previous.requires_grad


def test_states_of_networks_and_optimizers_that_a_model_keeps_come_back(tmp_path):
    """Candidates of an evolution, for example; and counts by layer and image."""
    first, second = (build("ttur", tmp_path) for _ in range(2))
    for model in (first, second):
        model.candidates, model.counts = [], {("x", 0): 0}
        model.watch_attributes()
    train(first, batch(0))
    for _ in range(2):
        states = [first.netG.state_dict(), first.optimizers[0].state_dict()]
        first.candidates.append(copy.deepcopy(states))
        train(first, batch(1))
    first.counts["x", 0] = 18
    resume(first, second)
    assert second.counts == {("x", 0): 18}
    for net, optimizer in second.candidates:
        second.netG.load_state_dict(net)
        second.optimizers[0].load_state_dict(optimizer)
    torch.testing.assert_close(second.candidates, first.candidates, rtol=0, atol=0)


def test_an_array_is_filled_again_where_it_is(tmp_path):
    first, second = (build("ttur", tmp_path) for _ in range(2))
    for model in (first, second):
        model.table = np.zeros(3)
        model.watch_attributes()
    first.table += 2
    held = second.table
    assert resume(first, second).table is held
    assert held.tolist() == [2, 2, 2]


def test_an_empty_array_does_not_stop_a_save(tmp_path):
    """A checkpoint with one could not be read again."""
    first, second = (build("ttur", tmp_path) for _ in range(2))
    for model in (first, second):
        model.found, model.count = np.zeros(2), 0
        model.watch_attributes()
    first.found, first.count = np.array([]), 3
    assert resume(first, second).count == 3


def test_a_model_that_changes_the_size_of_images_keeps_its_buffer(tmp_path):
    first, second = (build("ttur", tmp_path) for _ in range(2))
    for model in (first, second):
        model.recent = []
        model.watch_attributes()
    first.recent.append(torch.ones(1, 3, 40, 40))
    first.opt.crop_size = 40
    resume(first, second)
    assert second.opt.crop_size == 40
    assert len(second.recent) == 1


def test_values_that_can_not_be_compared_do_not_stop_a_save(tmp_path):
    model = build("ttur", tmp_path)
    endless: list[Any] = []
    endless.append(endless)
    model.own = [np.array([{}]), np.ma.zeros(2), endless]
    model.array, model.paths = np.array([None, "a"]), np.array(["a"])
    model.watch_attributes()
    model.own.append(1)
    model.array, model.paths = np.array([1, {}]), np.array(["b"])
    assert not {"own", "array", "paths"} & model.training_state()["plain"].keys()


@dataclasses.dataclass(frozen=True)
class Seen:
    """How many images there were, replaced in each iteration."""

    images: int = 0


def test_values_of_frozen_objects_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(Seen, "__module__", "models.own_model")
    first, second = (build("ttur", tmp_path) for _ in range(2))
    for model in (first, second):
        model.seen = Seen()
        model.watch_attributes()
    first.seen = Seen(3)
    assert resume(first, second).seen == Seen(3)


def test_a_deque_or_counter_made_later_is_made_again(tmp_path, capsys):
    """As a list it would grow without end, and a Counter as a dictionary has no zeros."""
    first, second = (build("ttur", tmp_path) for _ in range(2))
    for model in (first, second):
        model.recent, model.counts, model.window = None, None, deque(maxlen=2)
        model.watch_attributes()
    first.recent, first.counts = deque([1.0], maxlen=1), Counter("ab")
    first.window.extend([1, 2, 3])
    resume(first, second)
    assert second.recent is None
    assert second.counts is None
    assert second.window == deque([2, 3])
    assert "recent, counts: a list or a dictionary in" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["", "--batch_size 2", "--crop_size 64"])
def test_labels_and_images_of_another_size_are_made_again(flags, tmp_path):
    """They would not fit the output of D, nor a batch that they are put in."""
    first, second = build("ttur", tmp_path), build("ttur", tmp_path, flags)
    for model in (first, second):
        model.valid, model.mean, model.recent, model.count = None, None, [], 0
        model.watch_attributes()
    first.valid, first.mean = torch.ones(1, 1, 2, 2), torch.ones(1, 3, 1, 1)
    first.recent.append(torch.ones(1, 3, 32, 32))
    first.count = 3
    resume(first, second)
    assert second.valid is None if flags else second.valid.sum() == 4
    assert len(second.recent) == (flags != "--crop_size 64")
    assert second.count == second.mean.sum() == 3


def test_a_long_history_is_saved_soon(tmp_path):
    """It was searched for parts with a state_dict, which takes 20 seconds for each million."""
    model = build("ttur", tmp_path)
    model.history = []
    model.watch_attributes()
    model.history += [i / 7 for i in range(300_000)]
    start = time.process_time()
    assert model.training_state()["plain"]["history"] == model.history
    assert time.process_time() - start < 3
