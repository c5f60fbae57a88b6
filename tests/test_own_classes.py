"""Classes of a user's own, of optimizers, networks and models, and what ported model files do."""

from __future__ import annotations

import copy
import os
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from data import create_dataset
from data.base_dataset import BaseDataset
from data.transforms import FitChannels, split_deterministic
from models import create_model, discriminators, networks
from models.attributes import stateful_parts
from models.base_model import BaseModel
from models.cycle_gan_model import CycleGANModel
from models.ema import WeightAverage
from models.inference.translator import Translator
from models.networks import define_G
from models.speed import acceleration
from models.speed.steps import Steps
from models.speed.sync_norm import SyncBatchNorm2d, synchronize_norms
from models.training_state import load_optimizer
from options.train_options import TrainOptions
from tests import plain_models
from tests.ranks import Group
from tests.test_acceleration import batch, build
from util import distributed
from util.errors import UserError
from util.find_class import find_class
from util.light_torchvision import transforms
from util.run.position import Position
from util.run.training_run import TrainingRun


class Calling(torch.optim.SGD):
    """Calls the step of the class that it is made of."""

    def step(self, closure=None):
        return super().step(closure)


def test_a_step_inside_a_step_is_one():
    """torch calls the hooks for both: gradients of two batches are accumulated all the same."""
    weight = nn.Parameter(torch.zeros(1))
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)  # the hooks of SGD.step are there
    optimizer = Calling([weight], lr=1.0)
    steps = Steps(lambda: [weight], accumulate=2)
    steps.activate()
    found = []
    for gradient in (1.0, 2.0, 3.0, 4.0):
        optimizer.zero_grad()
        (weight * gradient).sum().backward()
        optimizer.step()
        found.append(weight.item())
    assert found == [0, -1.5, -1.5, -5]


def test_a_step_inside_a_step_is_averaged_once(tmp_path):
    model: Any = build(tmp_path, "--model pix2pix --netG unet_128 --ema 0.9")
    model.optimizer_G = Calling(model.netG.parameters(), lr=0.01)
    model.optimizers[0] = model.optimizer_G
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    for _ in range(3):
        model.set_input(batch(size=128))
        model.optimize_parameters()
    assert int(model._averages["G"].steps) == 3


def test_an_attribute_that_is_a_class_has_no_state(tmp_path):
    model: Any = build(tmp_path, "--model pix2pix --netG unet_128")
    model.kind, model.layer = torch.optim.Adam, nn.Conv2d
    assert {"kind", "layer"}.isdisjoint(stateful_parts(model))
    model.training_state()


class Counting(nn.Linear):
    """A layer with a state that is no tensor."""

    def get_extra_state(self):
        return {"count": 7}

    def set_extra_state(self, state):
        pass


def test_a_state_that_no_file_of_weights_holds_is_refused_at_the_start(tmp_path):
    flags = "--dataroot . --model pix2pix --netG unet_128 --gpu_ids -1 --checkpoints_dir"
    opt = TrainOptions(f"{flags} {tmp_path}").parse(save=False)
    model = create_model(opt)
    model.netG.more = Counting(2, 2)
    with pytest.raises(
        UserError, match=r"netG has a state that is no tensor \(more\._extra_state\)"
    ):
        model.setup(opt)


def test_a_generator_step_may_have_two_backward_passes(tmp_path, monkeypatch):
    """In the original the identity loss has a graph of its own."""

    def backward_G(self):
        self.idt_A = self.netG_A(self.real_B)
        self.criterionIdt(self.idt_A, self.real_B).backward()
        self.criterionCycle(self.rec_A, self.real_A).backward()

    model: Any = build(tmp_path, "--model cycle_gan --batch_passes on")
    model.__class__ = type("OwnModel", (CycleGANModel,), {"backward_G": backward_G})
    model.set_input(batch())
    model.optimize_parameters()


