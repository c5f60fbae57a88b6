"""Several processes train as one does, and end together, whatever happens to one of them."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from data import create_dataset
from data.loader import EpochOrder
from models import create_model, cut_model, patch_nce
from models.speed.layout import contiguous_gradients
from models.speed.steps import parameters_of
from models.speed.sync_norm import SyncBatchNorm2d, synchronize_norms
from options.train_options import TrainOptions
from tests import forked, ranks
from tests.helpers import aligned, files_below, picture, run_process, truncated, unaligned
from tests.ranks import Group, Torchrun
from util import distributed
from util.distributed import devices, launch
from util.errors import UserError
from util.randomness import seed_everything
from util.run import checkpoint

PICTURES = 8
TINY = (
    "--gpu_ids -1 --display_id 0 --no_html --netG resnet_6blocks --ngf 4 --ndf 4 --load_size 36 "
    "--crop_size 32 --num_threads 0 --seed 5"
).split()
SHORT = (
    "--n_epochs 2 --n_epochs_decay 1 --print_freq 2 --save_epoch_freq 2 --save_latest_freq 4"
).split()
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
MODELS = {"cycle_gan": ["--model", "cycle_gan"], "pix2pix": ["--model", "pix2pix", "--no_dropout"]}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    aligned(folder, PICTURES)
    return unaligned(folder, PICTURES)


def command(pictures: Path, folder: Path, *more: str) -> list[str]:
    where = ["--dataroot", str(pictures), "--checkpoints_dir", str(folder), "--name", "x"]
    return [*where, *TINY, *SHORT, *more]


def run_alone(log: Path, function, *args) -> None:
    """Run a function in one process of its own, without any others."""
    process = forked.call(_alone, str(log), function, args)
    process.join(100)
    assert process.exitcode == 0, log.read_text() if log.exists() else "no output"


def _alone(log: str, function, args) -> None:
    with open(log, "w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        function(*args)


# ------------------------------------------------------------------------------ the same results
def ten_steps(argv: list[str], out: str, prepare: Callable[[], None] | None = None) -> None:
    """Train ten steps in float64; the first process writes what came of it."""
    torch.set_default_dtype(torch.float64)
    if prepare is not None:
        prepare()
    reductions = []
    plain = dist.all_reduce

    def counted(x, *args, **kwargs):
        reductions.append(x.numel())
        return plain(x, *args, **kwargs)

    dist.all_reduce = counted
    opt = TrainOptions(argv).parse(save=False)
    seed_everything(opt.seed)
    dataset = create_dataset(opt)
    model = create_model(opt)
    model.setup(opt)
    contiguous_gradients(model.networks().values())  # as train.py does
    result: dict = {"gradients": {}, "reductions": [], "paths": []}
    batches = itertools.chain.from_iterable(iter(lambda: iter(dataset), None))
    for step, data in enumerate(itertools.islice(batches, 10)):
        data = {k: v.double() if torch.is_tensor(v) else v for k, v in data.items()}
        model.set_input(data)
        reductions.clear()
        model.optimize_parameters()
        result["reductions"].append(list(reductions))
        result["paths"].append(data["A_paths"])
        if step == opt.accumulate - 1:
            result["gradients"] = {
                f"{i}.{j}": p.grad.clone()
                for i, o in enumerate(model.optimizers)
                for j, p in enumerate(parameters_of(o))
                if p.grad is not None
            }
    result["weights"] = {
        f"{n}.{k}": v for n, state in model.network_states().items() for k, v in state.items()
    }
    result["sizes"] = [
        sum(p.numel() for p in parameters_of(o)) + len(parameters_of(o)) for o in model.optimizers
    ]
    result["traffic"] = vars(distributed.traffic)
    if distributed.is_main():
        torch.save(result, out)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    assert len(a) > 30
    return max(float((a[k] - b[k]).abs().max()) for k in a)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("cycle_gan", ""),
        ("cycle_gan", "--batch_passes on --accumulate 2"),
        ("pix2pix", ""),
        ("pix2pix", "--norm syncbatch --gan_mode lsgan"),
        (
            "pix2pix",
            "--netD multiscale --n_layers_D 2 --lambda_feat 10 --norm syncbatch --normD instance "
            "--spectral_norm --gp r1 --lambda_gp 0.01 --gp_every 3",
        ),
    ],
)
def test_two_processes_are_one_with_a_batch_of_two(model, flags, pictures, tmp_path):
    argv = command(pictures, tmp_path, *MODELS[model], "--pool_size", "0", *flags.split())
    group = Group(tmp_path / "log", 2, ten_steps, argv, str(tmp_path / "two"))
    assert group.wait() == 0, group.text()
    run_alone(tmp_path / "one.log", ten_steps, [*argv, "--batch_size", "2"], str(tmp_path / "one"))
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    assert [paths[:1] for paths in one["paths"]] == two["paths"]
    # float64 has 16 digits; ten steps of Adam magnify what is rounded off in them
    assert largest_difference(one["gradients"], two["gradients"]) < 1e-12
    assert largest_difference(one["weights"], two["weights"]) < 1e-7
    print("largest difference", largest_difference(one["weights"], two["weights"]))
    assert ("--norm batch: statistics are those" in group.text()) == (
        model == "pix2pix" and not flags
    )
    # one reduction for each optimizer and nothing else but the sums of norms
    every = 2 if "accumulate" in flags else 1
    sizes = one["sizes"] if model == "cycle_gan" else one["sizes"][::-1]
    for step, reductions in enumerate(two["reductions"]):
        large = [n for n in reductions if n > 1000]
        assert large == (sizes if step % every == every - 1 else [])
        assert len(reductions) == len(large) or model == "pix2pix"
    assert two["traffic"]["reductions"] == 2 * 10 // every
    assert two["traffic"]["bytes"] == sum(sizes) * 8 * 10 // every
    assert not one["traffic"]["reductions"]


def draw_nothing() -> None:
    """Make all processes sample the same patches, and flip: otherwise each draws its own."""
    patch_nce.sample_positions = lambda features, number: [
        torch.arange(0, f[0, 0].numel(), 7)[:number].expand(len(f), -1) for f in features
    ]
    cut_model.random = SimpleNamespace(random=lambda: 0.1)


@pytest.mark.parametrize(
    "flags",
    [
        "--model cut --nce_layers 0,4,8,12",
        "--model cut --CUT_mode FastCUT --nce_layers 0,4,8,12",
        "--model dcl --nce_layers 4,8,12 --accumulate 2",
    ],
)
def test_two_processes_compare_patches_as_one_does(flags, pictures, tmp_path):
    argv = command(pictures, tmp_path, *flags.split())
    group = Group(
        tmp_path / "log", 2, ten_steps, argv, str(tmp_path / "two"), lambda rank: draw_nothing
    )
    assert group.wait() == 0, group.text()
    two_at_once = [*argv, "--batch_size", "2"]
    run_alone(tmp_path / "log1", ten_steps, two_at_once, str(tmp_path / "one"), draw_nothing)
    one, two = torch.load(tmp_path / "one"), torch.load(tmp_path / "two")
    assert one["gradients"].keys() == two["gradients"].keys()
    for key, wanted in one["gradients"].items():
        # a patch of length 0 at the first step has gradients of 1e15
        limit = 1e-9 + 1e-12 * float(wanted.abs().max())
        assert float((two["gradients"][key] - wanted).abs().max()) <= limit, key
    # ten steps of 2e-4; biases in front of a norm move by rounding alone
    assert largest_difference(one["weights"], two["weights"]) < 1e-6
    every = 2 if "accumulate" in flags else 1
    assert two["traffic"]["reductions"] == 3 * 10 // every  # D, G and F


def norm_by_two(out: str) -> None:
    """A synchronized norm on half of a batch each, with gradients and their gradients."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64) * 3 + 100
    weights = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    size, rank = distributed.world_size(), distributed.rank()
    mine = slice(rank * 4 // size, (rank + 1) * 4 // size)
    net = nn.Sequential(nn.BatchNorm2d(3)).double()
    nn.init.normal_(net[0].weight, 1, 0.1)
    parameter = net[0].weight
    if size > 1:
        assert synchronize_norms(net) == 1
        assert net[0].weight is parameter
    x = x[mine].requires_grad_()
    y = net(x)
    (slope,) = torch.autograd.grad((y.square() * weights[mine]).sum(), x, create_graph=True)
    slope.square().sum().backward()
    half = copy.deepcopy(net).float()(x.detach().bfloat16())
    torch.save(
        {"y": y, "slope": slope, "grad": x.grad, "state": net.state_dict(), "half": half},
        f"{out}.{rank}",
    )


def test_synchronized_norm_is_batch_norm_of_the_whole_batch(tmp_path):
    group = Group(tmp_path / "log", 2, norm_by_two, str(tmp_path / "two"))
    assert group.wait() == 0, group.text()
    run_alone(tmp_path / "one.log", norm_by_two, str(tmp_path / "one"))
    one = torch.load(tmp_path / "one.0")
    parts = [torch.load(tmp_path / f"two.{rank}") for rank in (0, 1)]
    for key in ("y", "slope", "grad"):
        both = torch.cat([part[key] for part in parts])
        torch.testing.assert_close(both, one[key], rtol=1e-9, atol=1e-11)
    assert parts[0]["state"].keys() == one["state"].keys()
    for key, value in one["state"].items():
        torch.testing.assert_close(parts[1]["state"][key], value, rtol=1e-12, atol=1e-12)
    assert parts[0]["half"].dtype == torch.bfloat16


def test_a_synchronized_norm_by_itself_is_batch_norm():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    ours, plain = SyncBatchNorm2d(3), nn.BatchNorm2d(3)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for _ in range(2):
        assert torch.equal(ours(x), plain(x))
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    assert torch.equal(ours.eval()(x), plain.eval()(x))


def gradients_that_lack(out: str) -> None:
    nets = [nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(1, 1)]
    for p in nets[0].parameters():
        p.grad = torch.full_like(p, distributed.rank() + 1.0)
    if distributed.rank() == 1:
        nets[1].weight.grad = torch.full_like(nets[1].weight, 4.0)
    distributed.average_gradients([p for net in nets for p in net.parameters()])
    torch.save([p.grad for net in nets for p in net.parameters()], f"{out}.{distributed.rank()}")
    assert distributed.traffic.reductions == 1


def test_gradients_that_are_not_everywhere(tmp_path):
    group = Group(tmp_path / "log", 2, gradients_that_lack, str(tmp_path / "out"))
    assert group.wait() == 0, group.text()
    for rank in (0, 1):
        grads = torch.load(tmp_path / f"out.{rank}")
        assert [None if g is None else float(g.mean()) for g in grads] == [
            1.5, 1.5, 2.0, None, None, None,
        ]  # fmt: skip


# ----------------------------------------------------------------------------------- shares of data
@pytest.mark.parametrize(
    ("size", "processes", "batch"), [(8, 2, 1), (7, 2, 2), (10, 3, 2), (2, 3, 1), (5, 4, 4)]
)
def test_shares_are_those_of_one_process_with_a_larger_batch(size, processes, batch):
    def drawn(rank: int, of: int, each: int, start: int = 0) -> list:
        order = EpochOrder(size, True, 3, (rank, of, each))
        order.epoch, order.start = 4, start
        return list(order)

    whole = processes * batch
    for start in {0, min(whole, size - 1)}:
        one = drawn(0, 1, whole, start)
        shares = [drawn(rank, processes, batch, start) for rank in range(processes)]
        assert len({len(share) for share in shares}) == 1
        for first in range(0, len(shares[0]), batch):
            together = [d for share in shares for d in share[first : first + batch]]
            wanted = one[first * processes : first * processes + whole]
            assert together[: len(wanted)] == wanted
            padding = len(together) - len(wanted)
            assert padding < processes
            if padding:
                assert first + batch >= len(shares[0])


# ---------------------------------------------------------------------------------- whole trainings
def saved(folder: Path) -> dict:
    return torch.load(folder / "x" / "latest_train_state.pth", weights_only=True)


def all_weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((folder / "x").glob("latest_net_*.pth")):
        for key, value in torch.load(path, weights_only=True).items():
            found[f"{path.name}:{key}"] = value
    return found


def assert_same(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == wanted.keys()
    assert len(wanted) > 30
    assert not [key for key in wanted if not torch.equal(ours[key], wanted[key])]


def train_to_the_end(group: Group) -> str:
    assert group.wait() == 0, group.text()
    return group.text()


def test_three_processes_print_and_save_once(pictures, tmp_path):
    argv = command(pictures, tmp_path, "--accumulate", "2")
    text = train_to_the_end(Group(tmp_path / "log", 3, ranks.train, argv))
    assert text.count("--- Options ---") == text.count("End of epoch 3 / 3") == 1
    assert "warning" not in text
    assert "rank" not in text
    state = saved(tmp_path)
    assert state["total_iters"] == 3 * PICTURES
    assert (state["processes"], len(state["ranks"])) == (3, 2)
    # each draws its own
    states = [state["random"]["torch"], *(r["random"]["torch"] for r in state["ranks"])]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(states, 2))
    log = (tmp_path / "x" / "loss_log.txt").read_text()
    assert log.count("(epoch: 1,") == 3  # at 3, 6 and 8 images


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    argv = command(pictures, folder, "--pool_size", "2", "--dropout")
    train_to_the_end(Group(folder / "log", 2, ranks.train, argv))
    return folder


@pytest.mark.parametrize(("number", "writes_then"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_signal_to_any_stops_all_and_they_go_on_exactly(
    number, writes_then, pictures, uninterrupted, tmp_path
):
    """Each machine has a folder of its own, and the first process may come to another machine."""

    def argv(rank: int, where: int) -> list[str]:
        flags = ["--pool_size", "2", "--dropout", "--continue_train"]
        return command(pictures, tmp_path / str(where ^ rank), *flags)

    group = Group(tmp_path / "log", 2, ranks.train, lambda rank: argv(rank, 0), machines=True)
    group.wait_for("(epoch: 2, iters: 4")
    group.kill(1, number)
    assert group.wait() == 128 + number, group.text()
    assert group.text().count(f"stopped: got {signal.Signals(number).name}") == 1
    assert 0 < saved(tmp_path / "0")["total_iters"] < 3 * PICTURES
    assert not (tmp_path / "1").exists()
    again = [ranks.train, lambda rank: argv(rank, writes_then)]
    group = Group(tmp_path / "log2", 2, *again, machines=True)
    assert train_to_the_end(group).count("resuming from 'latest'") == 1
    folder = tmp_path / str(writes_then)
    assert_same(all_weights(folder), all_weights(uninterrupted))
    assert saved(folder)["total_iters"] == 3 * PICTURES


def test_time_is_up_for_all(pictures, tmp_path):
    argv = command(pictures, tmp_path, "--max_hours", "0.000001")
    group = Group(tmp_path / "log", 2, ranks.train, argv)
    assert group.wait() == 0, group.text()
    assert group.text().count("stopped: --max_hours") == 1
    assert saved(tmp_path)["total_iters"] < PICTURES


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 3)])
def test_going_on_with_another_number(first, then, pictures, tmp_path):
    argv = command(pictures, tmp_path, "--pool_size", "3", "--accumulate", "2")
    stop = [*argv, "--max_hours", "0.0000001"]
    train_to_the_end(Group(tmp_path / "log", first, ranks.train, stop))
    text = train_to_the_end(
        Group(tmp_path / "log2", then, ranks.train, [*argv, "--continue_train"])
    )
    assert text.count(f"number of processes: {first} when this was saved, {then} now;") == 1
    assert saved(tmp_path)["total_iters"] == 3 * PICTURES
    assert saved(tmp_path).get("processes", 1) == then


