"""Transforms of Pillow images, or of float tensors (C, H, W) for images of any depth.

Classes, not lambdas: spawned workers must pickle them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from util.errors import UserError
from util.light_torchvision import transforms

from .pictures.values import fit_channels, normalize

F = transforms.functional


def size_of(picture: Any) -> tuple[int, int]:
    """Width and height."""
    _, height, width = F.get_dimensions(picture)
    return width, height


def split_deterministic(
    transform: transforms.Compose,
) -> tuple[transforms.Compose, transforms.Compose]:
    """Split a transform before its first random or parametrized step: deterministic part, rest."""
    steps = transform.transforms
    same = (FitChannels, transforms.Grayscale, transforms.Resize, ScaleWidth, MakeMultiple)
    drawn = [i for i, step in enumerate(steps) if type(step) not in same]
    first = drawn[0] if drawn else len(steps)
    return transforms.Compose(steps[:first]), transforms.Compose(steps[first:])


class FitChannels:
    """Convert a tensor (C, H, W) between grey and colour, so that C is one of `wanted`."""

    def __init__(self, wanted: set[int]):
        self.wanted = wanted or {3}

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        if not isinstance(picture, torch.Tensor):
            raise UserError(
                f"--value_range: this dataset opens a {type(picture).__name__} by itself; let it "
                "do that by self.open or self.load, or leave --value_range out"
            )
        have = len(picture)
        if have in self.wanted:
            return picture
        wanted = 3 if have == 1 and 3 in self.wanted else min(self.wanted)
        try:
            pixels = fit_channels(picture.permute(1, 2, 0).numpy(), wanted)
        except UserError:
            raise UserError(
                f"the image has {have} channels, the networks take "
                f"{' or '.join(map(str, sorted(self.wanted)))} (--input_nc, --output_nc)"
            ) from None
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


class ScaleWidth:
    """Scale to a width and keep the aspect ratio; the height is at least `crop_size`."""

    def __init__(
        self, width: int, crop_size: int, method: Any = transforms.InterpolationMode.BICUBIC
    ):
        self.width, self.crop_size, self.method = width, crop_size, method

    def __repr__(self) -> str:
        return f"ScaleWidth({self.width}, {self.crop_size}, {self.method})"

    def __call__(self, picture: Any) -> Any:
        width, height = size_of(picture)
        if width == self.width and height >= self.crop_size:
            return picture
        new_height = int(max(self.width * height / width, self.crop_size))
        return F.resize(picture, [new_height, self.width], self.method)


class MakeMultiple:
    """Scale width and height to the nearest multiples of `base`, at least `base`.

    Raises UserError if a side is then below `min_size`.
    """

    def __init__(
        self, base: int, method: Any = transforms.InterpolationMode.BICUBIC, min_size: int = 1
    ):
        self.base, self.method, self.min_size = base, method, min_size

    def __repr__(self) -> str:
        return f"MakeMultiple({self.base}, {self.method})"

    def __call__(self, picture: Any) -> Any:
        size = size_of(picture)
        width, height = self.size_for(*size)
        if (width, height) == size:
            return picture
        return F.resize(picture, [height, width], self.method)

    def size_for(self, *size: int) -> tuple[int, int]:
        """The new width and height of an image of this `size`."""
        width, height = (max(self.base, round(n / self.base) * self.base) for n in size)
        if min(width, height) < self.min_size:
            raise UserError(
                f"an image of {size[0]}x{size[1]} is too small for the discriminator, which needs "
                f"{self.min_size}x{self.min_size}: leave it out, or use a --preprocess that "
                "scales, such as resize_and_crop, fewer layers (--netD n_layers --n_layers_D 2) "
                "or --netD pixel"
            )
        return width, height


class CropAt:
    """Crop a square of `size` at a fixed position (left, top); None: at the centre."""

    def __init__(self, position: tuple[int, int] | None, size: int):
        self.position, self.size = position, size

    def __call__(self, picture: Any) -> Any:
        width, height = size_of(picture)
        check_crop(width, height, self.size)
        if (width, height) == (self.size, self.size):
            return picture
        left, top = self.position or ((width - self.size) // 2, (height - self.size) // 2)
        return F.crop(picture, top, left, self.size, self.size)


class RandomCrop(transforms.RandomCrop):
    """Crop a square at a random position, drawn as by torchvision."""

    def forward(self, img: Any) -> Any:
        check_crop(*size_of(img), self.size[0])
        return super().forward(img)


class ToNormalized:
    """Convert a Pillow image to a tensor (C, H, W) in [-1, 1].

    Gives the same numbers as torchvision's `ToTensor` and `Normalize(0.5, 0.5)`, in half the time.
    """

    def __call__(self, picture: Any) -> torch.Tensor:
        if getattr(picture, "mode", None) not in ("L", "RGB"):
            x = F.to_tensor(picture)
            return F.normalize(x, [0.5] * len(x), [0.5] * len(x))
        # band by band: `normalize` would spend as long on reordering pixels as on its arithmetic
        planes = b"".join(band.tobytes() for band in picture.split())
        shape = (-1, picture.height, picture.width)
        return normalize(np.frombuffer(planes, np.uint8).reshape(shape).transpose(1, 2, 0))


def check_crop(width: int, height: int, size: int) -> None:
    """Raise UserError if an image is smaller than the square to be cut from it."""
    if min(width, height) < size:
        raise UserError(
            f"an image of {width}x{height} is too small for --crop_size {size}: use a "
            "smaller --crop_size, or a --preprocess that scales, such as resize_and_crop"
        )
