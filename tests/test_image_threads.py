"""Batches on a CPU: an image per thread, and convolutions by NNPACK."""

from __future__ import annotations

import argparse
import math
import textwrap
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from data import equal_batches
from models.inference.image_threads import batch_limits, compute_in_threads, encoding_threads
from models.networks import define_G
from models.speed import nnpack
from models.speed.instance_norm import GroupedInstanceNorm2d, normalize_by_groups
from models.speed.nnpack import NnpackConv2d, convolve_with_nnpack
from models.speed.row_convolution import convolve_by_rows
from tests.helpers import picture, run_process, succeed

available = pytest.mark.skipif(
    not (torch.backends.cpu.get_cpu_capability() != "DEFAULT" and torch._nnpack_available()),
    reason="this PyTorch or this CPU has no NNPACK",
)


@pytest.fixture
def threads():
    """Sets how many threads PyTorch has, and restores the number."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """The sizes of kernels that NNPACK has convolved with."""
    original, sizes = torch._nnpack_spatial_convolution, []

    def convolve(x, weight, *rest):
        sizes.append(tuple(weight.shape))
        return original(x, weight, *rest)

    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", convolve)
    return sizes


def resnet(precision: str = "tf32", **options) -> nn.Module:
    torch.manual_seed(0)
    net = define_G(3, 3, 16, "resnet_6blocks", "instance", **options)
    compute_in_threads([net], argparse.Namespace(precision=precision))
    return net


# ------------------------------------------------------------------------------ convolutions, norms
@available
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "padding", "error"),
    [(64, 64, 3, 0, 2e-5), (40, 96, 3, 1, 2e-5), (64, 3, 7, 0, 1e-6), (1, 32, 7, 0, 1e-6)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_equal_those_in_float64(
    inputs, outputs, kernel, padding, error, bias, threads, calls
):
    torch.manual_seed(1)
    layer = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=bias)
    x = torch.randn(1, inputs, 45, 38)
    known = F.conv2d(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None, padding=padding
    )
    convolve_with_nnpack(nn.Sequential(layer))
    assert type(layer) is NnpackConv2d
    threads(1)
    calls.clear()
    with torch.no_grad():
        found = layer(x)
    assert calls == [(outputs, inputs, kernel, kernel)]
    assert (found - known).abs().max() < error * known.abs().max()


@available
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(64, 64, 3, stride=2),
        nn.Conv2d(64, 64, 3, dilation=2),
        nn.Conv2d(64, 64, 3, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 3, padding="same"),
        nn.Conv2d(64, 64, 3, padding=2),
        nn.Conv2d(16, 64, 3),
        nn.Conv2d(64, 16, 3),
        nn.Conv2d(64, 64, (3, 1)),
        nn.Conv2d(64, 3, 4),
    ],
    ids=str,
)
def test_other_convolutions_stay(layer):
    convolve_with_nnpack(nn.Sequential(layer))
    assert type(layer) is nn.Conv2d


@available
@pytest.mark.parametrize(
    "mode", ["gradients", "autocast", "threads", "float64", "batch", "strided"]
)
def test_oneDNN_computes_what_nnpack_does_not(mode, threads, calls):
    torch.manual_seed(2)
    plain = nn.Conv2d(64, 64, 3)
    ours = nn.Conv2d(64, 64, 3)
    ours.load_state_dict(plain.state_dict())
    convolve_with_nnpack(nn.Sequential(ours))
    x = torch.randn(2 if mode == "batch" else 1, 64, 20, 20)
    if mode == "float64":
        plain, ours, x = plain.double(), ours.double(), x.double()
    if mode == "strided":
        x = x.to(memory_format=torch.channels_last)
    threads(2 if mode == "threads" else 1)
    half = torch.autocast("cpu", torch.bfloat16, mode == "autocast")
    calls.clear()
    with torch.set_grad_enabled(mode == "gradients"), half:
        assert torch.equal(ours(x), plain(x))
    assert not calls


@available
def test_a_last_layer_that_nnpack_does_not_compute_goes_by_rows(threads, calls):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 3, 7)
    x = torch.randn(1, 16, 150, 150)
    net = nn.Sequential(layer)
    convolve_by_rows(net)
    known = layer(x)
    convolve_with_nnpack(net)
    calls.clear()
    assert torch.equal(layer(x), known)  # with gradients
    assert not calls
    threads(1)
    with torch.no_grad():
        assert not torch.equal(layer(x), known)
    assert calls


def test_without_nnpack_nothing_changes(monkeypatch):
    monkeypatch.setattr(torch, "_nnpack_available", lambda: False)
    nnpack._starts.cache_clear()
    try:
        net = resnet()
        assert not any(isinstance(m, NnpackConv2d) for m in net.modules())
    finally:
        nnpack._starts.cache_clear()


@pytest.mark.parametrize("affine", [False, True])
def test_norms_equal_those_in_float64(affine):
    torch.manual_seed(4)
    layer = nn.InstanceNorm2d(24, affine=affine)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    x = 3 * torch.randn(2, 24, 45, 38) + 5
    net = nn.Sequential(layer)
    normalize_by_groups(net)
    assert type(net[0]) is GroupedInstanceNorm2d
    with torch.no_grad():
        found = net(x)
        assert (found - net.double()(x.double())).abs().max() < 4e-6
        net.float()
        with pytest.raises(ValueError, match="more than 1"):
            net(x[:, :, :1, :1])
    plain = nn.InstanceNorm2d(24, affine=affine)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(net(x), plain(x))  # with gradients


def test_norms_with_stored_statistics_stay():
    layer = nn.InstanceNorm2d(24, track_running_stats=True)
    normalize_by_groups(nn.Sequential(layer))
    assert type(layer) is nn.InstanceNorm2d


# ----------------------------------------------------------------------------------------- threads
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("inference", [False, True])
def test_a_batch_gives_what_its_images_give(count, inference, threads):
    net = resnet("fp32")
    x = torch.randn(5, 3, 24, 20).clamp(-1, 1)
    mode = torch.inference_mode() if inference else torch.no_grad()
    with mode:
        threads(1)
        known = torch.cat([net.forward.forward(image) for image in x.split(1)])
        threads(count)
        found = net(x)
    assert torch.equal(found, known)
    assert found.is_inference() == inference
    assert not found.requires_grad


@available
def test_with_nnpack_results_stay_within_a_level(threads, calls):
    net = resnet()
    x = torch.rand(3, 3, 64, 64) * 2 - 1
    threads(2)
    with torch.no_grad():
        known = torch.cat([net.double()(image) for image in x.double().split(1)])
        calls.clear()
        found = net.float()(x)
    assert set(calls) == {(16, 3, 7, 7), (64, 64, 3, 3), (3, 16, 7, 7)}
    assert (found - known).abs().max() < 0.02 / 127.5  # a fiftieth of a level


def test_threads_share_the_precision(threads):
    net = resnet("bf16")
    x = torch.rand(3, 3, 24, 24) * 2 - 1
    threads(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        known = torch.cat([net.forward.forward(image) for image in x.split(1)])
        assert torch.equal(net(x), known)
    assert known.dtype == torch.bfloat16


def test_each_thread_computes_alone_and_later_ones_do_not(threads, monkeypatch):
    net = resnet("fp32")
    seen = []

    def forward(x):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return x

    monkeypatch.setattr(net.forward, "forward", forward)
    threads(3)
    with torch.no_grad():
        for _ in range(3):
            net(torch.zeros(6, 3, 8, 8))
    assert {number for _, number in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}
    assert torch.get_num_threads() == 3
    numbers = []
    other = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert numbers == [3]


def test_a_program_ends_while_threads_compute():
    """As after Ctrl-C. The interpreter would abort: a thread can't get back from an operator."""
    code = """
    import argparse, os, time, torch
    from models.inference.image_threads import _pool, compute_in_threads
    from models.networks import define_G

    def compute():
        with torch.inference_mode():
            for _ in range(100):
                net.forward.forward(torch.zeros(1, 3, 64, 64))
        print("computed", flush=True)

    net = define_G(3, 3, 8, "resnet_6blocks", "instance")
    compute_in_threads([net], argparse.Namespace(precision="tf32"))
    torch.set_num_threads(2)
    pool = _pool(2, os.getpid())
    for _ in range(5):
        pool.call(compute)
    time.sleep(0.5)
    if os.fork() == 0:
        raise SystemExit  # has no such threads, and does not wait for them
    raise SystemExit(3)
    """
    result = run_process("-c", textwrap.dedent(code))
    assert (result.code, result.err) == (3, "")
    assert result.out.count("computed") < 5  # what had not begun is left out