# ------------------------------------------------------------------------------ mistakes, deaths
class BadInput:
    """Makes the images of one process NaN in one iteration, or in all from then on."""

    def __init__(self, rank: int, always: bool):
        self.rank, self.always = rank, always

    def __call__(self) -> None:
        from models.cycle_gan_model import CycleGANModel

        plain, count = CycleGANModel.set_input, itertools.count()

        def set_input(model, data):
            plain(model, data)
            bad = next(count) == 5
            if distributed.rank() == self.rank and bad:
                model.real_A = model.real_A * float("nan")

        CycleGANModel.set_input = set_input  # type: ignore[method-assign]


class BadLoss(BadInput):
    """One process reports a loss that is not finite, whose gradients are."""

    def __call__(self) -> None:
        from models.cycle_gan_model import CycleGANModel

        plain, count = CycleGANModel.loss_values, itertools.count()

        def loss_values(model, names):
            values = plain(model, names)
            if distributed.rank() == self.rank and len(names) == 8 and next(count) in (5, 6):
                values[0] = float("inf")
            return values

        CycleGANModel.loss_values = loss_values  # type: ignore[method-assign]


def test_a_loss_that_harms_nothing_ends_nothing(pictures, tmp_path):
    """What must be finite is what was backpropagated, not what is shown of it."""
    argv = command(pictures, tmp_path)
    group = Group(tmp_path / "log", 2, ranks.train, argv, lambda _: BadLoss(1, False))
    train_to_the_end(group)


