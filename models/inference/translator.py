"""A trained generator as a function of images.

from models import load_generator

G = load_generator("checkpoints/maps_cyclegan", "AtoB")
out = G(Image.open("photo.jpg"))
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from data.pictures.reading import Picture, fit_samples, from_pil, prefix_errors, read_picture
from data.pictures.values import (
    MAX_MAGNITUDE,
    Range,
    change_depth,
    denormalize,
    fit_channels,
    normalize,
    opaque_value,
)
from data.pictures.writing import fits_profile
from models.speed.acceleration import precision_context
from models.speed.inspection import independent_of_batch
from util import distributed
from util.errors import UserError, first_line, warn
from util.util import batched_by

from .sizes import KeepsSize, size_rule
from .tiles import ArrayRows, TiledNet, TileOptions, translate_in_tiles

_reading = threading.Lock()


class Translator:
    """A generator that takes images and gives images of the same kind.

    Attributes:
        net: the network, (N, input_nc, H, W) to (N, output_nc, H, W), both in [-1, 1].
        device: where it computes.
        options: the options that it was trained and built with, by name.
        weights: the file that was loaded.
        input_nc, output_nc: channels of input and output images.
        value_range: the values that become -1 and 1; None: 0 and the maximum of an integer type,
            0 and 1 for floats.
    """

    def __init__(
        self,
        net: nn.Module,
        device: torch.device,
        options: dict[str, Any],
        weights: Path,
        value_range: Range | None = None,
        precision: str = "tf32",
    ):
        self.net = net
        self.device = device
        self.options = options
        self.weights = weights
        self.input_nc = int(options["input_nc"])
        self.output_nc = int(options["output_nc"])
        self.value_range = value_range
        self._precision = precision
        rule = size_rule(net, self.input_nc, device)
        if isinstance(rule, str):
            warn(rule)
        self._any_size = KeepsSize(net, rule)

    def __repr__(self) -> str:
        kinds = f"{self.input_nc} to {self.output_nc} channels on {self.device}"
        made = f"{self.options.get('netG', type(self.net).__name__)}, {self.options['direction']}"
        return f"Translator({self.weights}: {made}, {kinds})"

    def __call__(
        self, picture: Any, batch_size: int = 8, tile: int | TileOptions | None = None
    ) -> Any:
        """Translate an image, or a list of images.

        Args:
            picture: one of
                - a Pillow image: returns one, with the same transparency;
                - a path: returns a Pillow image, or an array where Pillow lacks the mode
                  (`.npy`, colour of more than 8 bits);
                - an array (H, W) or (H, W, C) of uint8, uint16 or floats (in [0, 1], or in
                  `value_range`): returns an array of the same type;
                - a tensor (C, H, W) or (N, C, H, W) in [-1, 1]: returns a tensor on `device`;
                - a list of these: returns a list; neighbours of equal size make a batch.
            batch_size: the most images in a batch; 1 is used where results would depend on the
                others in the batch (batch norm or dropout without `eval`).
            tile: computes large images in tiles of this side, in pixels; see `TileOptions`.

        Keeps sizes if the network does. Raises UserError if an image can't be read, or if its
        channels do not fit.
        """
        batch_size = _whole("batch_size", batch_size)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is too small: at least 1")
        options = tile
        if not isinstance(options, (TileOptions, NoneType)):
            options = TileOptions(_whole("tile", options))
        if isinstance(picture, (list, tuple)):
            return self._list(picture, batch_size, options)
        return self._list([picture], batch_size, options)[0]

    def _list(
        self, pictures: Sequence[Any], batch_size: int, tiles: TileOptions | None
    ) -> list[Any]:
        results: list[Any] = [None] * len(pictures)
        size = batch_size if independent_of_batch(self.net) else 1

        def batchable() -> Iterator[tuple[int, Picture, torch.Tensor]]:
            """The images to batch; sets the results of tensors and tiled images at once."""
            for i, given in enumerate(pictures):
                if isinstance(given, torch.Tensor):
                    results[i] = self._tensor(given, size, tiles)
                    continue
                read = self._read(given)
                if tiles is None:
                    yield i, read, self.normalize(read)
                else:
                    dtype = self._dtype(given, read)
                    whole = np.concatenate(list(self.tiled(read, tiles, dtype)))
                    result = Picture(whole, self._alpha(read, dtype))
                    results[i] = self._like(given, read, result)

        for batch in batched_by(batchable(), size, lambda one: one[2].shape):
            outputs = self.run(torch.stack([x for *_, x in batch])).cpu()
            for (i, read, _), output in zip(batch, outputs, strict=True):
                result = self.finish(output, read, self._dtype(pictures[i], read))
                results[i] = self._like(pictures[i], read, result)
        return results

    # ---------------------------------------------------------------------------------- the steps
    def normalize(self, picture: Picture) -> torch.Tensor:
        """An image as the network takes it: (input_nc, H, W) in [-1, 1], on the CPU."""
        return normalize(fit_channels(picture.pixels, self.input_nc), self.value_range)

    def run(self, batch: torch.Tensor, tiles: TileOptions | None = None) -> torch.Tensor:
        """Run the network without gradients: (N, C, H, W) to (N, C', H, W) on `device`."""
        if batch.shape[1] != self.input_nc:
            raise UserError(
                f"a tensor of {batch.shape[1]} channels: the network takes {self.input_nc} "
                "channels, (N, C, H, W)"
            )
        net = TiledNet(self._any_size, tiles, self._precision) if tiles else self._any_size
        with torch.no_grad(), precision_context(self._precision, self.device.type):
            return net(distributed.to_device(batch, self.device)).float()

    def finish(
        self, output: torch.Tensor, picture: Picture, dtype: np.dtype | type | None = None
    ) -> Picture:
        """`output` (C', H, W) as pixels of `picture`'s type (or `dtype`), with its alpha."""
        dtype = np.dtype(dtype or picture.pixels.dtype)
        alpha = self._alpha(picture, dtype)
        if alpha is not None and alpha.shape != output.shape[1:]:
            alpha = None
        return Picture(denormalize(output, dtype, self.range_for(picture, dtype)), alpha)

    def _alpha(self, picture: Picture, dtype: np.dtype) -> np.ndarray | None:
        if (alpha := picture.alpha) is None:
            return None
        return change_depth(alpha, dtype, opaque_value(alpha, self.value_range))

    def range_for(self, picture: Picture, dtype: np.dtype | type) -> Range | None:
        """The range of results: the inputs' if these are known, of the same dtype, and fit it."""
        dtype = np.dtype(dtype)
        if not picture.pixels.size or dtype != picture.pixels.dtype or self.value_range is None:
            return None
        # as for 8 bits from a network that was trained with 12
        fits = dtype.kind == "f" or self.value_range[1] <= np.iinfo(dtype).max
        return self.value_range if fits else None

    def tiled(
        self, picture: Picture, tiles: TileOptions, dtype: np.dtype | type | None = None
    ) -> Generator[np.ndarray, None, None]:
        """The result of a large image in bands (h, W, C'), top to bottom."""
        dtype = np.dtype(dtype or picture.pixels.dtype)
        source = ArrayRows(picture.pixels, self.input_nc, self.value_range)
        for band in translate_in_tiles(self.net, source, tiles, self.device, self._precision):
            yield denormalize(band, dtype, self.range_for(picture, dtype))

    # ------------------------------------------------------------------------------ kinds of input
    def _tensor(self, x: torch.Tensor, size: int, tiles: TileOptions | None) -> torch.Tensor:
        if x.dim() not in (3, 4) or 0 in x.shape:
            raise UserError(f"a tensor of shape {tuple(x.shape)}: it must be (N, C, H, W)")
        if not x.is_floating_point():
            raise UserError(
                f"a tensor of {x.dtype}: give floats in [-1, 1] (for bytes x / 127.5 - 1), or "
                "an array (H, W, C)"
            )
        if not (largest := x.abs().amax().item()) <= MAX_MAGNITUDE:
            raise UserError(
                f"a tensor with values up to {largest:g} in magnitude: they must be in [-1, 1]"
            )
        batch = x.float() if x.dim() == 4 else x.float()[None]
        results = torch.cat([self.run(part, tiles) for part in batch.split(size)])
        return results if x.dim() == 4 else results[0]

    def _read(self, given: Any) -> Picture:
        if self.options.get("model") == "colorization":
            raise UserError(
                "this model turns lightness into colour (CIE Lab): use test.py --model "
                "colorization, or give tensors"
            )
        if isinstance(given, Image.Image):
            if 0 in given.size:
                raise UserError(f"an image of {given.width}x{given.height} pixels is empty")
            try:
                with _reading:  # Pillow decodes lazily, here, and only one thread may
                    return fit_samples(from_pil(given, upright=True), {self.input_nc})
            except UserError:
                raise
            except Exception as e:  # decoders raise nearly anything on damaged images
                raise UserError(f"can't read this image: {first_line(e)}") from e
        if isinstance(given, (str, os.PathLike)):
            if os.path.isdir(given):
                raise UserError(f"{os.fspath(given)} is a folder: give a list of its images")
            picture = read_picture(given, upright=True)
            with prefix_errors(given):
                return self.without_alpha(fit_samples(picture, {self.input_nc}))
        if isinstance(given, np.ndarray):
            array = given[..., None] if given.ndim == 2 else given
            if array.ndim != 3 or array.dtype.kind not in "uif" or 0 in array.shape:
                raise UserError(
                    f"an array of shape {given.shape} and type {given.dtype}: it must be "
                    "(H, W, C) of integers or floats"
                )
            return self.without_alpha(Picture(array))
        raise UserError(
            f"can't translate a {type(given).__name__}: give an image of Pillow, a path, "
            "an array (H, W, C), a tensor, or a list of these"
        )

    def without_alpha(self, picture: Picture) -> Picture:
        """Take the last of 2 or 4 channels as alpha if the network takes one less."""
        channels = picture.pixels.shape[2]
        if picture.alpha is None and channels in (2, 4) and channels == self.input_nc + 1:
            return Picture(picture.pixels[..., :-1], picture.pixels[..., -1])
        return picture

    def _dtype(self, given: Any, read: Picture) -> np.dtype:
        """The dtype of a result: the input's, but uint8 for colour in Pillow, its only depth."""
        colour = isinstance(given, Image.Image) and self.output_nc == 3
        return np.dtype(np.uint8) if colour else read.pixels.dtype

    def _like(self, given: Any, read: Picture, result: Picture) -> Any:
        """The result as the kind of object that was given."""
        pixels, alpha = result.pixels, result.alpha
        array = isinstance(given, np.ndarray) or str(given).lower().endswith(".npy")
        array = array or (pixels.dtype != np.uint8 and pixels.shape[2] == 3)
        if not array and pixels.shape[2] == 2:  # two channels that are not grey and alpha
            array = not isinstance(given, Image.Image)
            if not array:
                raise UserError("Pillow has no images of two channels: give an array instead")
        if alpha is not None and (array or pixels.shape[2] in (1, 3)):
            pixels = np.concatenate([pixels, alpha[..., None]], axis=2)
        if array:
            flat = getattr(given, "ndim", 3) == 2 and pixels.shape[2] == 1
            return pixels[..., 0] if flat else pixels
        try:
            image = to_pil(pixels)
        except UserError:
            if isinstance(given, Image.Image):
                raise
            return pixels
        if fits_profile(read.info, result.pixels.shape[2]):
            image.info["icc_profile"] = read.info["icc_profile"]
        return image


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} {value!r} is not a whole number") from None


def to_pil(pixels: np.ndarray) -> Image.Image:
    """Pixels (H, W, C) as a Pillow image; raises UserError if Pillow has no mode for them."""
    channels = pixels.shape[2]
    if pixels.dtype == np.uint8 and channels == 2:
        return Image.merge("LA", [Image.fromarray(pixels[..., i]) for i in range(2)])
    if pixels.dtype == np.uint8 and channels in (1, 3, 4):
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    if channels == 1 and pixels.dtype in (np.uint16, np.int16, np.int32, np.float32):
        wide = np.int32 if pixels.dtype == np.int16 else pixels.dtype  # Pillow has no int16
        return Image.fromarray(pixels[..., 0].astype(wide))
    raise UserError(
        f"Pillow has no images of {channels} channels of {pixels.dtype}: give an array instead"
    )