def test_networks_may_be_missing_where_gradients_are_turned_off():
    net = nn.Linear(1, 1)
    BaseModel.set_requires_grad([net, None], False)
    assert not net.weight.requires_grad
    BaseModel.set_requires_grad((net,), True)
    assert net.weight.requires_grad
    BaseModel.set_requires_grad(None, True)


def test_norms_are_synchronized_wherever_they_are_held():
    norm = nn.BatchNorm2d(3)
    also = [norm]
    assert synchronize_norms(norm) == 1
    assert isinstance(also[0], SyncBatchNorm2d)
    assert also[0].synchronized
    assert synchronize_norms(nn.Sequential(norm)) == 0
    before = copy.deepcopy(norm.state_dict())
    assert before.keys() == nn.BatchNorm2d(3).state_dict().keys()


def test_feature_matching_of_flipped_pictures(tmp_path, monkeypatch):
    """A perfect identity has no loss, flipped or not."""
    flags = "--model cut --CUT_mode FastCUT --nce_idt True --netD multiscale --lambda_feat 10"
    model: Any = build(tmp_path, flags)
    model.set_input(batch(size=64))
    for draw, flipped in ((0.1, True), (0.9, False)):
        monkeypatch.setattr("models.cut_model.random.random", lambda draw=draw: draw)
        model.forward()
        assert model.flipped is flipped
        model.idt_B = model.real_B.flip(3) if flipped else model.real_B
        model.compute_G_loss()
        assert model.loss_G_feat.item() == 0


def judged(kind: Any, tmp_path, flags: str) -> torch.Tensor:
    """The loss of a discriminator with something called `augment`, in a mode."""
    model: Any = build(tmp_path, f"--model pix2pix --netG unet_128 {flags}")
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.LeakyReLU())

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
            if kind != "method":
                self.augment = {
                    "function": lambda x: 2 * x, "module": nn.Hardtanh(-0.1, 0.1), "flag": False
                }[kind]  # fmt: skip

        def forward(self, x):
            changed = x if kind == "flag" else self.augment(x)
            return self.net(changed)

        if kind == "method":

            def augment(self, x):
                return 2 * x

    model.netD = Own()
    model.prepare_network(model.netD)
    return model.netD(batch(size=128)["A"]).mean()


@pytest.mark.parametrize("kind", ["function", "module", "method", "flag"])
def test_a_network_may_have_an_augment_of_its_own(kind, tmp_path):
    plain, half = (judged(kind, tmp_path, flags) for flags in ("", "--precision bf16"))
    assert half.item() == pytest.approx(plain.item(), rel=0.02)


def test_diffaug_that_reaches_nothing_is_told_once(tmp_path, capsys):
    model: Any = build(tmp_path, "--model pix2pix --netG unet_128 --diffaug color")
    model.set_input(batch(size=128))
    whole = model.netD
    model.forward()
    model.loss_D_real = whole.forward(torch.cat((model.real_A, model.fake_B), 1)).mean()
    for _ in range(2):
        model.get_current_losses()
    lines = [line for line in capsys.readouterr().err.splitlines() if "--diffaug" in line]
    assert lines == [
        "warning: --diffaug: netD was never called as a function of a batch so far, so nothing is "
        "augmented: call netD(x), not its parts or netD.forward"
    ]


def test_spectral_norm_draws_in_the_order_of_the_networks(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "models.discriminators.add_spectral_norm", lambda net, done: drawn.append(net)
    )
    model: Any = build(tmp_path, "--model cycle_gan --spectral_norm")
    assert drawn == [model.netD_A, model.netD_B]
    model.netD_again, model.model_names = model.netD_A, [*model.model_names, "D_again"]
    discriminators.apply_options(model)
    assert drawn[2:] == [model.netD_A, model.netD_B]  # each once


