"""Faster ways to compute give what the plain way gives, as closely as they promise."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import nn

from models import create_model, networks
from models.cycle_gan_model import CycleGANModel
from models.speed import acceleration, channels_last, gradient_scale, passes, row_convolution
from models.speed.gradient_scale import GradientScale
from models.speed.prepared import prepared, uncompiled
from models.speed.steps import parameters_of
from options.speed import choose_fast, hint_for_busy_cores, too_few_to_compile
from options.train_options import TrainOptions
from tests.helpers import SHORT, run_process, succeed, unaligned

TINY = "--ngf 4 --ndf 4 --netG resnet_6blocks --gpu_ids -1 --display_id 0 --name x --seed 3"


def build(tmp_path, flags: str, base: str = TINY) -> Any:
    folders = f"--dataroot {tmp_path} --checkpoints_dir {tmp_path}"
    opt = TrainOptions(f"{folders} {base} {flags}").parse(save=False)
    torch.manual_seed(0)
    model = create_model(opt)
    model.setup(opt)
    return model


def batch(n: int = 1, seed: int = 0, size: int = 32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(2, n, 3, size, size, generator=generator) * 2 - 1
    return {"A": pictures[0], "B": pictures[1], "A_paths": ["a"] * n, "B_paths": ["b"] * n}


def gradients(model, data) -> dict[str, torch.Tensor]:
    """What one iteration steps by, in float64 so that rounding does not show; no step is taken."""
    for net in model.networks().values():
        net.double()
    model.criterionGAN.double()
    names = {
        p: f"{name}.{key}"
        for name, net in model.networks().items()
        for key, p in net.named_parameters()
    }
    found = {}

    def take(optimizer, args, kwargs) -> None:
        for p in parameters_of(optimizer):
            if p.grad is not None:
                found[names[p]] = p.grad
            p.grad = None

    hooks = [optimizer.register_step_pre_hook(take) for optimizer in model.optimizers]
    data = {k: v.double() if torch.is_tensor(v) else v for k, v in data.items()}
    model.set_input(data)
    model.optimize_parameters()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix --norm instance --no_dropout"])
@pytest.mark.parametrize(
    "flags", ["--batch_passes on", "--grad_checkpoint", "--channels_last --batch_passes on"]
)
def test_same_gradients(model, flags, tmp_path):
    plain = gradients(build(tmp_path, f"--model {model} --batch_passes off"), batch(2))
    fast = gradients(build(tmp_path, f"--model {model} {flags}"), batch(2))
    assert plain.keys() == fast.keys()
    assert len(plain) > 30
    for key, gradient in plain.items():
        torch.testing.assert_close(fast[key], gradient, rtol=1e-9, atol=1e-12)


def test_passes_are_really_shared(tmp_path):
    """Two passes fewer for each generator and one for each discriminator."""

    def passes(flags: str) -> dict[str, int]:
        model = build(tmp_path, f"--model cycle_gan {flags}")
        counts = dict.fromkeys(model.model_names, 0)
        for name, net in model.networks().items():
            forward = net.forward

            def counted(x: torch.Tensor, name=name, forward=forward) -> torch.Tensor:
                counts[name] += 1
                return forward(x)

            net.forward = counted
        model.set_input(batch())
        model.optimize_parameters()
        return counts

    assert passes("--batch_passes off") == {"G_A": 3, "G_B": 3, "D_A": 3, "D_B": 3}
    assert passes("--batch_passes on") == {"G_A": 2, "G_B": 2, "D_A": 2, "D_B": 2}


def test_batch_norm_and_dropout_keep_their_own_passes():
    """Their result depends on the batch, so one pass would not give the same."""
    x = torch.rand(1, 3, 32, 32)
    for norm, dropout, free in [
        ("instance", False, True),
        ("none", False, True),
        ("batch", False, False),
        ("instance", True, False),
    ]:
        net = networks.define_G(3, 3, 4, "resnet_6blocks", norm, dropout)
        assert passes.can_batch(net, x, x) is free
        assert passes.can_batch(net.eval(), x, x)
    assert not passes.can_batch(net, x, torch.rand(1, 3, 32, 36))


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Two batches of 1 with --accumulate 2 step as one batch of 2: losses are means."""
    whole = build(tmp_path, "--model cycle_gan --batch_size 2 --pool_size 0")
    parts = build(tmp_path, "--model cycle_gan --accumulate 2 --pool_size 0")
    data = batch(2)
    wanted = gradients(whole, data)
    gradients(parts, {k: v[:1] for k, v in data.items()})
    found = gradients(parts, {k: v[1:] for k, v in data.items()})
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)


