"""Small helpers: tensors to images, and images to files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from util import distributed

# Takes a third of the time of the default, 6, for files up to a tenth larger; lower levels make
# those with flat colours half as large again. Other formats ignore it.
PNG_LEVEL = 4
# Values in a result that may wait on the GPU until a thread encodes it; many may queue up.
MAX_ON_GPU = 2**20

T = TypeVar("T")


def to_levels(values: np.ndarray) -> np.ndarray:
    """Float32 values in [-1, 1] as levels in [0, 255], neither rounded nor clipped."""
    levels = values + 1
    # in place from here on: other threads wait while this one gives memory back
    levels /= 2
    levels *= 255
    return levels


def tensor2im(input_image: torch.Tensor | np.ndarray, imtype: type = np.uint8) -> np.ndarray:
    """The first image of a batch as an array that can be shown and saved.

    Takes a tensor (N, C, H, W) with values in [-1, 1] and returns (H, W, 3) with values in
    [0, 255], rounded to the nearest level. The first of one or two channels is shown as grey, and
    the first three of more. An array (H, W, 3) already in [0, 255] is only rounded and converted.
    """
    if isinstance(input_image, np.ndarray):
        array = input_image
    elif isinstance(input_image, torch.Tensor):
        image = input_image.detach()[0].float().cpu().numpy()
        image = image[:1].repeat(3, axis=0) if image.shape[0] < 3 else image[:3]
        array = to_levels(image.transpose(1, 2, 0))
    else:
        return input_image
    if np.issubdtype(imtype, np.integer):
        array = array.round()
        np.fmax(array, 0, out=array)  # turns NaN into 0, unlike `clip`
        np.fmin(array, 255, out=array)
    return array.astype(imtype, order="C")


def save_image(image_numpy: np.ndarray, image_path: str | os.PathLike, aspect_ratio: float = 1.0):
    """Write an array (H, W, 3) of uint8 to a file; the width is scaled by `aspect_ratio`."""
    image = Image.fromarray(image_numpy)
    if aspect_ratio != 1.0:
        width = max(1, round(image.width * aspect_ratio))
        image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    image.save(image_path, compress_level=PNG_LEVEL)


def copy_if_equal(source: str | os.PathLike, pixels: np.ndarray, target: Path) -> bool:
    """Copy a PNG file if it holds exactly these pixels (H, W, 3); returns whether it does.

    Takes a quarter of the time of encoding them again. A file with more than pixels, such as a
    colour profile, is not copied: it would look different from the images beside it.
    """
    try:
        with Image.open(source, formats=["PNG"]) as image:
            if (image.mode, image.size) != ("RGB", pixels.shape[1::-1]):
                return False
            if not np.array_equal(np.asarray(image), pixels) or set(image.info) - {"dpi"}:
                return False
    except (OSError, SyntaxError, ValueError):
        return False
    shutil.copyfile(source, target)
    return True


def diagnose_network(net: torch.nn.Module, name: str = "network") -> None:
    """Print the mean absolute gradient of a network, over those parameters that have one."""
    means = [p.grad.abs().mean().item() for p in net.parameters() if p.grad is not None]
    print(name)
    print(sum(means) / len(means) if means else 0.0)


def print_numpy(x: np.ndarray, val: bool = True, shp: bool = False) -> None:
    """Print an array's shape (`shp`), and its mean, range, median and deviation (`val`)."""
    x = x.astype(np.float64)
    if shp:
        print("shape,", x.shape)
    if val:
        flat = x.flatten()
        print(
            f"mean = {flat.mean():3.3f}, min = {flat.min():3.3f}, max = {flat.max():3.3f}, "
            f"median = {np.median(flat):3.3f}, std={flat.std():3.3f}"
        )


def mkdirs(paths: str | os.PathLike | list) -> None:
    """Make a folder, or each folder of a list, with its parents; existing ones are fine."""
    for path in paths if isinstance(paths, list) else [paths]:
        mkdir(path)


def mkdir(path: str | os.PathLike) -> None:
    """Make one folder with its parents unless it is there."""
    Path(path).mkdir(parents=True, exist_ok=True)


def init_ddp() -> torch.device:
    """Join the processes that torchrun started, if it did; returns the device of this one."""
    distributed.init_process_group()
    return distributed.device()


def cleanup_ddp() -> None:
    """Leave the process group."""
    distributed.destroy_process_group()


def crossed(frequency: int, before: int, after: int) -> bool:
    """Whether a counter that went from `before` to `after` passed a multiple of `frequency`.

    Unlike `after % frequency == 0` this holds for every batch size.
    """
    return after // frequency > before // frequency


def batched_by(items: Iterable[T], size: int, key: Callable[[T], Any]) -> Iterator[list[T]]:
    """Lists of at most `size` consecutive items with equal keys; an item with key None is alone."""
    batch: list[T] = []
    shared: Any = None
    for item in items:
        own = key(item)
        if batch and own != shared:
            yield batch
            batch = []
        batch.append(item)
        shared = own
        if len(batch) == size or own is None:  # yielded before the next item is asked for
            yield batch
            batch = []
    if batch:
        yield batch
