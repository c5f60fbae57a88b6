"""Pictures of more than 8 bits or 3 channels, in the place of Pillow's in the transforms."""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data.transforms import (
    CenterCrop,
    CropAt,
    MakeMultiple,
    Mirror,
    ScaleWidth,
    check_crop,
    pil_filter,
)
from util.errors import UserError

from .picture_io import Range, fit_channels, naming, read_picture, to_unit


class DeepPicture:
    """Float channels in [-1, 1], each a picture of Pillow, with the methods that transforms use."""

    def __init__(self, channels: list[Image.Image]):
        self.channels = channels
        self.size = self.width, self.height = channels[0].size

    @classmethod
    def open(cls, path: str | os.PathLike, value_range: Range) -> DeepPicture:
        """Read a file; transparency is left out."""
        with naming(path):
            return cls.of(to_unit(read_picture(path).pixels, value_range).numpy())

    @classmethod
    def of(cls, channels: np.ndarray) -> DeepPicture:
        """An array (C, H, W) of float32."""
        return cls([Image.fromarray(np.ascontiguousarray(c)) for c in channels])

    def resize(self, size: tuple[int, int], resample: int) -> DeepPicture:
        return DeepPicture([c.resize(size, resample) for c in self.channels])

    def crop(self, box: tuple[int, int, int, int]) -> DeepPicture:
        return DeepPicture([c.crop(box) for c in self.channels])

    def transpose(self, method: Any) -> DeepPicture:
        return DeepPicture([c.transpose(method) for c in self.channels])

    def pixels(self) -> np.ndarray:
        """The values (H, W, C)."""
        return np.stack([np.asarray(c) for c in self.channels], -1)


def deep_transform(
    opt: argparse.Namespace,
    params: dict[str, Any] | None,
    grayscale: bool,
    method: InterpolationMode,
    convert: bool,
) -> transforms.Compose:
    """What `get_transform` makes, for a `DeepPicture`; what is drawn, is drawn in the same way."""
    steps: list[Any] = [Channels({1} if grayscale else {opt.input_nc, opt.output_nc} - {1})]
    if "resize" in opt.preprocess:
        steps.append(ScaleTo(opt.load_size, method))
    elif "scale_width" in opt.preprocess:
        steps.append(ScaleWidth(opt.load_size, opt.crop_size, method))
    if "crop" in opt.preprocess:
        if params is not None:
            steps.append(CropAt(params["crop_pos"], opt.crop_size))
        else:
            steps.append(DrawnCrop(opt.crop_size) if opt.isTrain else CenterCrop(opt.crop_size))
    if opt.preprocess == "none" and not getattr(opt, "keep_size", False):
        steps.append(MakeMultiple(4, method))
    if opt.isTrain and not opt.no_flip:
        if params is None:
            steps.append(DrawnMirror())
        elif params["flip"]:
            steps.append(Mirror())
    return transforms.Compose([*steps, ToTensor()] if convert else steps)


class Channels:
    """Make grey of colour, or repeat grey, where the network wants that."""

    def __init__(self, wanted: set[int]):
        self.wanted = wanted or {3}

    def __call__(self, image: DeepPicture) -> DeepPicture:
        have = len(image.channels)
        if have in self.wanted:
            return image
        wanted = 3 if have == 1 and 3 in self.wanted else min(self.wanted)
        try:
            pixels = fit_channels(image.pixels(), wanted)
        except UserError:
            raise UserError(
                f"the picture has {have} channels, the networks take "
                f"{' or '.join(map(str, sorted(self.wanted)))} (--input_nc, --output_nc)"
            ) from None
        return DeepPicture(
            [Image.fromarray(np.ascontiguousarray(c)) for c in np.moveaxis(pixels, 2, 0)]
        )


class ScaleTo:
    """Scale to a square of `size`."""

    def __init__(self, size: int, method: InterpolationMode):
        self.size, self.filter = size, pil_filter(method)

    def __call__(self, image: DeepPicture) -> DeepPicture:
        if image.size == (self.size, self.size):
            return image
        return image.resize((self.size, self.size), self.filter)


class DrawnCrop:
    """Cut a square from a random place."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: DeepPicture) -> DeepPicture:
        check_crop(image, self.size)  # type: ignore[arg-type]
        if image.size == (self.size, self.size):
            return image
        top = int(torch.randint(0, image.height - self.size + 1, (1,)))
        left = int(torch.randint(0, image.width - self.size + 1, (1,)))
        return image.crop((left, top, left + self.size, top + self.size))


class DrawnMirror:
    """Flip left and right half of the time."""

    def __call__(self, image: DeepPicture) -> DeepPicture:
        if torch.rand(1) < 0.5:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class ToTensor:
    """To a tensor (C, H, W), the values as they are."""

    def __call__(self, image: DeepPicture) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(c) for c in image.channels]))