def test_accumulation_steps_every_nth_time(tmp_path):
    model = build(tmp_path, "--model cycle_gan --accumulate 3")
    weight = model.netG_A.model[1].weight
    changed = []
    for i in range(6):
        before = weight.detach().clone()
        model.set_input(batch(seed=i))
        model.optimize_parameters()
        changed.append(not torch.equal(before, weight))
    assert changed == [False, False, True, False, False, True]


def test_accumulated_batches_have_one_scale(tmp_path, monkeypatch):
    """With --precision fp16 gradients are scaled; by powers of two, which leaves no trace."""
    monkeypatch.setattr(gradient_scale, "GROW_AFTER", 1)  # grows with each step
    trained = []
    for scale in (None, GradientScale(8.0)):
        model = build(tmp_path, "--model cycle_gan --accumulate 2")
        model._steps.scale = scale
        for net in model.networks().values():
            prepared(net).prepared_scale = scale
        for i in range(4):
            model.set_input(batch(seed=i))
            model.optimize_parameters()
        trained.append(model)
    plain, scaled = trained
    assert scaled._steps.scale.factor == 8.0 * 2**4  # two steps of two optimizers
    for name, state in plain.network_states().items():
        for key, value in scaled.network_states()[name].items():
            torch.testing.assert_close(value, state[key], rtol=1e-5, atol=1e-7)


def test_gradients_that_one_of_the_processes_lacked(tmp_path):
    model = build(tmp_path, "--model cycle_gan")
    lacking = [[[None, torch.full((2,), 3.0), None]], [[torch.full((2,), 4.0), None, None]]]
    states = [{"parts": {}, "gradients": own, "metric": [0.0, 0]} for own in lacking]
    (resharded,) = model.reshard_state(states, 1)
    assert [None if g is None else g.tolist() for g in resharded["gradients"][0]] == [
        [2.0, 2.0], [1.5, 1.5], None,
    ]  # fmt: skip


def test_accumulated_gradients_survive_a_resume(tmp_path):
    """Saved in the middle of a step, the state holds the gradients of its first batches."""
    flags = "--model cycle_gan --accumulate 2"
    first, second = build(tmp_path, flags), build(tmp_path, flags)
    first.set_input(batch(seed=1))
    first.optimize_parameters()
    for name, net in second.networks().items():
        net.load_state_dict(first.networks()[name].state_dict())
    second.load_training_state(first.training_state(), vars(first.opt))
    for model in (first, second):
        torch.manual_seed(0)
        model.set_input(batch(seed=2))
        model.optimize_parameters()
    for ours, wanted in zip(second.netG_A.parameters(), first.netG_A.parameters(), strict=True):
        assert torch.equal(ours, wanted)


def test_bf16_is_near_and_losses_stay_float32(tmp_path):
    """bf16 has 8 bits of mantissa: results are near those of float32, and not the same."""
    data = batch()
    found = {}
    for precision in ("fp32", "bf16"):
        model = build(tmp_path, f"--model cycle_gan --precision {precision}")
        model.set_input(data)
        model.optimize_parameters()
        assert model.fake_B.dtype == torch.float32
        assert model.loss_G.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in model.netG_A.parameters())
        found[precision] = model.fake_B.detach()
    difference = (found["bf16"] - found["fp32"]).abs().max()
    assert 1e-6 < difference < 0.1


def test_gradient_penalty_is_computed_in_full_precision(tmp_path):
    """With --precision bf16 the penalty is that of float32, to float32's rounding."""
    flags = "--model cycle_gan --gan_mode wgangp --norm none"
    plain = build(tmp_path, f"{flags} --precision fp32")
    half = build(tmp_path, f"{flags} --precision bf16")
    data = batch()
    penalties = []
    for model in (plain, half):
        torch.manual_seed(1)
        penalty, _ = networks.cal_gradient_penalty(
            model.netD_A, data["A"], data["B"], torch.device("cpu")
        )
        penalties.append(penalty.item())
    assert penalties[1] == pytest.approx(penalties[0], rel=1e-6)


def test_files_are_the_same_in_every_memory_format(tmp_path):
    model = build(tmp_path, "--model cycle_gan --channels_last")
    for state in model.network_states().values():
        for value in state.values():
            assert value.is_contiguous()


def test_strides_are_those_of_gradients_in_channels_last_layout():
    """Also for gray images and 1x1 kernels, or the fused Adam of PyTorch 2.4 stops."""
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 1))
    acceleration.prepare(net, torch.device("cpu"), channels_last=True)
    assert net[0].weight.stride() == (9, 1, 3, 1)
    assert net[1].weight.stride() == (8, 1, 8, 8)


