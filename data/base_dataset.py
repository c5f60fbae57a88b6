"""The interface of datasets, and the preprocessing that the command line describes."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch.utils.data
from PIL import Image

from util.light_torchvision import transforms

from .cache import CachedImage, PictureCache
from .image_folder import (
    PARTS,
    folder_of,
    list_pictures,
    no_part,
    open_image,
    quick_check,
    skip_broken_hint,
)
from .pictures.reading import fit_samples, prefix_errors, read_picture
from .pictures.values import normalize
from .transforms import (
    CropAt,
    FitChannels,
    MakeMultiple,
    RandomCrop,
    ScaleWidth,
    ToNormalized,
    check_crop,
    size_of,
    split_deterministic,
)


class BaseDataset(torch.utils.data.Dataset, ABC):
    """A subclass lists its files in `__init__` and returns a dictionary from `__getitem__`.

    `paired` says whether A and B of an item show the same thing, so that a translation of A can be
    compared with B. None: they do if their files have the same name.
    """

    paired: bool | None = None
    # on the class, for datasets that do not call `__init__`: the original's loader allows that
    folders: list[str] = []
    listed = 0  # images in all lists
    cache: PictureCache | None = None  # used by `keep`, see --cache_images

    def __init__(self, opt: argparse.Namespace):
        self.opt = opt
        self.root = opt.dataroot
        self.folders = []

    @staticmethod
    def modify_commandline_options(
        parser: argparse.ArgumentParser, is_train: bool
    ) -> argparse.ArgumentParser:
        """Add options of this dataset, or change defaults; return the parser."""
        return parser

    @abstractmethod
    def __len__(self) -> int:
        """The number of items."""

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """One item: tensors (C, H, W) in [-1, 1] by name, and the paths they come from."""

    def list_images(self, folder: str | os.PathLike, columns: int = 1) -> list[str]:
        """Paths of the images below a folder, at most `--max_dataset_size`, in a fixed order.

        `columns` is the number of images side by side in a file.
        """
        part = os.path.relpath(folder, self.root)
        phase = getattr(self.opt, "phase", "")
        named = (*PARTS, phase, f"{phase}A", f"{phase}B")  # --phase may be misspelt
        if part in named and not os.path.isdir(folder):
            validation = hasattr(self.opt, "val_phase") and not self.opt.isTrain
            raise no_part(self.root, part, validation)
        self.folders.append(folder_of(folder))
        deep = bool(getattr(self.opt, "value_range", None))
        paths = list_pictures(folder, self.opt.max_dataset_size, arrays=deep)
        if not deep and not getattr(self.opt, "skip_broken", False):
            quick_check(paths, _size_check(self.opt), columns)
        self.listed += len(paths) * columns
        return paths

    def open(self, path: str) -> Any:
        """A Pillow image in RGB, or with `--value_range` a tensor (C, H, W) in [-1, 1]."""
        skips = getattr(self.opt, "skip_broken", True)  # no hint where there is no such option
        with contextlib.nullcontext() if skips else skip_broken_hint():
            return open_picture(self.opt, path)

    def load(self, path: str, transform: Callable | None = None) -> Any:
        """Open an image as RGB and transform it; errors name the file.

        With `--cache_images` the deterministic first steps of a `Compose` are done only once.
        """
        if self.cache is None or not isinstance(transform, transforms.Compose):
            return self.transform(self.open(path), transform, path)
        first, rest = split_deterministic(transform)
        name = f"{path}\n{first}"

        def make() -> list[CachedImage]:
            image = self.open(path)
            return [CachedImage(self.transform(image, first, path), size_of(image))]

        return self.transform(self.keep([name], make)[0].image, rest, path)

    def keep(self, names: list[str], make: Callable[[], list[CachedImage]]) -> list[CachedImage]:
        """The images with these names: from the cache, or made by `make` and added to it."""
        if self.cache is None:
            return make()
        found = [kept for kept in map(self.cache.get, names) if kept is not None]
        if len(found) == len(names):
            return found
        made = make()
        for name, kept in zip(names, made, strict=True):
            self.cache.put(name, kept)
        return made

    @staticmethod
    def transform(image: Image.Image, transform: Callable | None, path: str) -> Any:
        """Transform an open image; errors name the file."""
        with prefix_errors(path):
            return image if transform is None else transform(image)

    def relative_path(self, path: str) -> str:
        """`path` relative to the folder it was listed in, or else to `--dataroot`."""
        # users' datasets that do not call `list_images` mostly read one of these folders
        usual = os.path.join(self.root, getattr(self.opt, "phase", ""))
        for folder in [*self.folders, usual, usual + "A", usual + "B", self.root]:
            relative = os.path.relpath(path, folder)
            if not relative.startswith(os.pardir):
                return relative
        return os.path.basename(path)


def _size_check(opt: argparse.Namespace) -> Callable[[int, int], object] | None:
    """A function that raises UserError for bad sizes; None if --preprocess scales images."""
    if opt.preprocess == "crop":
        return functools.partial(check_crop, size=opt.crop_size)
    min_size = getattr(opt, "min_size", 1)
    return MakeMultiple(4, min_size=min_size).size_for if opt.preprocess == "none" else None


def open_picture(opt: argparse.Namespace, path: str) -> Any:
    """An 8-bit RGB Pillow image, or with `--value_range` a tensor (C, H, W) in [-1, 1].

    Applies the EXIF orientation unless `--ignore_orientation`; drops transparency.
    """
    value_range = getattr(opt, "value_range", None)
    upright = not getattr(opt, "ignore_orientation", False)
    if not value_range:
        return open_image(path, upright=upright)
    with prefix_errors(path):
        channels = {opt.input_nc, getattr(opt, "output_nc", opt.input_nc)}
        picture = fit_samples(read_picture(path, upright), channels)
        return normalize(picture.pixels, tuple(value_range))


def reader(opt: argparse.Namespace, channels: int) -> Callable[[str], Any]:
    """A function from a path to a tensor (C, H, W) in [-1, 1], as the options say."""
    transform = get_transform(opt, channels=channels)
    return lambda path: BaseDataset.transform(open_picture(opt, path), transform, path)


def get_params(opt: argparse.Namespace, size: tuple[int, int]) -> dict[str, Any]:
    """Random crop position and flip for an image of `size` (width, height).

    Pass them to `get_transform` to apply the same to several images. In testing the crop is
    central and there is no flip.
    """
    width, height = size
    if opt.preprocess == "resize_and_crop":
        width = height = opt.load_size
    elif opt.preprocess == "scale_width_and_crop":
        width, height = opt.load_size, opt.load_size * height // width
    free_x, free_y = max(0, width - opt.crop_size), max(0, height - opt.crop_size)
    if not getattr(opt, "isTrain", True):
        return {"crop_pos": (free_x // 2, free_y // 2), "flip": False}
    position = (random.randint(0, free_x), random.randint(0, free_y))
    return {"crop_pos": position, "flip": random.random() > 0.5}


def get_transform(
    opt: argparse.Namespace,
    params: dict[str, Any] | None = None,
    grayscale: bool = False,
    method=transforms.InterpolationMode.BICUBIC,
    convert: bool = True,
    channels: int | None = None,
) -> transforms.Compose:
    """The transform that `--preprocess`, `--load_size`, `--crop_size` and `--no_flip` ask for.

    `params` from `get_params` fix crop and flip; without them both are random (in testing: central
    crop, no flip). With `convert` the result is a tensor (C, H, W) in [-1, 1], of 1 channel with
    `grayscale`, else 3. `channels`, in place of `grayscale`, is the number that the network takes:
    with `--value_range`, images that can't be converted to it raise UserError.
    """
    grayscale = grayscale or channels == 1
    train = getattr(opt, "isTrain", True)
    deep = bool(getattr(opt, "value_range", None))  # then images are tensors already
    steps: list[Any] = []
    if deep:
        either = {opt.input_nc, opt.output_nc} - {1}  # for datasets that do not say which
        steps.append(FitChannels({1} if grayscale else {channels} if channels else either))
    elif grayscale:
        steps.append(transforms.Grayscale(1))
    if "resize" in opt.preprocess:
        steps.append(transforms.Resize([opt.load_size, opt.load_size], method))
    elif "scale_width" in opt.preprocess:
        steps.append(ScaleWidth(opt.load_size, opt.crop_size, method))
    if "crop" in opt.preprocess:
        if params is not None:
            steps.append(CropAt(params["crop_pos"], opt.crop_size))
        else:
            steps.append(RandomCrop(opt.crop_size) if train else CropAt(None, opt.crop_size))
    if opt.preprocess == "none" and not getattr(opt, "keep_size", False):
        steps.append(MakeMultiple(4, method, getattr(opt, "min_size", 1)))
    if not opt.no_flip:
        if params is not None and params["flip"]:
            steps.append(transforms.functional.hflip)
        elif params is None and train:
            steps.append(transforms.RandomHorizontalFlip())
    if convert and not deep:
        steps.append(ToNormalized())
    return transforms.Compose(steps)
