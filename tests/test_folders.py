"""Folders as people have them: hidden files, other kinds of files, results, frames, photographs."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data.base_dataset import open_picture, reader
from data.image_folder import ImageFolder, list_pictures, make_dataset, no_part
from data.pictures.reading import Picture, read_picture
from data.pictures.writing import write_picture
from data.single_dataset import SingleDataset
from data.unaligned_dataset import UnalignedDataset
from models.inference.folder import FolderTranslation
from models.inference.tiles import TileOptions
from models.inference.translator import Translator
from tests.helpers import picture
from util.background import BackgroundWork
from util.errors import UserError
from util.files import mark_as_results
from util.html import HTML
from util.picture_files import IMG_EXTENSIONS, open_image

ORIENTATION, MAKE, ARTIST, EXIF_PART, TAKEN = 0x0112, 0x010F, 0x013B, 0x8769, 0x9003
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def options(root: Path, **more: Any) -> Any:
    given = {
        "dataroot": str(root), "max_dataset_size": float("inf"), "input_nc": 3, "isTrain": False,
        "preprocess": "none", "load_size": 32, "crop_size": 32, "no_flip": True, **more,
    }  # fmt: skip
    return SimpleNamespace(**given)


def photograph(path: Path, orientation: int = 6) -> Path:
    """An image of 40x20 whose upper half is red, as it is stored; with what a camera notes."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :, 0], pixels[10:, :, 2] = 255, 255
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKE], exif[ARTIST] = orientation, "Camera & Co", "Ada"
    exif[EXIF_PART] = {TAKEN: "2020:01:02 03:04:05"}
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif.tobytes(), icc_profile=SRGB, dpi=(300, 300))
    return path


def identity(channels: int = 3) -> Translator:
    opt = {"input_nc": channels, "output_nc": channels}
    return Translator(torch.nn.Identity(), torch.device("cpu"), opt, Path("none"))


# ------------------------------------------------------------------------------------ which files
def test_hidden_files_are_no_pictures(tmp_path):
    for name in ("a.png", "._a.png", ".b.png", ".thumbnails/a.png", "sub/c.png"):
        picture(tmp_path / name)
    assert make_dataset(tmp_path) == [str(tmp_path / "a.png"), str(tmp_path / "sub" / "c.png")]


@pytest.mark.parametrize("arrays", [False, True])
def test_what_is_passed_over_is_counted(arrays, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data.image_folder.IMG_EXTENSIONS", IMG_EXTENSIONS[:8])
    picture(tmp_path / "a.png")
    for name in ("1.gif", "2.GIF", "sub/3.heic", "._x.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    np.save(tmp_path / "b.npy", np.zeros((4, 4)))
    assert len(list_pictures(tmp_path, arrays=arrays)) == 1 + arrays
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"skipped in {tmp_path}: 2 .gif, 1 .")
    assert (" .npy" in line) == (not arrays)
    assert " (convert .gif, for example to .png)" in line
    assert line.endswith("(.heic needs the package pillow-heif: pip install pillow-heif)")
    for ending in ("txt", "md", "csv", "json"):
        (tmp_path / f"a.{ending}").touch()
    list_pictures(tmp_path, arrays=True)
    assert " and 2 more (" in capsys.readouterr().out


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    picture(tmp_path / "closed" / "b.png")

    # not by permissions, which do not bind root
    def denied(ordinary):
        def read(folder="."):
            if Path(folder).name == "closed":
                raise PermissionError(13, "Permission denied", str(folder))
            return ordinary(folder)

        return read

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, denied(getattr(os, name)))
    for read in (
        lambda: make_dataset(tmp_path),
        lambda: no_part(tmp_path / "closed", "trainA"),
        lambda: make_dataset(tmp_path / "closed" / "missing"),
    ):
        with pytest.raises(UserError, match=r"can't read the folder .*closed: Permission denied$"):
            read()


