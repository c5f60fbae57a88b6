"""Recorded iterations train as others do; a recorder of operators stands in for CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import base_model, find_model_using_name
from models.cycle_gan_model import CycleGANModel
from models.losses import GradientPenalty
from models.pix2pix_model import Pix2PixModel
from models.speed import acceleration, capture, iterations
from models.speed.iterations import record_iterations, why_not_recorded
from models.speed.steps import parameters_of
from options.speed import why_not_graphs
from options.train_options import TrainOptions
from tests.helpers import succeed, unaligned
from tests.test_acceleration import batch, build
from util import distributed


class Operators(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Graph:
    """A `torch.cuda.CUDAGraph` for the CPU: calls the recorded operators on the same tensors."""

    kept: list[torch.Tensor] = []  # that a capture must not change
    replays = 0
    draws = False  # whether random numbers are those of a GPU, which a capture does not draw

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.operators = Operators()
        self.before = [t.detach().clone() for t in self.kept]
        self.random = torch.get_rng_state()
        self.operators.__enter__()

    def capture_end(self):
        self.operators.__exit__(None, None, None)
        with torch.no_grad():
            for tensor, value in zip(self.kept, self.before, strict=True):
                if not torch.equal(tensor, value):  # for autograd a copy is a change
                    tensor.copy_(value)
        if self.draws:
            torch.set_rng_state(self.random)

    def replay(self):
        Graph.replays += 1
        with torch.no_grad():
            for func, args, kwargs, out in self.operators.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if torch.is_tensor(old) and old is not new:
                        old.detach().copy_(new)


@pytest.fixture(autouse=True)
def graphs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    stream = SimpleNamespace(wait_stream=lambda other: None, device_index=0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1, 1))
    monkeypatch.setattr(Graph, "replays", 0)


def record(model):
    """Record the iterations of a model on the CPU."""
    recorded = record_iterations(model)

    def kept():
        states = [s for o in model.all_optimizers() for s in o.state.values()]
        tensors = model.trained_tensors()
        gradients = [t.grad for t in tensors if t.grad is not None]
        return [*tensors, *gradients, *(x for s in states for x in s.values())]

    find = recorded._find
    recorded._find = lambda: setattr(Graph, "kept", kept()) or find()
    return recorded


def make(tmp_path, flags):
    model = build(tmp_path, f"--no_dropout {flags}")
    for optimizer in model.all_optimizers():  # as on a GPU
        acceleration.use_fused_step(optimizer, model.device, fast=True)
    return model


def train(model, iterations, begin=lambda model, i: None, sizes=(32,)):
    """Losses of each iteration, and the weights at the end."""
    random.seed(5)
    losses = []
    for i in range(iterations):
        begin(model, i)
        model.set_input(batch(seed=i, n=sizes[i % len(sizes)] // 32, size=32))
        model.optimize_parameters()
        losses.append(dict(model.get_current_losses()))
    states = model.network_states().items()
    return losses, {f"{n}.{k}": v for n, state in states for k, v in state.items()}


def assert_same(ours, wanted):
    assert ours[0] == wanted[0]
    torch.testing.assert_close(ours[1], wanted[1], rtol=0, atol=0)


MODELS = {
    "cycle_gan": "--model cycle_gan --pool_size 2",
    "cycle_gan_ema": "--model cycle_gan --pool_size 3 --ema 0.9 --batch_passes on",
    "cycle_gan_wgangp": "--model cycle_gan --gan_mode wgangp --gp r1",
    "pix2pix": "--model pix2pix --netG resnet_6blocks --netD multiscale --n_layers_D 2 --num_D 2 "
    "--lambda_feat 1",
    "cut": "--model cut --num_patches 4",
    "dcl": "--model dcl --nce_layers 0,4 --num_patches 4 --pool_size 2",
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_without(name, tmp_path, monkeypatch):
    """With pools that draw random numbers, rates that change, and a smaller batch now and then."""

    def begin(model, i):
        if i == 14:
            for optimizer in model.optimizers:
                optimizer.param_groups[0]["lr"] *= 0.5

    monkeypatch.setattr(Graph, "draws", True)
    found = []
    for recorded in (False, True):
        model = make(tmp_path, MODELS[name])
        if recorded:
            recorder = record(model)
        torch.manual_seed(7)
        found.append(train(model, 24, begin, sizes=(64, 64, 32)))
    assert not recorder.refused
    assert Graph.replays >= 10
    assert_same(found[1], found[0])
    for average in model._averages.values():
        assert average.steps == 24


def compare(make_model, iterations=16, begin=lambda model, i: None, **more):
    """Train with and without recording; returns the recorder."""
    found = []
    for recorded in (False, True):
        model = make_model()
        if recorded:
            recorder = record(model)
        found.append(train(model, iterations, begin, **more))
    assert_same(found[1], found[0])
    return recorder


FACTORS = {"extra": 1.0}  # of a module


def freeze(model):
    model.set_requires_grad(model.netG.model[1], False)


def replace_weights(model):
    for weight in model.netG.parameters():
        weight.data = weight.data * 1.5


def replace_a_layer(model):
    model.netG.model[3] = torch.nn.Identity()


def deep(more):
    return more["extra"] * more["deep"]["extra"]


def load_optimizer(model):
    model.optimizer_G.load_state_dict(model.optimizer_G.state_dict())


def slope_of(model):
    return next(m for m in model.netD.modules() if isinstance(m, torch.nn.LeakyReLU))


def halve_each(model):
    def hook(weight):
        weight.grad.mul_(0.5)

    next(model.netG.parameters()).register_post_accumulate_grad_hook(hook)


def halve(optimizer, *_):
    for weight in parameters_of(optimizer):
        weight.grad.mul_(0.5)


def change(**values):
    def do(model):
        for name, value in values.items():
            setattr(model if hasattr(model, name) else model.opt, name, value)

    return do


BETWEEN = {
    "freeze": freeze,
    "weights": replace_weights,
    "a layer": replace_a_layer,
    "evaluation mode": lambda model: model.netG.eval(),
    "moments": load_optimizer,
    "an option": change(lambda_L1=3.0),
    "a slope of a layer": lambda model: setattr(slope_of(model), "negative_slope", 0.5),
    "deep in a dictionary": lambda model: model.more["deep"].update(extra=2.0),
    "an array": lambda model: model.array.fill(2.0),
    "a hook of a gradient": halve_each,
    "a hook": lambda model: model.netG.register_forward_hook(lambda net, x, y: y * 0.5),
    "a hook of a step": lambda model: model.optimizer_G.register_step_pre_hook(halve),
    "an attribute of an object": lambda model: setattr(model.weights, "extra", 2.0),
    "a value in a dictionary": lambda model: model.more.update(extra=2.0),
    "a variable of the module": lambda model: FACTORS.update(extra=2.0),
    "an attribute of the class": lambda model: setattr(type(model), "all_of_them", 2.0),
    "an attribute": change(criterionL1=torch.nn.MSELoss()),
    "momentum": lambda model: model.optimizer_G.param_groups[0].update(betas=(0.8, 0.9)),
    "an attribute of a layer": lambda model: setattr(model.netD, "slope", 2.0),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_what_changes_between_iterations_is_seen(what, tmp_path):
    """In a later epoch, say: the old recording would go on as before."""

    def begin(model, i):
        if i == 8:
            BETWEEN[what](model)

    class Edited(Pix2PixModel):
        recordable = True
        all_of_them = 1.0

    def make_model():
        model = make(tmp_path, "--model pix2pix --netG resnet_6blocks")
        model.__class__, Edited.all_of_them = Edited, 1.0
        FACTORS["extra"] = 1.0
        ordinary = model.netD.forward
        model.netD.slope = 1.0
        model.netD.forward = lambda x: ordinary(x) * model.netD.slope
        model.weights, model.array = SimpleNamespace(extra=1.0), np.ones(3)
        model.more = {"extra": 1.0, "deep": {"extra": 1.0}}
        loss = model.compute_G_loss
        model.compute_G_loss = lambda: (
            loss()
            * model.weights.extra
            * deep(model.more)
            * model.all_of_them
            * model.array[0]
            * FACTORS["extra"]
        )
        return model

    recorder = compare(make_model, begin=begin)
    hook = what.startswith("a hook")
    assert recorder.refused.endswith("hooks") if hook else not recorder.refused
    assert Graph.replays >= 3
    assert hook or recorder.recordings


def give_the_same(model, i):
    """As a dataset of one image that stays on the GPU."""
    if i > 5:
        model.set_input = lambda input: None


def cut_by_hand(model, i):
    if i > 6:
        ordinary = model.optimize_parameters
        model.real_A, model.real_B = model.real_A[:1] * 0.5, model.real_B[:1]
        ordinary()


def steps_of_the_loop(model, i):
    """G learns from the mean of two batches."""
    if i == 0:
        model.optimizer_G.step = lambda: None
    if i % 2:
        torch.optim.Adam.step(model.optimizer_G)


@pytest.mark.parametrize("begin", [give_the_same, cut_by_hand, steps_of_the_loop])
def test_other_loops(begin, tmp_path):
    compare(lambda: make(tmp_path, "--model pix2pix --netG resnet_6blocks"), 16, begin, sizes=(64,))
    assert Graph.replays


def test_what_somebody_keeps_stays_as_it_is(tmp_path):
    """Losses that are summed up at the end of an epoch, say, without waiting for the GPU."""
    kept = []

    def begin(model, i):
        if i:
            kept[-1].append((model.loss_G.detach(), model.fake_B, model.real_A))

    def make_model():
        kept.append([])
        return make(tmp_path, "--model pix2pix --netG resnet_6blocks")

    compare(make_model, begin=begin)
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=0)


def test_all_is_as_before_where_a_recording_is_refused(tmp_path):
    """Gradients that go on from one iteration to the next, and a D that learns again at the end."""

    class Edited(Pix2PixModel):
        recordable = True

        def optimize_parameters(self):
            self.forward()
            self.backward_D()
            self.optimizer_D.step()
            self.optimizer_D.zero_grad()
            self.set_requires_grad(self.netD, False)
            for weight in self.netG.parameters():
                weight.grad = None if weight.grad is None else weight.grad * 0.5
            self.backward_G()
            self.loss_names = [*self.loss_names[:4], *self.image_paths]  # so it is refused
            self.loss_a = self.loss_G.detach()
            self.optimizer_G.step()
            self.set_requires_grad(self.netD, True)

    def make_model():
        model = make(tmp_path, "--model pix2pix --netG resnet_6blocks --norm batch")
        model.__class__ = Edited
        return model

    recorder = compare(make_model, 12)
    assert recorder.refused == "it reads image_paths, which may differ in each iteration"


def test_arguments_and_results_of_somebodys_own(tmp_path):
    class Edited(Pix2PixModel):
        recordable = True

        def set_input(self, input, scale=1.0):
            super().set_input(input)
            self.real_B = self.real_B * scale
            return "set"

        def optimize_parameters(self, weight=1.0):
            super().optimize_parameters()
            return self.loss_G.item() * weight

    model = make(tmp_path, "--model pix2pix --netG resnet_6blocks")
    model.__class__ = Edited
    recorder = record(model)
    assert model.set_input(batch(), scale=0.5) == "set"
    assert model.optimize_parameters(weight=0.0) == 0.0
    for _ in range(8):
        assert model.optimize_parameters(2.0) > 0
    assert not recorder.refused


def test_a_copy_of_a_model_trains_itself(tmp_path):
    """As without recording; the copy's iterations are not recorded."""
    model = make(tmp_path, "--model pix2pix --netG resnet_6blocks")
    record(model)
    train(model, 8)
    assert Graph.replays
    before = {name: value.clone() for name, value in model.netG.state_dict().items()}
    own = copy.deepcopy(model)
    wanted = train(make_like(model, tmp_path), 4)
    assert_same(train(own, 4), wanted)
    torch.testing.assert_close(dict(model.netG.state_dict()), before, rtol=0, atol=0)


