"""`--ema`: the average is the formula's, survives what training does, and is what testing takes."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from models import load_generator
from models.ema import WeightAverage
from models.inference.export import export_generator
from tests.helpers import SHORT, TINY, Finished, aligned, run, succeed, unaligned
from tests.plain_models import NAMES, batch, build, resume, train, weights
from tests.ranks import Group
from util import distributed
from util.errors import UserError
from util.run.finite import FiniteGuard

State = dict[str, torch.Tensor]


def averages(model: Any) -> dict[str, State]:
    return {name: average.weights() for name, average in model._averages.items()}


def copy_of(net: nn.Module) -> State:
    return {key: value.detach().clone() for key, value in net.state_dict().items()}


def expected(states: list[State], decay: float, parameters: set[str]) -> State:
    """The average of the weights before the first step and after each one, in float64."""
    mean = {key: value.double() for key, value in states[0].items()}
    for t, state in enumerate(states[1:], 1):
        d = min(decay, (1 + t) / (10 + t))
        for key, value in state.items():
            mean[key] = d * mean[key] + (1 - d) * value if key in parameters else value
    return mean


def assert_same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def load(path: Path) -> State:
    return torch.load(path, weights_only=True)


# -------------------------------------------------------------------------------------- the average
@pytest.mark.parametrize("decay", [0.25, 0.999])
@pytest.mark.parametrize(
    "flags", ["--norm batch", "--precision bf16", "--batch_passes on --channels_last", "--compile"]
)
def test_average_is_the_recurrence(flags, decay, tmp_path, monkeypatch):
    """From 0.25 on the ramp is over at the third of five steps; with 0.999 it is not."""
    eager = functools.partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", eager)
    monkeypatch.setattr("options.base_options.why_not_compile", lambda *a: None)
    model = build("ttur", tmp_path, f"{flags} --ema {decay} --lr 0.01")
    states = [copy_of(model.netG)]
    for i in range(5):
        train(model, batch(i))
        states.append(copy_of(model.netG))
    (average,) = averages(model).values()
    wanted = expected(states, decay, {name for name, _ in model.netG.named_parameters()})
    assert average.keys() == wanted.keys()
    for key, value in average.items():
        assert value.dtype == states[0][key].dtype
        torch.testing.assert_close(value.double(), wanted[key].double(), rtol=1e-5, atol=1e-7)


def test_a_step_is_counted_when_it_is_taken(tmp_path):
    model = build("ttur", tmp_path, "--ema 0.9 --accumulate 2")
    states = [copy_of(model.netG)]
    for i in range(4):
        train(model, batch(i))
        (average,) = averages(model).values()
        if i == 0:
            assert_same(average, states[0])
        if i % 2:
            states.append(copy_of(model.netG))
    assert int(model._averages["G"].steps) == 2
    for key, value in expected(states, 0.9, set(average)).items():
        torch.testing.assert_close(average[key].double(), value, rtol=1e-5, atol=1e-7)


def test_a_step_without_gradients_is_none(tmp_path):
    """Such as one that --on_nan skip or fp16 passes over."""
    model = build("ttur", tmp_path, "--ema 0.9")
    model.optimizer_G.zero_grad()
    model.optimizer_G.step()
    assert int(model._averages["G"].steps) == 0
    train(model, batch(0))
    assert int(model._averages["G"].steps) == 1


def state_of(model: Any) -> tuple[State, int]:
    average = model._averages["G"]
    return {k: v.clone() for k, v in average.weights().items()}, int(average.steps)


def test_an_optimizer_that_is_made_anew(tmp_path):
    model = build("ttur", tmp_path, "--ema 0.9")
    states = [copy_of(model.netG)]
    model.optimizer_G = torch.optim.Adam(model.netG.parameters(), lr=0.01)
    for i in range(3):
        train(model, batch(i))
        states.append(copy_of(model.netG))
    (average,) = averages(model).values()
    for key, value in expected(states, 0.9, set(average)).items():
        torch.testing.assert_close(average[key].double(), value, rtol=1e-5, atol=1e-7)


def test_layers_that_are_added_while_training(tmp_path):
    model = build("ttur", tmp_path, "--ema 0.9")
    model.netG.model.append(nn.Conv2d(3, 3, 1))
    with pytest.raises(UserError, match=r"whose layers have changed .* leave --ema out"):
        train(model, batch(0))


def test_a_model_that_writes_its_networks_itself(tmp_path, monkeypatch):
    model = build("ttur", tmp_path)

    def save_networks(self: Any, epoch: Any) -> None:
        torch.save(self.netG.state_dict(), self.save_dir + f"/{epoch}_net_G.pth")

    monkeypatch.setattr(type(model), "save_networks", save_networks)
    model = train(build("ttur", tmp_path, "--ema 0.9"), batch(0))
    model.save_dir.mkdir(parents=True)
    model.save_networks("latest")
    assert_same(load(model.save_dir / "latest_net_G_ema.pth"), averages(model)["G"])


def test_skipped_iterations_leave_the_average(tmp_path):
    """--on_nan skip: one of G's gradients is bad, or D's, after G and its average have stepped."""
    model = build("ttur", tmp_path, "--ema 0.9 --on_nan skip")
    guard = FiniteGuard(model, "skip")

    def iteration(number: int, poisoned: nn.Module | None = None) -> None:
        guard.start()
        if poisoned is not None:
            first = next(poisoned.parameters())
            hook = first.register_hook(lambda grad: grad * float("nan"))
        train(model, batch(number))
        guard.finish(str(number), [str(number)])
        if poisoned is not None:
            hook.remove()

    iteration(0)
    before = state_of(model)
    assert before[1] == 1
    for number, net in enumerate((model.netG, model.netD), 1):
        iteration(number, net)
        assert guard.skipped[-1] == str(number)
        assert_same(state_of(model), before)
    iteration(3)
    assert state_of(model)[1] == 2


def test_steps_that_overflow_leave_the_average(tmp_path):
    model = build("ttur", tmp_path, "--ema 0.9 --precision fp16")
    before = state_of(model)
    model._gradient_scale.factor = 2.0**100
    train(model, batch(0))
    assert_same(state_of(model), before)


class Odd(nn.Module):
    """Weights that are made anew in each pass, tied weights, a counter, an unsaved buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.weight_norm(nn.Linear(4, 4))  # type: ignore[attr-defined]
        self.b = nn.utils.spectral_norm(nn.Linear(4, 4))  # type: ignore[attr-defined]
        self.c = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.d, self.e = nn.Linear(4, 4), nn.Linear(4, 4)
        self.e.weight = self.d.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("unsaved", torch.ones(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.e(self.d(self.c(self.b(self.a(x)))))) * self.unsaved


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_odd_networks():
    torch.manual_seed(0)
    net = Odd()
    x = torch.randn(8, 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(x).square().sum().backward()
    average = WeightAverage(net, 0.9)
    states = [copy_of(net)]
    for _ in range(3):
        optimizer.zero_grad()
        (net(x) - x).square().sum().backward()
        optimizer.step()
        average.update(net)
        states.append(copy_of(net))
    parameters = {name for name, _ in net.named_parameters(remove_duplicate=False)}
    wanted = expected(states, 0.9, parameters)
    for key, value in average.weights().items():
        torch.testing.assert_close(value.double(), wanted[key].double(), rtol=1e-5, atol=1e-7)
    fresh = Odd()
    fresh.load_state_dict(average.weights())
    with average.applied_to(net):
        assert_same(copy_of(net), average.weights())
        assert_same(net.eval()(x), fresh.eval()(x))
    assert_same(copy_of(net), states[-1])


@pytest.mark.parametrize("name", NAMES)
def test_plain_models_have_averages_of_what_they_test_with(name, tmp_path):
    """Raw weights are those of a run without, to the bit: neither is a random number drawn."""
    plain, averaged = build(name, tmp_path), build(name, tmp_path, "--ema 0.9")
    for model in (plain, averaged):
        torch.manual_seed(1)
        train(model, batch(0), batch(1), batch(2))
    ours = {k: v for k, v in weights(averaged).items() if not k.startswith("_averages.")}
    assert_same(ours, weights(plain))
    used = {n for n in plain.model_names if not n.startswith("D")}
    assert set(averages(averaged)) == used
    averaged.save_networks("latest")
    for net, average in averages(averaged).items():
        raw = load(tmp_path / "x" / f"latest_net_{net}.pth")
        assert_same(load(tmp_path / "x" / f"latest_net_{net}_ema.pth"), average)
        assert average.keys() == raw.keys()
        assert not all(torch.equal(average[key], raw[key]) for key in raw)


@pytest.mark.parametrize("flags", ["", "--accumulate 2"])
@pytest.mark.parametrize("name", ["several", "teacher", "ttur"])
def test_resume_to_the_bit(name, flags, tmp_path):
    straight, first, second = (build(name, tmp_path, f"{flags} --ema 0.9") for _ in range(3))
    train(straight, *(batch(i) for i in range(6)))
    train(first, *(batch(i) for i in range(3)))
    resume(first, second)
    train(second, *(batch(i) for i in range(3, 6)))
    assert_same(weights(second), weights(straight))  # the averages and their steps among them


def two_processes(folder: str, out: str) -> None:
    torch.set_default_dtype(torch.float64)
    model = build("ttur", folder, "--ema 0.9 --norm batch")
    if distributed.rank() == 1:  # as one that did not read the files
        with torch.no_grad():
            for tensor in model.trained_tensors():
                tensor.add_(1)
    model.broadcast_weights()
    train(model, *(batch(2 * i + distributed.rank()) for i in range(4)))
    torch.save(averages(model), f"{out}.{distributed.rank()}")


def test_two_processes_have_the_average_of_one(tmp_path):
    group = Group(tmp_path / "log", 2, two_processes, str(tmp_path), str(tmp_path / "out"))
    torch.set_default_dtype(torch.float64)
    try:
        model = build("ttur", tmp_path, "--ema 0.9 --norm batch")
        train(model, *(batch(2 * i, 2 * i + 1) for i in range(4)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert group.wait() == 0, group.text()
    first, second = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    assert_same(second, first)
    torch.testing.assert_close(first, averages(model), rtol=1e-8, atol=1e-9)


def test_weights_that_are_loaded_later_begin_the_average(tmp_path):
    """As where another process has saved while this one waited for the lock."""
    older, newer = build("ttur", tmp_path, "--ema 0.9"), build("ttur", tmp_path)
    train(newer, batch(0))
    newer.save_networks("latest")
    older.load_networks("latest")
    assert_same(averages(older)["G"], copy_of(newer.netG))


# ------------------------------------------------------------------------------------- the programs
@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """pix2pix with averages and validation: folder of data, and of the experiment `x`."""
    root = tmp_path_factory.mktemp("ema")
    aligned(root / "data")
    train_py(root, "--ema", 0.9, "--val_freq", 1, "--val_phase", "test")
    return root


def where(root: Path) -> list[Any]:
    small = [*TINY, "--load_size", 32, "--model", "pix2pix", "--no_dropout"]
    return ["--dataroot", root / "data", "--checkpoints_dir", root, "--name", "x", *small]


def train_py(root: Path, *more: Any, program: Callable = succeed) -> Finished:
    words = ["--lr", 0.01, "--no_html", "--save_epoch_freq", 1]
    return program("train.py", *where(root), *SHORT, *words, *more)


def test_resumed_with_train_py(trained, tmp_path):
    """In two runs the same averages as in one; the option comes back with the others."""
    (tmp_path / "data").symlink_to(trained / "data")
    train_py(tmp_path, "--ema", 0.9, "--n_epochs", 2)
    whole = load(tmp_path / "x" / "latest_net_G_ema.pth")
    (tmp_path / "x").rename(tmp_path / "whole")
    train_py(tmp_path, "--ema", 0.9)
    said = train_py(tmp_path, "--n_epochs", 2, "--continue_train").out
    assert "ema=0.9" in said
    assert_same(load(tmp_path / "x" / "latest_net_G_ema.pth"), whole)
    assert not list(tmp_path.rglob("*_net_D_ema.pth"))
    first = load(tmp_path / "x" / "1_net_G_ema.pth")
    assert any(not torch.equal(first[key], whole[key]) for key in whole)

    said = train_py(tmp_path, "--n_epochs", 3, "--continue_train", "--ema", 0)
    assert "--ema 0: the averages so far (--ema 0.9) end here" in said.out
    assert not (tmp_path / "x" / "3_net_G_ema.pth").exists()
    # what is left of them is not taken for the average of these
    assert load_generator(tmp_path / "x", device="cpu").weights.name == "latest_net_G.pth"
    raw = load(tmp_path / "x" / "latest_net_G.pth")
    said = train_py(tmp_path, "--n_epochs", 4, "--continue_train", "--ema", 0.5)
    assert "--ema 0.5: averages start from the current weights" in said.out
    average, now = (load(tmp_path / "x" / f"latest_net_G{kind}.pth") for kind in ("_ema", ""))
    key = next(iter(raw))
    apart = [(average[key] - end[key]).norm() for end in (raw, now)]
    assert max(apart) < (raw[key] - now[key]).norm()  # between the two


def test_validation_scores_both(trained):
    """The averaged weights decide; scripts/evaluate.py has the same figures for both."""
    (record,) = map(json.loads, (trained / "x" / "scores.jsonl").read_text().splitlines())
    facts = json.loads((trained / "x" / "best_scores.json").read_text())
    assert facts["value"] == record["best"]["value"] == record["scores"]["L1"]
    assert [w["file"] for w in facts["weights"]] == ["best_net_G_ema.pth"]
    for chosen, name in (("auto", "L1"), ("ema", "L1"), ("raw", "L1 raw")):
        words = ["--weights", chosen, "--results_dir", trained / chosen, "--scores", "L1"]
        succeed("scripts/evaluate.py", *where(trained), *words, "--epoch", "best")
        report = json.loads((trained / chosen / "x" / "test_best" / "scores.json").read_text())
        kind = "" if chosen == "raw" else "_ema"
        assert [w["file"] for w in report["weights"]] == [f"best_net_G{kind}.pth"]
        value = report["scores"]["fake_B"]["L1"]["value"]
        assert record["scores"][name] == pytest.approx(value, rel=1e-9)
    assert record["scores"]["L1"] != pytest.approx(record["scores"]["L1 raw"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("chosen", "kind"), [("auto", "_ema"), ("ema", "_ema"), ("raw", "")])
def test_what_testing_takes(chosen, kind, trained, tmp_path):
    name = f"latest_net_G{kind}.pth"
    wanted = load(trained / "x" / name)
    out = ["--results_dir", tmp_path, "--weights", chosen]
    said = succeed("test.py", *where(trained), *out).out
    assert f"loading the model from {trained / 'x' / name}" in said
    assert f"Weights {name} in" in (tmp_path / "x/test_latest/index.html").read_text()
    G = load_generator(trained / "x", device="cpu", weights=chosen)
    assert G.weights.name == name
    assert_same(G.net.state_dict(), wanted)
    export_generator(trained / "x", "torchscript", tmp_path / "G.pt", weights=chosen)
    files = {"metadata.json": ""}
    torch.jit.load(tmp_path / "G.pt", _extra_files=files)
    assert json.loads(files["metadata.json"])["weights"] == name


def test_averages_alone_are_enough(tmp_path):
    """Without the raw weights of the generators, in both directions."""
    unaligned(tmp_path / "data")
    words = ["--dataroot", tmp_path / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    words += [*TINY, "--model", "cycle_gan"]
    succeed("train.py", *words, *SHORT, "--no_html", "--ema", 0.9)
    for path in (tmp_path / "x").glob("*_net_G_?.pth"):
        path.unlink()
    out = ["--results_dir", tmp_path / "r", "--load_size", 32]
    said = succeed("test.py", *words, *out, "--direction", "BtoA").out
    assert "latest_net_G_A_ema.pth" in said
    one = ["--dataroot", tmp_path / "data/testB", "--model", "test", "--direction", "BtoA"]
    said = succeed("test.py", *words, *out, *one).out
    assert "latest_net_G_B_ema.pth" in said
    assert load_generator(tmp_path / "x", "BtoA").weights.name == "latest_net_G_B_ema.pth"


# --------------------------------------------------------------------------------------- mistakes
def test_mistakes(tmp_path):
    aligned(tmp_path / "data")
    result = train_py(tmp_path, "--ema", 1, program=run)
    assert result.code == 2
    assert "--ema: 1 is out of range: at least 0 and below 1" in result.err
    train_py(tmp_path)
    assert not list((tmp_path / "x").glob("*_ema.pth"))
    result = run("test.py", *where(tmp_path), "--weights", "ema", "--results_dir", tmp_path)
    assert result.code == 1
    assert "has no latest_net_G_ema.pth, only latest_net_G.pth" in result.err
    assert result.err.count("\n") == 1
    result = run("test.py", *where(tmp_path), "--weights", "best", "--results_dir", tmp_path)
    assert result.code == 2
    with pytest.raises(UserError, match="choose --weights raw"):
        load_generator(tmp_path / "x", weights="ema")
    with pytest.raises(UserError, match="weights 'best': choose from auto, ema, raw"):
        load_generator(tmp_path / "x", weights="best")
    # a file of the model's own, in a training without --ema
    own = tmp_path / "x" / "latest_net_G_ema.pth"
    torch.save({"of": torch.zeros(1)}, own)
    assert load_generator(tmp_path / "x").weights.name == "latest_net_G.pth"
    train_py(tmp_path, "--n_epochs", 2, "--continue_train")
    assert own.exists()


def test_models_that_can_not_be_averaged(tmp_path, monkeypatch):
    from models.template_model import TemplateModel

    unaligned(tmp_path)
    make = TemplateModel.__init__

    def fails_in_testing(self, opt):
        make(self, opt)
        if not opt.isTrain:
            raise KeyError("results_dir")

    def with_its_own(self, opt):
        make(self, opt)
        self.netG_ema = self.netG
        self.model_names = ["G", "G_ema"]

    def of_no_network(self, opt):
        make(self, opt)
        self.model_names = ["G"] if opt.isTrain else []

    said = {
        fails_in_testing: r"isTrain = False it can't be made \(KeyError: 'results_dir'\)",
        with_its_own: "has a network G_ema of its own: leave --ema out",
        of_no_network: "has no network in testing",
    }
    for init, reason in said.items():
        monkeypatch.setattr(TemplateModel, "__init__", init)
        with pytest.raises(UserError, match=reason):
            build("template", tmp_path, "--ema 0.9")


def test_a_model_may_be_collected_in_the_step_of_another(tmp_path):
    """Garbage is also collected while torch goes through the hooks of a step."""
    hook = register_optimizer_step_post_hook(lambda *_: gc.collect() and None)
    gone, model = (build("template", tmp_path, "--ema 0.9") for _ in range(2))
    gc.disable()  # until the hook
    try:
        del gone
        train(model, batch(0))
    finally:
        hook.remove()
        gc.enable()
