"""Run a generator over a picture in bands of rows: the exact result, in bounded memory.

Tiles that are translated one by one differ where they meet: an instance norm takes mean and
variance of its tile, and the borders of each tile are padded. Here the network runs layer by layer.
The result of each convolution is computed in bands of rows and stored whole, in memory up to a
limit and in files beyond it. So the next layer sees the true neighbours of each pixel, and a norm
the statistics of the whole picture. The result equals that of the network on the whole picture up
to rounding.

Pads, norms, activations and sums are not stored: they are computed each time that their rows are
read. To add a kind of layer, write a function that makes new `Rows` of given ones, and enter it in
`LAYERS`.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from models.antialias import BlurredConv2d, BlurredConvTranspose2d, Downsample, Upsample
from models.networks import ResnetBlock, UnetSkipConnectionBlock
from util.errors import UserError

from .sizes import SELF_PADDING

INSTANCE = nn.InstanceNorm2d
BATCH = (nn.BatchNorm2d, nn.SyncBatchNorm)


class RowSource(Protocol):
    """A picture that is read in bands of rows."""

    channels: int
    height: int
    width: int

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as (C, h, W) in [-1, 1], on the CPU."""
        ...


def uses_own_statistics(module: nn.Module) -> bool:
    """Whether a norm computes mean and variance from its input, in its present mode."""
    if isinstance(module, INSTANCE):
        return module.training or not module.track_running_stats
    return isinstance(module, BATCH) and (module.training or module.running_mean is None)