def make_like(model, tmp_path):
    """A model that is not recorded, with the weights and the optimizers of another one."""
    other = make(tmp_path, "--model pix2pix --netG resnet_6blocks")
    for name, net in model.networks().items():
        other.networks()[name].load_state_dict(net.state_dict())
    for ours, theirs in zip(model.optimizers, other.optimizers, strict=True):
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    return other


def test_gradients_are_those_of_the_iteration(tmp_path):
    """For a loop that looks at them and sets them to None; with two sizes in turn."""
    norms = []

    def begin(model, i):
        weight = next(model.netG.parameters())
        norms[-1].append(float(weight.grad.norm()) if i else 0)
        model.optimizer_G.zero_grad()

    def make_model():
        norms.append([])
        return make(tmp_path, "--model pix2pix --netG resnet_6blocks")

    compare(make_model, 24, begin, sizes=(64, 32))
    assert Graph.replays
    assert norms[0] == norms[1]


def test_not_where_the_gpu_has_no_room_for_it(tmp_path, monkeypatch):
    """Recordings keep their memory, so that a smaller last batch would not fit beside them."""
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2)
    recorder = compare(lambda: make(tmp_path, "--model cycle_gan"), 8)
    assert recorder.refused == "it takes more than half of the GPU's memory"


EVERYTHING = (
    "--display_freq 3 --print_freq 2 --update_html_freq 4 --save_latest_freq 5 --val_freq 1"
)


