"""How training begins and ends: what is left on disk, and in which order things are said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import models
from models.pix2pix_model import Pix2PixModel
from options.train_options import TrainOptions
from tests.helpers import ROOT, SHORT, TINY, aligned, run, succeed
from util.errors import UserError
from util.find_class import find_class
from util.visualizer import Visualizer

TABLE = "----------------- Options ---------------"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return aligned(tmp_path_factory.mktemp("pictures"))


def words(data: Path, out: Path, *more: object) -> list[object]:
    where = ["--dataroot", data, "--checkpoints_dir", out / "c", "--name", "x"]
    return [*where, "--model", "pix2pix", *TINY, *SHORT, *more]


def test_nothing_to_do_leaves_the_options_as_they_are(pictures, tmp_path):
    first = succeed("train.py", *words(pictures, tmp_path)).out
    page = tmp_path / "c" / "x" / "web" / "index.html"
    assert first.splitlines()[-1].endswith(f"losses and images: {page}")
    file = tmp_path / "c" / "x" / "train_opt.txt"
    before = file.read_text()
    again = succeed("train.py", *words(pictures, tmp_path, "--continue_train", "--lr", "0.5"))
    assert "nothing to do" in again.out
    assert file.read_text() == before


def test_views_are_closed_after_an_exception(pictures, tmp_path, monkeypatch):
    closed = []
    close = Visualizer.close
    monkeypatch.setattr(Visualizer, "close", lambda self: closed.append(1) or close(self))

    def fail(self):
        raise UserError("no more")

    monkeypatch.setattr(Pix2PixModel, "optimize_parameters", fail)
    result = run("train.py", *words(pictures, tmp_path))
    assert (result.code, result.err) == (1, "error: no more\n")
    assert closed == [1]


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--phase", "nowhere"], 1, "nowhere"),
        (["--val_freq", "1"], 1, "--val_phase val"),
        (["--val_freq", "1", "--val_phase", "test", "--best_by", "cycle", "--lr", "x"], 2, "--lr"),
        (["--load_size", "8"], 2, "--load_size 8 is smaller"),
        (["--gpu_ids", "7"], 2, "no GPU 7"),
        (["--name", "../x"], 2, "is not a folder inside"),
    ],
)
def test_a_failed_start_is_one_line_and_leaves_nothing(pictures, tmp_path, more, code, said):
    result = run("train.py", *words(pictures, tmp_path, *more))
    assert result.code == code
    assert said in result.err
    assert result.err.count("\n") == 1
    assert TABLE not in result.out
    assert not (tmp_path / "c").exists()


def test_the_order_of_the_help(capsys):
    with pytest.raises(SystemExit):
        TrainOptions(["--model", "pix2pix", "--help"]).parse()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: ")
    assert lines[1] == ""
    groups = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert groups == [
        *("basic", "data", "model", "discriminator", "pix2pix", "training", "display"),
        *("saving and resuming", "validation", "speed", "examples"),
    ]


def test_options_of_ones_own_come_after_the_model(monkeypatch, capsys):
    def modify(parser, is_train):
        parser.add_argument("--mine", help="my own")
        return parser

    monkeypatch.setattr(models, "get_option_setter", lambda name: modify)
    with pytest.raises(SystemExit):
        TrainOptions(["--help"]).parse()
    text = capsys.readouterr().out
    assert text.index("\nmodel:") < text.index("--mine") < text.index("\ntraining:")
    assert text.index("--help") < text.index("\ndata:")


def test_a_model_file_that_misses_a_package(tmp_path, monkeypatch):
    package = tmp_path / "ourmodels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "fancy_model.py").write_text("import surely_not_installed.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = r"ourmodels/fancy_model.py needs the package surely_not_installed, .*pip install surely"
    with pytest.raises(UserError, match=said):
        find_class("ourmodels", "model", "fancy", object)


def test_output_that_nobody_reads():
    text = (
        "from util.errors import one_line_errors\nwith one_line_errors():\n    while True: print(1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()  # as `| head` does when it has seen enough
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 141