def test_not_finite_in_one_ends_all(pictures, tmp_path):
    argv = command(pictures, tmp_path)
    group = Group(tmp_path / "log", 2, ranks.train, argv, lambda _: BadInput(1, False))
    assert group.wait(60) == 1, group.text()
    text = group.text()
    assert text.count("error: ") == 1
    assert re.search(r"not finite at epoch [12], iters \d, on .*trainA", text)
    assert saved(tmp_path)["total_iters"] <= 10


def test_not_finite_in_one_is_skipped_by_all(pictures, tmp_path):
    argv = command(pictures, tmp_path, "--on_nan", "skip", "--num_threads", "1")
    group = Group(tmp_path / "log", 2, ranks.train, argv, lambda _: BadInput(1, False))
    text = train_to_the_end(group)
    assert text.count("warning: ") == text.count("this step is skipped") == 1
    assert all(bool(w.isfinite().all()) for w in all_weights(tmp_path).values())


def test_a_mistake_is_told_once(pictures, tmp_path):
    argv = command(tmp_path / "nothing", tmp_path)
    group = Group(tmp_path / "log", 3, ranks.train, argv)
    assert group.wait(30) == 1
    assert group.text().count("error: ") == 1
    assert "[rank" not in group.text()
    group = Group(tmp_path / "log2", 2, ranks.train, [*argv, "--netG", "nope"])
    assert group.wait(30) == 2
    assert group.text().count("error: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "syncbatch"])
def test_blocks_that_are_computed_again_count_a_batch_once(norm, pictures, tmp_path):
    """A compiled network with --grad_checkpoint would count each batch twice."""
    argv = command(pictures, tmp_path, "--norm", norm, "--grad_checkpoint", "--compile")
    text = train_to_the_end(Group(tmp_path / "log", 2, ranks.train, [*argv, "--n_epochs", "1"]))
    assert text.count("a ResnetGenerator is not compiled: with --grad_checkpoint") == 2
    weights = torch.load(tmp_path / "x" / "latest_net_G_A.pth", weights_only=True)
    counts = {int(v) for k, v in weights.items() if k.endswith("num_batches_tracked")}
    assert len(counts) == 1


def test_a_mistake_of_one_machine_is_told_with_its_rank(pictures, tmp_path):
    def argv(rank: int) -> list[str]:
        return command(tmp_path / "nothing" if rank == 1 else pictures, tmp_path)

    group = Group(tmp_path / "log", 2, ranks.train, argv)
    begin = time.monotonic()
    assert group.wait(30) == 1
    assert time.monotonic() - begin < 20
    assert re.findall(r"^.*error: .{20}", group.text(), re.M) == [
        f"[rank 1] error: {group.text().split('error: ')[1][:20]}"
    ]


def test_machines_with_different_pictures(pictures, tmp_path):
    def argv(rank: int) -> list[str]:
        return command(pictures, tmp_path, "--max_dataset_size", str(7 + rank))

    group = Group(tmp_path / "log", 2, ranks.train, argv)
    assert group.wait(30) == 1
    assert "[rank 1] error: images: 8 here, 7 in the first process" in group.text()


@pytest.mark.parametrize("word", ["--continue_train", "--serial_batches"])
def test_machines_with_different_flags(word, pictures, tmp_path):
    """They would wait for each other, or train on with other images than in one process."""

    def argv(rank: int) -> list[str]:
        return command(pictures, tmp_path, *[word] * rank, "--num_threads", str(rank))

    group = Group(tmp_path / "log", 2, ranks.train, argv)
    assert group.wait(30) == 1
    said = f"[rank 1] error: {word}: True here, False in the first process: all machines need the"
    assert group.text().count("error: ") == group.text().count(said) == 1


def fail_in_iteration(number: int) -> None:
    from models.cycle_gan_model import CycleGANModel

    plain, count = CycleGANModel.optimize_parameters, itertools.count()

    def optimize_parameters(model):
        if distributed.rank() == 1 and next(count) == number:
            raise ZeroDivisionError("a bug of one process")
        plain(model)

    CycleGANModel.optimize_parameters = optimize_parameters  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("option", "values"), [("--save_latest_freq", "46"), ("--max_hours", "12"), ("--ngf", "48")]
)
def test_machines_with_different_options(option, values, pictures, tmp_path):
    def argv(rank: int) -> list[str]:
        return command(pictures, tmp_path, option, values[rank])

    group = Group(tmp_path / "log", 2, ranks.train, argv)
    assert group.wait(30) == 1, group.text()
    here, first = values[1], values[0]
    assert re.search(rf"rank 1\] error: {option}: {here}\S* here, {first}", group.text())