class OwnNorm(nn.BatchNorm2d):
    """As people derive one to start with other weights."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.5)


def test_norms_that_only_begin_differently_are_synchronized():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), OwnNorm(4))
    assert synchronize_norms(net) == 1
    assert isinstance(net[1], SyncBatchNorm2d)
    assert net[1].weight.tolist() == [0.5] * 4

    class Frozen(OwnNorm):
        def train(self, mode: bool = True):
            return super().train(False)

    net = nn.Sequential(Frozen(4)).train()
    assert synchronize_norms(net) == 0  # it would thaw
    assert not net.train()[0].training


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_checkpointed_blocks_count_a_batch_once(norm):
    """The buffers and gradients of --grad_checkpoint are those of the plain network."""
    torch.manual_seed(0)
    net = define_G(3, 3, 4, "resnet_6blocks", norm)
    ours = copy.deepcopy(net)
    acceleration.prepare(ours, torch.device("cpu"), recompute=True)
    x = torch.rand(2, 3, 16, 16)
    for one in (net, ours):
        for _ in range(3):
            loss = one(x).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()  # computes everything once more
    for key, value in net.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    for a, b in zip(net.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_an_average_of_ones_own_is_not_averaged_again(tmp_path, monkeypatch):
    """--ema has nothing to say of a network that no optimizer steps."""
    model: Any = build(tmp_path, "--model pix2pix --netG unet_128 --ema 0.9")
    own = copy.deepcopy(model.netG)
    model.netG_own, model.model_names = own, [*model.model_names, "G_own"]
    model._averages["G_own"] = WeightAverage(own, 0.9)
    model.set_input(batch(size=128))
    model.optimize_parameters()
    with torch.no_grad():
        own.load_state_dict(model.netG.state_dict())
    model.save_dir.mkdir(parents=True, exist_ok=True)
    model.save_networks("latest")
    (model.save_dir / "latest_net_G_own_ema.pth").write_bytes(b"of an earlier training")
    model.save_networks("latest")
    saved = {path.name for path in model.save_dir.glob("*_ema.pth")}
    assert saved == {"latest_net_G_ema.pth"}
    before = own.state_dict()["model.model.0.weight"].clone()
    with model.averaged_weights():
        assert torch.equal(own.state_dict()["model.model.0.weight"], before)


class Sharpness(torch.optim.Optimizer):
    """An optimizer around another one, as SAM is mostly written."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.base = torch.optim.Adam(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.base.param_groups = self.param_groups


def test_what_holds_a_state_comes_back(tmp_path):
    """Labels that change, modules in a deque, and optimizers inside others."""
    models = [build(tmp_path, "--model pix2pix --netG unet_128") for _ in range(2)]
    for model in models:
        model.more = deque([nn.Linear(2, 2)])
        model.optimizers[0] = model.optimizer_G = Sharpness(model.netG.parameters(), lr=0.01)
    saved, fresh = models
    saved.set_input(batch(size=128))
    saved.optimize_parameters()
    saved.criterionGAN.real_label.fill_(0.9)
    fresh.load_training_state(copy.deepcopy(saved.training_state()), vars(saved.opt))
    assert fresh.criterionGAN.real_label.item() == pytest.approx(0.9)
    assert torch.equal(fresh.more[0].weight, saved.more[0].weight)
    theirs, ours = saved.optimizer_G.base.state_dict(), fresh.optimizer_G.base.state_dict()
    assert theirs["state"].keys() == ours["state"].keys() != set()
    assert all(
        torch.equal(ours["state"][k]["exp_avg"], v["exp_avg"]) for k, v in theirs["state"].items()
    )
    fresh.optimizer_G.param_groups[0]["lr"] = 0.25  # as a schedule does
    assert fresh.optimizer_G.base.param_groups[0]["lr"] == 0.25


def test_an_optimizer_may_keep_a_number(tmp_path):
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state["count"] = 7
    load_optimizer(optimizer, {**optimizer.state_dict(), "state": {"count": 8}})
    assert optimizer.state["count"] == 8