@pytest.mark.parametrize("policy", ["linear", "plateau"])
def test_train_py_trains_the_same(policy, tmp_path, monkeypatch):
    """With pages, validation and saves in between; rates change after each epoch but the first."""
    made = []
    monkeypatch.setattr(base_model, "record_iterations", lambda m: made.append(record(m)))
    fused = acceleration.use_fused_step
    on = {"fast": True}
    monkeypatch.setattr(acceleration, "use_fused_step", lambda o, d, fast: fused(o, d, **on))
    data = unaligned(tmp_path / "data", 7)
    shutil.copytree(data / "testA", data / "valA")
    shutil.copytree(data / "testB", data / "valB")
    words = f"--dataroot {data} --checkpoints_dir {tmp_path} --gpu_ids -1 --display_id 0 --seed 3 "
    words += "--model cycle_gan --netG resnet_6blocks --ngf 2 --ndf 2 --num_threads 1 --ema 0.9 "
    words += f"--load_size 36 --crop_size 32 --n_epochs 1 --n_epochs_decay 2 {EVERYTHING} "
    words += f"--pool_size 3 --lr_policy {policy}"
    ends = []
    for name, reason in (("ordinary", "not in this run"), ("recorded", None)):
        monkeypatch.setattr("options.base_options.why_not_graphs", lambda *a, r=reason, **k: r)
        out = succeed("train.py", *words.split(), "--name", name).out
        ends.append({p.name: torch.load(p) for p in (tmp_path / name).glob("latest_net_*.pth")})
        ends[-1]["log"] = re.sub(r"(time|data): [0-9.]+|=.*=", "", log_of(tmp_path / name))
    assert not made[0].refused
    assert Graph.replays > 12
    assert out.count("iterations are replayed as CUDA graphs") == 1
    assert ends[0].pop("log") == ends[1].pop("log")
    assert len(ends[0]) == 6
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=0)