def test_of_two_links_to_one_folder_the_first_by_name_is_followed(tmp_path, monkeypatch):
    folder = picture(tmp_path / "elsewhere" / "a.png").parent
    for name in ("x", "y"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).symlink_to(folder)
    ordinary = os.scandir
    for backwards in (False, True):

        class Entries(contextlib.ExitStack):
            def __init__(self, path, backwards=backwards):
                super().__init__()
                found = self.enter_context(ordinary(path))
                self.found = iter(sorted(found, key=lambda e: e.name, reverse=backwards))

            def __iter__(self):
                return self.found

            def __next__(self):
                return next(self.found)

        monkeypatch.setattr(os, "scandir", Entries)
        assert make_dataset(tmp_path / "in") == [str(tmp_path / "in" / "x" / "a.png")]


def test_results_below_the_folder_are_not_read_again(tmp_path, capsys):
    picture(tmp_path / "a.png")
    picture(HTML(tmp_path / "results" / "x" / "test_latest", "a page").get_image_dir() / "a.png")
    mark_as_results(picture(tmp_path / "out" / "y" / "b.png").parent)
    assert len(SingleDataset(options(tmp_path))) == 1
    line = capsys.readouterr().out
    assert f"skipped in {tmp_path}: 1 " in line
    assert "1 test_latest/ (results)" in line
    assert "1 y/ (results)" in line
    # asked for by its name it is a folder like others
    for folder in ("results/x/test_latest", "results/x/test_latest/images", "out/y"):
        assert len(SingleDataset(options(tmp_path / folder))) == 1


def test_a_single_file(tmp_path):
    path = picture(tmp_path / "a.png")
    dataset = SingleDataset(options(path))
    assert [item["A_paths"] for item in map(dataset.__getitem__, range(len(dataset)))] == [
        str(path)
    ]
    assert dataset.relative_path(str(path)) == "a.png"
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt is no image: give --dataroot a folder"):
        make_dataset(tmp_path / "notes.txt")


def test_several_frames(tmp_path, capsys):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("a.tif", "b.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    paths = ImageFolder(str(tmp_path)).imgs
    line = capsys.readouterr().out.strip()
    assert line == f"several frames in {tmp_path / 'a.tif'} and 1 more: the first one is taken"
    assert [open_image(path).getpixel((0, 0)) for path in paths] == [(255, 0, 0)] * 2
    work = FolderTranslation(identity(), "png", threads=0)
    assert work.run(work.jobs(paths, tmp_path, tmp_path / "out")) == []
    assert capsys.readouterr().out.strip() == line
    assert read_picture(tmp_path / "out" / "a.png").pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("ending", [".avif", ".heic"])
def test_newer_kinds(ending, tmp_path):
    if ending not in IMG_EXTENSIONS:
        pytest.skip("neither Pillow nor pillow-heif reads it here")
    Image.new("RGB", (32, 24), (200, 30, 40)).save(tmp_path / f"a{ending}")
    (path,) = list_pictures(tmp_path, arrays=False)
    for pixels in (np.asarray(open_image(path)), read_picture(path).pixels):
        assert pixels.shape == (24, 32, 3)
        assert np.abs(pixels.astype(int) - (200, 30, 40)).max() < 12


def test_what_a_newer_kind_needs_is_said(tmp_path, monkeypatch):
    path = tmp_path / "a.heic"
    path.write_bytes(b"x")
    for place in ("data.image_folder", "util.picture_files"):
        monkeypatch.setattr(f"{place}.IMG_EXTENSIONS", IMG_EXTENSIONS[:8])
    needs = r" \(\.heic needs the package pillow-heif: pip install pillow-heif\)$"
    for said, read in (("is no image.*", list_pictures), ("can't read.*", read_picture)):
        with pytest.raises(UserError, match=said + needs):
            read(path)


# ------------------------------------------------------------------------------------- photographs
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_photographs_are_upright_in_training(name, tmp_path):
    path = str(photograph(tmp_path / name))
    for value_range in (None, (0, 255)):
        opt = options(tmp_path, value_range=value_range)
        image = open_picture(opt, path)
        pixels = np.asarray(image) if value_range is None else image.numpy().transpose(1, 2, 0)
        assert pixels.shape == (40, 20, 3)
        red = pixels[..., 0] > pixels[..., 2]
        assert red[:, 11:].all()  # turned by a quarter to the right
        assert not red[:, :9].any()
    if name != "a.tif":  # Pillow turns it in any case
        stored = open_picture(options(tmp_path, ignore_orientation=True), path)
        assert stored.size == (40, 20)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("kind", ["same", "png", "jpg", "webp", "tiff"])
def test_what_files_say_about_themselves(name, kind, tmp_path):
    path = photograph(tmp_path / "in" / name)
    work = FolderTranslation(identity(), kind, threads=0)
    (job,) = work.jobs([str(path)], tmp_path / "in", tmp_path / "out")
    assert work.run([job]) == []
    with Image.open(job.target) as image:
        assert image.size == (20, 40)
        assert image.info["icc_profile"] == SRGB
        exif = image.getexif()
        assert ORIENTATION not in exif or exif[ORIENTATION] == 1
        if kind == "same":
            assert (exif[MAKE], exif[ARTIST]) == ("Camera & Co", "Ada")
            if name != "a.tif":
                assert exif.get_ifd(EXIF_PART)[TAKEN] == "2020:01:02 03:04:05"
            if name != "a.webp":
                np.testing.assert_allclose([float(n) for n in image.info["dpi"]], 300, atol=0.1)
        else:
            assert MAKE not in exif


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_what_deep_files_say_about_themselves(name, tmp_path):
    exif = Image.Exif()
    exif[ARTIST], exif[ORIENTATION] = "Ada", 6
    info = {"icc_profile": SRGB, "dpi": (300.0, 300.0), "exif": exif.tobytes()}
    pixels = np.random.default_rng(0).integers(0, 65536, (20, 12, 3)).astype(np.uint16)
    write_picture(tmp_path / name, pixels, None, info)
    with Image.open(tmp_path / name) as image:
        assert image.info["icc_profile"] == SRGB
        np.testing.assert_allclose([float(n) for n in image.info["dpi"]], 300, atol=0.1)
        assert image.getexif()[ARTIST] == "Ada"
    read = read_picture(tmp_path / name)
    np.testing.assert_array_equal(read.pixels, pixels)
    assert read.info["icc_profile"] == SRGB
    if name == "a.png":  # turned at full depth
        turned = read_picture(tmp_path / name, upright=True)
        np.testing.assert_array_equal(turned.pixels, np.rot90(pixels, -1))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "b.png", "b.tif"])
