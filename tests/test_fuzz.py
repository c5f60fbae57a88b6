"""Damaged images and random command lines: each ends well or in one line, and none hangs."""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data
import models
from data.image_folder import open_image
from options.base_options import BaseOptions
from options.test_options import TestOptions
from options.train_options import TrainOptions
from tests import helpers
from util.errors import UserError, one_line_errors
from util.find_class import available_names

KINDS = {
    "png": {},
    "jpg": {"quality": 90},
    "bmp": {},
    "ppm": {},
    "tif": {},
    "webp": {"lossless": True},
    # other ways to write the same kinds
    "tif lzw": {"compression": "tiff_lzw"},
    "jpg progressive": {"progressive": True},
    "webp lossy": {"quality": 80},
}
DAMAGED = 200
# the programs switch these off (data/image_folder.py), pytest switches them on
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]
LONGEST = 10.0  # seconds for one image, on a machine that does other things as well


# ---------------------------------------------------------------------------------------- images
def encoded(kind: str) -> bytes:
    """A small image as a file of this kind."""
    pixels = helpers.pixels(48, 40)
    pixels[::3] = np.random.default_rng(0).integers(0, 256, pixels[::3].shape)
    buffer = io.BytesIO()
    format = {"jpg": "jpeg", "tif": "tiff"}.get(kind.split()[0], kind.split()[0])
    Image.fromarray(pixels).save(buffer, format, **KINDS[kind])
    return buffer.getvalue()


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def wrong_head(content: bytes, rng: random.Random) -> bytes:
    other = encoded(rng.choice(list(KINDS)))
    length = rng.choice([2, 8, 16, 32, 64])
    return rng.choice([other[:length], rng.randbytes(length)]) + content[length:]