def loading_takes_long() -> None:
    """In one process an image comes to be asked for that its disk does not give."""
    import multiprocessing

    from data.unaligned_dataset import UnalignedDataset

    multiprocessing.set_start_method("fork", force=True)  # as in a program started by hand
    plain, count = UnalignedDataset.__getitem__, itertools.count()

    def get(dataset, index):
        if distributed.rank() == 1 and next(count) == 5:
            time.sleep(100)
        return plain(dataset, index)

    UnalignedDataset.__getitem__ = get  # type: ignore[method-assign]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to another")
def test_processes_that_load_do_not_hide_a_death(pictures, tmp_path):
    argv = command(pictures, tmp_path, "--num_threads", "1")
    group = Group(tmp_path / "log", 2, ranks.train, argv, lambda _: loading_takes_long)
    group.wait_for("(epoch: 1, iters: 8")
    time.sleep(1)
    begin = time.monotonic()
    group.kill(1)
    assert group.wait(30) == -signal.SIGKILL
    assert time.monotonic() - begin < 4


def test_a_bug_in_one_shows_its_traceback(pictures, tmp_path):
    argv = command(pictures, tmp_path)
    fail = functools.partial(fail_in_iteration, 5)
    group = Group(tmp_path / "log", 2, ranks.train, argv, lambda _: fail)
    assert group.wait(30) == 1
    assert "[rank 1] ZeroDivisionError: a bug of one process" in group.text()
    assert group.text().count("Traceback") == 1
    assert "error: another process" not in group.text()


