"""`scripts/check_dataset.py`: finds what training would stop at, and what is odd."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from options.train_options import TrainOptions
from scripts import check_dataset
from tests import helpers
from util.errors import UserError


def run(capsys, *argv: object) -> tuple[int, str]:
    """The exit code and what was printed; in this process unless asked otherwise."""
    words = [str(w) for w in argv]
    code = check_dataset.main(
        [*words, *([] if "--num_threads" in words else ["--num_threads", "0"])]
    )
    return code, capsys.readouterr().out


def sections(text: str) -> dict[str, list[str]]:
    """The listed files by the line above them."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith(("training would stop at:", "worth a look:")):
            title = line.split(": ", 1)[1].rsplit(" (", 1)[0]
            found[title] = []
        elif line.startswith("  ") and title:
            found[title].append(line.strip())
    return found


def noise(path: Path, width: int, height: int, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_a_good_data_set(tmp_path, capsys):
    helpers.unaligned(tmp_path, count=6)
    code, out = run(capsys, "--dataroot", tmp_path)
    assert code == 0
    assert not sections(out)
    rows = [line.split() for line in out.splitlines()[2:6]]
    assert rows == [
        [f, "6", "0", "40x40", "RGB", "PNG"] for f in ("trainA", "trainB", "testA", "testB")
    ]
    assert out.splitlines()[-1] == "training would go through all of it"


def test_a_link_to_nothing_is_counted(tmp_path, capsys):
    for name in ("a", "b"):
        noise(tmp_path / "in" / f"{name}.png", 40, 40)
    (tmp_path / "in" / "c.png").symlink_to("moved_away.png")
    words = ["--dataroot", tmp_path / "in", "--dataset_mode", "single"]
    code, out = run(capsys, *words, "--load_size", 40, "--crop_size", 40)
    assert code == 1
    assert "what can't be used (1)" in out
    assert out.splitlines()[2].split()[:3] == [".", "3", "1"]  # images, broken


@pytest.mark.parametrize("threads", [0, 2])
def test_broken_files(threads, tmp_path, capsys):
    helpers.unaligned(tmp_path, count=9)
    cut = helpers.truncated(tmp_path / "trainA" / "3.png")
    inside = helpers.damaged_inside(tmp_path / "trainB" / "sub" / "x.png")
    text = tmp_path / "trainB" / "text.jpg"
    text.write_text("no image")
    empty = tmp_path / "trainB" / "empty.webp"
    empty.touch()
    code, out = run(capsys, "--dataroot", tmp_path, "--phase", "train", "--num_threads", threads)
    assert code == 1
    listed = sections(out)["what can't be used"]
    told = [f"can't read the image {p}: " for p in (cut, empty, inside, text)]
    assert all(line.startswith(start) for line, start in zip(listed, told, strict=True))
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith("train")]
    assert rows[:2] == [["trainA", "9", "1"], ["trainB", "12", "3"]]
    assert out.splitlines()[-1].startswith("training would stop; with --skip_broken it would pass")
    code, out = run(capsys, "--dataroot", tmp_path, "--phase", "train", "--skip_broken")
    assert code == 0
    assert "training would skip: what can't be used (4)" in out
    assert out.splitlines()[-1].startswith("training would go through all others")


