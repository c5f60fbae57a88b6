"""--fast compiles where a trial says that it is faster, and remembers the answer."""

from __future__ import annotations

import time

import pytest
import torch

from models.speed import trial
from options.train_options import TrainOptions
from tests.helpers import unaligned


class Model:
    """A model whose iteration takes so long, with and without compiling."""

    takes = {False: 0.0, True: 0.0}
    breaks = False  # with CUDA graphs
    error: Exception | None = None  # of the compiler
    device = torch.device("cpu")

    def __init__(self, opt):
        torch.rand(3)  # as making weights does
        self.seconds, self.graphs = self.takes[opt.compile], opt.cuda_graphs and opt.compile
        self.compiled = opt.compile

    def data_dependent_initialize(self, batch):
        assert batch == {"A": 1}

    def setup(self, opt):
        assert not opt.continue_train

    def set_input(self, batch):
        assert batch == {"A": 1}

    def optimize_parameters(self):
        time.sleep(self.seconds)
        if self.compiled and self.error:
            raise self.error
        if self.graphs and self.breaks:
            raise RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten")


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("options.base_options.why_not_compile", lambda *a: None)
    return TrainOptions(f"--dataroot {tmp_path} --gpu_ids -1 --fast")


@pytest.mark.parametrize(("eager", "compiled"), [(0.02, 0.001), (0.001, 0.02)])
def test_the_faster_way_is_taken_and_remembered(eager, compiled, options, monkeypatch, capsys):
    monkeypatch.setattr(Model, "takes", {False: eager, True: compiled})
    tried = []

    def batch():
        tried.append(1)
        return {"A": 1}

    for _ in range(2):
        opt = options.parse(save=False)
        before = torch.get_rng_state()
        options.decide_compile(opt, 10**6, lambda opt=opt: trial.compiling_costs(opt, Model, batch))
        assert opt.compile is (compiled < eager)
        assert torch.equal(before, torch.get_rng_state())
    assert len(tried) == 1
    out = capsys.readouterr().out
    assert ("--compile is off: in a trial an iteration took 2" in out) is (compiled > eager)
    opt.batch_size = 7
    trial.compiling_costs(opt, Model, batch)
    assert len(tried) == 2  # another size is another question


def test_without_compiling_where_that_fails(options, monkeypatch):
    monkeypatch.setattr(Model, "error", TypeError("no such operator\nin a long trace"))
    opt = options.parse(save=False)
    reason = trial.compiling_costs(opt, Model, lambda: {"A": 1})
    assert reason == "this model can't be compiled (no such operator)"
    monkeypatch.setattr(Model, "error", None)
    monkeypatch.setattr(Model, "takes", {False: 0.02, True: 0.001})
    assert trial.compiling_costs(opt, Model, lambda: {"A": 1}) is None  # a failure is not kept


@pytest.mark.parametrize("breaks", [False, True])
def test_without_cuda_graphs_where_a_model_fails_with_them(breaks, options, monkeypatch, capsys):
    monkeypatch.setattr(Model, "takes", {False: 0.02, True: 0.001})
    monkeypatch.setattr(Model, "breaks", breaks)
    for _ in range(2):  # the second time from the kept answer
        opt = options.parse(save=False)
        opt.cuda_graphs = True
        assert trial.compiling_costs(opt, Model, lambda: {"A": 1}) is None
        assert opt.cuda_graphs is not breaks
        told = "--cuda_graphs is off: accessing tensor output" in capsys.readouterr().out
        assert told is breaks


def test_no_trial_where_compiling_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("options.base_options.why_not_compile", lambda *a: None)
    options = TrainOptions(f"--dataroot {tmp_path} --gpu_ids -1 --fast --compile")
    opt = options.parse(save=False)
    options.decide_compile(opt, 10**6, lambda: pytest.fail("a trial"))
    assert opt.compile


def test_a_real_model_is_tried(tmp_path, monkeypatch):
    """With the compiler's front half only, which is fast."""
    from data import create_dataset
    from models import create_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ordinary = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, **_: ordinary(net, backend="eager", dynamic=False)
    )
    root = unaligned(tmp_path / "data", 2)
    words = f"--dataroot {root} --gpu_ids -1 --netG resnet_6blocks --ngf 2 --ndf 2 --load_size 32"
    opt = TrainOptions(f"{words} --crop_size 32 --checkpoints_dir {tmp_path}").parse(save=False)
    times = [
        trial.seconds(opt, create_model, create_dataset(opt).first(), compile=compiled)
        for compiled in (False, True)
    ]
    assert all(0 < t < 60 for t in times)
