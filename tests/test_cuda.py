"""What only a GPU shows: the same numbers as the CPU, less memory, and no waiting for it."""

from __future__ import annotations

import copy
import functools
import random

import pytest
import torch
from torch import nn

from models import networks
from models.inference.recorded import record_passes
from models.speed import acceleration
from tests import test_acceleration
from tests.helpers import SHORT, aligned, succeed, unaligned

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = "--ngf 8 --ndf 8 --netG resnet_6blocks --display_id 0 --name x --seed 3 --crop_size 64"


build = functools.partial(test_acceleration.build, base=SMALL)
batch = functools.partial(test_acceleration.batch, size=64)


def first_losses(model) -> dict[str, float]:
    model.set_input(batch())
    model.optimize_parameters()
    return model.get_current_losses()


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix --norm instance --no_dropout"])
def test_first_losses_are_those_of_the_cpu(model, tmp_path):
    cpu = build(tmp_path, f"--model {model} --gpu_ids -1")
    gpu = build(tmp_path, f"--model {model} --precision fp32")
    for name, net in gpu.networks().items():
        net.load_state_dict(cpu.networks()[name].state_dict())
    wanted, found = first_losses(cpu), first_losses(gpu)
    assert found == pytest.approx(wanted, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize("flags", ["", "--precision bf16", "--precision fp16", "--fast"])
@pytest.mark.parametrize(
    "model", ["cycle_gan", "pix2pix", "cycle_gan --gan_mode wgangp", "cut", "dcl"]
)
def test_losses_stay_finite(model, flags, tmp_path):
    net = build(tmp_path, f"--model {model} {flags}")
    for _ in range(5):
        losses = first_losses(net)
    assert all(abs(value) < 1e6 for value in losses.values())


def test_nothing_waits_for_the_gpu(tmp_path):
    """An iteration only hands out work; PyTorch raises where something would wait."""
    model = build(tmp_path, "--model cycle_gan")
    data = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch().items()}
    for _ in range(3):
        model.set_input(data)
        model.optimize_parameters()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.set_input(data)
        model.optimize_parameters()
        model.track_metric()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("model", ["cycle_gan --pool_size 2", "pix2pix --norm instance"])
def test_recorded_networks_give_the_same_losses(model, tmp_path):
    """Over some iterations, so that pools return what was computed before the last recording."""
    flags = f"--model {model} --no_dropout --precision fp32 --lr 0.00001"
    found = []
    for more in ("", " --compile --cuda_graphs"):
        net = build(tmp_path, flags + more)
        assert net.opt.cuda_graphs is bool(more)
        random.seed(0)
        found.append([])
        for _ in range(6):
            found[-1].append(first_losses(net))
    for wanted, ours in zip(*found, strict=True):
        assert ours == pytest.approx(wanted, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize("kind", ["resnet_6blocks instance", "unet_128 batch"])
def test_recorded_passes_give_the_same(kind):
    """Whatever sizes come, random numbers of dropout included, and after changes of the network."""
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = False
    netG, norm = kind.split()
    nets = [networks.define_G(3, 3, 8, netG, norm, use_dropout=True).cuda() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    record_passes(nets[1:])
    sizes = [128, 128, 128, 100, 128, 100, 100, 128]
    changes = {4: lambda net: net.eval(), 6: swap_weights}
    found = []
    for net in nets:
        torch.manual_seed(1)
        pictures = [torch.rand(1, 3, size, 96, device="cuda") for size in 2 * sizes]
        found.append([])
        with torch.no_grad():
            for i, picture in enumerate(pictures):
                changes.get(i, lambda net: None)(net)
                found[-1].append(net(picture))
    assert len(nets[1].forward.recordings) > 2
    for wanted, ours in zip(*found, strict=True):  # some kernels add up in varying order
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-3)


def swap_weights(net) -> None:
    for weight in net.parameters():
        weight.data = weight.data * 1.1


@pytest.mark.parametrize("flags", ["--grad_checkpoint", "--precision bf16"])
def test_less_memory(flags, tmp_path):
    peaks = []
    for more in ("", flags):
        model = build(tmp_path, f"--model cycle_gan --ngf 32 --crop_size 256 {more}")
        torch.backends.cudnn.benchmark = False  # a search takes memory by what else runs there
        data = batch(size=256)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            model.set_input(data)
            model.optimize_parameters()
        peaks.append(torch.cuda.max_memory_allocated())
        del model
        torch.cuda.empty_cache()
    assert peaks[1] < peaks[0]


def test_compiled_norms_keep_the_layout():
    """And give the gradients of float64 on the CPU."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3)]
    net = nn.Sequential(*layers, nn.InstanceNorm2d(8), nn.Conv2d(8, 3, 3))
    pictures = torch.rand(1, 3, 64, 64)
    wanted = gradients_of(copy.deepcopy(net).double(), pictures.double())
    torch.backends.cudnn.allow_tf32 = False
    acceleration.prepare(net.cuda(), torch.device("cuda"), compiled=True, channels_last=True)
    scale = max(gradient.abs().max().item() for gradient in wanted)
    for ours, known in zip(gradients_of(net, pictures.cuda()), wanted, strict=True):
        torch.testing.assert_close(ours.cpu().double(), known, rtol=1e-4, atol=1e-5 * scale)
        assert ours.dim() < 4 or ours.is_contiguous(memory_format=torch.channels_last)


def gradients_of(net, pictures) -> list[torch.Tensor]:
    net(pictures).square().sum().backward()
    return [p.grad for p in net.parameters()]


RECORDED = "--compile --cuda_graphs --channels_last"


@pytest.mark.parametrize("flags", ["", "--precision fp16", "--fast", RECORDED])
def test_training_resumes(flags, tmp_path):
    """Saves hold what a GPU has: training goes on, and --deterministic ends with the same bits."""
    data = aligned(unaligned(tmp_path / "data"))
    words = ["--dataroot", data, *SMALL.split(), *SHORT, "--deterministic", "--num_threads", 2]
    # no ResNet: the gradient of its reflection padding adds up in varying order
    words += ["--model", "cycle_gan", "--netG", "unet_128", "--load_size", 128, "--crop_size", 128]
    words += flags.split()
    ends = []
    for folder, parts in ((tmp_path / "whole", [2]), (tmp_path / "parts", [1, 2])):
        for epochs in parts:
            go_on = ["--continue_train"] if epochs > parts[0] else []
            succeed("train.py", *words, "--checkpoints_dir", folder, "--n_epochs", epochs, *go_on)
        ends.append(torch.load(folder / "x" / "latest_net_G_A.pth", weights_only=True))
    for key, value in ends[0].items():
        torch.testing.assert_close(value.cpu(), ends[1][key].cpu(), rtol=1e-4, atol=1e-5)