def log_of(folder) -> str:
    return (folder / "loss_log.txt").read_text()


GENERATOR = np.random.default_rng(3)
steps = 0  # of all models


def counts(model):
    model.steps = getattr(model, "steps", 0) + 1
    model.loss_G = model.loss_G * (model.steps % 3)


def counts_in_a_variable(model):
    global steps
    steps += 1
    model.loss_G = model.loss_G * (steps % 3)


def draws_by_a_variable(model):
    model.loss_G = model.loss_G * GENERATOR.random()


def keeps(model):
    if hasattr(model, "before"):
        model.loss_G = model.loss_G + (model.fake_B - model.before).abs().mean()
    model.before = model.fake_B.detach()


def draws(model):
    model.loss_G = model.loss_G * (1.0 + (random.random() < 0.5))


def draws_by_torch(model):
    model.loss_G = model.loss_G * torch.rand(())


def sometimes(model):
    if random.random() < 0.5:
        model.loss_extra = model.loss_G.detach() * 2


def turns(model):
    model.trains_D = not getattr(model, "trains_D", False)
    if model.trains_D:
        model.loss_G = model.loss_G * 2


def reads_names(model):
    if "night" in model.image_paths[0]:
        model.loss_G = model.loss_G * 2


def by_epoch(model):
    model.loss_G = model.loss_G * (1 + model.schedulers[0].last_epoch)


def draws_by_own(model):
    if not hasattr(model, "random"):
        model.random = np.random.default_rng(3)
    model.loss_G = model.loss_G * model.random.random()


def draws_by_older_own(model):
    if not hasattr(model, "random"):
        model.random = np.random.RandomState(3)
    model.loss_G = model.loss_G * model.random.random_sample()


def asks_what_it_is(model):
    if isinstance(getattr(model, "last", None), torch.Tensor):
        model.loss_G = model.loss_G + (model.fake_B - model.last).abs().mean()
    model.last = model.fake_B.detach()