def test_peculiar_pictures(tmp_path, capsys):
    for i in range(30):
        helpers.picture(tmp_path / f"{i:02}.png", k=i)
    noise(tmp_path / "wide.png", 64, 40)
    noise(tmp_path / "grey.png", 40, 40, "L")
    noise(tmp_path / "alpha.png", 40, 40, "RGBA")
    noise(tmp_path / "cmyk.jpg", 40, 40, "CMYK")
    Image.new("RGB", (40, 40), (200, 10, 10)).save(tmp_path / "red.png")
    levels = np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray((levels / 65535).astype(np.float32)).save(tmp_path / "floats.tif")
    image = Image.open(noise(tmp_path / "rotated.jpg", 40, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "rotated.jpg", exif=exif)
    frames = [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    noise(tmp_path / "frames.tif", 40, 40)
    Image.open(tmp_path / "07.png").save(
        tmp_path / "frames.tif", save_all=True, append_images=frames
    )
    (tmp_path / "notes.txt").write_text("x")
    code, out = run(capsys, "--dataroot", tmp_path, "--dataset_mode", "single")
    assert code == 0
    found = {what: [Path(f.split(": ")[0]).name for f in v] for what, v in sections(out).items()}
    assert found.pop("size differs from nearly all in ., which have 40x40") == ["wide.png"]
    assert set(found.pop("mode differs from nearly all in ., which have RGB")) == {
        "grey.png", "alpha.png", "cmyk.jpg", "deep.png", "floats.tif"
    }  # fmt: skip
    assert found.pop("nearly one colour") == ["red.png"]
    assert found.pop("transparency: left out") == ["alpha.png"]
    assert found.pop("mode CMYK: converted to RGB") == ["cmyk.jpg"]
    deep = "16 bits a channel: scaled to 8 by value, unless --value_range is given"
    assert found.pop(deep) == ["deep.png"]
    floats = "floats: scaled from [0, 1] to 8 bits by value, unless --value_range is given"
    assert found.pop(floats) == ["floats.tif"]
    sideways = "stored sideways by the camera (EXIF): "
    assert found.pop(f"{sideways}turned upright") == ["rotated.jpg"]
    assert found.pop("several images in one file: the first is taken") == ["frames.tif"]
    assert f"skipped in {tmp_path}: 1 .txt" in out
    assert not found
    words = ["--dataroot", tmp_path, "--dataset_mode", "single", "--ignore_orientation"]
    as_stored = f"{sideways}taken as it is stored (--ignore_orientation)"
    assert as_stored in sections(run(capsys, *words)[1])


def test_every_orientation_but_upright_is_told(tmp_path, capsys):
    """2 to 8; 0 and 9 mean nothing."""
    for value in range(10):
        image = Image.open(noise(tmp_path / f"{value}.jpg", 40, 40))
        exif = image.getexif()
        exif[0x0112] = value
        image.save(tmp_path / f"{value}.jpg", exif=exif)
    _, out = run(capsys, "--dataroot", tmp_path, "--dataset_mode", "single")
    told = sections(out)["stored sideways by the camera (EXIF): turned upright"]
    assert [Path(name).name for name in told] == [f"{value}.jpg" for value in range(2, 9)]


def test_aligned_files_of_odd_width(tmp_path, capsys):
    helpers.aligned(tmp_path, count=3)
    odd = helpers.picture(tmp_path / "train" / "odd.png", 81, 40)
    argv = ["--dataroot", tmp_path, "--dataset_mode", "aligned"]
    code, out = run(capsys, *argv)
    assert code == 1
    (line,) = sections(out)["what can't be used"]
    assert line.startswith(f"{odd} is 81x40: a file with A and B side by side must be of even")
    odd.unlink()
    assert run(capsys, *argv)[0] == 0


def test_pairs_of_two_folders(tmp_path, capsys):
    for side in "AB":
        for i in range(4):
            helpers.picture(tmp_path / f"train{side}" / "sub" / f"{i}.png")
    argv = ["--dataroot", tmp_path, "--dataset_mode", "aligned"]
    assert run(capsys, *argv)[0] == 0
    helpers.picture(tmp_path / "trainB" / "sub" / "1.png", 40, 44)
    code, out = run(capsys, *argv)
    assert code == 1
    (pair,) = sections(out)["what can't be used"]
    assert pair.startswith("a pair must be of one size: ")
    assert pair.endswith("sub/1.png is 40x44")
    assert re.findall(r"^train[AB] +(\d+) +(\d+) ", out, re.M) == [("4", "1")] * 2
    helpers.picture(tmp_path / "trainA" / "lonely.png")
    code, out = run(capsys, *argv)
    assert code == 1
    (line,) = sections(out)["the dataset as a whole"]
    assert "1 have no partner, such as lonely; for images that are no pairs say" in line
    assert out.splitlines()[-1] == "training would stop"
    # no pairs are asked for here
    assert run(capsys, "--dataroot", tmp_path)[0] == 0


def test_too_small_for_the_crop(tmp_path, capsys):
    helpers.aligned(tmp_path, count=2, size=64)
    argv = ["--dataroot", tmp_path, "--dataset_mode", "aligned", "--preprocess", "crop"]
    assert run(capsys, *argv, "--crop_size", 64)[0] == 0
    code, out = run(capsys, *argv, "--crop_size", 65)
    assert code == 1
    lines = sections(out)["what can't be used"]
    assert len(lines) == 4
    assert all("is too small for --crop_size 65" in line for line in lines)
    assert run(capsys, *argv[:-2], "--crop_size", 65)[0] == 0


def test_a_batch_needs_one_size(tmp_path, capsys):
    helpers.picture(tmp_path / "a.png", 40, 40)
    helpers.picture(tmp_path / "b.png", 44, 40)
    argv = ["--dataroot", tmp_path, "--dataset_mode", "single", "--preprocess", "none"]
    assert run(capsys, *argv)[0] == 0
    code, out = run(capsys, *argv, "--batch_size", 2)
    assert code == 1
    (what,) = sections(out)
    assert what.startswith("--batch_size 2 needs images of one size, and --preprocess none")


def test_long_lists_are_cut(tmp_path, capsys):
    for i in range(15):
        (tmp_path / f"{i}.png").write_bytes(b"")
    argv = ["--dataroot", tmp_path, "--dataset_mode", "single"]
    _, out = run(capsys, *argv)
    assert "  ... and 5 more (--all lists them)" in out
    _, out = run(capsys, *argv, "--all")
    assert len(sections(out)["what can't be used"]) == 15


def test_missing_and_empty_folders(tmp_path, capsys):
    helpers.picture(tmp_path / "trainA" / "0.png")
    code, out = run(capsys, "--dataroot", tmp_path)
    assert code == 1
    assert f"no folder {tmp_path / 'trainB'}" in sections(out)["the dataset as a whole"][0]
    (tmp_path / "trainB").mkdir()
    code, out = run(capsys, "--dataroot", tmp_path)
    assert code == 1
    assert sections(out)["the dataset as a whole"][0].startswith("no images in ")


@pytest.mark.slow
def test_the_program_runs_in_any_folder(tmp_path):
    helpers.aligned(tmp_path / "good")
    program = helpers.ROOT / "scripts/check_dataset.py"
    result = helpers.run_process(program, "--dataroot", tmp_path / "good", cwd=tmp_path)
    assert (result.code, result.err) == (1, "")
    assert "for pairs side by side in one file say --model pix2pix" in result.out


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_a_file_name_that_is_no_utf8(tmp_path):
    helpers.unaligned(tmp_path)
    with open(os.path.join(os.fsencode(tmp_path / "trainA"), b"caf\xe9.png"), "wb") as file:
        file.write(b"no image")
    program = helpers.ROOT / "scripts/check_dataset.py"
    more = {"PYTHONIOENCODING": "utf-8:strict"}  # as in most people's terminals
    result = helpers.run_process(program, "--dataroot", tmp_path, more=more)
    assert (result.code, result.err) == (1, "")
    assert r"trainA/caf\udce9.png: " in result.out


OWN = '''
import random
from PIL import Image
from data.base_dataset import BaseDataset, get_transform

class CheckedDataset(BaseDataset):
    """Somebody's own: lists its files itself, and takes no image whose name has an x."""
    def __init__(self, opt):
        super().__init__(opt)
        self.image_paths = [f"{opt.dataroot}/{i}.png" for i in (0, 1)] + [f"{opt.dataroot}/x.png"]
        self.transform_all = get_transform(opt)
    def __getitem__(self, index):
        path = self.image_paths[index]
        if "x" in path.rsplit("/", 1)[1]:
            raise ValueError("no x, please")
        return {"A": self.transform_all(Image.open(path).convert("RGB")), "A_paths": path}
    def __len__(self):
        return len(self.image_paths)
'''


def test_datasets_of_ones_own_are_checked_as_they_are(tmp_path, capsys, monkeypatch):
    helpers.picture(tmp_path / "0.png", 40, 40)
    helpers.truncated(helpers.picture(tmp_path / "1.png", 40, 40))
    helpers.picture(tmp_path / "x.png", 40, 40)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "checked_dataset.py").write_text(OWN)
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path / "own")])
    code, out = run(capsys, "--dataroot", tmp_path, "--dataset_mode", "checked")
    assert code == 1
    lines = sections(out)["what can't be used"]
    assert f"{tmp_path}/x.png: no x, please" in lines
    assert any("1.png: " in line for line in lines)
    assert not any("0.png" in line for line in lines)
    # x.png is a whole file, but this dataset refuses it
    assert out.splitlines()[2].split() == [".", "3", "2", "40x40", "RGB", "PNG"]


