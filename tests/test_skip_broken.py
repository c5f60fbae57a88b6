"""Images that can't be used: training stops at them, or with --skip_broken goes round them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from data import create_dataset
from data.loader import MAX_TRIES, EpochLoader
from options.train_options import TrainOptions
from scripts import check_dataset
from tests import helpers
from util.errors import UserError

BROKEN_A, BROKEN_B = "1.png", "2.png"


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Datasets of 4 images, of which one of A, one of B, and one of the pairs is broken."""
    root = helpers.aligned(helpers.unaligned(tmp_path / "pictures", count=4), count=4)
    for phase in ("train", "test"):
        helpers.damaged_inside(root / f"{phase}A" / BROKEN_A)
        helpers.truncated(root / f"{phase}B" / BROKEN_B)
        helpers.truncated(root / phase / BROKEN_A)
    return root


def train_words(pictures: Path, tmp_path: Path, *more: str, model: str = "cycle_gan") -> list[str]:
    where = ["--dataroot", str(pictures), "--checkpoints_dir", str(tmp_path / "ckpt")]
    rest = ["--model", model, "--no_html", *helpers.TINY, *helpers.SHORT]
    return [*where, "--name", "x", *rest, *more]


@pytest.mark.parametrize("threads", ["0", "2"])
def test_without_it_training_stops_and_names_the_file(threads, pictures, tmp_path):
    result = helpers.run("train.py", *train_words(pictures, tmp_path, "--num_threads", threads))
    assert result.code == 1
    (line,) = result.err.strip().splitlines()
    assert line.startswith(f"error: can't read the image {pictures}/train")


@pytest.mark.parametrize("threads", ["0", "2"])
def test_with_it_training_ends_and_lists_them_once(threads, pictures, tmp_path):
    words = train_words(pictures, tmp_path, "--skip_broken", "--num_threads", threads)
    result = helpers.succeed("train.py", *words, "--n_epochs", "3")
    listed = result.out[result.out.index("--skip_broken skipped") :].splitlines()
    assert listed[0] == "--skip_broken skipped 2:"
    for line, path in zip(listed[1:], [f"trainA/{BROKEN_A}", f"trainB/{BROKEN_B}"], strict=False):
        assert line.startswith(f"  can't read the image {pictures / path}: ")
    assert "iters 4)" not in result.err
    assert "End of epoch 3 / 3" in result.out


@pytest.mark.parametrize("count", ["2", "6"])
def test_the_first_batch_is_that_of_the_loader(count, pictures, tmp_path):
    words = train_words(pictures, tmp_path, "--skip_broken", "--batch_size", count, model="pix2pix")
    with helpers.undisturbed():
        dataset = create_dataset(TrainOptions(words).parse(save=False))
        first, batch = dataset.first(), next(iter(dataset))
        with pytest.raises(UserError, match="the model needs 'other'"):
            first["other"]
    assert len(first["A"]) == int(count)  # an epoch has 4 items
    for name in ("A", "B"):
        shared = min(4, int(count))
        torch.testing.assert_close(first[name][:shared], batch[name][:shared], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layers", "height", "fits"), [(3, 20, False), (3, 22, True), (2, 12, True)]
)
def test_a_picture_too_thin_for_the_discriminator(layers, height, fits, tmp_path, capsys):
    """Patches of n layers need 3 * 2^n pixels; 22 are scaled to 24, a multiple of 4."""
    root = helpers.unaligned(tmp_path / "pictures")
    thin = helpers.picture(root / "trainA" / "thin.bmp", 200, height)
    more = ["--preprocess", "none", "--netD", "n_layers", "--n_layers_D", str(layers)]
    words = train_words(root, tmp_path, *more)
    checked = check_dataset.main([*words, "--phase", "train"])
    report = capsys.readouterr().out
    result = helpers.run("train.py", *words)
    skipping = helpers.succeed("train.py", *words, "--skip_broken")
    if fits:
        assert (checked, result.code) == (0, 0)
        assert "skipped" not in skipping.out
        return
    said = f"{thin}: an image of 200x{height} is too small for the discriminator, which needs 24x24"
    assert (checked, result.code) == (1, 1)
    assert said in report
    assert report.splitlines()[-1].startswith("training would stop; with --skip_broken it would")
    assert said in result.err
    assert said in skipping.out


def test_the_first_batch_is_of_one_size(tmp_path):
    for i, height in enumerate((40, 50)):
        helpers.picture(tmp_path / "pictures" / "train" / f"{i}.png", 80, height)
    words = train_words(tmp_path / "pictures", tmp_path, "--batch_size", "2", model="pix2pix")
    dataset = create_dataset(TrainOptions([*words, "--preprocess", "none"]).parse(save=False))
    with pytest.raises(UserError, match="make no batch: say --batch_size 1"):
        dataset.first()


def test_listed_too_where_training_is_stopped(pictures, tmp_path):
    words = train_words(pictures, tmp_path, "--skip_broken", "--max_hours", "0", model="pix2pix")
    result = helpers.run("train.py", *words, "--serial_batches", "--batch_size", "2")
    assert result.code == 0, result.err
    assert "--skip_broken skipped 1:" in result.out


