"""What only a GPU shows: the same numbers as the CPU, less memory, and no waiting for it."""

from __future__ import annotations

import copy
import functools
import gc
import json
import random

import pytest
import torch
from torch import nn

from models import base_model, networks
from models.cycle_gan_model import CycleGANModel
from models.inference.recorded import RecordedPasses, record_passes
from models.pix2pix_model import Pix2PixModel
from models.speed import acceleration, row_convolution
from models.speed.channels_last import FusingSequential
from tests import forked, test_acceleration
from tests.helpers import ROOT, SHORT, aligned, succeed, unaligned
from tests.test_checkpoint_faults import kill_a_worker

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


@pytest.fixture
def recorders(monkeypatch):
    """What records the iterations of models that are made in a test."""
    made = []
    ordinary = base_model.record_iterations
    monkeypatch.setattr(base_model, "record_iterations", lambda m: made.append(ordinary(m)))
    return made


@pytest.mark.parametrize("before", [3, 8])
def test_nothing_waits_for_the_gpu(before, recorders, tmp_path):
    """An iteration only hands out work, recorded or not; PyTorch raises where it would wait."""
    model = build(tmp_path, "--model cycle_gan --pool_size 2")
    data = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch().items()}
    for _ in range(before):
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
    assert bool(recorders[0].recordings) is (before == 8)


@pytest.mark.parametrize("model", ["cycle_gan --pool_size 2", "pix2pix --norm instance"])
def test_recorded_networks_give_the_same_losses(model, tmp_path, monkeypatch):
    """Over some iterations, so that pools return what was computed before the last recording."""
    for kind in (CycleGANModel, Pix2PixModel):  # as models that somebody has written
        monkeypatch.setattr(kind, "recordable", False)
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


def iterate(model, iterations: int) -> list[dict[str, float]]:
    random.seed(0)
    found = []
    for i in range(iterations):
        if i == 12:
            for optimizer in model.optimizers:
                optimizer.param_groups[0]["lr"] *= 0.5
        model.set_input(batch(seed=i, size=model.opt.crop_size))
        model.optimize_parameters()
        found.append(model.get_current_losses())
    return found


@pytest.mark.parametrize(
    "model",
    [
        "cycle_gan --netG unet_128 --pool_size 2 --ema 0.9",
        "pix2pix --netG unet_128 --diffaug color",
        "cycle_gan --pool_size 2",
    ],
)
def test_recorded_iterations_give_the_same_bits(model, recorders, tmp_path):
    """With dropout, pools, averages, and another rate; all kernels are deterministic."""
    flags = f"--model {model} --crop_size 128 --deterministic"
    ends = []
    for more in (" --cuda_graphs off", ""):
        net = build(tmp_path, flags + more)
        torch.manual_seed(5)
        losses = iterate(net, 20)
        weights = {f"{n}.{k}": v for n, s in net.network_states().items() for k, v in s.items()}
        averages = {f"{n}.{k}": v for n, a in net._averages.items() for k, v in a.weights().items()}
        ends.append((losses, {k: v.clone() for k, v in {**weights, **averages}.items()}))
    torch.use_deterministic_algorithms(False)
    assert not recorders[0].refused
    assert len(recorders[0].recordings) == 1
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=0, atol=0)
    assert ends[1][0] == ends[0][0]


HALF = "--precision bf16 --compile --channels_last"


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("cycle_gan", HALF),
        ("pix2pix", HALF),
        ("cycle_gan", "--spectral_norm"),
        ("cycle_gan --gan_mode wgangp", ""),
        ("cut", ""),
        ("cut --pool_size 3", ""),
        ("dcl --nce_layers 0,4", ""),
    ],
)
def test_recorded_iterations_stay_close(model, flags, recorders, tmp_path):
    flags = f"--model {model} {flags} --no_dropout --lr 0.00001"
    found = []
    for more in (" --cuda_graphs off", ""):
        torch.manual_seed(5)
        found.append(iterate(build(tmp_path, flags + more), 10))
    assert not recorders[0].refused
    assert len(recorders[0].recordings) == 1
    relative, absolute = (5e-2, 2e-2) if flags == HALF else (2e-2, 2e-3)
    for wanted, ours in zip(*found, strict=True):
        # whose patches are drawn at random; tests/test_iterations.py has these
        names = [n for n in wanted if "NCE" not in n and not (n == "G" and "NCE" in str(wanted))]
        known = pytest.approx([wanted[n] for n in names], rel=relative, abs=absolute)
        assert [ours[n] for n in names] == known