def zeroed(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    length = rng.randrange(1, len(content))
    return (content[:start] + bytes(length) + content[start + length :])[: len(content)]


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    # half of them in the head, where sizes, offsets and counts are
    end = rng.choice([min(64, len(changed)), len(changed)])
    for _ in range(rng.choice([1, 2, 10, 50])):
        changed[rng.randrange(end)] = rng.randrange(256)
    return bytes(changed)


def doubled(content: bytes, rng: random.Random) -> bytes:
    cut = rng.randrange(len(content))
    return content[:cut] + content[rng.randrange(len(content)) :]


def huge(content: bytes, rng: random.Random, kind: str) -> bytes:
    """The head says that the image is very large."""
    most = 2**31 - 1
    # the last one is below the limit of Pillow: it is decoded as far as it goes
    sizes = [(20000, 20000), (65000, 65000), (most, 1), (1, most)] * 3 + [(9500, 9500)]
    width, height = rng.choice(sizes)
    if kind == "png":
        chunk = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    if kind == "bmp":
        return content[:18] + struct.pack("<ii", width, height) + content[26:]
    if kind == "ppm":
        return content.replace(b"48 40", f"{width} {height}".encode(), 1)
    if kind.startswith("tif"):
        for tag, old, new in [(256, 48, width), (257, 40, height)]:
            for old_entry in (
                struct.pack("<HHII", tag, 4, 1, old),
                struct.pack("<HHIHH", tag, 3, 1, old, 0),
            ):
                content = content.replace(old_entry, struct.pack("<HHII", tag, 4, 1, new))
        return content
    small = struct.pack(">HH", min(width, 65535), min(height, 65535))
    if kind.startswith("jpg"):
        return content.replace(struct.pack(">HH", 40, 48), small[2:] + small[:2], 1)
    start = content.index(b"VP8") + 9  # a stream's own size field, or next to it
    return content[:start] + b"\xff" * 4 + content[start + 4 :]


def test_the_undamaged_ones_open(tmp_path):
    for kind in KINDS:
        path = tmp_path / f"x.{kind.split()[0]}"
        path.write_bytes(encoded(kind))
        assert open_image(path).size == (48, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_pictures(kind, tmp_path):
    rng = random.Random(kind)
    content = encoded(kind)
    path = tmp_path / f"x.{kind.split()[0]}"
    damages = [truncated, wrong_head, zeroed, flipped, flipped, doubled]
    refused = 0
    for case in range(DAMAGED):
        damage = damages[case % len(damages)]
        changed = huge(content, rng, kind) if case % 10 == 9 else damage(content, rng)
        path.write_bytes(changed)
        start = time.monotonic()
        try:
            image = open_image(path)
        except UserError as e:
            refused += 1
            text = str(e)
        else:
            assert image.mode == "RGB"
            text = ""
        assert time.monotonic() - start < LONGEST, f"case {case}, {damage.__name__}"
        if text:
            assert text.startswith(f"can't read the image {path}: ")
            assert len(text.splitlines()) == 1
    assert refused > DAMAGED / 4


# ----------------------------------------------------------------------------------- command lines
NUMBERS = "0 1 2 3 7 -1 0.5 1e-4 1e400 nan inf -inf x 99999999999999999999 0x10 1,2".split()
NUMBERS += ["", "\u0663"]
TEXTS = "x ../x a/b / . .. {netG} {nothing} { {0} - -- all latest 0,1 -1 0 %s train test".split()
TEXTS += ["", "a b", "\n", "\u00e4", "x" * 300]
# take long, or reach for the network or other programs
LEFT_OUT = {
    "--compile",
    "--fast",
    "-h",
    "--help",
    "--use_wandb",
    "--use_tensorboard",
    "--lambda_vgg",
}
# at the end of a command line that is followed up with a dataset and a model
SMALL = "--gpu_ids -1 --ngf 4 --ndf 4 --num_threads 0".split()
SIZES = [1, 2, 4, 7, 8, 16, 23, 24, 32, 33, 40]  # to crop; some are too small for some networks


def all_options(program: type[BaseOptions]) -> list[argparse.Action]:
    """The options of all models and datasets together."""
    found: dict[str, argparse.Action] = {}
    for model in available_names("models", "model"):
        for mode in ("unaligned", "template", "colorization"):
            words = ["--dataroot", ".", "--model", model, "--dataset_mode", mode]
            found.update(options_with(program, words))
    return [found[name] for name in sorted(found.keys() - LEFT_OUT)]


def options_with(program: type[BaseOptions], words: list[str]) -> dict[str, argparse.Action]:
    """The options that there are behind these words, which name a model or a dataset."""
    options = program(words)
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        options.gather_options()
    return {name: action for action in options.parser._actions for name in action.option_strings}


def random_words(
    rng: random.Random, program: type[BaseOptions], actions: list[argparse.Action], root: Path
) -> list[str]:
    words = ["--dataroot", str(root)] if rng.random() < 0.9 else []
    words += (
        ["--model", rng.choice(available_names("models", "model"))] if rng.random() < 0.7 else []
    )
    if rng.random() < 0.5:
        words += ["--dataset_mode", rng.choice(available_names("data", "dataset"))]
    wild = rng.random() < 0.5
    if not wild:  # or nearly every line would end at an option of another model
        there = options_with(program, words)
        actions = [action for action in actions if action.option_strings[0] in there]
    for action in rng.sample(actions, rng.choice([0, 1, 2, 4, 8])):
        name = rng.choice(action.option_strings)
        if name in ("--dataroot", "--checkpoints_dir", "--results_dir"):
            continue
        words.append(name)
        if action.nargs == 0 or (wild and rng.random() < 0.1):
            continue
        if action.choices and (not wild or rng.random() < 0.7):
            words.append(rng.choice(list(map(str, action.choices))))
        elif not wild and action.default is not None and rng.random() < 0.7:
            words.append(str(action.default))
        else:
            words.append(rng.choice(TEXTS if action.type is None else NUMBERS))
    if wild and rng.random() < 0.2:
        words.insert(rng.randrange(len(words) + 1), rng.choice(["--whta", "x", "--", "", "-z"]))
    return words


def outcome(program: type[BaseOptions], words: list[str], follow_up: bool) -> tuple[int, str, Any]:
    """Exit code, stderr and options of a command line, with a dataset and a model if asked for."""
    err, opt = io.StringIO(), None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            with one_line_errors():
                opt = program(words).parse(save=False)
                if follow_up:
                    dataset = data.create_dataset(opt)
                    model = models.create_model(opt)
                    model.setup(opt)
                    if opt.isTrain:
                        model.set_input(next(iter(dataset)))
                        model.optimize_parameters()
                        model.compute_visuals()
                        model.get_current_losses()
        except SystemExit as e:
            return int(e.code or 0), err.getvalue(), opt
    return 0, err.getvalue(), opt


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return helpers.aligned(helpers.unaligned(tmp_path_factory.mktemp("data")))


def check_outcomes(program: Any, root: Path, count: int, follow_up: bool, tmp_path: Path) -> None:
    rng = random.Random(f"{program.__name__} {follow_up}")
    actions = all_options(program)
    codes = []
    for _ in range(count):
        words = random_words(rng, program, actions, root)
        words += ["--checkpoints_dir", str(tmp_path / "ckpt")]
        if follow_up:
            size = rng.choice(SIZES)
            words += [*SMALL, "--crop_size", str(size), "--load_size", str(max(size, 36))]
            words += ["--n_layers_D", rng.choice("1235")]
        start = time.monotonic()
        with helpers.undisturbed():
            code, err, _ = outcome(program, words, follow_up)
        codes.append(code)
        assert time.monotonic() - start < 30, words
        assert code in (0, 1, 2), words
        lines = err.strip().splitlines()
        if code:
            assert len(lines) == 1, (words, err)
            assert "error: " in lines[0], (words, err)
        else:
            assert all(line.startswith("warning: ") for line in lines), (words, err)
    # neither everything nor nothing may pass, or this would test little
    assert 0.05 * count < codes.count(0) < 0.95 * count or (program is TestOptions and follow_up)
    assert not list(tmp_path.iterdir()), "a folder was made for an experiment that never ran"


@pytest.mark.parametrize("program", [TrainOptions, TestOptions])
def test_random_command_lines(program, root, tmp_path):
    check_outcomes(program, root, 200, False, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("program", [TrainOptions, TestOptions])
def test_random_command_lines_with_data_and_model(program, root, tmp_path):
    check_outcomes(program, root, 50, True, tmp_path)