# ------------------------------------------------------------------------------------------- rows
class Rows:
    """A feature map (1, channels, height, width) whose rows are computed when they are asked for.

    `rows(top, bottom)` gives rows [top, bottom) as (1, C, h, W), made of rows of the `inputs`.
    What is `costly` is stored before it is read twice.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        rows: Callable[[int, int], torch.Tensor],
        *inputs: Rows,
        costly: bool = False,
    ):
        self.channels, self.height, self.width = self.shape = shape
        self.rows, self.inputs, self.costly = rows, inputs, costly


def pointwise(function: Callable[[torch.Tensor], torch.Tensor], x: Rows) -> Rows:
    """A function of each value; it must not change what it is given."""
    return Rows(x.shape, lambda top, bottom: function(x.rows(top, bottom)), x)


def padded(x: Rows, sides: Sequence[int], mode: str) -> Rows:
    """Rows with a border: `sides` are left, right, top and bottom, as for `F.pad`."""
    left, right, above, below = sides
    last = x.height - 1

    def rows(top: int, bottom: int) -> torch.Tensor:
        top, bottom = top - above, bottom - above
        wanted = torch.arange(top, bottom)
        inside = wanted.clamp(0, last)
        if mode == "reflect":
            inside = last - (last - wanted.abs()).abs()
        low, high = int(inside.min()), int(inside.max()) + 1
        y = x.rows(low, high)
        if mode == "constant":
            return F.pad(y, (left, right, low - top, bottom - high))
        if (low, high) != (top, bottom):
            y = y[:, :, (inside - low).to(y.device)]
        return F.pad(y, (left, right, 0, 0), mode) if left + right else y

    return Rows((x.channels, x.height + above + below, x.width + left + right), rows, x)


def convolved(
    x: Rows, weight: torch.Tensor, bias: torch.Tensor | None, stride: int, groups: int
) -> Rows:
    """A convolution by `weight` (out, in / groups, kh, kw), without padding."""
    kernel, across = weight.shape[2:]

    def rows(top: int, bottom: int) -> torch.Tensor:
        y = x.rows(top * stride, (bottom - 1) * stride + kernel)
        return F.conv2d(y, weight, bias, stride, groups=groups)

    height, width = (x.height - kernel) // stride + 1, (x.width - across) // stride + 1
    return Rows((len(weight), height, width), rows, x, costly=True)


def conv_transposed(
    x: Rows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: int,
    groups: int,
    crop: int,
    more: int = 0,
) -> Rows:
    """A transposed convolution by `weight` (in, out / groups, kh, kw).

    `crop` rows and columns are cut off on each side, then `more` added at the bottom and right:
    `padding` and `output_padding` of PyTorch.
    """
    _, out, kernel, across = weight.shape

    def rows(top: int, bottom: int) -> torch.Tensor:
        top, bottom = top + crop, bottom + crop
        low = max(0, -((kernel - 1 - top) // stride))
        y = x.rows(low, min(x.height, (bottom - 1) // stride + 1))
        pads = (0, crop), (more, more)
        y = F.conv_transpose2d(y, weight, bias, stride, *pads, groups)
        return y[:, :, top - low * stride : bottom - low * stride]

    sizes = (x.height, kernel), (x.width, across)
    height, width = ((n - 1) * stride + k - 2 * crop + more for n, k in sizes)
    return Rows((out * groups, height, width), rows, x, costly=True)


# ---------------------------------------------------------------------------------------- storage
class ScratchSpace:
    """Space for stored maps: up to `memory` bytes on the device, beyond that in unnamed files."""

    def __init__(self, memory: int, scratch: str | os.PathLike | None = None):
        self.memory, self.scratch = memory, Path(scratch or tempfile.gettempdir())
        self.used = self.peak = 0  # bytes, in memory and in files
        self.files = 0

    def open_file(self) -> Any:
        """A file without a name: it is deleted when the process ends, however that ends."""
        self.files += 1
        return tempfile.TemporaryFile(dir=self.scratch)

    def check(self, needed: int) -> None:
        """Raise UserError if the disk has no room for what does not fit into memory."""
        try:
            free = shutil.disk_usage(self.scratch).free
        except OSError as e:
            raise UserError(f"--tile_scratch {self.scratch}: {e.strerror}") from e
        if needed - self.memory > free * 0.95:
            gib = 2**30
            raise UserError(
                f"exact tiles of this picture store {needed / gib:.1f} GiB: --tile_memory gives "
                f"{self.memory / gib:.1f} and {self.scratch} has {free / gib:.1f} free; use "
                "--tile_scratch FOLDER on a larger disk, or --tile_mode quick"
            )


class StoredMap:
    """All rows of a map, until nothing refers to it any more.

    They are written from top to bottom. A file has rows first, (H, C, W), so that a band is in one
    piece.
    """

    def __init__(self, space: ScratchSpace, shape: tuple[int, int, int], like: torch.Tensor):
        """`like` has the type and the device of the map."""
        self.space, self.shape, self.like = space, shape, like.new_empty(0)
        self.size = math.prod(shape) * like.element_size()
        fits = space.used + self.size <= space.memory
        self.data = like.new_empty(1, *shape) if fits else None
        self.file: Any = None if fits else space.open_file()
        space.used += self.size
        space.peak = max(space.peak, space.used)

    def __del__(self) -> None:
        self.space.used -= self.size
        if self.file is not None:
            self.file.close()

    def write(self, top: int, rows: torch.Tensor) -> None:
        """Take over rows (1, C, h, W) from `top` on."""
        if self.data is not None:
            self.data[:, :, top : top + rows.shape[2]] = rows
        else:
            raw = rows[0].transpose(0, 1).contiguous().cpu()
            self.file.write(raw.view(torch.uint8).numpy())

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as (1, C, h, W)."""
        if self.data is not None:
            return self.data[:, :, top:bottom]
        c, h, w = self.shape
        raw = bytearray((bottom - top) * (self.size // h))
        self.file.seek(top * (self.size // h))
        self.file.readinto(raw)
        rows = torch.frombuffer(raw, dtype=self.like.dtype).view(bottom - top, c, w)
        return rows.transpose(0, 1).contiguous()[None].to(self.like.device)


# ------------------------------------------------------------------------------------ the network
class Stream:
    """Runs a network over a picture, layer by layer.

    `band_pixels` bounds what is computed at once, in pixels of the picture. Raises UserError for a
    network that is not a ResNet or U-Net of this code.
    """

    def __init__(
        self,
        net: nn.Module,
        source: RowSource,
        device: torch.device,
        space: ScratchSpace,
        band_pixels: int = 2**18,
    ):
        if not isinstance(net, SELF_PADDING):
            raise UserError(
                f"{type(net).__name__} can't be run in exact tiles, only ResNet and U-Net "
                "generators can: use --tile_mode quick"
            )
        self.net, self.source, self.space = net, source, space
        self.picture = extended(source, *net.fits, device)
        self.band_rows = max(8, band_pixels // self.picture.width)

    def run(self) -> Iterator[torch.Tensor]:
        """The result in bands (C', h, W), top to bottom, cut to the size of the picture."""
        output = self.layer(self.net.model, self.picture)  # type: ignore[arg-type]
        for top, bottom in self.bands(output, self.source.height):
            yield output.rows(top, bottom)[0, :, :, : self.source.width]

    def bands(self, x: Rows, height: int) -> Iterator[tuple[int, int]]:
        """First row and end of each band of a map, in proportion to the picture."""
        step = max(1, self.band_rows * x.height // self.picture.height)
        return ((top, min(height, top + step)) for top in range(0, height, step))

    def layer(self, module: nn.Module, x: Rows) -> Rows:
        """The output of a layer. Raises UserError for a layer that is not in `LAYERS`."""
        for kind, function in LAYERS.items():
            if isinstance(module, kind):
                return function(self, module, x)
        raise UserError(
            f"a layer of type {type(module).__name__} can't be run in exact tiles: "
            "use --tile_mode quick"
        )

    def store(self, x: Rows) -> Rows:
        """Compute all rows, and keep them instead of what they were computed from."""
        if x.inputs:
            stored = None
            for top, bottom in self.bands(x, x.height):
                rows = x.rows(top, bottom)
                stored = stored or StoredMap(self.space, x.shape, rows)
                stored.write(top, rows)
            assert stored is not None
            x.rows, x.inputs, x.costly = stored.rows, (), False
        return x

    def store_convolutions(self, x: Rows) -> Rows:
        """Make rows cheap to read again: store the convolutions that they are computed from."""
        if x.costly:
            return self.store(x)
        for source in x.inputs:
            self.store_convolutions(source)
        return x

    def statistics(self, x: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance (C,) of all rows, in float64 (Chan et al. 1979)."""
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for top, bottom in self.bands(x, x.height):
            rows = x.rows(top, bottom)[0].float()
            more = rows[0].numel()
            variance, own = (v.double() for v in torch.var_mean(rows, dim=(1, 2), correction=0))
            delta, share = own - mean.to(own), more / (count + more)
            mean = mean.to(own) + delta * share
            squares = squares.to(own) + variance * more + delta**2 * (count * share)
            count += more
        return mean, squares / count


def scratch_needed(net: nn.Module, source: RowSource) -> int:
    """Bytes of the maps that are stored at a time, at most, with 4 bytes a value."""
    # on this device only shapes are computed
    space, meta = ScratchSpace(sys.maxsize), torch.device("meta")
    stream = Stream(copy.deepcopy(net).to(meta), source, meta, space, sys.maxsize)
    stream.layer(stream.net.model, stream.picture)  # type: ignore[arg-type]
    return space.peak


def extended(source: RowSource, multiple: int, least: int, device: torch.device) -> Rows:
    """A picture made larger at the right and at the bottom, as `apply_padded` does."""
    c, h, w = source.channels, source.height, source.width
    height, width = (max(least, -(-n // multiple) * multiple) for n in (h, w))
    mode = "reflect" if height < 2 * h and width < 2 * w else "replicate"

    def rows(top: int, bottom: int) -> torch.Tensor:
        if device.type == "meta":
            return torch.empty(1, c, bottom - top, w, device=device)
        return source.rows(top, bottom)[None].to(device)

    return padded(Rows((c, h, w), rows), (0, width - w, 0, height - h), mode)


# ----------------------------------------------------------------------------------------- layers
def _sequence(stream: Stream, module: nn.Sequential, x: Rows) -> Rows:
    for layer in module:
        x = stream.layer(layer, x)
    return x


def _convolution(stream: Stream, module: Any, x: Rows) -> Rows:
    x = stream.store_convolutions(x)
    if any(module.padding):
        vertical, horizontal = module.padding
        x = padded(x, (horizontal, horizontal, vertical, vertical), "constant")
    return convolved(x, module.weight, module.bias, module.stride[0], module.groups)


def _transposed(stream: Stream, module: Any, x: Rows) -> Rows:
    shape = module.stride[0], module.groups, module.padding[0], module.output_padding[0]
    return conv_transposed(stream.store_convolutions(x), module.weight, module.bias, *shape)


def _downsample(stream: Stream, module: Downsample, x: Rows) -> Rows:
    x = padded(stream.store_convolutions(x), (1, 1, 1, 1), "reflect")
    return convolved(x, module.filt, None, 2, len(module.filt))


def _upsample(stream: Stream, module: Upsample, x: Rows) -> Rows:
    x = padded(stream.store_convolutions(x), (1, 1, 1, 1), "replicate")
    return conv_transposed(x, module.filt, None, 2, len(module.filt), crop=3)


def _blur(stream: Stream, filt: torch.Tensor, x: Rows) -> Rows:
    x = padded(stream.store_convolutions(x), (1, 1, 1, 1), "replicate")
    return convolved(x, filt, None, 1, len(filt))


def _blurred_convolution(stream: Stream, module: BlurredConv2d, x: Rows) -> Rows:
    return _convolution(stream, module, _blur(stream, module.filt, x))


def _blurred_transposed(stream: Stream, module: BlurredConvTranspose2d, x: Rows) -> Rows:
    return _blur(stream, module.filt, _transposed(stream, module, x))


def _norm(stream: Stream, module: Any, x: Rows) -> Rows:
    if uses_own_statistics(module):
        mean, variance = stream.statistics(stream.store_convolutions(x))
    else:
        mean, variance = module.running_mean, module.running_var
    scale = (variance.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    mean, scale = mean.float()[:, None, None], scale.float()[:, None, None]

    def normalize(rows: torch.Tensor) -> torch.Tensor:
        y = (rows.float() - mean).mul_(scale)
        return y if module.bias is None else y.add_(module.bias[:, None, None])

    return pointwise(normalize, x)


def _dropout(stream: Stream, module: nn.Dropout, x: Rows) -> Rows:
    # stored, or the rows would be computed again each time that they are read
    return stream.store(pointwise(module, stream.store_convolutions(x))) if module.training else x


def _resnet_block(stream: Stream, module: ResnetBlock, x: Rows) -> Rows:
    # or the next block would hold all maps of this one
    x = stream.store(stream.store_convolutions(x))
    y = stream.layer(module.conv_block, x)
    return Rows(x.shape, lambda top, bottom: x.rows(top, bottom) + y.rows(top, bottom), x, y)


def _unet_level(stream: Stream, module: UnetSkipConnectionBlock, x: Rows) -> Rows:
    if module.outermost:
        return stream.layer(module.model, x)
    first, *others = module.model
    skip = inner = stream.store_convolutions(stream.layer(first, x))
    for layer in others:
        inner = stream.layer(layer, inner)

    def rows(top: int, bottom: int) -> torch.Tensor:
        a, b = skip.rows(top, bottom), inner.rows(top, bottom)
        return torch.cat([a, b.to(a.dtype)], 1)

    shape = skip.channels + inner.channels, skip.height, skip.width
    return Rows(shape, rows, skip, inner)


LAYERS: dict[Any, Callable[[Stream, Any, Rows], Rows]] = {
    nn.Sequential: _sequence,
    ResnetBlock: _resnet_block,
    UnetSkipConnectionBlock: _unet_level,
    BlurredConv2d: _blurred_convolution,  # in front of the classes that they extend
    BlurredConvTranspose2d: _blurred_transposed,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _transposed,
    Downsample: _downsample,
    Upsample: _upsample,
    (INSTANCE, *BATCH): _norm,
    nn.ReflectionPad2d: lambda stream, module, x: padded(x, module.padding, "reflect"),
    nn.ReplicationPad2d: lambda stream, module, x: padded(x, module.padding, "replicate"),
    nn.ReLU: lambda stream, module, x: pointwise(F.relu, x),
    nn.LeakyReLU: lambda stream, module, x: pointwise(
        lambda rows: F.leaky_relu(rows, module.negative_slope), x
    ),
    nn.Tanh: lambda stream, module, x: pointwise(torch.tanh, x),
    nn.Dropout: _dropout,
    nn.Identity: lambda stream, module, x: x,
}