def test_compiled_feature_losses_stay_close(recorders, tmp_path):
    """The discriminators give features while they are frozen, and then learn."""
    flags = "--model pix2pix --netD multiscale --n_layers_D 2 --lambda_feat 10 --norm instance"
    flags += " --no_dropout --lr 0.00001"
    found = []
    for more in ("--cuda_graphs off --precision fp32", HALF):
        model = build(tmp_path, f"{flags} {more}")
        before = [p.detach().clone() for p in model.netD.parameters()]
        found.append(iterate(model, 8))
        after = list(model.netD.parameters())
        assert not any(map(torch.equal, before, after))
    assert len(recorders[0].recordings) == 1
    for wanted, ours in zip(*found, strict=True):
        assert ours == pytest.approx(wanted, rel=5e-2, abs=2e-2)


def test_an_iteration_that_waits_is_not_recorded(recorders, tmp_path, capsys, monkeypatch):
    """And goes on as if nothing had been tried."""
    found = []
    for more in (" --cuda_graphs off", ""):
        model = build(tmp_path, f"--model pix2pix --deterministic --netG unet_128{more}")
        ordinary = model.backward_G
        monkeypatch.setattr(model, "backward_G", lambda o=ordinary, m=model: (o(), m.loss_G.item()))
        model.opt.crop_size = 128
        torch.manual_seed(5)
        found.append((iterate(model, 12), model.netG.state_dict()))
    torch.use_deterministic_algorithms(False)
    assert recorders[0].refused
    assert "iterations are not recorded" in capsys.readouterr().out
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)
    other = build(tmp_path, "--model pix2pix --netG unet_128")
    other.opt.crop_size = 128
    iterate(other, 8)
    assert recorders[1].recordings


def test_a_number_on_the_cpu_that_changes(recorders, tmp_path):
    """Kernels get it when they start; a recording would keep it."""
    found = []
    for more in (" --cuda_graphs off", ""):
        model = build(tmp_path, f"--model pix2pix --deterministic --netG unet_128{more}")
        model.opt.crop_size, model.weight = 128, torch.tensor(1.0)
        loss = model.compute_G_loss
        model.compute_G_loss = lambda m=model, loss=loss: loss() * m.weight
        torch.manual_seed(5)
        found.append(iterate(model, 8))
        model.weight.mul_(0.5)
        found[-1] += iterate(model, 8)
    torch.use_deterministic_algorithms(False)
    assert len(recorders[0].recordings) == 1
    assert found[1] == found[0]


def test_recording_again_takes_no_more_memory(recorders, tmp_path):
    """As in each epoch in which the learning rate falls."""
    model = build(tmp_path, "--model cycle_gan --ngf 32 --crop_size 128")
    torch.backends.cudnn.benchmark = False  # a search takes memory by what else runs there
    reserved, peaks = [], []
    for _ in range(6):
        torch.cuda.reset_peak_memory_stats()
        model.optimizer_G.param_groups[0]["lr"] *= 0.9
        iterate(model, 8)
        assert len(recorders[0].recordings) == 1
        reserved.append(torch.cuda.memory_reserved())
        peaks.append(torch.cuda.max_memory_reserved())
    assert reserved[-1] < 1.1 * reserved[1]
    # eager iterations and those that were recorded before do not take memory at the same time
    assert peaks[-1] < 1.4 * peaks[0]


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


def test_scores_are_those_of_the_cpu(tmp_path):
    """`scripts/evaluate.py` records passes as test.py does."""
    data = ROOT / "datasets" / "worldmaps_mini" / "aligned"
    words = ["--dataroot", data, "--checkpoints_dir", tmp_path, "--name", "x", "--crop_size", 128]
    more = "--model pix2pix --netG unet_128 --ngf 8 --ndf 8 --load_size 128 --n_epochs 2".split()
    succeed("train.py", *words, *SHORT, *more)
    found = []
    for gpu in ("0", "-1"):
        results = tmp_path / f"results{gpu}"
        asked = ["--eval", "--scores", "L1,PSNR,SSIM", "--gpu_ids", gpu, "--results_dir", results]
        succeed("scripts/evaluate.py", *words, "--model", "pix2pix", *asked)
        facts = json.loads((results / "x" / "test_latest" / "scores.json").read_text())
        found.append({k: v["value"] for k, v in facts["scores"]["fake_B"].items()})
    assert found[0] == pytest.approx(found[1], rel=1e-2)


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


@pytest.mark.parametrize("kind", ["resnet_6blocks", "basic", "multiscale"])
def test_networks_in_channels_last_layout(kind):
    """Values and gradients, of the input too, are those of float64 on the CPU."""
    torch.manual_seed(0)
    if kind.startswith("resnet"):
        net = networks.define_G(3, 3, 8, kind, "instance")
    else:
        net = networks.define_D(3, 8, kind, 2, "instance")
    pictures = torch.rand(2, 3, 64, 52)
    torch.backends.cudnn.allow_tf32 = False
    ends = []
    for kind_of, device in ((torch.float64, "cpu"), (torch.float32, "cuda")):
        own, x = copy.deepcopy(net).to(device, kind_of), pictures.to(device, kind_of)
        if device == "cuda":
            acceleration.prepare(own, torch.device(device), channels_last=True)
            assert any(type(m) is FusingSequential for m in own.modules())
        x.requires_grad_()
        y = own(x)
        y = y if torch.is_tensor(y) else torch.cat([p.flatten() for p in y.predictions])
        y.square().sum().backward()
        ends.append([t.cpu().double() for t in (y, x.grad, *(p.grad for p in own.parameters()))])
    scale = max(gradient.abs().max().item() for gradient in ends[0][1:])
    for known, ours in zip(*ends, strict=True):
        torch.testing.assert_close(ours, known, rtol=1e-3, atol=1e-5 * scale)