def test_channels_last_leaves_volumes_alone():
    """--fast takes it on a GPU, where a model of one's own may have them."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(3, 4, 3))
    before = [p.clone() for p in net.parameters()]
    acceleration.prepare(net, torch.device("cpu"), channels_last=True)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert net[1].weight.is_contiguous()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_compile_is_off_with_a_line_where_sizes_change(tmp_path, capsys):
    build(tmp_path, "--model cycle_gan --compile --preprocess scale_width")
    out = capsys.readouterr().out
    assert "--compile is off: --preprocess scale_width gives images of many sizes" in out


def test_compile_is_off_with_a_line_without_a_compiler(tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", broken)
    model = build(tmp_path, "--model cycle_gan --compile")
    assert "--compile is off: the compiler does not work here (no C++" in capsys.readouterr().out
    model.set_input(batch())
    model.optimize_parameters()


@pytest.mark.slow
@pytest.mark.parametrize(("graphs", "antialias"), [(False, False), (True, True)])
def test_compiled_networks_give_the_same_gradients(graphs, antialias):
    """The real compiler, on a small generator: to the rounding of another order of sums."""
    torch.manual_seed(0)
    norm = networks.get_norm_layer("instance")
    net = networks.ResnetGenerator(3, 3, 4, norm, False, 1, "reflect", antialias, antialias)
    x = torch.rand(1, 3, 32, 32)

    def found() -> list[torch.Tensor]:
        net.zero_grad()
        result = net(x)
        result.square().sum().backward()
        return [result.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    plain = found()
    acceleration.prepare(net, torch.device("cpu"), compiled=True, graphs=graphs)
    if graphs:
        torch.compiler.cudagraph_mark_step_begin()
    assert "model.1.weight" in net.state_dict()
    # of biases in front of a norm the true gradient is 0, and what comes out is rounding
    scale = max(gradient.abs().max().item() for gradient in plain[1:])
    for ours, wanted in zip(found(), plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-5 * scale)


def test_networks_that_do_not_learn_run_as_written_where_asked():
    net = prepared(networks.define_G(3, 3, 4, "resnet_6blocks", "instance"))
    x = torch.rand(1, 3, 32, 32)
    wanted = net(x)
    net._compiled_call_impl = lambda x: "compiled"
    with torch.no_grad():
        assert net(x) == "compiled"
        with uncompiled():
            torch.testing.assert_close(net(x), wanted.detach())
        assert net(x) == "compiled"
    with uncompiled():
        assert net(x) == "compiled"  # it learns


def test_validation_does_not_compile(tmp_path, monkeypatch):
    learning = []

    def compile(net, **options):
        def call(*args, **kwargs):
            learning.append(torch.is_grad_enabled())
            return net._call_impl(*args, **kwargs)

        net._compiled_call_impl = call

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setattr("options.base_options.why_not_compile", lambda *a: None)
    where = ["--dataroot", unaligned(tmp_path / "data"), "--checkpoints_dir", tmp_path]
    words = ["--model", "cycle_gan", *TINY.split(), *SHORT, "--load_size", 32, "--crop_size", 32]
    succeed("train.py", *where, *words, "--compile", "--val_freq", 1, "--val_phase", "test")
    assert learning
    assert all(learning)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_norm_of_compiled_networks(kind, monkeypatch):
    """The form that the compiler sees, against the usual one in float64."""
    net = torch.nn.Sequential(torch.nn.InstanceNorm2d(4))
    x = (torch.randn(2, 4, 9, 7, dtype=torch.float64) * 3 + 5).to(kind).requires_grad_()
    weights = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    known = net(x.double())
    wanted = torch.autograd.grad((known * weights).sum(), x)[0]
    channels_last.keep_layout(net, compiled=True)
    assert torch.equal(net(x), torch.nn.InstanceNorm2d(4)(x))  # where nothing is compiled
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours = net(x)
    gradient = torch.autograd.grad((ours * weights).sum(), x)[0]
    assert ours.dtype == gradient.dtype == kind
    close = {"rtol": 1e-2, "atol": 1e-2} if kind is torch.bfloat16 else {}
    torch.testing.assert_close(ours, known.to(kind), **close)
    torch.testing.assert_close(gradient, wanted, **close)


def test_fast_says_what_it_is_and_leaves_what_was_given(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("options.base_options.why_not_compile", lambda *a: "not in this test")
    model = build(tmp_path, "--model cycle_gan --fast --precision fp32")
    assert "--fast stands for --precision fp32" in capsys.readouterr().out
    assert model.opt.precision == "fp32"
    assert model.opt.batch_passes == "on"
    assert model.optimizer_G.defaults["fused"]


@pytest.mark.parametrize(
    ("training", "accumulate", "bf16", "wanted"),
    [
        (True, 1, True, "--precision bf16 --compile --channels_last --cuda_graphs"),
        (True, 4, True, "--precision bf16 --compile --channels_last"),
        (True, 1, False, "--precision fp16 --compile --channels_last"),
        (False, 1, True, "--precision bf16 --compile --channels_last"),
    ],
)
def test_what_fast_is_on_a_gpu(training, accumulate, bf16, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
    opt = TrainOptions(f"--dataroot {tmp_path} --gpu_ids -1").parse(save=False)
    opt.isTrain, opt.accumulate = training, accumulate
    words = choose_fast(opt, torch.device("cuda"), set())
    assert " ".join(words) == f"{wanted} --batch_passes on"
    assert (opt.cuda_graphs == "on") is ("--cuda_graphs" in wanted)


def test_auto_shares_passes_on_a_cpu_where_that_pays_and_stays_close():
    small, large = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 128, 128)
    found = {
        (choice, net): [
            passes.should_batch(Namespace(batch_passes=choice, netG=net), x) for x in (small, large)
        ]
        for choice in ("auto", "on", "off")
        for net in ("resnet_9blocks", "unet_128")
    }
    assert found == {
        ("auto", "resnet_9blocks"): [False, True],
        ("auto", "unet_128"): [False, False],
        ("on", "resnet_9blocks"): [True, True],
        ("on", "unet_128"): [True, True],
        ("off", "resnet_9blocks"): [False, False],
        ("off", "unet_128"): [False, False],
    }


@pytest.mark.parametrize(
    ("flags", "pictures", "compiled"),
    [
        ("--fast", 2999, False),
        ("--fast", 3000, True),
        ("--fast --compile", 10, True),
        ("--compile", 10, True),
        ("", 10**6, False),
    ],
)
def test_a_short_run_is_not_compiled(flags, pictures, compiled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("options.base_options.why_not_compile", lambda *a: None)
    options = TrainOptions(f"--dataroot {tmp_path} --gpu_ids -1 {flags}")
    opt = options.parse(save=False)
    capsys.readouterr()
    options.decide_compile(opt, pictures)
    out = capsys.readouterr().out
    assert opt.compile is compiled
    assert ("compiling: the first iterations take" in out) is compiled
    too_few = "--compile is off: it pays off from 3000 images on, and there are 2999 in all"
    assert (too_few in out) is (pictures == 2999)


@pytest.mark.parametrize(("model", "minimum"), [("cycle_gan", 10000), ("template", 3000)])
def test_compiling_pays_later_where_iterations_are_recorded(model, minimum, tmp_path):
    opt = TrainOptions(f"--dataroot {tmp_path} --model {model} --gpu_ids -1").parse(save=False)
    opt.cuda_graphs, opt.device = True, torch.device("cuda")
    assert f"from {minimum} images on" in str(too_few_to_compile(opt, minimum - 1))
    assert too_few_to_compile(opt, minimum) is None
    opt.cuda_graphs = False
    assert "from 3000 images on" in str(too_few_to_compile(opt, 2999))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model", ["cycle_gan", "template"])
def test_either_iterations_or_networks_are_recorded(model, compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda net, **options: None)
    found = build(tmp_path, f"--model {model}")
    found.opt.cuda_graphs, found.opt.compile = True, compiled
    assert found._records_iterations() is (model == "cycle_gan")
    assert found._records_networks() is (model == "template" and compiled)


def test_every_loop_tells_cuda_graphs_where_an_iteration_starts(tmp_path, monkeypatch):
    """One that calls `set_input` and `optimize_parameters` and nothing else, too."""
    events = []
    monkeypatch.setattr(
        "torch.compiler.cudagraph_mark_step_begin", lambda: events.append("iteration")
    )
    monkeypatch.setattr(nn.Module, "compile", lambda net, **options: None)
    opt = TrainOptions(f"--dataroot {tmp_path} {TINY} --model cycle_gan").parse(save=False)
    opt.compile = opt.cuda_graphs = True  # needs a GPU on the command line
    monkeypatch.delattr(CycleGANModel, "recordable")  # as one that somebody has written
    model = create_model(opt)
    model.setup(opt)
    model.netG_A.register_forward_pre_hook(lambda *_: events.append("G_A"))
    for _ in range(2):
        model.set_input(batch())
        model.optimize_parameters()
    once = ["iteration", *["G_A"] * (len(events) // 2 - 1)]
    assert events == 2 * once


def test_an_iteration_does_not_load_the_compiler(tmp_path):
    """Nor what records CUDA graphs, which takes seconds to import."""
    code = (
        "import sys, torch; from tests.test_acceleration import build, batch\n"
        f"model = build({str(tmp_path)!r}, '--model cycle_gan')\n"
        "model.set_input(batch()); model.optimize_parameters()\n"
        "print([m for m in sys.modules if m in ('torch._inductor.cudagraph_trees',"
        " 'torch._inductor.compile_fx', 'torch._inductor.graph')])"
    )
    assert run_process("-c", code).out.endswith("\n[]\n")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_by_rows_are_those_of_torch(bias, channels_last, monkeypatch):
    """Values, and first and second gradients, in float64."""
    monkeypatch.setitem(row_convolution.SMALL, "cpu", 0)
    torch.manual_seed(0)
    ours = nn.Conv2d(8, 3, (7, 5), bias=bias).double()
    torchs = copy.deepcopy(ours)
    row_convolution.convolve_by_rows(ours)
    assert type(ours) is row_convolution.RowConv2d
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 8, 20, 18, dtype=torch.float64).contiguous(memory_format=layout)
    x.requires_grad_()
    found = []
    for layer in (ours, torchs):
        wanted = [x, *layer.parameters()]
        y = layer(x)
        first = torch.autograd.grad(y.tanh().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wanted[:2])
        found.append([y, *first, *second])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "by_rows"),
    [
        (nn.Conv2d(64, 3, 7), True),
        (nn.Conv2d(3, 64, 7), False),
        (nn.Conv2d(64, 3, 7, padding=3), False),
        (nn.Conv2d(64, 3, 7, stride=2), False),
        (nn.Conv2d(64, 2, 7, groups=2), False),
        (nn.Conv2d(64, 3, 3), False),
        (nn.ConvTranspose2d(64, 3, 7), False),
    ],
)
def test_which_convolutions_go_by_rows(layer, by_rows):
    net = nn.Sequential(layer)
    row_convolution.convolve_by_rows(net)
    assert (type(layer) is row_convolution.RowConv2d) is by_rows
    if by_rows:  # a small input, as torch computes it
        x = torch.randn(1, 64, 16, 16)
        assert torch.equal(net(x), nn.functional.conv2d(x, layer.weight, layer.bias))


def test_the_last_layer_of_a_resnet_goes_by_rows(tmp_path):
    """From 2^18 values on, with the values of float64; smaller ones are torch's to the bit."""
    model = build(tmp_path, "--model cycle_gan --netG resnet_6blocks --ngf 16")
    rows = [m for m in model.netG_A.modules() if type(m) is row_convolution.RowConv2d]
    (last,) = rows
    for side, close in ((64, False), (150, True)):
        x = torch.randn(1, 16, side, side)
        found, torchs = last(x), nn.functional.conv2d(x, last.weight, last.bias)
        assert torch.equal(found, torchs) != close
        known = nn.functional.conv2d(x.double(), last.weight.double(), last.bias.double())
        torch.testing.assert_close(found.double(), known, rtol=0, atol=5e-6)
    x = torch.randn(16, 150, 150)  # without a batch, as torch takes it too
    assert torch.equal(last(x), nn.functional.conv2d(x, last.weight, last.bias))


@pytest.mark.parametrize("frozen", ["all", "first"])
def test_a_compiled_network_that_was_frozen_learns(frozen):
    """PyTorch 2.11 goes on with the code that computes no gradients of what was frozen."""

    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.scales = nn.ModuleList(nn.Conv2d(3, 1, 3) for _ in range(2))

        def forward(self, x):
            return sum(scale(x).tanh() for scale in self.scales)

    torch.compiler.reset()
    net = prepared(Scales())
    net.compile(backend="aot_eager", dynamic=False)
    x = torch.randn(1, 3, 16, 16)
    parameters = list(net.parameters())
    for p in parameters if frozen == "all" else parameters[:2]:
        p.requires_grad = False
    net(x)
    for p in parameters:
        p.requires_grad = True
    net(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters)


@pytest.mark.parametrize(
    ("load", "threads", "told"), [(2.0, 2, True), (0.1, 2, False), (9.0, 1, False)]
)
def test_busy_cores_are_told(monkeypatch, load, threads, told):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert bool(hint_for_busy_cores()) is told
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert hint_for_busy_cores() is None