def test_an_error_in_a_thread_is_raised(threads, monkeypatch):
    net = resnet("fp32")

    def forward(x):
        if x.mean() > 0:
            raise RuntimeError("not this one")
        return x

    monkeypatch.setattr(net.forward, "forward", forward)
    threads(2)
    x = torch.tensor([-1.0, 1.0, -1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="not this one"):
            net(x)
        assert torch.equal(net(-x.abs()), -x.abs())  # the threads are still there


@pytest.mark.parametrize("what", ["dropout", "batch norm", "hook", "gradients", "few images"])
def test_a_batch_stays_whole_where_it_must(what, threads, monkeypatch):
    torch.manual_seed(0)
    norm = "batch" if what == "batch norm" else "instance"
    net = define_G(3, 3, 8, "resnet_6blocks", norm, use_dropout=what == "dropout")
    compute_in_threads([net], argparse.Namespace(precision="tf32"))
    if what == "hook":
        net.model[0].register_forward_hook(lambda *_: None)
    sizes = []
    monkeypatch.setattr(net.forward, "forward", lambda x: sizes.append(len(x)) or x)
    threads(4)
    with torch.set_grad_enabled(what == "gradients"):
        net(torch.zeros(2 if what == "few images" else 3, 3, 8, 8))
    assert len(sizes) == 1


def test_other_networks_stay():
    class Custom(nn.ReLU):
        pass

    unet = define_G(3, 3, 8, "unet_128", "instance")
    custom = define_G(3, 3, 8, "resnet_6blocks", "instance")
    custom.model[3] = Custom()
    compute_in_threads([unet, custom], argparse.Namespace(precision="tf32"))
    assert not any("forward" in vars(net) for net in (unet, custom))


# ----------------------------------------------------------------------------------------- batches
def test_batches_have_some_images_for_each_thread(threads):
    threads(2)
    one = argparse.Namespace(batch_size=1)
    net, dropout = resnet(), resnet(use_dropout=True)
    assert batch_limits(one, [net]) == (16, 3 * 1024 * 1024)
    assert batch_limits(argparse.Namespace(batch_size=2), [net]) == (2, math.inf)
    assert batch_limits(one, [net, dropout]) == (1, math.inf)
    assert batch_limits(one, [net, define_G(3, 3, 8, "unet_128")]) == (1, math.inf)


def test_files_are_written_in_threads_where_images_are_computed_in_threads(threads):
    threads(2)
    found = [
        encoding_threads(argparse.Namespace(num_threads=number), nets)
        for number in (0, 5)
        for nets in ([resnet()], [resnet(), define_G(3, 3, 8, "unet_128")])
    ]
    assert found == [2, 0, 5, 5]


def test_large_images_are_batches_by_themselves():
    items = [{"A": torch.zeros(1, 3, side, side)} for side in (8, 8, 9, 9, 8)]
    sizes = [batch["A"].shape[0] for batch in equal_batches(items, 4, largest=3 * 64)]
    assert sizes == [2, 1, 1, 1]


@available
@pytest.mark.parametrize("words", [[], ["--only_outputs"]], ids=["page", "only_outputs"])
def test_results_stay_within_a_level(tmp_path, words, threads, calls):
    for i, size in enumerate([(64, 64)] * 5 + [(48, 64), (64, 48), (64, 64)]):
        picture(tmp_path / "images" / f"{i}.png", *size, k=i)
    torch.manual_seed(3)
    folder = tmp_path / "checkpoints" / "run"
    folder.mkdir(parents=True)
    net = define_G(3, 3, 16, "resnet_6blocks", "instance")
    torch.save(net.state_dict(), folder / "latest_net_G.pth")
    options = {
        "dataroot": tmp_path / "images",
        "checkpoints_dir": folder.parent,
        **{"name": "run", "ngf": 16, "netG": "resnet_6blocks", "preprocess": "none"},
        "gpu_ids": -1,
    }
    common = [str(word) for k, v in options.items() for word in (f"--{k}", v)] + ["--no_dropout"]
    threads(2)
    exact = ["--precision", "fp32", "--results_dir", tmp_path / "exact"]
    succeed("test.py", *common, *words, *exact)
    assert not calls
    succeed("test.py", *common, *words, "--results_dir", tmp_path / "default")
    assert calls
    found = sorted((tmp_path / "default").rglob("*.png"))
    assert len(found) == (8 if words else 16)
    for path in found:
        other = tmp_path / "exact" / path.relative_to(tmp_path / "default")
        levels = (np.asarray(Image.open(file)).astype(int) for file in (path, other))
        assert abs(next(levels) - next(levels)).max() <= 1
