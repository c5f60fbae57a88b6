"""What several tests share: images made by formula, and the programs run in this process."""

from __future__ import annotations

import contextlib
import io
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from util.files import NO_INPUT

ROOT = Path(__file__).resolve().parents[1]

# the smallest networks and images that go through everything
TINY = (
    "--gpu_ids -1 --netG resnet_6blocks --ngf 4 --ndf 4 --load_size 36 --crop_size 32 "
    "--num_threads 0 --seed 3"
).split()
SHORT = "--display_id 0 --n_epochs 1 --n_epochs_decay 0".split()


# ---------------------------------------------------------------------------------------- images
def pixels(width: int, height: int, k: int = 0) -> np.ndarray:
    """A smooth image (H, W, 3) of uint8; another one for each `k`."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = [
        np.sin(x * (0.05 + 0.01 * c) + k) * 60 + np.cos(y * (0.07 - 0.01 * c) + c) * 60 + 128
        for c in range(3)
    ]
    return np.stack(channels, -1).round().astype(np.uint8)


def picture(path: Path, width: int = 40, height: int = 40, k: int = 0, mode: str = "RGB") -> Path:
    """Write the image of `pixels` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(width, height, k)).convert(mode).save(path)
    return path


def unaligned(root: Path, count: int = 3, size: int = 40) -> Path:
    """A dataset with trainA, trainB, testA and testB."""
    for j, side in enumerate(("trainA", "trainB", "testA", "testB")):
        for i in range(count):
            picture(root / side / f"{i}.png", size, size, 10 * j + i)
    return root


def aligned(root: Path, count: int = 3, size: int = 40) -> Path:
    """A dataset with A|B in train and test."""
    for j, phase in enumerate(("train", "test")):
        for i in range(count):
            picture(root / phase / f"{i}.png", 2 * size, size, 10 * j + i)
    return root


def truncated(path: Path, width: int = 40, height: int = 40) -> Path:
    """An image file without its second half."""
    picture(path, width, height)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def damaged_inside(path: Path) -> Path:
    """A PNG file with a whole head and tail, and pixels that can't be decoded."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT") + 4
    data[start : start + 200] = bytes(200)
    path.write_bytes(bytes(data))
    return path


# ---------------------------------------------------------------------------------------- programs
class Finished(NamedTuple):
    """How a program ended, and what it said."""

    code: int
    out: str
    err: str


def run(program: str, *argv: object) -> Finished:
    """Run `train.py` or `test.py` with these arguments, in this process but as the main program.

    A bug's exception is not caught: it fails the test with its traceback.
    """
    words = [program, *map(str, argv)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        undisturbed(),
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    return Finished(code, out.getvalue(), err.getvalue())


def succeed(program: str, *argv: object) -> Finished:
    """Like `run`, and the program must end well."""
    result = run(program, *argv)
    assert result.code == 0, result.err
    return result


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put back the signal handlers and random sources that a program changes for good."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
    handlers = {n: signal.getsignal(n) for n in numbers}
    sources = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        random.setstate(sources[0])
        np.random.set_state(sources[1])
        torch.set_rng_state(sources[2])


def run_process(
    *argv: object, cwd: Path = ROOT, more: Mapping[str, str] = MappingProxyType({})
) -> Finished:
    """Run a program in a process of its own, without a GPU; `more` goes into its environment."""
    result = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Finished(result.returncode, result.stdout, result.stderr)


def copy_of_code(folder: Path) -> Path:
    """The programs and packages of this repository, for a test that adds files to them."""
    folder.mkdir(parents=True)
    for name in ("train.py", "test.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("data", "models", "options", "util"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def files_below(folder: Path) -> list[str]:
    """All files below a folder, but for the mark of results and the lock, as paths relative to it.

    Empty where there is no such folder.
    """
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (NO_INPUT, ".lock")]
    return sorted(str(p.relative_to(folder)) for p in files)


def seed_all(seed: int) -> None:
    """Seed the sources that the code draws from on the CPU."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