def collects(model):
    """Too much to be looked through in each iteration."""
    model.collected = getattr(model, "collected", None) or [0.5] * 5000
    model.loss_G = model.loss_G * model.collected[-1]
    model.collected[-1] *= 0.9


def returns(model):
    pass  # see Edited


class Odd:
    def __eq__(self, other):
        raise RuntimeError("not to be compared")

    def __hash__(self):
        return 1


def holds_the_odd(model):
    odd = vars(model).setdefault("odd", {})
    odd.clear()
    odd[Odd()] = 1


def buffers(model):
    """As the ReplayBuffer of other code bases."""
    buffer = vars(model).setdefault("buffer", SimpleNamespace(data=[]))
    buffer.data.append(model.fake_B.detach())
    if len(buffer.data) > 6:
        model.loss_G = model.loss_G + (model.fake_B - buffer.data.pop(0)).abs().mean()


def remembers(model):
    bank = vars(model).setdefault("bank", {"before": model.fake_B.detach() * 0})
    model.loss_G = model.loss_G + (model.fake_B - bank["before"]).abs().mean()
    bank["before"] = model.fake_B.detach()


def penalizes(model):
    own = vars(model).setdefault("own", GradientPenalty("vanilla", "r1", 1.0, every=4))
    model.loss_G = model.loss_G + own(model.netD, torch.cat((model.real_A,) * 2, 1), model.fake_B)


REFUSED = {
    counts: "it reads steps, which may differ in each iteration",
    counts_in_a_variable: "the attribute steps of tests.test_iterations changes too often",
    draws_by_a_variable: "the attribute GENERATOR of tests.test_iterations changes too often",
    keeps: "it reads before, which may differ in each iteration",
    turns: "it reads trains_D, which may differ in each iteration",
    reads_names: "it reads image_paths, which may differ in each iteration",
    by_epoch: "it reads schedulers, which may differ in each iteration",
    draws_by_own: "the attribute random changes too often",
    buffers: "the attribute buffer changes too often",
    remembers: "the attribute bank changes too often",
    asks_what_it_is: "it reads last, which may differ in each iteration",
    draws_by_older_own: "the attribute random changes too often",
    collects: "the attribute collected changes too often",
    returns: "optimize_parameters returns something",
    holds_the_odd: "what the model holds can't be compared (not to be compared)",
    penalizes: "a gradient penalty is not computed in every iteration",
    draws: "draws random numbers on the CPU",
    draws_by_torch: "draws random numbers on the CPU",
    sometimes: "",  # one of two reasons
}