def test_names_of_people_keep_their_letters(name, tmp_path):
    dtype = np.uint8 if name[0] == "a" else np.uint16
    exif, person = Image.Exif(), "© José 山田".encode()
    exif[ARTIST] = person
    (tmp_path / "in").mkdir()
    pixels = np.zeros((20, 12, 3), dtype)
    write_picture(tmp_path / "in" / name, pixels, None, {"exif": exif.tobytes()})
    work = FolderTranslation(identity(), "same", threads=0)
    (job,) = work.jobs([str(tmp_path / "in" / name)], tmp_path / "in", tmp_path / "out")
    assert work.run([job]) == []
    for path in (job.source, job.target):
        assert Path(path).read_bytes().count(person) == 1


def test_a_photograph_by_its_path_is_upright(tmp_path):
    """As one that Pillow has opened and turned."""
    assert identity()(photograph(tmp_path / "a.jpg")).size == (20, 40)


def shapes_of(tiles: TileOptions | None, folder: Path) -> list[torch.Size]:
    """What the network is called with for five images of 100x20 with --batch_size 2."""
    paths = [str(picture(folder / f"{i}.png", 100, 20)) for i in range(5)]
    G, seen = identity(), []
    G.net.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    work = FolderTranslation(G, batch_size=2, tiles=tiles)
    assert work.run(work.jobs(paths, folder, folder / "out")) == []
    return seen


def test_batches_and_tiles_are_no_larger_than_asked(tmp_path):
    """Larger ones may be more than memory holds."""
    assert [shape[0] for shape in shapes_of(None, tmp_path)] == [2, 2, 1]
    # a long image is a large one, too
    shapes = shapes_of(TileOptions(32, 0, "quick"), tmp_path)
    assert (1, 3, 20, 32) in shapes
    assert 100 not in [shape[3] for shape in shapes]


