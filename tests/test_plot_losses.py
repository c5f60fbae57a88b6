"""The picture of the loss curves: what is drawn where, and what the command says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.display import loss_plot as plot_losses
from util.display.loss_plot import COLOURS, draw, nice_ticks, panel_of, smooth

ROOT = Path(__file__).resolve().parent.parent


def records(n: int, losses=None) -> list[dict]:
    losses = losses or (lambda i: {"G_A": 1 + math.sin(i / 50), "D_A": 0.5, "cycle_A": 3.0})
    return [{"images": i, "progress": i / 100, "losses": losses(i)} for i in range(1, n + 1)]


def pixels(path: Path, colour: tuple[int, int, int]) -> np.ndarray:
    """Where the picture has this very colour: (number of pixels, 2) of row and column."""
    return np.argwhere((np.asarray(Image.open(path).convert("RGB")) == colour).all(axis=2))


def test_a_curve_goes_where_it_should(tmp_path):
    """A straight line from the lower left to the upper right of the only panel."""
    path = tmp_path / "loss.png"
    draw(records(500, lambda i: {"G": i / 500}), path, "straight")
    image = Image.open(path)
    assert image.size == (1200, 594)
    assert image.format == "PNG"
    at = pixels(path, COLOURS[0])
    row, column = at[at[:, 0] > 100].T  # below the legend
    assert column.min() < 85
    assert column.max() > 1160
    # The frame: columns 70 to 1176 for epochs 0 to 5, rows 536 to 96 for values 0 to 1.05. At the
    # ends the moving average has points on one side only.
    inside = (column > 90) & (column < 1150)
    wanted = 536 - (column - 70) / 1106 / 1.05 * 440
    assert np.abs(row - wanted)[inside].max() < 2
    assert os.listdir(tmp_path) == ["loss.png"]


def test_gaps_spikes_and_single_points(tmp_path):
    def losses(i):
        value = math.nan if 200 < i < 300 else 1e6 if i == 100 else 1 + i / 1000
        return {"G_A": value, "D_A": math.inf, "late": 1.0} if i > 400 else {"G_A": value}

    path = tmp_path / "loss.png"
    draw(records(500, losses), path, "gaps")
    columns = np.unique(pixels(path, COLOURS[0])[:, 1])
    gap = columns[(columns > 70 + 1106 * 0.42) & (columns < 70 + 1106 * 0.58)]
    assert not len(gap)
    for few in (1, 2):
        draw(records(few), path, "few")
        assert len(pixels(path, COLOURS[0]))


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 1e12, math.nan])
def test_constant_values(tmp_path, value):
    draw(records(20, lambda i: {"G": value}), tmp_path / "loss.png", "constant")
    assert (tmp_path / "loss.png").stat().st_size


def test_panels():
    assert {panel_of(n) for n in ("D_A", "D_real", "D_fake", "GP_A")} == {"Discriminators"}
    assert {panel_of(n) for n in ("cycle_A", "idt_B", "G_L1", "L1")} == {"Reconstruction"}
    assert {panel_of(n) for n in ("G_A", "G_GAN", "G", "G_CE")} == {"Generators"}


def test_smooth_is_the_mean_around():
    y = np.array([1.0, 2.0, 6.0, np.nan, 10.0])
    np.testing.assert_allclose(smooth(y, 2), [1.5, 3.0, 4.0, np.nan, 10.0])
    np.testing.assert_array_equal(smooth(y, 0), y)


def test_ticks():
    assert nice_ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(-3, 198, 10) == pytest.approx(list(range(0, 200, 20)))


def test_fast_enough(tmp_path):
    many = records(10_000)
    draw(many[:10], tmp_path / "loss.png", "warm up")
    began = time.process_time()
    draw(many, tmp_path / "loss.png", "many")
    took = time.process_time() - began
    print(f"\n10,000 records drawn in {1000 * took:.0f} ms")
    assert took < 0.15


def run(*args: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "util.plot_losses", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_command(tmp_path):
    lines = [json.dumps(r) for r in records(5)]
    (tmp_path / "losses.jsonl").write_text("\n".join(lines) + '\n{"torn')
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "loss.png").width == 1200
    assert run(tmp_path, "--out", tmp_path / "other.jpg").returncode == 0
    assert Image.open(tmp_path / "other.jpg").format == "JPEG"


@pytest.mark.parametrize("there", ["no folder", "no record", "an empty one", "a bad name"])
def test_command_without_anything_to_draw(tmp_path, there):
    folder = tmp_path / "run"
    if there != "no folder":
        folder.mkdir()
    if there == "an empty one":
        (folder / "losses.jsonl").write_text('{"torn')
    if there == "a bad name":
        (folder / "losses.jsonl").write_text(json.dumps(records(1)[0]))
        done = run(folder, "--out", tmp_path / "loss.what")
    else:
        done = run(folder)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    draw(records(5), path, "old")
    old = path.read_bytes()

    def torn(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(plot_losses.Image.Image, "save", torn)
    with pytest.raises(OSError, match="disk full"):
        draw(records(9), path, "new")
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["loss.png"]
