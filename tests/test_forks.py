"""What model files of published forks do beside the usual: right in every mode, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from models import networks
from models.norms import add_spectral_norm
from models.speed import acceleration
from tests import ranks
from tests.helpers import unaligned
from tests.plain_models import batch, build, put_in_place, resume, train, weights
from tests.ranks import Group
from util import distributed
from util.errors import UserError
from util.run.finite import FiniteGuard
from util.run.position import Position
from util.run.training_run import TrainingRun

CPU = torch.device("cpu")


class Wrapper(nn.Module):
    """Spectral norm as the code of SAGAN has it: vectors are parameters beside `weight_bar`."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv
        conv.weight_u = nn.Parameter(torch.ones(4), requires_grad=False)


@pytest.mark.parametrize(
    ("norm", "compiled"),
    [(nn.utils.spectral_norm, False), (Wrapper, False), (parametrizations.spectral_norm, True)],
)
def test_older_spectral_norm_is_not_compiled(norm, compiled, capsys):
    """PyTorch's compiler gives its weights wrong gradients: off by 10% for one convolution."""
    net: Any = nn.Sequential(norm(nn.Conv2d(3, 4, 3)))
    acceleration.prepare(net, CPU, compiled=True)
    assert (net._compiled_call_impl is not None) == compiled
    assert ("--compile" in capsys.readouterr().out) != compiled


def test_two_steps_in_an_iteration_are_no_two_batches(tmp_path):
    model = train(build("ttur", tmp_path, "--accumulate 2"), batch(0), batch(1))
    model.set_input(batch(2))
    model.optimize_parameters()
    with pytest.raises(UserError, match="Adam steps twice in an iteration"):
        model.optimize_parameters()
    plain = build("ttur", tmp_path)
    plain.set_input(batch(0))
    for _ in range(2):
        plain.optimize_parameters()


def test_a_loop_of_ones_own_may_pass_on_more(tmp_path):
    """As a loop over several datasets does, that tells the model which one a batch is from."""
    model = build("ttur", tmp_path, "--accumulate 2")
    kind, seen = type(model), []

    class Conditional(kind):
        def set_input(self, input, task=None):
            seen.append(task)
            super().set_input(input)

    model = Conditional(model.opt)
    model.setup(model.opt)
    model.parallelize()
    model.set_input(batch(0), 3)
    model.set_input(batch(0), task=4)
    assert seen == [3, 4]


def test_gradients_that_no_backward_made_are_refused(tmp_path):
    """As PCGrad and the like set them: combined from those of a part of the batch."""
    model = train(build("ttur", tmp_path, "--accumulate 2"), batch(0), batch(1))
    model.set_input(batch(2))
    model.forward()
    parameters = list(model.netG.parameters())
    found = torch.autograd.grad(model.fake_B.square().mean(), parameters)
    for p, gradient in zip(parameters, found, strict=True):
        p.grad = gradient
    with pytest.raises(UserError, match="the model sets gradients without backward"):
        model.optimizer_G.step()


def test_a_schedule_that_setup_makes_goes_on(tmp_path):
    """OneCycleLR sets the initial rates itself, behind BaseModel.setup."""

    def one_cycle() -> Any:
        model = build("ttur", tmp_path)
        model.cycle = torch.optim.lr_scheduler.OneCycleLR(model.optimizer_G, 1e-3, total_steps=50)
        return model

    first = one_cycle()
    for _ in range(5):
        first.optimizer_G.step()
        first.cycle.step()
    second = resume(first, one_cycle())
    for ours, wanted in zip(
        second.optimizer_G.param_groups, first.optimizer_G.param_groups, strict=True
    ):
        assert (ours["lr"], ours["initial_lr"]) == (wanted["lr"], wanted["initial_lr"])


def test_what_only_an_optimizer_holds_goes_to_its_place(tmp_path):
    """A network that replaces a parameter leaves the old one to the optimizer (VQ-VAE's EMA)."""

    def with_loss_weight(value: float) -> Any:
        model = build("ttur", tmp_path)
        model.weight = nn.Parameter(torch.full((2,), value))
        model.optimizer_D.add_param_group({"params": [model.weight]})
        return model

    first = with_loss_weight(3.0)
    last = first.netG.model[-2]
    last.bias = nn.Parameter(last.bias.detach() + 1)
    second = resume(first, with_loss_weight(0.0))
    assert second.weight.tolist() == [3.0, 3.0]
    assert torch.equal(second.netG.model[-2].bias, last.bias)