@pytest.mark.parametrize(("largest", "ahead"), [(1000, 1), (math.inf, 5)])
def test_large_images_do_not_wait_in_memory(largest, ahead, tmp_path, monkeypatch):
    """Neither those that are read ahead, nor results."""
    paths = [str(picture(tmp_path / f"{i}.png", 32, 32)) for i in range(9)]
    G, asked, found = identity(), [], []
    call = BackgroundWork.call

    def count(self, *args):
        asked.append(args)
        return call(self, *args)

    monkeypatch.setattr(BackgroundWork, "call", count)
    work = FolderTranslation(G, threads=2, largest=largest)
    written = tmp_path / "out"
    look = lambda *_: found.append((len(asked), len(list(written.glob("[!.]*")))))  # noqa: E731
    G.net.register_forward_hook(look)
    assert work.run(work.jobs(paths, tmp_path, written)) == []
    assert [number for number, _ in found] == [min(9, i + (ahead if i else 1)) for i in range(9)]
    if ahead == 1:
        assert [files for _, files in found] == list(range(9))


@pytest.mark.parametrize("kind", ["same", "png"])
def test_scaled_pictures_keep_their_profile(kind, tmp_path):
    path = photograph(tmp_path / "in" / "a.jpg")
    opt = options(tmp_path, preprocess="resize_and_crop", load_size=32, crop_size=32)
    work = FolderTranslation(identity(), kind, threads=0, load_resized=reader(opt, 3))
    (job,) = work.jobs([str(path)], tmp_path / "in", tmp_path / "out")
    assert work.run([job]) == []
    with Image.open(job.target) as image:
        assert (image.size, image.info["icc_profile"]) == ((32, 32), SRGB)
        assert image.getexif().get(ARTIST) == ("Ada" if kind == "same" else None)
    with Image.open(path) as image:
        assert identity()(image).info["icc_profile"] == SRGB
    assert identity()(path).info["icc_profile"] == SRGB


def test_a_profile_of_colour_is_not_given_to_grey(tmp_path):
    opt = {"input_nc": 3, "output_nc": 1}
    G = Translator(torch.nn.Conv2d(3, 1, 1), torch.device("cpu"), opt, Path("none"))
    result = G(photograph(tmp_path / "a.jpg"))
    assert (result.mode, "icc_profile" in result.info) == ("L", False)


def test_transparency_of_another_size_is_left_out():
    """Of a network that enlarges, where there is no transparency for its pixels."""
    opt = {"input_nc": 3, "output_nc": 3, "direction": "AtoB"}
    G = Translator(torch.nn.Upsample(scale_factor=2), torch.device("cpu"), opt, Path("none"))
    G._any_size = G.net  # as it is where no size is kept
    result = G(Image.new("RGBA", (8, 8)))
    assert (result.mode, result.size) == ("RGB", (16, 16))


def test_a_profile_of_grey_is_not_written_into_colour(tmp_path):
    grey = SRGB[:16] + b"GRAY" + SRGB[20:]
    write_picture(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), None, {"icc_profile": grey})
    assert read_picture(tmp_path / "a.png").info == {}
    assert isinstance(read_picture(tmp_path / "a.png"), Picture)


def test_pictures_where_folders_are_expected(tmp_path):
    picture(tmp_path / "photo.jpg", 40, 30, 1)
    said = r"trainA: .*has 1 image\); move .*--model test .*--dataset_mode single"
    with pytest.raises(UserError, match=said):
        UnalignedDataset(options(tmp_path, phase="train"))


def test_a_tiled_picture_is_done_before_the_next_one_is_read(tmp_path, monkeypatch):
    """One large image in memory at a time, also with --batch_size."""
    for name, size in (("a", 40), ("b", 40), ("c", 8), ("d", 8)):
        picture(tmp_path / "in" / f"{name}.png", size, size)
    work = FolderTranslation(identity(3), batch_size=2, tiles=TileOptions(16))
    order: list[str] = []
    read, write = work._read, work._write_tiled
    monkeypatch.setattr(work, "_read", lambda job: order.append(job.source[-5]) or read(job))
    monkeypatch.setattr(work, "_write_tiled", lambda ready: order.append("tiled") or write(ready))
    paths = sorted(map(str, (tmp_path / "in").glob("*.png")))
    assert work.run(work.jobs(paths, tmp_path / "in", tmp_path / "out")) == []
    assert order == ["a", "tiled", "b", "tiled", "c", "d"]
