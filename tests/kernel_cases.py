"""The Triton kernels in Triton's interpreter, on the CPU; tests/test_channels_last.py runs this.

Values and gradients are compared with PyTorch's own layers in float64.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import networks
from models.speed import channels_last, kernels
from models.speed.channels_last import FusingSequential
from tests import test_acceleration

SHAPES = [(2, 7, 9, 11), (1, 70, 17, 33), (1, 3, 5, 4)]
IN_MEMORY = torch.channels_last


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """The kernels compute on the CPU too, but not what is compared with them, in float64."""

    def found(x):
        return kernels if x.dim() == 4 and x.dtype != torch.float64 else None

    monkeypatch.setattr(channels_last, "_kernels_for", found)
    torch.manual_seed(0)


def derivatives(function, x, weights) -> list[torch.Tensor]:
    """The value of a function, and its first and second gradients."""
    y = function(x)
    (first,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return [y, first, second]


def compare(ours, known, rtol=1e-5) -> None:
    for one, other in zip(ours, known, strict=True):
        error = (one.double() - other).norm() / other.norm().clamp_min(1e-12)
        assert error < rtol


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slope", [1.0, 0.0, 0.2])
def test_norm(shape, slope):
    """The mean is far from zero, where squares would cancel."""
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 50).float()
    weights = torch.randn(shape, dtype=torch.float64)

    def plain(x):
        y = F.instance_norm(x)
        return y if slope == 1 else F.leaky_relu(y, slope)

    known = derivatives(plain, x.double().requires_grad_(), weights)
    own = x.clone().requires_grad_()
    y = kernels.normalize(own, slope, 1e-5)
    (first,) = torch.autograd.grad((y * weights.float()).sum(), own)
    assert y.is_contiguous(memory_format=IN_MEMORY)
    compare([y, first], known[:2])
    ours = derivatives(lambda x: kernels.normalize(x, slope, 1e-5), own, weights.float())
    compare(ours, known, 1e-3)  # torch's own in float32: the kernels have no second gradient


def test_norm_of_an_even_image_with_one_dark_corner():
    """Relative to the corner, the squares of all other pixels would cancel."""
    x = torch.full((1, 3, 256, 256), 30.0) + torch.rand(3, 1, 1)
    x[..., 0, 0] = 0
    compare([kernels.normalize(x, 1.0, 1e-5)], [F.instance_norm(x.double())])


def test_norm_of_equal_pixels_is_zero():
    x = (torch.rand(2, 5, 1, 1) * 100).expand(2, 5, 9, 11)
    assert not kernels.normalize(x, 1.0, 1e-5).any()


def test_saved_tensors_may_return_in_another_layout():
    """As with `torch.autograd.graph.save_on_cpu(pin_memory=True)`."""
    x, weights = torch.randn(2, 2, 7, 9, 11).unbind()
    x.requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda saved: saved)
    gradients = []
    for context in (contextlib.nullcontext(), hooks):
        with context:
            y = kernels.normalize(x, 0.2, 1e-5)
        gradients += torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(*gradients)


def test_norm_in_16_bits():
    x = torch.randn(2, 8, 16, 16).bfloat16().requires_grad_()
    weights = torch.randn(x.shape)
    y = kernels.normalize(x, 0.0, 1e-5)
    (first,) = torch.autograd.grad((y * weights).sum(), x)
    assert y.dtype == first.dtype == torch.bfloat16
    exact = x.detach().double().requires_grad_()
    known = derivatives(lambda x: F.relu(F.instance_norm(x)), exact, weights.bfloat16().double())
    compare([y, first], known[:2], 1e-2)


def test_norm_of_one_pixel_is_an_error():
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        kernels.normalize(torch.rand(1, 4, 1, 1), 0.0, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 3])
def test_padding(shape, size):
    n, c, h, w = shape
    x, weights = torch.randn(shape), torch.randn(n, c, h + 2 * size, w + 2 * size)
    layer = nn.ReflectionPad2d(size)
    nonlinear = nn.Sequential(layer, nn.Tanh())
    known = derivatives(nonlinear, x.double().requires_grad_(), weights.double())
    channels_last.keep_layout(layer, compiled=False)
    assert layer(x).is_contiguous(memory_format=IN_MEMORY)
    ours = derivatives(nonlinear, x.requires_grad_(), weights)
    compare(ours, known, 1e-6)


def test_kernels_that_are_wrong_are_not_used(monkeypatch):
    """Such as by a fault of a compiler on some GPU."""
    cpu = torch.device("cpu")
    assert channels_last._are_right(kernels, cpu)
    with torch.inference_mode():
        assert channels_last._are_right(kernels, cpu)
    ordinary = kernels._run_pad

    def wrong(x, shape, size, backward):
        return ordinary(x, shape, size, backward) * (1.1 if backward else 1)

    monkeypatch.setattr(kernels, "_run_pad", wrong)
    assert not channels_last._are_right(kernels, cpu)


def test_padding_that_is_too_large_is_an_error():
    layer = nn.ReflectionPad2d(3)
    channels_last.keep_layout(layer, compiled=False)
    with pytest.raises(RuntimeError, match=r"[Pp]adding"):
        layer(torch.rand(1, 2, 3, 8))


NETWORKS = {
    "resnet": lambda: networks.define_G(3, 3, 4, "resnet_6blocks", "instance"),
    "antialiased": lambda: networks.define_G(
        3, 3, 4, "resnet_6blocks", "instance", antialias=True, antialias_up=True
    ),
    "unet": lambda: networks.define_G(3, 3, 4, "unet_128", "instance"),
    "batch norm": lambda: networks.define_G(3, 3, 4, "resnet_6blocks", "batch"),
    "patch": lambda: networks.define_D(3, 8, "basic", norm="instance"),
    "spectral": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Conv2d(3, 8, 3)), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2)
    ),
    "parametrized": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)), nn.InstanceNorm2d(8)
    ),
    "with weights": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)),
    "empty": lambda: nn.Sequential(nn.Sequential(), nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks(kind):
    """Values and all gradients."""
    net = NETWORKS[kind]()
    exact = copy.deepcopy(net).double()
    channels_last.keep_layout(net, compiled=False)
    assert any(type(m) is FusingSequential for m in net.modules())
    size = 128 if kind == "unet" else 24
    x = torch.rand(2, 3, size, size)
    found = []
    for own, input in ((exact, x.double()), (net, x)):
        input.requires_grad_()
        y = own(input)
        y.tanh().sum().backward()
        found.append([y, input.grad, *(p.grad for p in own.parameters())])
    largest = max(gradient.abs().max().item() for gradient in found[0][1:])
    for known, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), known, rtol=1e-3, atol=3e-5 * largest)


@pytest.mark.parametrize(("layers", "size"), [(1, 16), (3, 32)])
def test_gradient_penalty(layers, size):
    """Gradients of gradients (Gulrajani et al. 2017, equation 3)."""
    net = networks.define_D(3, 4, "n_layers", layers, "instance")
    exact = copy.deepcopy(net).double()
    channels_last.keep_layout(net, compiled=False)
    x, found = torch.rand(2, 3, size, size) * 2 - 1, []
    for own, input in ((exact, x.double()), (net, x)):
        input.requires_grad_()
        (gradient,) = torch.autograd.grad(own(input).sum(), input, create_graph=True)
        (gradient.flatten(1).norm(2, 1) - 1).square().mean().backward()
        found.append([p.grad for p in own.parameters() if p.grad is not None])
    largest = max(gradient.abs().max().item() for gradient in found[0])
    for known, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), known, rtol=1e-3, atol=1e-5 * largest)


def test_hooks_see_what_they_would_without_kernels():
    net = networks.define_G(3, 3, 4, "resnet_6blocks", "instance")
    plain = copy.deepcopy(net)
    channels_last.keep_layout(net, compiled=False)
    seen = []
    for own in (plain, net):
        for layer in (own.model[2], own.model[3]):
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.clone()))
        x = torch.rand(1, 3, 32, 32, dtype=torch.float32)
        torch.manual_seed(1)
        own(x.copy_(torch.rand(x.shape)))
    for known, ours in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(ours, known)
    assert seen[2].min() < 0 <= seen[3].min()


def test_a_layer_may_have_a_forward_of_its_own():
    """As norms have in quick tiles, which share their statistics."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU())
    channels_last.keep_layout(net, compiled=False)
    net[1].forward = lambda x: x + 1
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(net(x), F.relu(net[0](x) + 1))


