"""scripts/recipes.py: what it has run is not run again, and its table says what is in the file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from options.train_options import TrainOptions
from scripts import recipes
from tests.helpers import picture
from util.errors import UserError


def row(recipe, seed, psnr, back=None):
    scores = {"fake_B PSNR": psnr, "fake_B SSIM": 0.5, "fake_B grid 2": 1.0, "fake_B grid 4": 2.0}
    if back is not None:
        scores["fake_A PSNR"] = back
    key = {"recipe": recipe, "seed": seed, "minutes": 1.0, "data": "worldmaps_mini"}
    return {**key, "epochs": 7, "seconds": 60.0, "best_epoch": "4", "last": scores, "best": scores}


def test_the_table_has_means_and_deviations():
    rows = [row("cycle_gan", 1, 15.0, 18.0), row("cycle_gan", 2, 17.0, 18.0), row("+ ema", 1, 16.0)]
    lines = recipes.table(rows, "unaligned").splitlines()
    assert len(lines) == 4
    # the deviation of a sample of two is their difference over the root of two: 1.41
    there = "16.00 ± 1.41"
    cells = [there, there, "0.50 ± 0.00", "18.00 ± 0.00", "18.00 ± 0.00"]
    grids = ["1.00 ± 0.00", "2.00 ± 0.00"]
    assert lines[2] == f"| cycle_gan | 2 | 7 | 60 | {' | '.join([*cells, *grids])} |"
    assert lines[3].startswith("| + ema | 1 | 7 | 60 | 16.00 | 16.00 | 0.50 | - | - |")
    assert recipes.table(rows, "aligned").count("\n") == 1


def test_a_page_gets_the_tables_of_its_markers(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text(json.dumps(row("cycle_gan", 1, 15.0, 18.0)) + "\n")
    page.write_text("a\n<!-- unaligned worldmaps_mini 1 -->\nold\n<!-- end -->\nb\n")
    recipes.write_page(page, results)
    text = page.read_text()
    assert text.startswith("a\n<!-- unaligned worldmaps_mini 1 -->\n| recipe |")
    assert text.endswith("|\n<!-- end -->\nb\n")
    assert "old" not in text


def test_it_goes_on_where_it_was_ended(tmp_path, monkeypatch, capsys):
    done = []

    def measure(options, seed, dataroot, seconds, epochs, gpu):
        done.append((options, seed, epochs))
        return {k: v for k, v in row("", 0, 1.0).items() if k in ("epochs", "seconds", "last")}

    data = tmp_path / "worldmaps_mini"
    (data / "aligned" / "test").mkdir(parents=True)
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(row("+ ema", 1, 15.0)) + "\n")
    monkeypatch.setattr(recipes, "measure", measure)
    words = ["--dataroot", data, "--minutes", 1, "--seeds", "1,2", "--only", "+ ema,+ R1"]
    monkeypatch.setattr(sys, "argv", [*map(str, ["recipes.py", *words, "--results", results])])
    recipes.main()
    ema, r1 = recipes.RECIPES["+ ema"], recipes.RECIPES["+ R1"]
    # the number of epochs of the first seed is that of the others
    assert done == [(r1, 1, 0), (ema, 2, 7), (r1, 2, 7)]
    recipes.main()
    assert len(done) == 3
    results.write_text("# Results\n")
    with pytest.raises(UserError, match=r"--results .*results\.jsonl holds other lines"):
        recipes.main()


def test_epochs_are_as_long_as_the_larger_side_and_at_most_four_are_scored(tmp_path, monkeypatch):
    for side, count in (("trainA", 2), ("trainB", 5)):
        for i in range(count):
            picture(tmp_path / "unaligned" / side / f"{i}.png")
    runs, scored = [], []

    def run(words, gpu, limit):
        assert limit == 60
        runs.append(words)
        saves = Path(words[words.index("--checkpoints_dir") + 1]) / "x"
        saves.mkdir()
        for epoch in "2", "4", "latest":  # stopped in the sixth
            (saves / f"{epoch}_net_G_A.pth").touch()
        return 60.0

    def scores(folder, dataroot, phase, epoch, gpu):
        scored.append((phase, epoch))
        return {"fake_B PSNR": 1.0}

    def fitting(words, pictures, seconds, gpu):
        assert pictures == 5
        return 7

    monkeypatch.setattr(recipes, "run", run)
    monkeypatch.setattr(recipes, "scores", scores)
    monkeypatch.setattr(recipes, "epochs_that_fit", fitting)
    assert recipes.measure(recipes.RECIPES["+ ema"], 1, tmp_path, 60, 0, "-1")["epochs"] == 7
    assert [e for phase, e in scored if phase == "val"] == ["2", "4", "latest"]
    assert runs[0][-2:] == ["--save_epoch_freq", "2"]


@pytest.mark.parametrize("gpu", [False, True])
def test_a_training_is_stopped_when_its_time_is_up(gpu, tmp_path, monkeypatch):
    """On the clock, or after so much work of the processor, of which sleeping is none."""
    script = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    script += "time.sleep(0.5 if '-1' in sys.argv else 0)\nwhile True: pass\n"
    (tmp_path / "train.py").write_text(script)
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    tick = 1 / os.sysconf("SC_CLK_TCK")  # by which the kernel's timer may be early
    assert 0.4 - tick <= recipes.run([] if gpu else ["-1"], gpu, 0.4) < 1.5
    (tmp_path / "train.py").write_text("raise SystemExit('no data')")
    with pytest.raises(UserError, match="no data"):
        recipes.run([], gpu, 60)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_each_recipe_is_a_command_line(name, tmp_path):
    assert "," not in name  # --only separates names by commas
    words = [*recipes.COMMON.split(), *recipes.RECIPES[name][1].split()]
    TrainOptions([*words, "--gpu_ids", "-1", "--dataroot", str(tmp_path)]).parse(save=False)