def test_datasets_that_name_no_files(tmp_path, capsys, monkeypatch):
    """Their items are counted: no row of a folder that seems to be empty."""
    unnamed = OWN.replace("image_paths", "files").replace(', "A_paths": path', "")
    helpers.picture(tmp_path / "0.png", 40, 40)
    helpers.picture(tmp_path / "1.png", 40, 40)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "unnamed_dataset.py").write_text(unnamed.replace("Checked", "Unnamed"))
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path / "own")])
    code, out = run(capsys, "--dataroot", tmp_path, "--dataset_mode", "unnamed")
    assert code == 1
    assert out.splitlines()[2].split() == ["items", "of", "unnamed", "3", "1"]
    assert sections(out)["what can't be used"] == ["item 2: no x, please"]


def test_each_phase_of_a_dataset_that_names_no_files(tmp_path, capsys, monkeypatch):
    unnamed = OWN.replace("image_paths", "files").replace(', "A_paths": path', "")
    unnamed = unnamed.replace("{opt.dataroot}", "{opt.dataroot}/{opt.phase}")
    for phase in ("train", "test"):
        for i in range(2):
            helpers.picture(tmp_path / phase / f"{i}.png", 40, 40)
    helpers.truncated(tmp_path / "test" / "1.png")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "phases_dataset.py").write_text(unnamed.replace("Checked", "Phases"))
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path / "own")])
    _, out = run(capsys, "--dataroot", tmp_path, "--dataset_mode", "phases")
    rows = [line.split()[-2:] for line in out.splitlines()[2:4]]
    assert rows == [["3", "1"], ["3", "2"]]


