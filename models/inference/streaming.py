"""Run a generator over an image in bands of rows: the exact result, in bounded memory.

Tiles that are translated one by one differ where they meet: an instance norm takes mean and
variance of its tile, and the borders of each tile are padded. Here the network runs layer by layer.
The result of each convolution is computed in bands of rows and stored whole, in memory up to a
limit and in files beyond it. So the next layer sees the true neighbours of each pixel, and a norm
the statistics of the whole image. Up to rounding, the result is what the network gives for the
whole image at once.

Pads, norms, activations and sums are not stored: they are computed each time their rows are read.
To add a kind of layer, write a function that makes new `Rows` from given ones, and add it to
`LAYERS`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.antialias import BlurredConv2d, BlurredConvTranspose2d, Downsample, Upsample
from models.networks import ResnetBlock, UnetSkipConnectionBlock
from util.errors import UserError

from .rows import Rows, RowSource, conv_transposed, convolved, extended, padded, pointwise
from .scratch import ScratchSpace, StoredMap
from .sizes import SELF_PADDING

INSTANCE = nn.InstanceNorm2d
BATCH = (nn.BatchNorm2d, nn.SyncBatchNorm)


def uses_own_statistics(module: nn.Module) -> bool:
    """Whether a norm computes mean and variance from its input, in its current mode."""
    if isinstance(module, INSTANCE):
        return module.training or not module.track_running_stats
    return isinstance(module, BATCH) and (module.training or module.running_mean is None)


# ------------------------------------------------------------------------------------ the network
class Stream:
    """Runs a network over an image, layer by layer.

    `band_pixels` bounds what is computed at once, in pixels of the image. Raises UserError for a
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
        self.net, self.source, self.device, self.space = net, source, device, space
        self.picture = extended(source, *net.fits, device)
        self.band_rows = max(8, band_pixels // self.picture.width)

    def run(self) -> Iterator[torch.Tensor]:
        """The result in bands (C', h, W), top to bottom, cut to the size of the image."""
        output = self.layer(self.net.model, self.picture)  # type: ignore[arg-type]
        for top, bottom in self.bands(output, self.source.height):
            yield output.rows(top, bottom)[0, :, :, : self.source.width]

    def bands(self, x: Rows, height: int) -> Iterator[tuple[int, int]]:
        """(top, bottom) of the bands of a map's first `height` rows, scaled to its resolution."""
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
        """Compute and store all rows, and drop the inputs that they were computed from."""
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
        """Mean and biased variance (C,) of all rows, as `_double` (Chan et al. 1979)."""
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for top, bottom in self.bands(x, x.height):
            rows = x.rows(top, bottom)[0].float()
            more = rows[0].numel()
            variance, own = map(_double, torch.var_mean(rows, dim=(1, 2), correction=0))
            delta, share = own - mean.to(own), more / (count + more)
            mean = mean.to(own) + delta * share
            squares = squares.to(own) + variance * more + delta**2 * (count * share)
            count += more
        return mean, squares / count


def _double(x: torch.Tensor) -> torch.Tensor:
    """In float64; on the CPU where the device has no such numbers."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def scratch_needed(net: nn.Module, source: RowSource) -> int:
    """The most bytes of maps that are stored at one time, with 4 bytes a value."""
    # on the meta device only shapes are computed
    space, meta = ScratchSpace(sys.maxsize), torch.device("meta")
    stream = Stream(copy.deepcopy(net).to(meta), source, meta, space, sys.maxsize)
    stream.layer(stream.net.model, stream.picture)  # type: ignore[arg-type]
    return space.peak


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
    scale = (_double(variance) + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * _double(module.weight.detach())
    mean, scale = (v.float().to(stream.device)[:, None, None] for v in (mean, scale))

    def normalize(rows: torch.Tensor) -> torch.Tensor:
        y = (rows.float() - mean).mul_(scale)
        return y if module.bias is None else y.add_(module.bias[:, None, None])

    return pointwise(normalize, x)


def _dropout(stream: Stream, module: nn.Dropout, x: Rows) -> Rows:
    # stored, or rows would get another dropout each time they are read
    return stream.store(pointwise(module, stream.store_convolutions(x))) if module.training else x


def _resnet_block(stream: Stream, module: ResnetBlock, x: Rows) -> Rows:
    # stored, or the next block would hold on to all maps of this one
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
    BlurredConv2d: _blurred_convolution,  # before the classes that they extend
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