@pytest.mark.parametrize("step", REFUSED)
def test_an_iteration_that_python_decides_on_is_not_recorded(step, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(iterations, "PATIENCE", 8)

    class Edited(Pix2PixModel):
        recordable = True

        def backward_G(self):
            self.loss_G = self.compute_G_loss()
            step(self)
            self.loss_G.backward()

        def optimize_parameters(self):
            super().optimize_parameters()
            return "done" if step is returns else None

    def make_model():
        torch.manual_seed(1)
        monkeypatch.setitem(globals(), "steps", 0)
        monkeypatch.setitem(globals(), "GENERATOR", np.random.default_rng(3))
        model = make(tmp_path, "--model pix2pix --netG resnet_6blocks")
        model.__class__ = Edited
        return model

    recorder = compare(make_model)
    assert REFUSED[step] in recorder.refused
    assert "--cuda_graphs: iterations are not recorded: " in capsys.readouterr().out
    assert not Graph.replays


HOOKS = {
    "steps are inspected": lambda m: setattr(m._steps, "inspect", lambda optimizer: None),
    "Adam is no fused Adam": lambda m: m.optimizer_G.param_groups[0].update(fused=False),
    "a network has hooks": lambda m: m.netG.register_forward_hook(lambda *_: None),
    "an optimizer has hooks": lambda m: m.optimizer_G.register_step_pre_hook(lambda *_: None),
    "weights have hooks": lambda m: next(m.netG.parameters()).register_hook(lambda g: g * 2),
    "SGD is no fused Adam": lambda m: m.optimizers.append(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    ),
}


@pytest.mark.parametrize("reason", HOOKS)
def test_hooks_and_other_optimizers_are_not_recorded(reason, tmp_path):
    def make_model():
        model = make(tmp_path, "--model pix2pix --netG resnet_6blocks")
        HOOKS[reason](model)
        return model

    assert compare(make_model, iterations=8).refused == reason


def test_pools_with_pictures_of_another_size(tmp_path):
    """Those of a training that goes on with another --crop_size."""

    def make_model():
        model = make(tmp_path, "--model cycle_gan")
        model.fake_B_pool.images = [torch.zeros(1, 3, 48, 48) for _ in range(50)]
        return model

    recorder = compare(make_model)
    assert recorder.refused == "an image pool has images of another size"


def edited(tmp_path, **body):
    model = make(tmp_path, "--model pix2pix --netG resnet_6blocks")
    model.__class__ = type("Edited", (Pix2PixModel,), {"recordable": True, **body})
    return model


def test_when_and_how_many_are_recorded(tmp_path):
    """The state changes twice, by the first weights' moments and results; then three are alike."""
    compare(lambda: edited(tmp_path))
    assert Graph.replays == 16 - 5
    recorder = compare(lambda: edited(tmp_path), 25, sizes=(32, 64, 96, 128, 160))
    assert len(recorder.recordings) == iterations.RECORDINGS


def test_a_value_of_the_batch_has_its_own_recording(tmp_path):
    def set_input(self, input):
        Pix2PixModel.set_input(self, input)
        self.scale = 1.0 + (self.real_A.mean().item() > 0)

    def compute_G_loss(self):
        return Pix2PixModel.compute_G_loss(self) * self.scale

    body = {"set_input": set_input, "compute_G_loss": compute_G_loss}
    recorder = compare(lambda: edited(tmp_path, **body), 24)
    assert len(recorder.recordings) == 2


@pytest.mark.parametrize("what", ["real_A, which needs gradients", "extra, which is no tensor"])
def test_inputs_that_are_not_recorded(what, tmp_path):
    def set_input(self, input):
        Pix2PixModel.set_input(self, input)
        if what.startswith("real_A"):
            self.real_A.requires_grad_()
        else:
            self.extra = [1]

    recorder = compare(lambda: edited(tmp_path, set_input=set_input), 8)
    assert recorder.refused == f"set_input sets {what}"


def test_an_interrupt_leaves_no_trace(tmp_path):
    """Ctrl-C in a notebook, while an iteration is recorded."""

    def backward_G(self):
        Pix2PixModel.backward_G(self)
        if capture._recording:
            raise KeyboardInterrupt

    model = edited(tmp_path, backward_G=backward_G)
    record(model)
    train(model, 5)
    learn = [t.requires_grad for t in model.trained_tensors()]
    model.set_input(batch())
    before = dict(vars(model))
    with pytest.raises(KeyboardInterrupt):
        model.optimize_parameters()
    assert all(vars(model)[name] is value for name, value in before.items())
    assert [t.requires_grad for t in model.trained_tensors()] == learn
    assert type(model).__name__ == "Edited"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--preprocess scale_width", "not with --preprocess scale_width"),
        ("--accumulate 2", "not with --accumulate"),
        ("--precision fp16", "not with --precision fp16"),
        ("--on_nan skip", "not with --on_nan skip"),
        ("--grad_checkpoint", "not with --grad_checkpoint"),
        ("--gp r1 --gp_every 4", "not with --gp_every"),
        ("--preprocess none", "not with --preprocess none"),
        ("--model cut --CUT_mode FastCUT", "not with --flip_equivariance"),
        ("", None),
    ],
)
def test_modes_that_need_python_in_each_iteration(flags, reason, tmp_path, monkeypatch):
    opt = TrainOptions(f"--dataroot {tmp_path} --gpu_ids -1 {flags}").parse(save=False)
    assert why_not_recorded(find_model_using_name(opt.model), opt) == reason
    gpu = torch.device("cuda")
    assert why_not_graphs(opt, gpu, networks=False) == reason  # --cuda_graphs auto
    assert why_not_graphs(opt, gpu) == (
        reason and f"{reason}, and recording networks needs --compile"
    )
    opt.compile = True
    assert why_not_graphs(opt, gpu) is None
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert reason or why_not_recorded(CycleGANModel, opt) == "not with several processes"
    opt.isTrain = False
    assert why_not_recorded(CycleGANModel, opt) == "not in testing"


def test_a_subclass_says_for_itself_that_it_is_recordable(tmp_path):
    class Mine(CycleGANModel):
        pass

    opt = TrainOptions(f"--dataroot {tmp_path} --gpu_ids -1").parse(save=False)
    assert why_not_recorded(Mine, opt) == "a Mine does not say that it is recordable"
