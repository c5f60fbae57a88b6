"""A generator run over a picture in bands of rows, in bounded memory, with the exact result.

Tiles that are translated by themselves differ where they meet: an instance norm takes mean and
variance of its tile, and the borders of a tile are padded. Here the network runs layer by layer.
The result of each convolution is computed in bands of rows and stored whole, in memory up to a
limit and in a file beyond it, so that the next layer sees its true neighbours, and a norm the
statistics of the whole picture. The result is that of the network on the whole picture but for
rounding.

Between two stored maps everything is lazy: pads, norms, activations and sums are computed when rows
of them are read. A new layer is one function in `LAYERS` that makes new rows of those it is given.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from models.antialias import Downsample, Upsample
from models.networks import ResnetBlock, ResnetGenerator, UnetGenerator, UnetSkipConnectionBlock
from util.errors import UserError

INSTANCE = nn.InstanceNorm2d
BATCH = (nn.BatchNorm2d, nn.SyncBatchNorm)


class RowSource(Protocol):
    """A picture of which bands of rows can be read."""

    channels: int
    height: int
    width: int

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as (C, h, W) in [-1, 1], on the CPU."""
        ...


def size_needed(net: nn.Module) -> tuple[int, int]:
    """Of which number height and width must be multiples inside a generator, and the least size.

    Raises UserError for a network that is none of this code's.
    """
    if isinstance(net, ResnetGenerator):
        return 4, 8
    if isinstance(net, UnetGenerator):
        return net.size_multiple, net.size_multiple
    raise UserError(f"{type(net).__name__} can't be run in tiles: only ResNet and U-Net generators")


def uses_own_statistics(module: nn.Module) -> bool:
    """Whether a norm computes mean and variance from what it is given, now."""
    if isinstance(module, INSTANCE):
        return module.training or not module.track_running_stats
    return isinstance(module, BATCH) and (module.training or module.running_mean is None)