@pytest.mark.parametrize("values", ["byte", "float"])
def test_values_that_are_not_in_the_range(values, tmp_path, capsys, monkeypatch):
    item = 'self.transform_all(Image.open(path).convert("RGB"))'
    scaled = f"(({item} + 1) * 127.5).{values}()"
    helpers.picture(tmp_path / "0.png", 40, 40)
    (tmp_path / "own").mkdir()
    text = OWN.replace(item, scaled).replace("Checked", f"{values.capitalize()}Scaled")
    text = text.replace("(0, 1)", "(0,)")
    (tmp_path / "own" / f"{values}scaled_dataset.py").write_text(text)
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path / "own")])
    code, out = run(capsys, "--dataroot", tmp_path, "--dataset_mode", f"{values}scaled")
    assert code == 1  # of x.png, which this dataset refuses
    found = sections(out)
    if values == "byte":
        title = "A is a tensor of torch.uint8, not of float32 in [-1, 1]"
        assert found[title] == [f"{tmp_path}/0.png"]
        assert out.endswith("training would stop\n")
    else:
        (line,) = found["A has values far out of [-1, 1], which models expect"]
        assert line.startswith(f"{tmp_path}/0.png: up to ")
        assert line.endswith(" in magnitude")


WRONG_ITEMS = {
    "{'A': A.double()}": "A is a tensor of torch.float64, not of float32 in [-1, 1]",
    "{'A': A[0]}": "A has the shape (40, 40), not (C, H, W)",
    "{'A': A / 0}": "A has values that are NaN or infinite",
    "(A, A)": "items are of list, not dictionaries",
    "None": "what can't be used",
}


