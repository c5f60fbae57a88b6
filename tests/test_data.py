"""Datasets, preprocessing, and the order in which the loader gives what it gives."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data import create_dataset, find_dataset_using_name
from data.base_dataset import get_params, get_transform
from data.image_folder import ImageFolder, list_pictures, make_dataset, open_image
from data.transforms import ToNormalized
from models.colorization_model import ColorizationModel
from options.test_options import TestOptions
from options.train_options import TrainOptions
from tests.helpers import (
    ROOT,
    aligned,
    damaged_inside,
    files_below,
    picture,
    pixels,
    seed_all,
    truncated,
    unaligned,
    undisturbed,
)
from util.errors import UserError
from util.util import tensor2im

MODES = {
    "unaligned": "cycle_gan",
    "aligned": "pix2pix",
    "single": "cycle_gan",
    "colorization": "colorization",
    "template": "template",
}


@pytest.fixture(autouse=True)
def _random_sources():
    with undisturbed():
        seed_all(1)
        yield


def options(root: Path, *words: str, train: bool = True, model: str = "cycle_gan"):
    kind = TrainOptions if train else TestOptions
    where = ["--dataroot", str(root), "--checkpoints_dir", str(root / "checkpoints")]
    return kind([*where, "--gpu_ids", "-1", "--model", model, *words]).parse(save=False)


def dataset(root: Path, mode: str, *words: str, train: bool = True):
    opt = options(root, "--dataset_mode", mode, *words, train=train, model=MODES[mode])
    return find_dataset_using_name(mode)(opt)


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """What an image (H, W, 3) of uint8 has to become, by the closed form."""
    return torch.from_numpy(array.transpose(2, 0, 1) / 127.5 - 1).float()


def assert_picture(tensor: torch.Tensor, array: np.ndarray) -> None:
    torch.testing.assert_close(tensor, as_tensor(array), rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------- preprocessing
NOTHING = ("--preprocess", "none", "--no_flip")


def test_values_are_mapped_to_minus_one_and_one(tmp_path):
    ramp = np.zeros((4, 256, 3), np.uint8)
    ramp[..., 0] = np.arange(256)
    ramp[..., 1] = 255
    transform = get_transform(options(tmp_path, *NOTHING))
    tensor = transform(Image.fromarray(ramp))
    assert tensor.shape == (3, 4, 256)
    torch.testing.assert_close(tensor[0, 0], torch.linspace(-1, 1, 256))
    assert (tensor[1] == 1).all()
    assert (tensor[2] == -1).all()


def test_grey_is_the_luma_of_the_colours(tmp_path):
    transform = get_transform(options(tmp_path, *NOTHING), grayscale=True)
    array = pixels(8, 8)
    luma = array.astype(np.float64) @ [0.299, 0.587, 0.114]  # ITU-R 601, as Pillow has it
    tensor = transform(Image.fromarray(array))
    assert tensor.shape == (1, 8, 8)
    np.testing.assert_allclose((tensor[0].double() + 1) * 127.5, luma, atol=1.0)


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ("--preprocess resize_and_crop --load_size 36 --crop_size 36", (50, 40), (36, 36)),
        ("--preprocess resize_and_crop --load_size 36 --crop_size 20", (50, 40), (20, 20)),
        ("--preprocess crop --crop_size 20", (50, 40), (20, 20)),
        ("--preprocess scale_width --load_size 100 --crop_size 20", (50, 40), (100, 80)),
        ("--preprocess scale_width --load_size 25 --crop_size 22", (50, 40), (25, 22)),
        ("--preprocess scale_width --load_size 512", (100, 40), (512, 256)),  # stretched
        ("--preprocess scale_width --load_size 512 --crop_size 64", (100, 40), (512, 204)),
        ("--preprocess scale_width_and_crop --load_size 100 --crop_size 20", (50, 40), (20, 20)),
        ("--preprocess none", (51, 40), (52, 40)),  # to the nearest multiple of 4
        ("--preprocess none", (49, 2), (48, 4)),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_sizes(flags, before, after, train, tmp_path):
    transform = get_transform(options(tmp_path, *flags.split(), train=train))
    tensor = transform(Image.fromarray(pixels(*before)))
    assert tensor.shape == (3, after[1], after[0])


def test_scaling_is_pillows_bicubic(tmp_path):
    opt = options(tmp_path, "--load_size", "30", "--crop_size", "30", "--no_flip")
    image = Image.fromarray(pixels(50, 40))
    scaled = np.asarray(image.resize((30, 30), Image.Resampling.BICUBIC))
    assert_picture(get_transform(opt)(image), scaled)


@pytest.mark.parametrize("with_params", [True, False])
def test_testing_cuts_from_the_middle(with_params, tmp_path):
    opt = options(tmp_path, "--preprocess", "crop", "--crop_size", "20", train=False)
    array = pixels(50, 40)
    params = get_params(opt, (50, 40)) if with_params else None
    for _ in range(5):
        tensor = get_transform(opt, params)(Image.fromarray(array))
        assert_picture(tensor, array[10:30, 15:35])


def test_testing_scales_and_cuts_from_the_middle(tmp_path):
    words = ("--load_size", "60", "--crop_size", "20")
    opt = options(tmp_path, *words, train=False)
    image = Image.fromarray(pixels(50, 40))
    scaled = np.asarray(image.resize((60, 60), Image.Resampling.BICUBIC))
    assert_picture(get_transform(opt)(image), scaled[20:40, 20:40])


def test_training_draws_crop_and_flip(tmp_path):
    opt = options(tmp_path, "--preprocess", "crop", "--crop_size", "20")
    array = pixels(22, 21)
    views = {}
    for top in range(2):
        for left in range(3):
            cut = array[top : top + 20, left : left + 20]
            views[as_tensor(cut).numpy().round(4).tobytes()] = (left, top, False)
            views[as_tensor(cut[:, ::-1].copy()).numpy().round(4).tobytes()] = (left, top, True)
    transform = get_transform(opt)
    seen = {views[transform(Image.fromarray(array)).numpy().round(4).tobytes()] for _ in range(200)}
    assert len(seen) == 12  # every place, each both ways round


def test_params_fix_crop_and_flip(tmp_path):
    opt = options(tmp_path, "--preprocess", "crop", "--crop_size", "20")
    array = pixels(50, 40)
    transform = get_transform(opt, {"crop_pos": (7, 3), "flip": True})
    assert_picture(transform(Image.fromarray(array)), array[3:23, 7:27][:, ::-1].copy())


@pytest.mark.parametrize("mode", ["crop", "resize_and_crop", "scale_width_and_crop"])
def test_drawn_crops_lie_within_the_picture(mode, tmp_path):
    words = ("--preprocess", mode, "--load_size", "48", "--crop_size", "40")
    opt = options(tmp_path, *words)
    # after scaling: 60x50, 48x48, 48x40
    limits = {"crop": (20, 10), "resize_and_crop": (8, 8), "scale_width_and_crop": (8, 0)}[mode]
    positions = [get_params(opt, (60, 50))["crop_pos"] for _ in range(600)]
    assert {x for x, _ in positions} == set(range(limits[0] + 1))
    assert {y for _, y in positions} == set(range(limits[1] + 1))


@pytest.mark.parametrize("mode", ["crop", "none", "scale_width", "resize_and_crop"])
def test_transforms_can_be_pickled(mode, tmp_path):
    words = ("--preprocess", mode, "--load_size", "30", "--crop_size", "20")
    opt = options(tmp_path, *words)
    image = Image.fromarray(pixels(50, 40))
    for params in (None, {"crop_pos": (3, 4), "flip": True}):
        transform = get_transform(opt, params, grayscale=True)
        copy = pickle.loads(pickle.dumps(transform))
        seed_all(3)
        expected = transform(image)
        seed_all(3)
        assert torch.equal(copy(image), expected)


@pytest.mark.parametrize("mode", ["unaligned", "aligned", "single", "colorization", "template"])
def test_datasets_can_be_pickled(mode, tmp_path):
    unaligned(aligned(tmp_path))
    items = dataset(tmp_path, mode, "--load_size", "30", "--crop_size", "20")
    copy = pickle.loads(pickle.dumps(items))
    seed_all(3)
    expected = items[1]
    seed_all(3)
    assert torch.equal(copy[1]["A"], expected["A"])


@pytest.mark.slow
def test_workers_can_be_spawned(tmp_path):
    items = dataset(unaligned(tmp_path), "unaligned", "--load_size", "30", "--crop_size", "20")
    loader = torch.utils.data.DataLoader(items, num_workers=1, multiprocessing_context="spawn")
    shapes = [batch["A"].shape for batch in loader]
    assert shapes == [(1, 3, 20, 20)] * 3


# -------------------------------------------------------------------------------- finding files
def test_pictures_are_found_by_their_endings_in_any_case(tmp_path):
    names = ["a.Png", "b.JPG", "c.jpeg", "d.TIFF", "e.webp", "sub/f.bmp", "sub/deep/g.PPM"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(8, 8)).save(path)
    for name in ("notes.txt", "png", "h.png.bak", "i.npy"):
        (tmp_path / name).write_text("no image")
    found = make_dataset(tmp_path)
    assert found == sorted(str(tmp_path / name) for name in names)
    assert [open_image(p).size for p in list_pictures(tmp_path, arrays=False)] == [(8, 8)] * 7


def test_max_dataset_size(tmp_path):
    unaligned(tmp_path, count=5)
    assert len(make_dataset(tmp_path / "trainA", 3)) == 3
    items = dataset(tmp_path, "unaligned", "--max_dataset_size", "2")
    assert (len(items), items.A_size, items.B_size) == (2, 2, 2)
    opt = options(tmp_path, "--dataset_mode", "unaligned", "--max_dataset_size", "2")
    assert len(create_dataset(opt)) == 2


def test_links_to_folders_are_followed_once(tmp_path):
    root = tmp_path / "root"
    picture(root / "a.png")
    elsewhere = tmp_path / "elsewhere"
    picture(elsewhere / "b.png")
    (root / "link").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "round").symlink_to(root)
    (elsewhere / "back").symlink_to(root)
    found = make_dataset(root)
    assert sorted(os.path.basename(p) for p in found) == ["a.png", "b.png"]


def test_image_folder(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.png", 12, 10, k=i)
    folder = ImageFolder(tmp_path, transform=np.asarray, return_paths=True)
    assert len(folder) == 2
    array, path = folder[1]
    assert path == str(tmp_path / "1.png")
    np.testing.assert_array_equal(array, pixels(12, 10, k=1))


# -------------------------------------------------------------------------------- opening files
@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bits_are_read_by_value(ending, tmp_path):
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    path = tmp_path / f"x{ending}"
    Image.fromarray(levels * 257).save(path)  # 65535 / 255 = 257
    for mode in ("L", "RGB"):
        array = np.asarray(open_image(path, mode))
        expected = levels if mode == "L" else np.repeat(levels[..., None], 3, axis=2)
        np.testing.assert_array_equal(array, expected)
    between = np.array([[0, 128, 129, 1000, 40000, 65535]], np.uint16)
    Image.fromarray(between).save(path)
    np.testing.assert_array_equal(open_image(path, "L"), [[0, 0, 1, 4, 156, 255]])


def test_floats_are_read_by_value_or_refused(tmp_path):
    path = tmp_path / "x.tif"
    grey = np.array([[0, 0.25, 0.5, 1 / 255, 1]], np.float32)
    Image.fromarray(grey).save(path)
    np.testing.assert_array_equal(open_image(path, "L"), [[0, 64, 128, 1, 255]])
    np.testing.assert_array_equal(np.asarray(open_image(path))[..., 2], [[0, 64, 128, 1, 255]])
    for wrong, message in [(7, "floats from 0 to 7 need their range"), (np.nan, "NaN")]:
        Image.fromarray(np.array([[0, wrong]], np.float32)).save(path)
        with pytest.raises(UserError, match=message) as error:
            open_image(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_other_kinds_of_pictures_become_rgb(mode, tmp_path):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.fromarray(np.full((6, 5, 3), 255, np.uint8)).convert(mode).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 6))
    assert (np.asarray(image) == 255).all()


def test_a_corrupt_picture_is_named_when_the_dataset_is_made(tmp_path):
    unaligned(tmp_path)
    bad = truncated(tmp_path / "trainB" / "1.png")
    with pytest.raises(UserError) as error:
        dataset(tmp_path, "unaligned")
    assert str(bad) in str(error.value)
    bad.write_text("this is a text")
    with pytest.raises(UserError) as error:
        dataset(tmp_path, "unaligned")
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_damaged_inside_is_named_when_it_is_read(workers, tmp_path):
    unaligned(tmp_path)
    bad = damaged_inside(tmp_path / "trainA" / "1.png")
    words = ("--dataset_mode", "unaligned", "--num_threads", str(workers), "--serial_batches")
    with contextlib.closing(create_dataset(options(tmp_path, *words))) as data_set:
        batches = iter(data_set)
        next(batches)
        with pytest.raises(UserError) as error:
            next(batches)
    assert str(error.value).startswith(f"can't read the image {bad}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("seen", ["first", "when read"])
def test_a_picture_smaller_than_the_crop_is_named(workers, train, seen, tmp_path):
    for side in ("trainA", "trainB", "testA", "testB"):
        picture(tmp_path / side / "small.png", 60, 40 if seen == "when read" else 30)
    words = ("--preprocess", "crop", "--crop_size", "40", "--num_threads", str(workers))
    opt = options(tmp_path, *words, train=train)
    if seen == "first":
        with pytest.raises(UserError) as error:
            create_dataset(opt)
    else:
        # as where the disk is too slow to look at all of them in time
        with contextlib.closing(create_dataset(opt)) as data_set:
            for side in ("trainA", "testA"):
                picture(tmp_path / side / "small.png", 60, 30)
            with pytest.raises(UserError) as error:
                next(iter(data_set))
    message = str(error.value)
    assert message.startswith(str(tmp_path))
    assert "small.png" in message
    assert "60x30" in message
    assert "--crop_size 40" in message
    assert "\n" not in message


def test_a_small_picture_is_scaled_where_the_mode_says_so(tmp_path):
    unaligned(tmp_path, count=1, size=10)
    items = dataset(tmp_path, "unaligned", "--load_size", "48", "--crop_size", "40")
    assert items[0]["A"].shape == (3, 40, 40)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_missing_folder_is_named(mode, tmp_path):
    picture(tmp_path / "pictures" / "valA" / "x.png")
    root = tmp_path / ("nowhere" if mode in ("single", "template") else "pictures")
    with pytest.raises(UserError, match="no folder") as error:
        dataset(root, mode)
    folder = {"unaligned": "trainA", "aligned": "train", "colorization": "train"}.get(mode, "")
    assert f"no folder {root / folder}:" in str(error.value)
    assert ("valA" in str(error.value)) == (root.name == "pictures")  # what there is instead


def test_an_empty_folder_is_named(tmp_path):
    unaligned(tmp_path)
    for path in (tmp_path / "trainB").iterdir():
        path.rename(path.with_suffix(".gif"))
    with pytest.raises(UserError) as error:
        dataset(tmp_path, "unaligned")
    message = str(error.value)
    assert message.startswith(f"no images in {tmp_path / 'trainB'}: looked for .jpg")
    assert message.endswith("found 3 .gif (convert .gif, for example to .png)")


# --------------------------------------------------------------------------------------- unaligned
def test_unaligned_pairs(tmp_path):
    for side, count in (("trainA", 5), ("trainB", 2)):
        for i in range(count):
            picture(tmp_path / side / f"{i}.png", k=i)
    items = dataset(tmp_path, "unaligned", "--serial_batches", *NOTHING)
    assert len(items) == 5
    names = [[Path(items[i][f"{s}_paths"]).stem for s in "AB"] for i in range(5)]
    assert names == [["0", "0"], ["1", "1"], ["2", "0"], ["3", "1"], ["4", "0"]]
    assert_picture(items[3]["A"], pixels(40, 40, k=3))
    assert_picture(items[3]["B"], pixels(40, 40, k=1))
    shuffled = dataset(tmp_path, "unaligned", *NOTHING)
    drawn = {(i, Path(shuffled[i]["B_paths"]).stem) for i in range(5) for _ in range(20)}
    assert len(drawn) == 10  # each A with each B


@pytest.mark.parametrize(("direction", "channels"), [("AtoB", (1, 3)), ("BtoA", (3, 1))])
@pytest.mark.parametrize("mode", ["unaligned", "aligned"])
def test_channels_follow_the_direction(mode, direction, channels, tmp_path):
    aligned(unaligned(tmp_path, count=1), count=1)
    words = ["--input_nc", "1", "--output_nc", "3", "--direction", direction]
    words += ["--lambda_identity", "0"] if mode == "unaligned" else []
    item = dataset(tmp_path, mode, *words)[0]
    assert (len(item["A"]), len(item["B"])) == channels


# ----------------------------------------------------------------------------------------- aligned
def negatives(root: Path, width: int = 50, height: int = 40) -> None:
    """Pairs of an image and its negative, so that A + B is 0 wherever they are cut alike."""
    for i in range(3):
        array = pixels(width, height, k=i)
        (root / "train").mkdir(parents=True, exist_ok=True)
        both = np.concatenate([array, 255 - array], axis=1)
        Image.fromarray(both).save(root / "train" / f"{i}.png")


def test_pairs_are_cut_and_flipped_alike(tmp_path):
    negatives(tmp_path)
    items = dataset(tmp_path, "aligned", "--preprocess", "crop", "--crop_size", "16")
    views = set()
    for _ in range(20):
        item = items[1]
        torch.testing.assert_close(item["A"], -item["B"], rtol=0, atol=1e-6)
        views.add(item["A"].numpy().tobytes())
    assert len(views) > 10


def test_pair_is_split_in_the_middle(tmp_path):
    negatives(tmp_path, 51, 40)
    items = dataset(tmp_path, "aligned", *NOTHING)
    # 51 wide becomes 52: the sides are scaled apart
    side = Image.fromarray(pixels(51, 40, k=2)).resize((52, 40), Image.Resampling.BICUBIC)
    assert_picture(items[2]["A"], np.asarray(side))
    assert items[2]["A_paths"] == items[2]["B_paths"] == str(tmp_path / "train" / "2.png")


def test_pair_of_odd_width(tmp_path):
    path = picture(tmp_path / "train" / "odd.png", 81, 40)
    items = dataset(tmp_path, "aligned")
    with pytest.raises(UserError, match=r"is 81x40: .* even") as error:
        items[0]
    assert str(path) in str(error.value)


def test_pairs_from_two_folders(tmp_path):
    for name in ("a", "deep/b"):
        picture(tmp_path / "trainA" / f"{name}.png", 40, 30, k=1)
        (tmp_path / "trainB" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - pixels(40, 30, k=1)).save(tmp_path / "trainB" / f"{name}.bmp")
    items = dataset(tmp_path, "aligned", "--preprocess", "crop", "--crop_size", "16")
    assert len(items) == 2
    for i, name in enumerate(("a", "deep/b")):
        item = items[i]
        assert item["A_paths"] == str(tmp_path / "trainA" / f"{name}.png")
        assert item["B_paths"] == str(tmp_path / "trainB" / f"{name}.bmp")
        torch.testing.assert_close(item["A"], -item["B"], rtol=0, atol=1e-6)


def test_pairs_in_one_folder_go_first(tmp_path):
    aligned(unaligned(tmp_path), count=2)
    items = dataset(tmp_path, "aligned")
    assert [Path(items[i]["A_paths"]).parent.name for i in range(2)] == ["train", "train"]


def test_two_folders_that_do_not_match(tmp_path):
    for path in ("trainA/a.png", "trainB/a.png", "trainA/lonely.png"):
        picture(tmp_path / path)
    with pytest.raises(UserError, match="1 have no partner, such as lonely"):
        dataset(tmp_path, "aligned")
    (tmp_path / "trainA" / "lonely.png").unlink()
    picture(tmp_path / "trainB" / "a.png", 44, 40)
    with pytest.raises(UserError, match=r"one size: .*40x40 and .*44x40"):
        dataset(tmp_path, "aligned")[0]


def test_two_files_of_one_name_in_a_folder_have_no_partner_of_their_own(tmp_path):
    for path in ("trainA/1.jpg", "trainA/1.png", "trainB/1.jpg"):
        picture(tmp_path / path)
    with pytest.raises(UserError, match=r"1\.jpg and .*1\.png .*which is the partner"):
        dataset(tmp_path, "aligned")


# ------------------------------------------------------------------------------------ other modes
def test_colorization_gives_lab(tmp_path):
    # CIE Lab of sRGB's primaries under D65, as tables have it
    colours = {
        (255, 255, 255): (100.0, 0.0, 0.0),
        (0, 0, 0): (0.0, 0.0, 0.0),
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
    }
    (tmp_path / "train").mkdir()
    row = np.repeat(np.array([list(colours)], np.uint8), 4, axis=0)
    wide = np.concatenate([row, row[:, :3]], axis=1)  # 8 wide: a multiple of 4
    Image.fromarray(wide).save(tmp_path / "train" / "x.png")
    item = dataset(tmp_path, "colorization", *NOTHING)[0]
    assert item["A"].shape == (1, 4, 8)
    assert item["B"].shape == (2, 4, 8)
    for x, (L, a, b) in enumerate(colours.values()):
        assert item["A"][0, 0, x].item() == pytest.approx(L / 50 - 1, abs=2e-3)
        assert item["B"][:, 0, x].tolist() == pytest.approx([a / 110, b / 110], abs=2e-3)


def test_colorization_shows_the_colours_that_were_read(tmp_path):
    """The model's way back from L and ab is the inverse of the dataset's way there."""
    picture(tmp_path / "train" / "x.png")
    item = dataset(tmp_path, "colorization", *NOTHING)[0]
    model: Any = ColorizationModel.__new__(ColorizationModel)
    model.real_A, model.real_B = item["A"][None], item["B"][None]
    model.fake_B = torch.zeros_like(model.real_B)
    model.compute_visuals()
    np.testing.assert_allclose(tensor2im(model.real_B_rgb), pixels(40, 40), atol=1)
    assert np.ptp(tensor2im(model.fake_B_rgb).astype(int), axis=2).max() <= 1  # no colour is grey


def test_colorization_refuses_other_channels(tmp_path, capsys):
    picture(tmp_path / "train" / "x.png")
    with pytest.raises(SystemExit) as end:  # the model
        dataset(tmp_path, "colorization", "--output_nc", "3", "--input_nc", "3")
    assert end.value.code == 2
    assert "--input_nc 1 --output_nc 2" in capsys.readouterr().err
    with pytest.raises(UserError, match="--input_nc 1 --output_nc 2"):  # the dataset
        dataset(tmp_path, "colorization", "--direction", "BtoA")


def test_single_goes_through_subfolders(tmp_path):
    for name in ("a.png", "sub/a.png"):
        picture(tmp_path / name)
    items = dataset(tmp_path, "single", *NOTHING)
    paths = [items[i]["A_paths"] for i in range(len(items))]
    assert [items.relative_path(p) for p in paths] == ["a.png", "sub/a.png"]
    assert set(items[0]) == {"A", "A_paths"}


def test_relative_path_is_seen_from_the_folder_that_was_listed(tmp_path):
    unaligned(tmp_path)
    items = dataset(tmp_path, "unaligned")
    assert items.relative_path(str(tmp_path / "trainB" / "x" / "1.png")) == "x/1.png"
    assert items.relative_path(str(tmp_path / "1.png")) == "1.png"
    items.folders.clear()  # somebody's own dataset may not say what it listed
    assert items.relative_path(str(tmp_path / "trainB" / "x" / "1.png")) == "x/1.png"
    assert items.relative_path(str(tmp_path / "train" / "1.png")) == "1.png"
    assert items.relative_path(str(tmp_path / "other" / "1.png")) == "other/1.png"
    assert items.relative_path("/somewhere/else/1.png") == "1.png"


# -------------------------------------------------------------------------------------- the loader
LOADING = "--load_size 24 --crop_size 16 --batch_size 2 --seed 11".split()


def loader(root: Path, workers: int = 0, *words: str):
    return create_dataset(options(root, *LOADING, "--num_threads", str(workers), *words))


def contents(batches) -> list[tuple[str, str, bytes]]:
    """Paths and pixels of each item, in order."""
    return [
        (a, b, A.numpy().tobytes() + B.numpy().tobytes())
        for batch in batches
        for a, b, A, B in zip(
            batch["A_paths"], batch["B_paths"], batch["A"], batch["B"], strict=True
        )
    ]


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> Path:
    return unaligned(tmp_path_factory.mktemp("seven"), count=7)


def test_order_and_draws_do_not_depend_on_the_number_of_workers(seven):
    alone = loader(seven, 0)
    with contextlib.closing(loader(seven, 2)) as helped:
        for epoch in (1, 2):
            alone.set_epoch(epoch)
            helped.set_epoch(epoch)
            expected = contents(alone)
            assert contents(helped) == expected
            assert sorted(Path(a).name for a, _, _ in expected) == [f"{i}.png" for i in range(7)]


def test_each_epoch_has_an_order_and_draws_of_its_own(seven):
    batches = loader(seven)
    epochs = []
    for epoch in range(1, 5):
        batches.set_epoch(epoch)
        epochs.append(contents(batches))
    orders = {tuple(a for a, _, _ in items) for items in epochs}
    assert len(orders) == 4
    # the same image is cut elsewhere
    drawn = {data for items in epochs for a, _, data in items if a.endswith("0.png")}
    assert len(drawn) == 4
    batches.set_epoch(2)
    assert contents(batches) == epochs[1]
    assert contents(batches) == epochs[2]  # without being told, the next one
    other = loader(seven, 0, "--seed", "12")
    other.set_epoch(1)
    assert contents(other) != epochs[0]


SCRIPT = """
from data import create_dataset
from options.train_options import TrainOptions

