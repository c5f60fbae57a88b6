"""Channels-last layout: the kernels, without a GPU, and where the layout is used by default."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from models import networks
from models.cycle_gan_model import CycleGANModel
from models.speed import acceleration
from models.speed.channels_last import keep_layout
from tests import test_acceleration
from tests.helpers import run_process

SMALL = "--ngf 4 --ndf 4 --netG resnet_6blocks --display_id 0 --name x --gpu_ids -1"
build = functools.partial(test_acceleration.build, base=SMALL)


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernel_cases.py"]
    result = run_process(*words, more={"TRITON_INTERPRET": "1"})
    assert result.code == 0, result.out


@pytest.mark.parametrize("type_name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(type_name, capability):
    """The compiler is stricter than the interpreter, and needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.speed import kernels

    target, tile = GPUTarget("cuda", capability, 32), {"ROWS": 32, "CHANNELS": 64, "STEPS": 4}
    cases = [(kernels._sum_up, {**tile, "BACKWARD": back}) for back in (True, False)]
    cases += [(kernels._apply, {**tile, "BACKWARD": b, "CHUNKS": 16}) for b in (True, False)]
    pads = kernels._reflect, kernels._unreflect
    cases += [(pad, {"COLUMNS": 32, "CHANNELS": 64}) for pad in pads]
    for kernel, constants in cases:
        types = {}
        for name in kernel.arg_names:
            pointer = "*fp32" if name in ("moments_ptr", "sums_ptr") else f"*{type_name}"
            number = "fp32" if name in ("slope", "eps") else "i32"
            types[name] = pointer if name.endswith("_ptr") else number
            if name in constants:
                types[name] = "constexpr"
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(ASTSource(kernel, types, places), target=target)
        assert compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("device", "precision", "capability", "kernels", "net", "expected"),
    [
        ("cuda", "tf32", (8, 0), True, "resnet_6blocks", True),
        ("cuda", "bf16", (9, 0), True, "unet_128", True),
        ("cuda", "fp32", (9, 0), True, "resnet_6blocks", False),
        ("cuda", "tf32", (7, 5), True, "resnet_6blocks", False),
        ("cuda", "tf32", (9, 0), False, "resnet_6blocks", False),
        ("cuda", "tf32", (9, 0), True, "own", False),
        ("cuda", "tf32", (9, 0), True, "blurring", False),
        ("cpu", "tf32", (9, 0), True, "resnet_6blocks", False),
    ],
)
def test_where_the_layout_is_preferred(
    device, precision, capability, kernels, net, expected, monkeypatch
):
    class Own(nn.Module):
        pass

    if net == "own":
        net = Own()
    elif net == "blurring":
        net = networks.define_D(3, 4, "basic", antialias=True)
    else:
        net = networks.define_G(3, 3, 4, net, "instance")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(acceleration, "working_kernels", lambda device: kernels or None)
    found = acceleration.prefers_channels_last(net, torch.device(device), precision)
    assert found is expected


class Mine(CycleGANModel):
    """A model that somebody has derived from one of ours; it may use functions such as `view`."""


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        (CycleGANModel, "", True),
        (CycleGANModel, "--cuda_graphs off", True),
        (CycleGANModel, "--channels_last off", False),
        (CycleGANModel, "--accumulate 2", False),
        (CycleGANModel, "--accumulate 2 --batch_size 8", True),
        (CycleGANModel, "--accumulate 2 --batch_size 8 --crop_size 128", False),
        (CycleGANModel, "--accumulate 2 --channels_last", True),
        (Mine, "", False),
        (Mine, "--batch_size 8", False),
        (Mine, "--channels_last on", True),
    ],
)
def test_which_models_take_it(kind, flags, expected, tmp_path, monkeypatch):
    model = build(tmp_path, f"--model cycle_gan {flags}")
    monkeypatch.setattr(acceleration, "prefers_channels_last", lambda *args: True)
    model.__class__ = kind
    assert model._takes_channels_last(model.netG_A) is expected


def test_nothing_changes_on_a_cpu(tmp_path):
    model = build(tmp_path, "--model cycle_gan")
    assert model.opt.channels_last == "auto"
    assert not model._takes_channels_last(model.netG_A)
    assert all(p.is_contiguous() for p in model.netG_A.parameters())
    assert type(model.netG_A.model) is nn.Sequential


def test_gradients_of_a_network_that_has_moved_to_a_cpu():
    """PyTorch's own instance norm has wrong ones there: see models/speed/layout.py."""
    net = networks.define_G(3, 3, 4, "resnet_6blocks", "instance")
    exact, x = copy.deepcopy(net).double(), torch.rand(1, 3, 32, 32)
    for weight in net.parameters():  # as on a GPU
        if weight.dim() == 4:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    keep_layout(net, compiled=False)
    exact(x.double()).square().mean().backward()
    net(x).square().mean().backward()
    for known, ours in zip(exact.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.double(), known.grad, rtol=1e-3, atol=1e-6)


def test_layers_may_pass_on_several_tensors():
    class Swap(nn.Module):
        def forward(self, pair):
            return pair[::-1]

    net = nn.Sequential(Swap(), Swap())
    keep_layout(net, compiled=False)
    assert net((1, 2)) == (1, 2)