def test_garbage_is_not_collected_during_a_capture():
    """It may hold a CUDA graph, as of a `Translator` that is no longer used."""
    net = networks.define_G(3, 3, 8, "resnet_6blocks", "instance").cuda()
    picture = torch.rand(1, 3, 64, 64, device="cuda")
    ordinary, thresholds, graphs = net.forward, gc.get_threshold(), []
    for _ in range(5):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            picture.square()

    def forward(x):
        garbage = [graphs.pop()]
        garbage.append(garbage)
        del garbage
        return ordinary(x) if [[] for _ in range(100)] else None

    net.forward = forward
    recorded = RecordedPasses(net)
    gc.set_threshold(1)
    try:
        with torch.no_grad():
            found = [recorded(picture) for _ in range(5)]
    finally:
        gc.set_threshold(*thresholds)
    assert len(recorded.recordings) == 1
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=0, atol=1e-3)


def test_convolutions_by_rows():
    """A batch that is large enough gives the values and gradients of float64 on the CPU."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 3, 7))
    pictures = torch.randn(4, 64, 262, 262)
    assert pictures.numel() > row_convolution.SMALL["cuda"]
    plain = copy.deepcopy(net).double()
    wanted = [plain(pictures.double()), *gradients_of(plain, pictures.double())]
    torch.backends.cudnn.allow_tf32 = False
    acceleration.prepare(net.cuda(), torch.device("cuda"))
    assert type(net[0]) is row_convolution.RowConv2d
    found = [net(pictures.cuda()), *gradients_of(net, pictures.cuda())]
    for ours, known in zip(found, wanted, strict=True):
        scale = known.abs().max().item()
        torch.testing.assert_close(ours.cpu().double(), known, rtol=0, atol=1e-5 * scale)


def gradients_of(net, pictures) -> list[torch.Tensor]:
    net(pictures).square().sum().backward()
    return [p.grad for p in net.parameters()]


RECORDED = "--compile --cuda_graphs --channels_last"


RESNET = "--netG resnet_6blocks"


@pytest.mark.parametrize(
    "flags", ["--cuda_graphs off", "--precision fp16", "--fast", RECORDED, "", RESNET]
)
def test_training_resumes(flags, tmp_path):
    """Saves hold what a GPU has: training goes on, and --deterministic ends with the same bits."""
    data = aligned(unaligned(tmp_path / "data", 10), 10)  # recording begins with the fifth
    words = ["--dataroot", data, *SMALL.split(), *SHORT, "--deterministic", "--num_threads", 2]
    # PyTorch's gradient of reflection padding, in a ResNet, adds up in varying order; ours does not
    words += ["--model", "cycle_gan", "--netG", "unet_128", "--load_size", 128, "--crop_size", 128]
    words += flags.split()
    ends = []
    for folder, parts in ((tmp_path / "whole", [2]), (tmp_path / "parts", [1, 2])):
        for epochs in parts:
            go_on = ["--continue_train"] if epochs > parts[0] else []
            where = ["--checkpoints_dir", folder, "--n_epochs", epochs]
            out = succeed("train.py", *words, *where, *go_on).out
            replays = "iterations are replayed as CUDA graphs" in out
            assert replays is (flags in ("", "--fast", RECORDED, RESNET))
        ends.append(torch.load(folder / "x" / "latest_net_G_A.pth", weights_only=True))
    for key, value in ends[0].items():
        exact = {"rtol": 0, "atol": 0} if flags == RESNET else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(value.cpu(), ends[1][key].cpu(), **exact)


def test_training_saves_when_a_worker_is_killed(tmp_path):
    """Batches go through pinned memory, which has a thread of its own."""
    data = unaligned(tmp_path / "data", 8)
    words = ["--dataroot", data, "--checkpoints_dir", tmp_path, *SMALL.split(), *SHORT]
    words = [*map(str, words), "--num_threads", "1", "--load_size", "64"]
    log = tmp_path / "log"
    assert forked.run(words, log, prepare=kill_a_worker) == 1
    assert "error: a process that loads images was killed" in log.read_text()
    assert "Traceback" not in log.read_text()
    resumed = succeed("train.py", *words, "--continue_train")
    assert "resuming from 'latest'" in resumed.out
    assert ", 0 images into it" not in resumed.out