if __name__ == "__main__":
    dataset = create_dataset(TrainOptions().parse())
    for i, data in enumerate(dataset):
        if i == STOP:
            break
"""


@pytest.mark.parametrize("stop", [0, 99])
def test_a_script_that_does_not_close_its_dataset_ends_by_itself(stop, seven, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("STOP", str(stop)))
    words = ["--dataroot", seven, "--checkpoints_dir", tmp_path, "--gpu_ids", -1, *LOADING]
    done = subprocess.run(
        [sys.executable, script, *map(str, words), "--num_threads", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,  # below LINGER, for which it would wait
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("start", [2, 4, 6])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_tail_of_an_epoch(start, workers, seven):
    whole = loader(seven)
    whole.set_epoch(3)
    expected = contents(whole)
    with contextlib.closing(loader(seven, workers)) as tail:
        tail.set_epoch(3, start=start)
        assert contents(tail) == expected[start:]
        assert len(contents(tail)) == 7  # the start counts once


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_sources_alone(workers, seven):
    seed_all(5)
    before = [random.random(), np.random.rand(), torch.rand(1).item()]
    with contextlib.closing(loader(seven, workers)) as batches:
        seed_all(5)
        assert len(contents(batches)) == 7
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == before


def test_serial_batches_come_in_order(seven):
    batches = loader(seven, 0, "--serial_batches")
    assert [Path(a).stem for a, _, _ in contents(batches)] == list("0123456")
    assert len(batches) == 7


def test_loading_writes_nothing(seven):
    before = files_below(seven)
    contents(loader(seven))
    assert files_below(seven) == before


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_the_numbers_are_those_of_torchvision(mode):
    """To the bit, for all 256 levels."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    levels = (np.arange(256 * channels) % 256).astype(np.uint8).reshape(16, 16, channels)
    picture = Image.fromarray(levels.squeeze())
    assert picture.mode == mode
    half = [0.5] * channels
    steps = transforms.Compose([transforms.ToTensor(), transforms.Normalize(half, half)])
    assert torch.equal(ToNormalized()(picture), steps(picture))
    assert ToNormalized()(picture).is_contiguous()