# ------------------------------------------------------------------------------------------- rows
class Rows(ABC):
    """A feature map (1, channels, height, width) of which rows can be read.

    They are computed from `inputs` each time, or read where all of them have been `stored`. Without
    a shape of its own it has that of its first input.
    """

    def __init__(self, *inputs: Rows, shape: tuple[int, int, int] | None = None):
        self.inputs = inputs
        self.shape = shape or inputs[0].shape
        self.channels, self.height, self.width = self.shape
        self.stored: Storage | None = None

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as (1, C, h, W)."""
        return (self.stored or self).compute(top, bottom)

    @abstractmethod
    def compute(self, top: int, bottom: int) -> torch.Tensor:
        """The same, from the inputs."""


class Picture(Rows):
    """A source on the device of the network."""

    def __init__(self, source: RowSource, device: torch.device):
        super().__init__(shape=(source.channels, source.height, source.width))
        self.source, self.device = source, device

    def compute(self, top: int, bottom: int) -> torch.Tensor:
        return self.source.rows(top, bottom)[None].to(self.device)


class Each(Rows):
    """A function of values at the same place of all inputs; it must not change what it is given."""

    def __init__(self, function: Callable[..., torch.Tensor], *inputs: Rows, channels: int = 0):
        _, height, width = inputs[0].shape
        super().__init__(*inputs, shape=(channels or inputs[0].channels, height, width))
        self.function = function

    def compute(self, top: int, bottom: int) -> torch.Tensor:
        return self.function(*(x.rows(top, bottom) for x in self.inputs))


class Padded(Rows):
    """Rows with a border: `sides` are left, right, top and bottom, as for `F.pad`."""

    def __init__(self, source: Rows, sides: Sequence[int], mode: str):
        left, right, above, below = sides
        c, h, w = source.shape
        super().__init__(source, shape=(c, h + above + below, w + left + right))
        self.left, self.right, self.above, self.mode = left, right, above, mode

    def compute(self, top: int, bottom: int) -> torch.Tensor:
        (source,) = self.inputs
        top, bottom, last = top - self.above, bottom - self.above, source.height - 1
        wanted = torch.arange(top, bottom)
        inside = wanted.clamp(0, last)
        if self.mode == "reflect":
            inside = last - (last - wanted.abs()).abs()
        low, high = int(inside.min()), int(inside.max()) + 1
        x = source.rows(low, high)
        if self.mode == "constant":
            return F.pad(x, (self.left, self.right, low - top, bottom - high))
        if (low, high) != (top, bottom):
            x = x[:, :, (inside - low).to(x.device)]
        return F.pad(x, (self.left, self.right, 0, 0), self.mode) if self.left + self.right else x


class Convolved(Rows):
    """A convolution by `weight` (out, in / groups, kh, kw), without padding."""

    def __init__(
        self,
        source: Rows,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int = 1,
        groups: int = 1,
    ):
        self.weight, self.bias, self.stride, self.groups = weight, bias, stride, groups
        _, height, width = source.shape
        out, _, self.kernel, across = weight.shape
        height, width = ((n - k) // stride + 1 for n, k in ((height, self.kernel), (width, across)))
        super().__init__(source, shape=(out, height, width))

    def compute(self, top: int, bottom: int) -> torch.Tensor:
        (source,) = self.inputs
        x = source.rows(top * self.stride, (bottom - 1) * self.stride + self.kernel)
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


class Upconvolved(Rows):
    """A transposed convolution by `weight` (in, out / groups, kh, kw).

    `crop` rows and columns are cut off on each side, then `more` added at the bottom and right:
    `padding` and `output_padding` of PyTorch.
    """

    def __init__(
        self,
        source: Rows,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: int = 1,
        groups: int = 1,
        crop: int = 0,
        more: int = 0,
    ):
        self.weight, self.bias, self.stride, self.groups = weight, bias, stride, groups
        self.crop, self.more = crop, more
        _, out, self.kernel, across = weight.shape
        height, width = (
            (n - 1) * stride + k - 2 * crop + more
            for n, k in ((source.height, self.kernel), (source.width, across))
        )
        super().__init__(source, shape=(out * groups, height, width))

    def compute(self, top: int, bottom: int) -> torch.Tensor:
        (source,) = self.inputs
        top, bottom = top + self.crop, bottom + self.crop
        low = max(0, -((self.kernel - 1 - top) // self.stride))
        high = min(source.height, (bottom - 1) // self.stride + 1)
        y = F.conv_transpose2d(
            source.rows(low, high),
            self.weight,
            self.bias,
            self.stride,
            (0, self.crop),
            (self.more, self.more),
            self.groups,
        )
        return y[:, :, top - low * self.stride : bottom - low * self.stride]


# ---------------------------------------------------------------------------------------- storage
class Room:
    """Where maps are stored: on the device up to `memory` bytes, beyond that in unnamed files."""

    def __init__(self, memory: int, scratch: str | os.PathLike | None = None):
        self.memory, self.scratch = memory, Path(scratch or tempfile.gettempdir())
        self.used = self.peak = 0  # bytes, in memory and in files
        self.files = 0

    def open_file(self) -> Any:
        """A file without a name, which goes with the process whatever ends that."""
        self.files += 1
        return tempfile.TemporaryFile(dir=self.scratch, buffering=0)

    def check(self, needed: int) -> None:
        """Raise UserError where the disk has no room for what does not fit into memory."""
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


class Storage:
    """All rows of a map, until nothing refers to it any more.

    Rows come from top to bottom; the first ones decide the type and the device. A file has rows
    first, (H, C, W), so that a band is in one piece.
    """

    data: torch.Tensor | None = None
    file: Any = None

    def __init__(self, room: Room, shape: tuple[int, int, int], first: torch.Tensor | None):
        """`first` has the first rows, or is None for a plan, which counts 4 bytes a value."""
        self.room, self.shape = room, shape
        value = first.element_size() if first is not None else 4
        self.size = math.prod(shape) * value
        if first is not None:
            self.like = first.new_empty(0)
            if room.used + self.size <= room.memory:
                self.data = first.new_empty(1, *shape)
            else:
                self.file = room.open_file()
        room.used += self.size
        room.peak = max(room.peak, room.used)

    def __del__(self) -> None:
        self.room.used -= self.size
        if self.file is not None:
            self.file.close()

    def fill(self, top: int, rows: torch.Tensor) -> None:
        """Take over rows (1, C, h, W) from `top` on."""
        if self.data is not None:
            self.data[:, :, top : top + rows.shape[2]] = rows
            return
        raw = rows[0].transpose(0, 1).contiguous().cpu()
        view = memoryview(raw.view(torch.uint8).numpy()).cast("B")
        while view:
            view = view[self.file.write(view) :]

    def compute(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as (1, C, h, W)."""
        if self.data is not None:
            return self.data[:, :, top:bottom]
        c, h, w = self.shape
        raw = bytearray((bottom - top) * (self.size // h))
        self.file.seek(top * (self.size // h))
        view = memoryview(raw)
        while view:
            view = view[self.file.readinto(view) :]
        rows = torch.frombuffer(raw, dtype=self.like.dtype).view(bottom - top, c, w)
        return rows.transpose(0, 1).contiguous()[None].to(self.like.device)


# ------------------------------------------------------------------------------------ the network
class Stream:
    """Runs a network over a picture, layer by layer.

    `band_pixels` bounds what is computed at once, in pixels of the picture. A `plan` computes
    nothing, and finds how much room is needed.
    """

    def __init__(
        self,
        net: nn.Module,
        source: RowSource,
        device: torch.device,
        room: Room,
        band_pixels: int = 2**18,
        plan: bool = False,
    ):
        self.net, self.source, self.room, self.plan = net, source, room, plan
        self.picture = extended(source, *size_needed(net), device)
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
        """What a layer makes of rows. Raises UserError for one that is not in `LAYERS`."""
        for kind, function in LAYERS.items():
            if isinstance(module, kind):
                return function(self, module, x)
        raise UserError(
            f"a layer of type {type(module).__name__} can't be run in exact tiles: "
            "use --tile_mode quick"
        )

    def store(self, x: Rows) -> Rows:
        """Compute all rows, and keep them instead of what they were computed from."""
        if x.stored is None and self.plan:
            x.stored = Storage(self.room, x.shape, None)
        elif x.stored is None:
            storage = None
            for top, bottom in self.bands(x, x.height):
                rows = x.compute(top, bottom)
                storage = storage or Storage(self.room, x.shape, rows)
                storage.fill(top, rows)
            x.stored = storage
        x.inputs = ()
        return x

    def settle(self, x: Rows) -> Rows:
        """Make rows cheap to read again: store the convolutions that they are computed from."""
        if isinstance(x, (Convolved, Upconvolved)):
            return self.store(x)
        for source in x.inputs:
            self.settle(source)
        return x

    def statistics(self, x: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance (C,) of all rows, in float64 (Chan et al. 1979)."""
        if self.plan:
            return torch.zeros(x.channels), torch.ones(x.channels)
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
    """Bytes of the maps that are stored at a time, at most."""
    room = Room(0)
    stream = Stream(net, source, torch.device("cpu"), room, plan=True)
    stream.layer(net.model, stream.picture)  # type: ignore[arg-type]
    return room.peak


def extended(source: RowSource, multiple: int, least: int, device: torch.device) -> Rows:
    """A picture made larger at the right and at the bottom, as `apply_padded` does."""
    height, width = (
        max(least, -(-n // multiple) * multiple) for n in (source.height, source.width)
    )
    below, right = height - source.height, width - source.width
    reflects = below < source.height and right < source.width
    mode = "reflect" if reflects else "replicate"
    return Padded(Picture(source, device), (0, right, 0, below), mode)


# ----------------------------------------------------------------------------------------- layers
def _sequence(stream: Stream, module: nn.Sequential, x: Rows) -> Rows:
    for layer in module:
        x = stream.layer(layer, x)
    return x


def _convolution(stream: Stream, module: Any, x: Rows) -> Rows:
    x = stream.settle(x)
    if any(module.padding):
        vertical, horizontal = module.padding
        x = Padded(x, (horizontal, horizontal, vertical, vertical), "constant")
    return Convolved(x, module.weight, module.bias, module.stride[0], module.groups)


def _transposed(stream: Stream, module: Any, x: Rows) -> Rows:
    crop, more = module.padding[0], module.output_padding[0]
    shape = module.stride[0], module.groups, crop, more
    return Upconvolved(stream.settle(x), module.weight, module.bias, *shape)


def _downsample(stream: Stream, module: Downsample, x: Rows) -> Rows:
    x = Padded(stream.settle(x), (1, 1, 1, 1), "reflect")
    return Convolved(x, module.filt, stride=2, groups=len(module.filt))


def _upsample(stream: Stream, module: Upsample, x: Rows) -> Rows:
    x = Padded(stream.settle(x), (1, 1, 1, 1), "replicate")
    return Upconvolved(x, module.filt, stride=2, groups=len(module.filt), crop=3)


def _norm(stream: Stream, module: Any, x: Rows) -> Rows:
    if uses_own_statistics(module):
        mean, variance = stream.statistics(stream.settle(x))
    else:
        mean, variance = module.running_mean, module.running_var
    scale = (variance.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    mean, scale = mean.float()[:, None, None], scale.float()[:, None, None]

    def normalize(rows: torch.Tensor) -> torch.Tensor:
        y = (rows.float() - mean).mul_(scale)
        return y if module.bias is None else y.add_(module.bias[:, None, None])

    return Each(normalize, x)


def _dropout(stream: Stream, module: nn.Dropout, x: Rows) -> Rows:
    # stored, or the rows would be drawn anew each time that they are read
    return stream.store(Each(module, stream.settle(x))) if module.training else x


def _resnet_block(stream: Stream, module: ResnetBlock, x: Rows) -> Rows:
    x = stream.store(stream.settle(x))  # or the next block would hold all maps of this one
    return Each(torch.add, x, stream.layer(module.conv_block, x))


def _unet_level(stream: Stream, module: UnetSkipConnectionBlock, x: Rows) -> Rows:
    if module.outermost:
        return stream.layer(module.model, x)
    first, *others = module.model
    skip = inner = stream.settle(stream.layer(first, x))
    for layer in others:
        inner = stream.layer(layer, inner)
    channels = skip.channels + inner.channels
    return Each(lambda a, b: torch.cat([a, b.to(a.dtype)], 1), skip, inner, channels=channels)


def _each(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[..., Rows]:
    return lambda stream, module, x: Each(functools.partial(function, module), x)


def _pad(mode: str) -> Callable[..., Rows]:
    return lambda stream, module, x: Padded(x, module.padding, mode)


LAYERS: dict[Any, Callable[[Stream, Any, Rows], Rows]] = {
    nn.Sequential: _sequence,
    ResnetBlock: _resnet_block,
    UnetSkipConnectionBlock: _unet_level,
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _transposed,
    Downsample: _downsample,
    Upsample: _upsample,
    (INSTANCE, *BATCH): _norm,
    nn.ReflectionPad2d: _pad("reflect"),
    nn.ReplicationPad2d: _pad("replicate"),
    nn.ReLU: _each(lambda module, x: F.relu(x)),
    nn.LeakyReLU: _each(lambda module, x: F.leaky_relu(x, module.negative_slope)),
    nn.Tanh: _each(lambda module, x: x.tanh()),
    nn.Dropout: _dropout,
    nn.Identity: lambda stream, module, x: x,
}
