"""Each way of going faster goes together with each model, with resuming, and with the others."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
from torch import nn

from tests.helpers import SHORT, TINY, aligned, succeed, unaligned

SETTINGS = {
    "bf16": "--precision bf16",
    "fp16": "--precision fp16",
    "compile": "--compile",
    "channels_last": "--channels_last",
    "passes": "--batch_passes on",
    "accumulate": "--accumulate 2",
    "checkpoint": "--grad_checkpoint",
    "cache": "--cache_images ram",
    "broken": "--on_nan skip",
    "fast": "--fast",
}
MODELS = {
    "cycle_gan": "--model cycle_gan",
    "wgan": "--model cycle_gan --gan_mode wgangp --norm none",
    "pix2pix": "--model pix2pix --batch_size 2",
    "colorization": "--model colorization",
    "template": "--model template --dataset_mode aligned",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return aligned(unaligned(root, 2), 2)


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """The front half of the compiler only: what it makes of the code is run as it is."""
    original = nn.Module.compile
    eager = functools.partialmethod(original, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", eager)
    torch.compiler.reset()


def weights(folder) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}.{key}": value
        for path in sorted(folder.glob("latest_net_*.pth"))
        for key, value in torch.load(path, weights_only=True).items()
    }


def train(pictures, folder, flags: str) -> dict[str, torch.Tensor]:
    where = ["--dataroot", pictures, "--checkpoints_dir", folder, "--name", "x", "--no_html"]
    succeed("train.py", *where, *TINY, *SHORT, "--print_freq", "1", *flags.split())
    for line in (folder / "x" / "losses.jsonl").read_text().splitlines():
        assert all(abs(v) < 1e6 for v in json.loads(line).get("losses", {}).values())
    return weights(folder / "x")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_each_model_trains_and_resumes(model, setting, pictures, tmp_path):
    """Two epochs at a stretch, and one and then one more, end with the same bits."""
    flags = f"{MODELS[model]} {SETTINGS[setting]}"
    whole = train(pictures, tmp_path / "whole", f"{flags} --n_epochs 2")
    train(pictures, tmp_path / "parts", flags)
    parts = train(pictures, tmp_path / "parts", f"{flags} --n_epochs 2 --continue_train")
    assert whole.keys() == parts.keys()
    assert len(whole) > 10
    for key, value in whole.items():
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.equal(value, parts[key]), key


PAIRS = [
    pair
    for pair in itertools.combinations(SETTINGS, 2)
    if not all("--precision" in SETTINGS[name] for name in pair)
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_each_two_settings(first, second, pictures, tmp_path):
    """Together they train, and what they give fits a network without either."""
    flags = f"{SETTINGS[first]} {SETTINGS[second]}"
    found = train(pictures, tmp_path, f"--model cycle_gan {flags}")
    plain = ["--dataroot", pictures, "--checkpoints_dir", tmp_path, "--name", "x", "--model"]
    result = succeed(
        "test.py", *plain, "cycle_gan", *TINY, "--results_dir", tmp_path, "--num_test", 1
    )
    assert "loading the model from" in result.out
    assert all(torch.isfinite(value).all() for value in found.values())