def test_an_optimizer_without_a_state_goes_on(tmp_path):
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer):
            self.inner, self.param_groups = inner, inner.param_groups

        def step(self, closure=None):
            return self.inner.step()

        def state_dict(self):
            return self.inner.state_dict()

        def load_state_dict(self, state_dict):
            self.inner.load_state_dict(state_dict)
            self.param_groups = self.inner.param_groups

    models = [build("ttur", tmp_path) for _ in range(2)]
    for model in models:
        model.look = Lookahead(model.optimizer_G)
    first = train(models[0], batch(0))
    second = resume(first, models[1])
    assert second.optimizer_G.state_dict()["state"].keys() == {*range(len(first.optimizer_G.state))}


def test_a_skipped_step_gives_replaced_tensors_back(tmp_path):
    model = build("ttur", tmp_path, "--on_nan skip")
    model.netG.register_buffer("mean", torch.zeros(3))
    model.netG.codebook = nn.Parameter(torch.ones(2), requires_grad=False)
    guard, before = FiniteGuard(model, "skip"), weights(model)
    guard.start()
    model.set_input({**batch(0), "A": batch(0)["A"] * float("nan")})
    model.netG.mean = model.real_A.mean((0, 2, 3))
    model.netG.codebook = nn.Parameter(model.real_A.mean() * torch.ones(2), requires_grad=False)
    model.optimize_parameters()
    guard.finish("here", ["a.png"])
    after = weights(model)
    assert not [key for key in before if not torch.equal(after[key], before[key])]


def test_spectral_norm_needs_convolutions():
    with pytest.raises(UserError, match="a Sequential has none: leave it out"):
        add_spectral_norm(nn.Sequential(nn.Linear(3, 3)))


class RunningMean(nn.Module):
    """A norm of one's own, with statistics."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.mean: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x - self.mean[:, None, None]


SPECTRAL = {
    "hook": nn.utils.spectral_norm,
    "parametrization": parametrizations.spectral_norm,
    "norm": lambda conv: conv,
}


@pytest.mark.parametrize("kind", list(SPECTRAL))
def test_checkpointed_blocks_are_computed_from_the_same_buffers(kind):
    """Spectral norm makes a step in each pass; computed once more it would be another network."""
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        norm = RunningMean if kind == "norm" else networks.get_norm_layer("instance")
        net = networks.ResnetGenerator(3, 3, 4, norm_layer=norm, n_blocks=1)
        spectral = {
            "hook": nn.utils.spectral_norm,
            "parametrization": parametrizations.spectral_norm,
        }
        for module in (
            [m for m in net.modules() if isinstance(m, nn.Conv2d)] if kind in spectral else ()
        ):
            spectral[kind](module)
        nets.append(net)
    plain, ours = nets
    acceleration.prepare(ours, CPU, recompute=True)
    x = torch.rand(2, 3, 16, 16)
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    wanted = plain.state_dict()
    assert not [
        key for key, value in ours.state_dict().items() if not torch.equal(value, wanted[key])
    ]


# ------------------------------------------------------------------------------- several processes
def save_with_a_sample(folder: str) -> None:
    model = build("ttur", folder, "--norm batch")
    model.netG.codebook = nn.Parameter(
        torch.full((2,), float(distributed.rank())), requires_grad=False
    )
    save_networks = model.save_networks

    def save(epoch: str) -> None:
        save_networks(epoch)
        with torch.no_grad():
            model.forward()

    model.save_networks = save
    train(model, batch(distributed.rank()))
    TrainingRun(model.opt, model, []).save("latest", position=Position())


def test_a_model_may_compute_a_sample_while_it_saves(tmp_path):
    """One process alone does, and its batch norms must not wait for the others."""
    group = Group(tmp_path / "log", 2, save_with_a_sample, str(tmp_path))
    assert group.wait(60) == 0, group.text()
    # what no optimizer steps is not compared as weights are
    assert group.text().count("G.codebook (and 0 more that no optimizer steps) differs") == 1


def test_what_load_networks_reads_besides_is_there_in_all_processes(tmp_path):
    data = unaligned(tmp_path / "data", 4)

    def argv(name: str, epochs: int) -> list[str]:
        flags = (
            "--model ownsave --gpu_ids -1 --ngf 4 --netG resnet_6blocks --display_id 0 --no_html"
        )
        sizes = "--load_size 32 --crop_size 32 --num_threads 0 --seed 1 --n_epochs_decay 0"
        words = f"--dataroot {data} --checkpoints_dir {tmp_path} --name {name} {flags} {sizes}"
        return f"{words} --n_epochs {epochs} --lr_policy step --continue_train".split()

    for name, all_epochs in (("whole", [2]), ("parts", [1, 2])):
        for epochs in all_epochs:
            log = tmp_path / "log" / f"{name}{epochs}"
            group = Group(log, 2, ranks.train, argv(name, epochs), lambda _: put_in_place)
            assert group.wait() == 0, group.text()
    whole, parts = (torch.load(tmp_path / n / "latest_net_G.pth") for n in ("whole", "parts"))
    assert not [key for key in whole if not torch.equal(whole[key], parts[key])]