def test_one_that_is_told_to_stop_does_not_report_that_another_has_failed(pictures, tmp_path):
    argv = command(pictures, tmp_path, "--num_threads", "1")
    group = Group(tmp_path / "log", 2, ranks.train, argv, lambda _: loading_takes_long)
    group.wait_for("(epoch: 1, iters: 8")
    time.sleep(1)
    group.kill(0, signal.SIGTERM)  # it waits for the other, inside gloo
    group.kill(1)
    assert group.codes(30) == [128 + signal.SIGTERM, -signal.SIGKILL]
    assert "error: another process" not in group.text()


def test_a_folder_that_is_being_trained_ends_all(pictures, tmp_path):
    from util.run.stopping import ExperimentLock

    lock = ExperimentLock(tmp_path / "x")
    lock.acquire()
    try:
        group = Group(tmp_path / "log", 2, ranks.train, command(pictures, tmp_path))
        assert group.wait(30) == 1
    finally:
        lock.release()
    assert group.text().count("error: ") == 1
    assert "is being trained by" in group.text()


def test_restarted_before_the_first_save(pictures, tmp_path):
    """What an earlier training has left in the folder is not what a restart goes on from."""
    argv = command(pictures, tmp_path, "--save_latest_freq", "1000")
    train_to_the_end(Group(tmp_path / "log", 1, ranks.train, argv))
    first = Group(tmp_path / "log1", 2, ranks.train, argv)
    first.wait_for("(epoch: 1, iters: 2")
    first.kill(1)
    assert first.wait(30) == -signal.SIGKILL
    text = train_to_the_end(Group(tmp_path / "log2", 2, ranks.train, argv, before=first))
    assert text.count("restarted by torchrun before anything was saved") == 1
    assert "resuming" not in text
    assert saved(tmp_path)["total_iters"] == 3 * PICTURES
    fail = functools.partial(fail_in_iteration, 0)
    first = Group(tmp_path / "log4", 2, ranks.train, argv, lambda _: fail)
    assert first.wait(30) == 1
    text = train_to_the_end(Group(tmp_path / "log5", 2, ranks.train, argv, before=first))
    assert text.count("restarted by torchrun before anything was saved") == 1
    assert "resuming" not in text
    third = Group(tmp_path / "log3", 2, ranks.train, [*argv, "--n_epochs", "3"], before=first)
    text = train_to_the_end(third)
    assert text.count("restarted by torchrun: training goes on from the newest save") == 1
    assert saved(tmp_path)["total_iters"] == 4 * PICTURES


