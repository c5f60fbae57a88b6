"""The image of the loss curves: what is drawn where, and what the command says."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util import plot_losses
from util.display.loss_plot import COLOURS, draw, draw_page, panel_of, panels_of_losses, smooth
from util.errors import UserError, one_line_errors

ROOT = Path(__file__).resolve().parent.parent


def records(n: int, losses=None) -> list[dict]:
    losses = losses or (lambda i: {"G_A": 1 + math.sin(i / 50), "D_A": 0.5, "cycle_A": 3.0})
    return [{"images": i, "progress": i / 100, "losses": losses(i)} for i in range(1, n + 1)]


def draw_losses(n: int, path: Path, losses=None) -> None:
    draw(panels_of_losses(records(n, losses)), path, "title")


def points(path: Path, bottom: int) -> np.ndarray:
    """Where the image has the first curve's colour, in the first panel: rows and columns."""
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    near = np.abs(picture - list(bytes.fromhex(COLOURS[0][1:]))).sum(axis=2) < 60
    near[:62] = near[bottom:] = False  # outside of the axes
    return np.argwhere(near)


def test_a_curve_goes_where_it_should(tmp_path):
    """A straight line from the lower left to the upper right of the only panel."""
    path = tmp_path / "loss.png"
    draw_losses(500, path, lambda i: {"G": i / 500})
    image = Image.open(path)
    assert image.width == 1200
    assert image.format == "PNG"
    row, column = points(path, image.height - 50).T
    assert column.min() < 100
    assert column.max() > 1150
    assert row.min() < 100
    assert row.max() > 450
    # At the ends the moving average has points on one side only.
    inside = (column > 150) & (column < 1100)
    slope, start = np.polyfit(column[inside], row[inside], 1)
    assert slope < 0
    assert np.abs(row - start - slope * column)[inside].max() < 2
    assert os.listdir(tmp_path) == ["loss.png"]


def test_gaps_spikes_and_single_points(tmp_path):
    def losses(i):
        value = math.nan if 200 < i < 300 else 1e6 if i == 100 else 1 + i / 1000
        return {"G_A": value, "D_A": math.inf, "late": 1.0} if i > 400 else {"G_A": value}

    path = tmp_path / "loss.png"
    draw_losses(500, path, losses)
    row, column = points(path, 360).T
    left, right = column.min(), column.max()
    share = (column - left) / (right - left)
    assert not ((share > 0.42) & (share < 0.58)).any()
    # the spike does not flatten what comes after it
    assert row[(share > 0.3) & (share < 0.39)].min() - row[share > 0.98].max() > 100
    for few in (1, 2):
        draw_losses(few, path)
        assert len(points(path, 360))


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 1e12, math.nan])
def test_constant_values(tmp_path, value):
    draw_losses(20, tmp_path / "loss.png", lambda i: {"G": value})
    assert (tmp_path / "loss.png").stat().st_size


@pytest.mark.parametrize("n", [119, 120])
def test_a_moving_average_is_named_where_there_is_one(n, tmp_path):
    draw_losses(n, tmp_path / "loss.svg")
    texts = re.findall(r"<!-- (.*) -->", (tmp_path / "loss.svg").read_text())
    assert ("epoch (bold lines: moving average)" in texts) == (n >= 120)
    assert ("epoch" in texts) == (n < 120)


def test_names_are_shown_as_they_are(tmp_path):
    """Not taken for formulas."""
    panels = panels_of_losses(records(5, lambda i: {"x$^$": 1.0}))
    draw(panels, tmp_path / "loss.svg", "$a_b$")
    texts = re.findall(r"<!-- (.*) -->", (tmp_path / "loss.svg").read_text())
    assert {"x$^$  1", "$a_b$"} <= set(texts)


def test_panels():
    assert {panel_of(n) for n in ("D_A", "D_real", "D_fake", "GP_A")} == {"Discriminators"}
    assert {panel_of(n) for n in ("cycle_A", "idt_B", "G_L1", "L1")} == {"Reconstruction"}
    assert {panel_of(n) for n in ("G_A", "G_GAN", "G", "G_CE")} == {"Generators"}


def test_smooth_is_the_mean_around():
    y = np.array([1.0, 2.0, 6.0, np.nan, 10.0])
    np.testing.assert_allclose(smooth(y, 2), [1.5, 3.0, 4.0, np.nan, 10.0])
    np.testing.assert_array_equal(smooth(y, 0), y)


def test_scores_have_a_panel_each(tmp_path):
    scores = [
        {"images": i, "progress": i, "scores": {"L1": 1 / i, "PSNR": 20.0 + i}} for i in (1, 2)
    ]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(s) + "\n" for s in scores))
    (tmp_path / "web").mkdir()
    draw_page(tmp_path, "run")
    assert sorted(os.listdir(tmp_path / "web")) == ["scores.png", "scores_narrow.png"]
    assert Image.open(tmp_path / "web" / "scores.png").width == 1200
    assert Image.open(tmp_path / "web" / "scores_narrow.png").width == 780


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


@pytest.mark.parametrize(
    "there", ["no folder", "a file", "no record", "an empty one", "a bad name"]
)
def test_command_without_anything_to_draw(tmp_path, there):
    folder = tmp_path / "run"
    if there == "a file":
        folder.write_text("")
    elif there != "no folder":
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
    assert ("no folder" in done.stderr) == (there in ("no folder", "a file"))


def test_command_with_a_file_that_can_not_be_written(tmp_path):
    (tmp_path / "losses.jsonl").write_text(json.dumps(records(1)[0]))
    out = tmp_path / "losses.jsonl" / "loss.png"
    done = run(tmp_path, "--out", out)
    said = f"error: {out} can't be written: File exists; choose another --out\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_command_without_matplotlib(tmp_path, monkeypatch, capsys):
    (tmp_path / "losses.jsonl").write_text(json.dumps(records(1)[0]))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(sys, "argv", ["plot_losses", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        plot_losses.main()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "pip install matplotlib" in said.err


def test_nothing_is_an_error(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        draw({}, tmp_path / "loss.png", "title")


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "loss.png"
    draw_losses(5, path)
    old = path.read_bytes()

    def torn(self, file, *args, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(OSError, match="disk full"):
        draw_losses(9, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["loss.png"]