def test_attributes_that_hide_methods_are_named(tmp_path, monkeypatch):
    class Hiding(CycleGANModel):
        def __init__(self, opt):
            super().__init__(opt)
            self.networks = [self.netG_A]

    monkeypatch.setattr("models.find_model_using_name", lambda name: Hiding)
    flags = "--dataroot . --model cycle_gan --gpu_ids -1 --ngf 4 --ndf 4 --checkpoints_dir"
    with pytest.raises(UserError, match=r"Hiding sets self\.networks, which hides the method"):
        create_model(TrainOptions(f"{flags} {tmp_path}").parse(save=False))


def test_a_layer_may_have_a_method_called_recompute():
    class Layer(nn.Linear):
        def recompute(self):
            return 7

    net = nn.Sequential(Layer(2, 2))
    acceleration.prepare(net, torch.device("cpu"), recompute=True)
    assert net[0].recompute() == 7


def test_a_step_drawn_at_random_is_not_cached():
    class Sizes(transforms.Resize):
        def forward(self, img):
            return super().forward(img)

    kept, rest = split_deterministic(transforms.Compose([transforms.Resize(8), Sizes(4)]))
    assert (len(kept.transforms), len(rest.transforms)) == (1, 1)


def buffers_in_two_processes(folder: str) -> None:
    model: Any = plain_models.build("ttur", folder)
    model.netG.norm = nn.InstanceNorm2d(3, track_running_stats=True)
    model.netG.norm.running_mean.fill_(distributed.rank())
    run = TrainingRun(model.opt, model, [])
    for _ in range(2):
        run.save("latest", position=Position())


def test_buffers_of_each_process_are_told(tmp_path):
    group = Group(tmp_path / "log", 2, buffers_in_two_processes, str(tmp_path))
    assert group.wait() == 0, group.text()
    lines = [line for line in group.text().splitlines() if "differs between" in line]
    assert len(lines) == 1
    assert "G.norm.running_mean (and 0 more that no optimizer steps) differs" in lines[0]


def test_gradients_stay_until_they_are_zeroed():
    """With --accumulate as well: another optimizer of the same weights adds to them."""
    found = []
    for accumulate, batches in ((1, [(1.0, 3.0)]), (2, [(1.0,), (3.0,)])):
        weight = nn.Parameter(torch.zeros(1))
        first, second = torch.optim.SGD([weight], lr=1.0), torch.optim.SGD([weight], lr=10.0)
        steps = Steps(lambda weight=weight: [weight], accumulate=accumulate)
        steps.activate()
        for gradients in batches:
            first.zero_grad()
            (weight * sum(gradients) / len(gradients)).sum().backward()
            first.step()
            (2 * weight * sum(gradients) / len(gradients)).sum().backward()
            second.step()  # what the first backward() gave is in it
        found.append(weight.item())
    assert found == [-2 - 60, -2 - 60]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_networks_that_share_a_layer_may_be_listed_in_one_optimizer():
    """As UNIT and MUNIT do, whose encoders share layers: torch then steps these twice."""
    found = []
    for accumulate in (1, 2):
        shared, own = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for layer in (shared, own):
            nn.init.ones_(layer.weight)
        there, back = nn.Sequential(shared, own), nn.Sequential(shared)
        optimizer = torch.optim.SGD([*there.parameters(), *back.parameters()], lr=0.1)
        steps = Steps(lambda net=there: list(net.parameters()), accumulate)
        steps.activate()
        for x in (torch.ones(1, 1), torch.full((1, 1), 2.0)) * 2:
            for _ in range(accumulate):
                optimizer.zero_grad()
                (there(x) + back(x)).sum().backward()
                optimizer.step()
        found.append([shared.weight.item(), own.weight.item()])
    assert found[1] == pytest.approx(found[0])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_weight_that_is_listed_twice_is_stepped_as_without_fast():
    found = []
    for fast in (False, True):
        weight = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.Adam([weight, weight], lr=0.1)
        acceleration.use_fused_step(optimizer, torch.device("cpu"), fast)
        for _ in range(3):
            optimizer.zero_grad()
            weight.square().sum().backward()
            optimizer.step()
        found.append(weight.item())
    assert found[1] == pytest.approx(found[0])


