"""From the data that come along to a model that is scored, taken elsewhere, and called."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from models import load_generator
from tests.helpers import ROOT, succeed

DATA = ROOT / "datasets" / "worldmaps_mini"


@pytest.mark.slow
def test_scored_exported_and_called(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    where = ["--dataroot", DATA / "unaligned", "--checkpoints_dir", tmp_path, "--name", "q"]
    model = "--model cycle_gan --load_size 128 --crop_size 128 --gpu_ids -1".split()
    small = "--netG unet_128 --ngf 4 --ndf 4 --n_epochs 2 --n_epochs_decay 0 --seed 1".split()
    more = "--num_threads 0 --display_id 0 --max_dataset_size 6 --lr 0.001".split()
    succeed("train.py", *where, *model, *small, *more, "--val_freq", 1, "--val_phase", "test")

    best = json.loads((tmp_path / "q" / "best_scores.json").read_text())
    words = ["--crop_size", 128, "--gpu_ids", -1, "--epoch", "best", "--results_dir", tmp_path]
    succeed("scripts/evaluate.py", *where, *words, "--scores", "cycle")
    facts = json.loads((tmp_path / "q" / "test_best" / "scores.json").read_text())
    assert facts["pictures"] == 8
    # what was measured in training is what is measured now: no norm or dropout makes a difference
    for visual in ("rec_A", "rec_B"):
        value = best["scores"][visual]["cycle"]["value"]
        assert facts["scores"][visual]["cycle"]["value"] == pytest.approx(value, abs=1e-6)

    onnx = tmp_path / "q.onnx"
    export = ["--checkpoints_dir", tmp_path, "--name", "q", "--epoch", "best", "--output", onnx]
    succeed("scripts/export.py", *export, "--direction", "AtoB")
    program = ROOT / "scripts" / "run_onnx.py"
    command = [sys.executable, program, onnx, DATA / "unaligned" / "testA", tmp_path / "onnx"]
    subprocess.run(command, check=True, timeout=120, capture_output=True)

    G = load_generator(tmp_path / "q", "AtoB", epoch="best", device="cpu")
    sources = sorted((DATA / "unaligned" / "testA").iterdir())
    results = G([Image.open(path) for path in sources])
    assert len(results) == 8
    for path, result in zip(sources, results, strict=True):
        assert result.size == (128, 128)
        with Image.open(tmp_path / "onnx" / f"{path.stem}.png") as other:
            difference = np.abs(np.asarray(result, int) - np.asarray(other, int))
        assert difference.max() <= 1