@pytest.mark.slow
def test_killed_five_times_at_random_moments(pictures, tmp_path):
    rng = random.Random(1)

    def argv(epochs: int) -> list[str]:
        longer = ["--n_epochs", str(epochs), "--n_epochs_decay", "0", "--continue_train"]
        return command(pictures, tmp_path, *longer)

    slowest, kills = 0.0, 0
    for attempt in range(5):
        group = Group(tmp_path / f"log{attempt}", 2, ranks.train, argv(1000))
        group.wait_for("(epoch: " if attempt else "(epoch: 2")  # by then something is saved
        ranks.moment(rng, 0.6)
        killed = rng.randrange(2)
        begin = time.monotonic()
        group.kill(killed)
        codes = group.codes(60)
        slowest = max(slowest, time.monotonic() - begin)
        kills += codes[killed] == -signal.SIGKILL
        assert codes[1 - killed] == 1, group.text()
        assert group.text().count("error: another process") == 1
        found = checkpoint.find_checkpoint(tmp_path / "x", ["G_A", "G_B", "D_A", "D_B"])
        assert found is None or not found.skipped
    print(f"slowest end after a kill: {slowest:.1f} s")
    assert kills == 5
    # nobody was there to remove the lock's file, which holds nobody off
    last = saved(tmp_path)["epoch"] + 1
    text = train_to_the_end(Group(tmp_path / "log", 2, ranks.train, argv(last)))
    assert "resuming from" in text
    assert saved(tmp_path)["total_iters"] == last * PICTURES