@pytest.mark.parametrize("item", WRONG_ITEMS)
@pytest.mark.parametrize("threads", [0, 2])
def test_items_that_no_model_takes(item, threads, tmp_path, capsys, monkeypatch):
    number = list(WRONG_ITEMS).index(item)
    (tmp_path / f"wrong{number}_dataset.py").write_text(
        "import torch\nfrom data.base_dataset import BaseDataset\n"
        f"class Wrong{number}Dataset(BaseDataset):\n    def __len__(self):\n        return 3\n"
        "    def __getitem__(self, index):\n        A = torch.rand(3, 40, 40) - 0.5\n"
        f"        return {item}\n"
    )
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path)])
    words = ["--dataroot", tmp_path, "--dataset_mode", f"wrong{number}", "--num_threads", threads]
    code, out = run(capsys, *words, "--load_size", 40, "--crop_size", 40)
    assert code == 1
    assert WRONG_ITEMS[item] in sections(out)
    if item == "None":
        told = sections(out)["what can't be used"]
        assert told[0].startswith(f"item 0 of Wrong{number}Dataset is None: return a dictionary")
        opt = TrainOptions(f"--dataroot {tmp_path} --dataset_mode wrong{number}").gather_options()
        opt.num_threads, opt.seed, opt.gpu_ids = threads, 0, []
        with pytest.raises(UserError, match=r"item . of Wrong.Dataset is None"):
            next(iter(data.create_dataset(opt)))


def test_both_files_of_an_item_may_be_broken(tmp_path, capsys):
    helpers.unaligned(tmp_path, count=3)
    broken = [helpers.truncated(tmp_path / f"train{side}" / "1.png") for side in "AB"]
    _, out = run(capsys, "--dataroot", tmp_path, "--phase", "train")
    listed = sections(out)["what can't be used"]
    assert all(f"image {p}: " in line for p, line in zip(broken, listed, strict=True))


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix"])
def test_each_side_has_the_channels_of_its_network(model, tmp_path, capsys):
    for side, channels in (("A", 3), ("B", 5)):
        (tmp_path / f"train{side}").mkdir()
        values = np.random.default_rng(channels).random((40, 40, channels), np.float32)
        np.save(tmp_path / f"train{side}" / "0.npy", values)
    words = ["--dataroot", tmp_path, "--model", model, "--value_range", "0", "1"]
    words += ["--lambda_identity", "0"] * (model == "cycle_gan")
    assert run(capsys, *words, "--input_nc", "3", "--output_nc", "5")[0] == 0
    back = ["--input_nc", "5", "--output_nc", "3", "--direction", "BtoA"]
    assert run(capsys, *words, *back)[0] == 0
    code, out = run(capsys, *words, "--input_nc", "5", "--output_nc", "3")
    assert code == 1
    text = " ".join(sections(out)["what can't be used"])
    assert "A/0.npy: the image has 3 channels, the networks take 5 " in text


def test_channels_that_images_do_not_have(tmp_path, capsys):
    helpers.unaligned(tmp_path)
    code, out = run(capsys, "--dataroot", tmp_path, "--input_nc", "4", "--output_nc", "4")
    assert (code, "--input_nc 4: images are read with 1 or 3" in out) == (1, True)


@pytest.mark.parametrize("wrong", [["--dataset_mode", "x"], ["--what"], ["--load_size", "50"]])
def test_wrong_command_lines(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        check_dataset.main(["--dataroot", ".", *wrong])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_agrees_with_training(tmp_path, capsys):
    """What it objects to stops training, and what it lets pass does not."""
    helpers.unaligned(tmp_path / "data")
    noise(tmp_path / "data" / "trainA" / "deep.png", 40, 40, "I;16")
    noise(tmp_path / "data" / "trainA" / "palette.png", 90, 50, "P")
    words = ["--dataroot", tmp_path / "data", "--checkpoints_dir", tmp_path, *helpers.TINY]
    words += [*helpers.SHORT, "--no_html"]
    assert run(capsys, "--dataroot", tmp_path / "data")[0] == 0
    assert helpers.run("train.py", *words).code == 0
    helpers.damaged_inside(tmp_path / "data" / "trainB" / "x.png")
    assert run(capsys, "--dataroot", tmp_path / "data")[0] == 1
    assert helpers.run("train.py", *words).code == 1
    assert run(capsys, "--dataroot", tmp_path / "data", "--skip_broken")[0] == 0
    assert helpers.run("train.py", *words, "--skip_broken").code == 0
