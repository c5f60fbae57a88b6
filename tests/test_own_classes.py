"""Classes of a user's own, of optimizers, networks and models, and what ported model files do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from models import create_model
from models.attributes import stateful_parts
from models.base_model import BaseModel
from models.cycle_gan_model import CycleGANModel
from models.speed.steps import Steps
from models.speed.sync_norm import SyncBatchNorm2d, synchronize_norms
from options.train_options import TrainOptions
from tests.test_acceleration import batch, build
from util.errors import UserError


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