@pytest.mark.parametrize(
    "flags",
    [
        "--model cycle_gan --gan_mode wgangp",
        "--model pix2pix --norm instance --netD multiscale --lambda_feat 10",
        "--model cut --nce_layers 0,4,8",
    ],
)
def test_training(flags, tmp_path, monkeypatch):
    """The losses and gradients of an iteration."""
    base = "--ngf 4 --ndf 4 --netG resnet_6blocks --display_id 0 --name x --seed 3 --gpu_ids -1"
    base += " --crop_size 16 --netD n_layers --n_layers_D 1 --no_dropout --lr 0"
    build = functools.partial(test_acceleration.build, base=base)
    found = []
    for on in ("off", "on"):
        if on == "on":
            monkeypatch.setattr("models.speed.acceleration.working_kernels", lambda device: kernels)
        torch.manual_seed(1)
        model = build(tmp_path, f"{flags} --channels_last {on}")
        layers = [type(m) for net in model.networks().values() for m in net.modules()]
        assert (FusingSequential in layers) is (on == "on")
        random.seed(0)
        torch.manual_seed(2)
        model.set_input(test_acceleration.batch(size=16))
        model.optimize_parameters()
        found.append((model.get_current_losses(), [p.grad for p in model.trained_tensors()]))
    (losses, gradients), (our_losses, our_gradients) = found
    assert our_losses == pytest.approx(losses, rel=1e-4, abs=1e-5)
    # together: where a value is almost zero, rounding may take it to the other side of a ReLU
    known, ours = (
        torch.cat([g.flatten() for g in every if g is not None])
        for every in (gradients, our_gradients)
    )
    compare([ours], [known.double()], 1e-3)