# ---------------------------------------------------------------------------------- several GPUs
def test_a_batch_of_all_gpus(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(devices, "gpu_count", lambda: 4)
    monkeypatch.setattr(launch, "launch", lambda n, argv: started.append((n, argv)) or 7)
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataroot", "x", "--gpu_ids", "0,1,2,3"])

    def end(*more: str) -> object:
        monkeypatch.setattr(sys, "argv", [*sys.argv[:5], *more])
        with pytest.raises(SystemExit) as stop:
            launch.one_process_per_gpu(TrainOptions())
        return stop.value.code

    assert end("--batch_size", "8") == 7
    assert started == [(4, [*sys.argv, "--batch_size=2"])]
    assert end("--batch_size", "4", "--name", "x", "--suffix", "b{batch_size}_{netG}") == 7
    name = "x_b4_resnet_9blocks"
    assert started.pop() == (4, [*sys.argv, "--batch_size=1", f"--name={name}", "--suffix="])
    assert end("--batch_size", "6") == 2
    err = capsys.readouterr().err
    assert "--batch_size 6" in err
    assert "multiple of 4" in err
    assert err.count("\n") == 1
    monkeypatch.setattr(devices, "gpu_count", lambda: 2)
    assert end("--batch_size", "8") == 2
    assert "no GPU 2" in capsys.readouterr().err
    sys.argv[4] = "0"
    launch.one_process_per_gpu(TrainOptions())
    assert len(started) == 1


@pytest.mark.parametrize(
    ("ids", "local", "gpu"), [("0", 2, 2), ("4,5,6,7", 1, 5), ("3", 0, 3), ("0,1", 3, None)]
)
def test_which_gpu_a_process_takes(ids, local, gpu, monkeypatch):
    monkeypatch.setattr(devices, "gpu_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda i: None)
    monkeypatch.setattr(devices, "local_rank", lambda: local)
    monkeypatch.setattr(devices, "local_world_size", lambda: 1 if ids == "3" else 4)
    if gpu is None:
        with pytest.raises(UserError, match="names 2 for 4 processes"):
            distributed.select_device(ids)
    else:
        assert distributed.select_device(ids) == ([gpu], torch.device("cuda", gpu))


# ----------------------------------------------------------------------------------------- torchrun
RUN = ["-m", "torch.distributed.run"]
LAUNCH = [
    "-c",
    "import sys; from util.distributed.launch import launch; sys.exit(launch(2, sys.argv[1:]))",
]


@pytest.mark.slow
def test_one_process_under_torchrun_is_a_plain_one(pictures, tmp_path):
    flags = ["--model", "pix2pix", "--norm", "syncbatch"]
    one = Torchrun(
        tmp_path / "log", *RUN, "--nproc_per_node=1", "--master_port", ranks.free_port(),
        "train.py", *command(pictures, tmp_path / "a", *flags),
    )  # fmt: skip
    run_alone(tmp_path / "log2", ranks.train, command(pictures, tmp_path / "b", *flags))
    assert one.end() == 0, one.text()
    assert_same(all_weights(tmp_path / "a"), all_weights(tmp_path / "b"))
    assert saved(tmp_path / "a").keys() == saved(tmp_path / "b").keys()


@pytest.mark.slow
def test_torchrun_restarts_from_the_newest_save(pictures, tmp_path):
    longer = ["--n_epochs", "12", "--n_epochs_decay", "0"]
    run = Torchrun(
        tmp_path / "log", *RUN, "--nproc_per_node=2", "--max-restarts=1", "--master_port",
        ranks.free_port(), "train.py", *command(pictures, tmp_path, *longer),
    )  # fmt: skip
    run.wait_for("saving the latest", 2)
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.end() == 0, run.text()
    assert run.text().count("restarted by torchrun: training goes on") == 1
    assert run.text().count("resuming from") == 1
    assert saved(tmp_path)["total_iters"] == 12 * PICTURES


@pytest.mark.slow
def test_a_machine_goes_and_comes_back(pictures, tmp_path):
    """Two agents on this machine act as two machines, with a folder each."""
    port = ranks.free_port()
    longer = ["--n_epochs", "30", "--n_epochs_decay", "0"]

    def machine(number: int, log: str) -> Torchrun:
        return Torchrun(
            tmp_path / log, *RUN, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3",
            "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=job",
            "train.py", *command(pictures, tmp_path / str(number), *longer),
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
        )  # fmt: skip

    first = machine(0, "log0")
    ranks.wait_until_listens(port)  # this one has the store over which they meet
    second = machine(1, "log1")
    end = time.monotonic() + 60
    while "saving the latest" not in first.text() + second.text():
        assert time.monotonic() < end, first.text()[-2000:] + second.text()[-2000:]
        time.sleep(0.05)
    second.close()
    again = machine(1, "log2")
    try:
        assert first.end(120) == 0, first.text()[-3000:]
        assert again.end(60) == 0, again.text()[-3000:]
    finally:
        first.close()
        again.close()
    texts = first.text() + again.text()
    assert texts.count("restarted by torchrun") == 1
    # whichever has the first process now has the files
    sets = [tmp_path / n for n in "01" if (tmp_path / n / "x" / "latest_train_state.pth").exists()]
    assert max(saved(folder)["total_iters"] for folder in sets) == 30 * PICTURES


@pytest.mark.slow
def test_without_torchrun_they_save_and_stop(pictures, tmp_path):
    longer = ["--n_epochs", "10000", "--save_latest_freq", "1000000", "--save_epoch_freq", "10000"]
    run = Torchrun(
        tmp_path / "log", *RUN, "--nproc_per_node=2", "--master_port", ranks.free_port(),
        "train.py", *command(pictures, tmp_path, *longer),
    )  # fmt: skip
    run.wait_for("(epoch: 2")
    workers = run.workers()
    run.process.kill()  # and with it goes the store over which they met
    run.process.wait()
    end = time.monotonic() + 30
    while any(map(ranks.is_running, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in workers if ranks.is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    run.close()
    assert not left
    assert run.text().count("stopped: got SIGTERM") == 1, run.text()[-2000:]
    assert saved(tmp_path)["processes"] == 2


def test_what_several_gpu_ids_start_ends_without_a_word_of_torch(tmp_path):
    """torchrun logs each signal that it passes on."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(100)\n"
        "except KeyboardInterrupt:\n    sys.exit(130)\n"
    )
    run = Torchrun(tmp_path / "log", *LAUNCH, program)
    run.wait_for("ready", 2)
    run.process.send_signal(signal.SIGINT)
    assert run.end(40) == 130, run.text()
    assert "".join(run.text().split()) == "readyready"  # in any order of their line breaks


@pytest.mark.slow
def test_what_several_gpu_ids_start_stops_in_order(pictures, tmp_path):
    longer = ["--n_epochs", "400", "--n_epochs_decay", "0"]
    argv = command(pictures, tmp_path, *longer)
    run = Torchrun(tmp_path / "log", *LAUNCH, "train.py", *argv)
    run.wait_for("(epoch: 2")
    run.process.send_signal(signal.SIGINT)  # Ctrl-C: its processes are in sessions of their own
    assert run.end(40) == 130, run.text()
    assert run.text().count("stopped: got SIGINT; resume with --continue_train") == 1
    assert "Traceback" not in run.text()
    run = Torchrun(tmp_path / "log2", *LAUNCH, "train.py", *argv, "--continue_train")
    run.wait_for("(epoch: ")
    begin = time.monotonic()
    os.kill(run.workers()[1], signal.SIGKILL)
    assert run.end(60) == 137, run.text()
    print(f"ended {time.monotonic() - begin:.1f} s after the kill")
    assert "resuming from 'latest'" in run.text()
    assert "was killed by SIGKILL" in run.text()
    assert "Traceback" not in run.text()


# ------------------------------------------------------------------------------------------ test.py
@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    short = ["--n_epochs", "1", "--n_epochs_decay", "0"]
    run_alone(folder / "log", ranks.train, command(pictures, folder, *short))
    return folder


def largest_step(a: Path, b: Path) -> int:
    """The largest difference of two images in levels of 8 bits."""
    first, second = (np.asarray(Image.open(p)).astype(int) for p in (a, b))
    return int(abs(first - second).max())


@pytest.mark.parametrize("flags", ["", "--num_test 3 --batch_size 2"])
def test_a_page_of_several_processes(flags, pictures, trained, tmp_path):
    def argv(results: str) -> list[str]:
        where = ["--dataroot", str(pictures / "testA"), "--checkpoints_dir", str(trained)]
        where += ["--name", "x", "--model", "test", "--direction", "AtoB", "--gpu_ids", "-1"]
        return [
            *where,
            "--crop_size",
            "32",
            "--results_dir",
            str(tmp_path / results),
            *flags.split(),
        ]

    run_alone(tmp_path / "log", ranks.translate, argv("one"))
    text = train_to_the_end(Group(tmp_path / "log3", 3, ranks.translate, argv("three")))
    assert text.count("results: ") == 1
    one, three = (tmp_path / n / "x" / "test_latest" for n in ("one", "three"))
    assert files_below(one) == files_below(three)
    for name in files_below(one):
        # the page says when it was made, to the minute
        texts = [re.sub(rb"Made [0-9: -]+", b"", (p / name).read_bytes()) for p in (one, three)]
        same = texts[0] == texts[1]
        # other neighbours in a batch: another rounding
        assert same or ("batch" in flags and largest_step(one / name, three / name) <= 1), name
    assert len(files_below(one)) == 1 + 2 * (3 if flags else PICTURES)


def test_files_of_several_processes_with_a_broken_one(trained, tmp_path):
    folder = tmp_path / "in"
    for i in range(5):
        picture(folder / f"{i}.png", k=i)
    picture(folder / "0.bmp", k=9)
    truncated(folder / "3.png")

    def argv(results: str, *more: str) -> list[str]:
        where = ["--dataroot", str(folder), "--checkpoints_dir", str(trained), "--name", "x"]
        where += ["--model", "test", "--only_outputs", "--gpu_ids", "-1"]
        return [*where, "--results_dir", str(tmp_path / results), *more]

    alone_group = Group(tmp_path / "log", 1, ranks.translate, argv("one"))
    assert alone_group.wait() == 1
    group = Group(tmp_path / "log2", 2, ranks.translate, argv("two"))
    assert group.wait() == 1, group.text()
    assert group.text().count("1 of 6 images failed:") == 1
    one, two = (tmp_path / n / "x" / "test_latest" for n in ("one", "two"))
    assert files_below(one) == files_below(two)
    assert len(files_below(two)) == 5
    for name in files_below(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    group = Group(tmp_path / "log3", 2, ranks.translate, argv("two", "--skip_existing"))
    assert group.wait() == 1, group.text()
    assert "translating 1 of 6 images (5 already exist)" in group.text()


@pytest.mark.parametrize(
    ("more", "said"), [({"RANK": "x"}, "invalid literal"), ({"MASTER_ADDR": "no.such.invalid"}, "")]
)
def test_processes_that_can_not_meet_say_so_in_one_line(more, said, tmp_path):
    address = {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    program = (
        "from datetime import timedelta\nfrom util import distributed\n"
        "distributed.ranks.JOIN_TIMEOUT = timedelta(seconds=1)\n"
        "with distributed.process_group(): print('in')"
    )
    result = run_process("-c", program, more={**ALONE, **address, **more})
    assert result.code == 1
    assert result.out == ""
    assert "Traceback" not in result.err
    assert f"error: the processes could not connect: {said}" in result.err.splitlines()[-1]


def test_an_own_loop_ends_the_threads_of_the_group_before_python_ends():
    here = {**ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}
    program = (
        "import atexit, sys, torch\nfrom tests.ranks import gloo_threads\n"
        "from util import distributed\n"
        "atexit.register(lambda: print('left:', gloo_threads()))\n"
        "distributed.init_process_group()\n"
        "torch.optim.Adam([torch.zeros(1, requires_grad=True)])\n"
        "assert 'torch._dynamo' in sys.modules and gloo_threads()\n"
    )
    result = run_process("-c", program, more=here)
    assert (result.code, result.out) == (0, "left: []\n"), result.err