def test_results_of_broken_pictures_are_left_out(pictures, tmp_path):
    """Another image's result under that name would be a false one."""
    helpers.succeed("train.py", *train_words(pictures, tmp_path, "--skip_broken", model="pix2pix"))
    where = ["--dataroot", str(pictures), "--checkpoints_dir", str(tmp_path / "ckpt")]
    words = [*where, "--name", "x", "--model", "pix2pix", "--gpu_ids", "-1", "--num_threads", "0"]
    words += ["--crop_size", "32", "--results_dir", str(tmp_path / "results")]
    result = helpers.run("test.py", *words)
    assert result.code == 1
    assert f"{pictures}/test/{BROKEN_A}" in result.err
    result = helpers.succeed("test.py", *words, "--skip_broken")
    names = {os.path.basename(f) for f in helpers.files_below(tmp_path / "results")}
    assert {n for n in names if "fake_B" in n} == {f"{i}_fake_B.png" for i in (0, 2, 3)}
    assert f"  can't read the image {pictures}/test/{BROKEN_A}: " in result.out
    page = (tmp_path / "results" / "x" / "test_latest" / "index.html").read_text()
    assert page.count("<h3>") == 3
    assert f" 3 of 4 images (test) of {pictures}; 1 left out. " in page


# --------------------------------------------------------------------------------------- the loader
class Folder(torch.utils.data.Dataset):
    """Somebody's own dataset: plain Pillow, and whatever that raises."""

    def __init__(self, paths: list[Path], draw: bool = False):
        self.image_paths, self.draw = paths, draw

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.draw:
            index = int(torch.randint(len(self), ()))
        with Image.open(self.image_paths[index]) as image:
            value = image.convert("L").resize((1, 1)).getpixel((0, 0))
        return {"index": index, "value": value, "noise": torch.rand(())}


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """Twelve images; 2, 3 and 7 are broken in three ways."""
    paths = [tmp_path / f"{i:02}.png" for i in range(12)]
    for i, path in enumerate(paths):
        helpers.picture(path, k=i)
    helpers.truncated(paths[2])
    paths[3].write_bytes(b"no image")
    paths[7].unlink()
    return paths


def batches(loader: EpochLoader, epoch: int = 1, start: int = 0) -> list[dict[str, list[float]]]:
    loader.set_epoch(epoch, start)
    return [{k: v.tolist() for k, v in batch.items()} for batch in loader]


@pytest.mark.parametrize("draw", [False, True])
def test_the_same_replacement_for_any_number_of_workers_and_any_start(draw, paths):
    dataset = Folder(paths, draw)
    plain, parallel = (
        EpochLoader(dataset, 3, True, workers, seed=5, broken="replace") for workers in (0, 2)
    )
    whole = batches(plain)
    assert [len(b["index"]) for b in whole] == [3, 3, 3, 3]
    assert batches(parallel) == whole
    assert batches(plain, start=6) == whole[2:]
    assert batches(plain, epoch=2) != whole
    assert not {2, 3, 7} & {int(i) for b in whole for i in b["index"]}
    if not draw:
        # the next one that can be read takes the place, the others keep theirs
        orderly = batches(EpochLoader(dataset, 12, False, 0, seed=5, broken="replace"))
        assert orderly[0]["index"] == [0, 1, 4, 4, 4, 5, 6, 8, 8, 9, 10, 11]
    parallel.close()
    if not draw:
        assert parallel.broken.keys() == plain.broken.keys()
        assert len(plain.broken) == 3


def test_reasons_name_the_file_though_the_error_does_not(paths):
    loader = EpochLoader(Folder(paths), 4, False, 0, broken="replace")
    batches(loader)
    reasons = sorted(loader.broken)
    assert [str(p) in r for p, r in zip([paths[2], paths[3], paths[7]], reasons, strict=True)] == (
        [True] * 3
    )
    assert all("\n" not in r for r in reasons)


def test_dropped_items_leave_smaller_batches_and_none_empty(paths):
    loader = EpochLoader(Folder(paths), 2, False, 0, broken="drop")
    assert [b["index"] for b in batches(loader)] == [[0, 1], [4, 5], [6], [8, 9], [10, 11]]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_pictures_is_an_error(workers, paths):
    for path in paths:
        path.write_bytes(b"")
    loader = EpochLoader(Folder(paths), 2, False, workers, broken="replace")
    with pytest.raises(UserError, match="12 items in a row can't be loaded"):
        batches(loader)
    loader.close()


def test_gives_up_after_many_in_a_row():
    tried = []

    class Gone(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> Any:
            tried.append(index)
            raise OSError(5, "Input/output error")

    loader = EpochLoader(Gone(), 1, True, 0, broken="replace")
    with pytest.raises(UserError, match=f"{MAX_TRIES} items in a row.*Input/output error"):
        next(iter(loader))
    assert len(set(tried)) == MAX_TRIES


def test_bugs_are_not_passed_over(paths):
    class Buggy(Folder):
        def __getitem__(self, index: int) -> Any:
            return self.no_such_attribute

    with pytest.raises(AttributeError):
        batches(EpochLoader(Buggy(paths), 1, False, 0, broken="replace"))


def test_a_dataset_without_the_option(paths):
    """Code that makes its own options need not know this one."""
    from data.single_dataset import SingleDataset

    for index in (2, 3):
        paths[index].unlink()
    opt = SimpleNamespace(
        dataroot=str(paths[0].parent), max_dataset_size=float("inf"), input_nc=3, isTrain=False
    )
    opt.preprocess, opt.load_size, opt.crop_size, opt.no_flip = "none", 32, 32, True
    assert len(SingleDataset(opt)) == 9  # type: ignore[arg-type]
