"""What a default run must not load: it costs seconds and memory, and is not needed."""

from __future__ import annotations

import pytest

from tests.helpers import ROOT, run, run_process, unaligned

OPTIONAL = "scipy skimage matplotlib tensorboard wandb gradio torchmetrics onnx".split()
COMPILER = ["torch._dynamo", "torch._inductor", "sympy", "triton"]
PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as e:
    assert not e.code, e.code
print("loaded:", *sys.modules)
"""


def loaded(*words: object) -> set[str]:
    """The modules that are there when a program has ended."""
    result = run_process("-c", PROGRAM, *words)
    assert result.code == 0, result.err
    return set(result.out.rsplit("loaded:", 1)[1].split())


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A command line for both programs, with small networks and images."""
    folder = tmp_path_factory.mktemp("imports")
    return [
        "--dataroot", unaligned(folder / "data", 1), "--name", "small", "--checkpoints_dir",
        folder / "checkpoints", "--gpu_ids", -1, "--netG", "resnet_6blocks", "--ngf", 4,
        "--load_size", 40, "--crop_size", 32, "--num_threads", 0,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def training(words):
    more = ["--n_epochs", 1, "--n_epochs_decay", 0, "--display_id", 0, "--ndf", 4]
    return ["train.py", *words, *more]


def test_testing_loads_no_compiler(words, training, tmp_path):
    assert run(*training).code == 0
    modules = loaded("test.py", *words, "--results_dir", tmp_path)
    assert not modules & {*OPTIONAL, *COMPILER}


def test_training_loads_no_optional_package(training):
    # the compiler is loaded by torch's own optimizers
    assert not loaded(*training, "--no_html") & {*OPTIONAL}


def test_help_loads_no_compiler():
    assert not loaded("train.py", "--help") & {*OPTIONAL, *COMPILER}


def test_torch_can_import_its_own_modules_later():
    # they look at all modules that are there while they are half imported themselves
    code = "import data.base_dataset, torch.distributed.tensor, torchvision as t; print(t.ops.nms)"
    result = run_process("-c", code, cwd=ROOT)
    assert result.code == 0, result.err
    assert "function nms" in result.out