def test_two_steps_after_one_backward_are_refused():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    steps = Steps(lambda: [weight], accumulate=2)
    steps.activate()
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step()  # nothing to do, as without --accumulate
    weight.sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="SGD steps twice after one backward"):
        optimizer.step()


def test_further_arguments_of_other_codes_are_no_anti_aliasing():
    """Forks have put other things behind the arguments of the original's."""
    more = (3, 3, 4, "resnet_6blocks", "instance", False, "normal", 0.02, [])
    with pytest.raises(TypeError):
        define_G(*more, "reflect")
    with pytest.raises(TypeError):
        networks.define_D(3, 4, "basic", 3, "instance", "normal", 0.02, [], 7)


class RenamedOptions(CycleGANModel):
    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        parser = CycleGANModel.modify_commandline_options(parser, is_train)
        parser.set_defaults(niter=7)
        return parser

    def __init__(self, opt):
        super().__init__(opt)
        self.save_dir = os.path.join(opt.checkpoints_dir, opt.name)  # the original's own line


def test_model_files_of_older_codes(tmp_path, monkeypatch):
    monkeypatch.setattr("models.find_model_using_name", lambda name: RenamedOptions)
    flags = "--dataroot . --model cycle_gan --gpu_ids -1 --ngf 4 --ndf 4 --checkpoints_dir"
    opt = TrainOptions(f"{flags} {tmp_path} --name x").parse(save=False)
    assert opt.n_epochs == 7
    model = create_model(opt)
    model.setup(opt)
    (tmp_path / "x").mkdir()
    model.save_networks("latest")
    assert (tmp_path / "x" / "latest_net_G_A.pth").exists()
    assert model.save_dir + "/a" == f"{tmp_path}/x/a"


@pytest.mark.parametrize(("kind", "base"), [("model", BaseModel), ("dataset", BaseDataset)])
def test_files_of_2017_are_refused_in_one_line(kind, base, tmp_path, monkeypatch):
    package = tmp_path / f"own{kind}s"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / f"old_{kind}.py").write_text(
        f"from {base.__module__} import {base.__name__}\n"
        f"class Old{kind.capitalize()}({base.__name__}):\n"
        f"    def initialize(self, opt):\n        {base.__name__}.initialize(self, opt)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=rf"old_{kind}\.py is of the original code of 2017"):
        find_class(f"own{kind}s", kind, "old", base)


@pytest.mark.parametrize("size", [4, 0])
def test_a_dataset_need_not_call_the_constructor(size, tmp_path):
    class Bare(BaseDataset):
        def __init__(self, opt):
            self.opt = opt

        def __len__(self):
            return size

        def __getitem__(self, index):
            return {"A": torch.zeros(3, 4, 4), "A_paths": str(index)}

    opt = TrainOptions(f"--dataroot {tmp_path} --gpu_ids -1 --num_threads 0").parse(save=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.find_dataset_using_name", lambda name: Bare)
        if not size:  # training would end at once, and save weights that have learned nothing
            with pytest.raises(UserError, match="the Bare has no items"):
                create_dataset(opt)
            return
        loader = create_dataset(opt)
    assert sorted(path for batch in loader for path in batch["A_paths"]) == ["0", "1", "2", "3"]


def test_pictures_opened_by_the_dataset_have_no_range():
    with pytest.raises(UserError, match="opens a Image by itself; let it do that"):
        FitChannels({3})(Image.new("RGB", (4, 4)))  # type: ignore[arg-type]


def test_networks_of_several_results_are_refused_as_functions():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    G = Translator(Two(), torch.device("cpu"), {"input_nc": 3, "output_nc": 3}, Path("none"))
    with pytest.raises(UserError, match="a Two returns a tuple"):
        G(torch.zeros(3, 8, 8))
