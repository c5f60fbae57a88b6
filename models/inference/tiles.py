"""Large images in bounded memory: `exact` (see `streaming.py`), or `quick`, in overlapping tiles.

Quick tiles are run one by one. Neighbours share a strip of `overlap` pixels. Its outer parts, which
the padding of a tile influences, are discarded; over its middle, at most 64 pixels wide, one tile
fades into the other. Norms that compute statistics of their input use the same ones in all tiles:
those of 16 sample tiles of 256x256 pixels, spread evenly over the image and run as one batch.

With stored statistics (batch norm in eval mode) quick tiles are exact if the overlap is at least
the fade plus the reach of the receptive field on both sides. It reaches 60 pixels for
resnet_6blocks, 84 for resnet_9blocks, 381 for unet_128 and 765 for unet_256: overlaps of 184, 232,
832 and 1600 pixels are enough.

Quick tiles work for any generator that keeps sizes, exact ones for the ResNets and U-Nets of this
code. In quick tiles, other layers that look at the whole image, such as attention, see one tile.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data.pictures.values import Range, fit_channels, normalize
from models.speed.acceleration import precision_context
from util.errors import UserError, warn

from .rows import Rows, RowSource, extended
from .scratch import ScratchSpace
from .sizes import SELF_PADDING, KeepsSize, size_rule
from .streaming import Stream, scratch_needed, uses_own_statistics

MODES = ("exact", "quick")
SAMPLES, SAMPLE_SIZE = 16, 256
WIDEST_FADE = 64


@dataclass(frozen=True)
class TileOptions:
    """How to cut up large images.

    Attributes:
        size: side of a tile; exact bands have as many pixels as one such tile.
        overlap: pixels that neighbours share (`quick` only); None: 64, or a quarter of small tiles.
        mode: `exact`, `quick`, or None: exact if network and disk space allow it, else quick.
        memory: GiB of feature maps to keep in memory (`exact` only); further ones go to files.
        scratch: folder for those files; None: the system's folder for temporary files.
        said: warnings given so far, since the same network gives the same one for each image.
    """

    size: int = 512
    overlap: int | None = None
    mode: str | None = None
    memory: float = 1.0
    scratch: str | os.PathLike | None = None
    said: set[str] = field(default_factory=set, init=False, compare=False, repr=False)

    @classmethod
    def from_options(cls, opt: argparse.Namespace) -> TileOptions | None:
        """The options of the command line; None without `--tile`."""
        if not opt.tile:
            return None
        return cls(opt.tile, opt.tile_overlap, opt.tile_mode, opt.tile_memory, opt.tile_scratch)

    @property
    def shared(self) -> int:
        """`overlap`, or its default."""
        return min(64, self.size // 4) if self.overlap is None else self.overlap

    def __post_init__(self) -> None:
        if self.mode not in (*MODES, None):
            raise UserError(f"tile mode '{self.mode}': choose exact or quick")
        if self.size < 16:
            raise UserError(f"tiles of {self.size} pixels are too small: at least 16")
        if not 0 <= self.shared < self.size:
            raise UserError(f"tiles of {self.size} pixels can't overlap by {self.overlap}")


def tile_generators(model: object, options: TileOptions, precision: str = "tf32") -> None:
    """Replace the generators of a model with ones that compute in tiles."""
    for name, net in list(vars(model).items()):
        if isinstance(net, (*SELF_PADDING, KeepsSize)):
            setattr(model, name, TiledNet(net, options, precision))


class TiledNet(nn.Module):
    """A generator that computes in tiles: (N, C, H, W) in [-1, 1], any N, H and W.

    This bounds the memory that the network needs; the images are whole tensors.
    """

    def __init__(self, net: nn.Module, options: TileOptions, precision: str = "tf32"):
        super().__init__()
        self.whole, self.options, self.precision = net, options, precision
        self.net = net.net if isinstance(net, KeepsSize) else net  # tiles have sizes it takes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = []
        for picture in x:
            if max(picture.shape[1:]) <= self.options.size:
                results.append(self.whole(picture[None])[0])
                continue
            source = TensorRows(picture)
            bands = translate_in_tiles(self.net, source, self.options, x.device, self.precision)
            results.append(torch.cat([band.to(x.device) for band in bands], 1))
        return torch.stack(results)


class TensorRows:
    """A tensor (C, H, W) as a source of rows."""

    def __init__(self, picture: torch.Tensor):
        self.picture = picture
        self.channels, self.height, self.width = picture.shape

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return self.picture[:, top:bottom].cpu()


class ArrayRows:
    """Pixels (H, W, C) as a source of rows (`channels`, h, W) in [-1, 1]."""

    def __init__(self, pixels: np.ndarray, channels: int, value_range: Range | None = None):
        self.pixels, self.channels, self.value_range = pixels, channels, value_range
        self.height, self.width = pixels.shape[:2]

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return normalize(fit_channels(self.pixels[top:bottom], self.channels), self.value_range)


def translate_in_tiles(
    net: nn.Module,
    source: RowSource,
    options: TileOptions,
    device: torch.device,
    precision: str = "tf32",
) -> Generator[torch.Tensor, None, None]:
    """Translate an image of any size; yields bands (C', h, W) in [-1, 1], from top to bottom.

    Raises UserError for networks that can't run in tiles, and if exact tiles lack room.
    """
    space = ScratchSpace(int(options.memory * 2**30), options.scratch)
    bands = None
    if options.mode != "quick":
        try:
            space.check(scratch_needed(net, source))
            bands = Stream(net, source, device, space, options.size**2).run()
        except UserError as e:
            if options.mode == "exact":
                raise
            if str(e) not in options.said:
                warn(f"quick tiles instead of exact ones: {e}")
            options.said.add(str(e))
    if bands is None:
        bands = quick_tiles(net, source, options, device)
    while True:
        # not around the loop: between bands the contexts would stay active in the caller
        with torch.no_grad(), precision_context(precision, device.type):
            band = next(bands, None)
        if band is None:
            return
        yield band.float()


# ------------------------------------------------------------------------------------- quick tiles
def quick_tiles(
    net: nn.Module, source: RowSource, options: TileOptions, device: torch.device
) -> Iterator[torch.Tensor]:
    """Translate overlapping tiles with common statistics, and blend them; see above."""
    rule = size_rule(net, source.channels, device)
    if isinstance(rule, str):
        raise UserError(f"no tiles: {rule}")
    multiple, least = rule
    picture = extended(source, multiple, least, torch.device("cpu"))
    tile = max(least, -(-options.size // multiple) * multiple)
    # tiles start at multiples, so that a network that downsamples keeps its grid
    step = max(multiple, (tile - options.shared) // multiple * multiple)
    overlap = min(options.shared, tile - step)
    tops, lefts = (_starts(n, tile, step) for n in (picture.height, picture.width))
    across = _weights(lefts, picture.width, tile, overlap)
    down = _weights(tops, picture.height, tile, overlap)
    if len(tops) * len(lefts) > 1:
        net = with_common_statistics(net, picture, device)
    held = torch.zeros(0, 0, 0)  # sums in the rows that overlap the next row of tiles
    for row, top in enumerate(tops):
        bottom = min(picture.height, top + tile)
        strip = picture.rows(top, bottom)
        sums = torch.zeros(0)
        for column, left in enumerate(lefts):
            right = min(picture.width, left + tile)
            result = net(strip[..., left:right].contiguous().to(device))[0].float().cpu()
            if column == 0:
                sums = torch.zeros(result.shape[0], bottom - top, picture.width)
            sums[..., left:right] += result * across[column] * down[row][:, None]
        if row:
            sums[:, : held.shape[1]] += held
        end = tops[row + 1] if row + 1 < len(tops) else picture.height
        yield sums[:, : max(0, min(end, source.height) - top), : source.width]
        held = sums[:, end - top :]


def _starts(length: int, tile: int, step: int) -> list[int]:
    """Where tiles begin along one axis; the last one ends with the image."""
    return [*range(0, length - tile, step), max(0, length - tile)]


def _weights(starts: list[int], length: int, tile: int, overlap: int) -> list[torch.Tensor]:
    """The blending weights of each tile along one axis; at each pixel they add up to 1."""
    fade = min(overlap // 2, WIDEST_FADE)
    margin = (overlap - fade) / 2
    total = torch.zeros(length, dtype=torch.float64)
    weights = []
    for start in starts:
        end = min(length, start + tile)
        at = torch.arange(start, end, dtype=torch.float64) + 0.5
        weight = torch.ones(end - start, dtype=torch.float64)
        if overlap:
            if start > 0:
                weight *= ((at - start - margin) / max(fade, 1)).clamp(0, 1)
            if end < length:
                weight *= ((end - at - margin) / max(fade, 1)).clamp(0, 1)
        total[start:end] += weight
        weights.append(weight)
    pairs = zip(starts, weights, strict=True)
    return [(w / total[start : start + len(w)]).float() for start, w in pairs]


def with_common_statistics(net: nn.Module, picture: Rows, device: torch.device) -> nn.Module:
    """A copy whose norms use the statistics of sample tiles, not those of each tile.

    It shares the weights. A copy, since the network itself may be called between two tiles, also by
    another thread.
    """
    if not any(uses_own_statistics(m) for m in net.modules()):
        return net
    held = [x for m in net.modules() for x in (*m._parameters.values(), *m._buffers.values())]
    # old-style weight norm keeps its result in an attribute, which deepcopy can't copy
    held += [x for m in net.modules() for x in vars(m).values() if torch.is_tensor(x)]
    net = copy.deepcopy(net, {id(x): x for x in held})
    learned: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def learn(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3), correction=0)
        learned[module] = mean, variance
        return apply(module, x)

    def apply(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        mean, variance = learned[module]
        weight, bias = module.weight, module.bias
        eps = float(module.eps)  # type: ignore[arg-type]
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)  # type: ignore[arg-type]

    def use(function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        for module in filter(uses_own_statistics, net.modules()):
            module.forward = functools.partial(function, module)  # type: ignore[method-assign]

    use(learn)
    net(_samples(picture).to(device))
    use(apply)
    return net


def _samples(picture: Rows) -> torch.Tensor:
    """Sample tiles (16, C, h, w), spread evenly over the image."""
    height, width = min(SAMPLE_SIZE, picture.height), min(SAMPLE_SIZE, picture.width)
    side = round(SAMPLES**0.5)
    tiles = []
    for top in np.linspace(0, picture.height - height, side).round().astype(int):
        strip = picture.rows(int(top), int(top) + height)
        for left in np.linspace(0, picture.width - width, side).round().astype(int):
            tiles.append(strip[..., left : left + width])
    return torch.cat(tiles)
