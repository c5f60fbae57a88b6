"""A generator run over a picture in bands of rows, in bounded memory, with the exact result.

Tiles that are translated by themselves differ where they meet: an instance norm takes mean and
variance of its tile, and the borders of a tile are padded. Here each layer sees its true neighbours
and each norm the statistics of the whole picture, so that the result equals that of the network on
the whole picture but for rounding.

The network becomes a chain of nodes of which rows can be asked for. Every convolution has a `Store`
behind it, which computes the rows that are asked for next and drops those that nobody will ask for
again: one pass from top to bottom computes nothing twice. A norm that takes its statistics from the
picture needs a pass of its own, over all rows of what it normalizes. Of these passes, the results
of all layers that are small are kept for the next one, in memory up to a limit and in files beyond
it: in a ResNet those at a quarter of the resolution, 64 bytes for each pixel of the picture at
`ngf` 64. The few large layers (full and half resolution) are cheap, and computed anew in each pass.
"""

from __future__ import annotations

import math
import mmap
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.networks import ResnetBlock, ResnetGenerator, UnetGenerator, UnetSkipConnectionBlock
from util.errors import UserError
from util.memory import return_freed_memory

TIDY_SECONDS = 1.0
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


# ----------------------------------------------------------------------------------------- storage
class Room:
    """Where kept rows go: to the device up to `memory` bytes, then to files in a scratch folder."""

    def __init__(self, memory: int, scratch: str | os.PathLike | None = None):
        self.memory, self.used = memory, 0
        self.base = Path(scratch or tempfile.gettempdir())
        self.folder: Path | None = None
        self.files = 0
        self.tidied = time.monotonic()

    def keep(self, rows: torch.Tensor) -> Chunk:
        """Take over rows (1, C, h, W)."""
        size = rows.numel() * rows.element_size()
        if self.used + size <= self.memory:
            self.used += size
            return Chunk(self, _apart(rows), None, size)
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="tiles-", dir=self.base))
        self.files += 1
        return Chunk(self, rows, self.folder / str(self.files), size)

    def tidy(self) -> None:
        """From time to time, give freed memory back; doing so each time would cost too much."""
        if time.monotonic() > self.tidied + TIDY_SECONDS:
            return_freed_memory()
            self.tidied = time.monotonic()

    def check(self, needed: int) -> None:
        """Raise UserError where the disk has no room for what does not fit into memory."""
        beyond = needed - self.memory
        try:
            free = shutil.disk_usage(self.base).free
        except OSError as e:
            raise UserError(f"--tile_scratch {self.base}: {e.strerror}") from e
        if beyond > free * 0.95:
            gib = 2**30
            raise UserError(
                f"exact tiles of this picture keep {needed / gib:.1f} GiB between passes: "
                f"--tile_memory gives {self.memory / gib:.1f} and {self.base} has "
                f"{free / gib:.1f} free; use --tile_scratch FOLDER on a larger disk, or "
                "--tile_mode quick"
            )

    def close(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def _apart(rows: torch.Tensor) -> torch.Tensor:
    """Rows in memory of their own, which goes back to the system when they are dropped.

    Among the short-lived results of the layers they would leave gaps that nothing fits into.
    """
    if rows.device.type != "cpu":
        return rows
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    buffer = mmap.mmap(-1, rows.numel() * rows.element_size(), **private)
    return torch.frombuffer(buffer, dtype=rows.dtype).view(rows.shape).copy_(rows)


class Chunk:
    """A few rows, in memory or in a file (rows first there, so that single rows can be read)."""

    def __init__(self, room: Room | None, rows: torch.Tensor, path: Path | None, size: int):
        self.room, self.path, self.size = room, path, size
        self.height = rows.shape[2]
        self.data: torch.Tensor | None = rows
        if path is not None:
            self.like = torch.empty(0, dtype=rows.dtype, device=rows.device)
            self.shape = (rows.shape[1], rows.shape[3])
            raw = rows[0].permute(1, 0, 2).contiguous().cpu()
            with open(path, "wb", buffering=0) as file:
                view = memoryview(raw.view(torch.uint8).numpy()).cast("B")
                while view:
                    view = view[file.write(view) :]
            self.data = None

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        if self.data is not None:
            return self.data[:, :, top:bottom]
        assert self.path is not None
        row = math.prod(self.shape) * self.like.element_size()
        raw = np.fromfile(self.path, np.uint8, (bottom - top) * row, offset=top * row)
        rows = torch.from_numpy(raw).view(self.like.dtype).view(bottom - top, *self.shape)
        return rows.permute(1, 0, 2).contiguous()[None].to(self.like.device)

    def drop(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
        elif self.room is not None:
            self.room.used -= self.size
        self.data = None


# ------------------------------------------------------------------------------------------- nodes
class Node(ABC):
    """Something with `channels`, `height` and `width` of which rows can be asked for, downwards."""

    inputs: tuple[Node, ...] = ()
    channels: int
    height: int
    width: int

    @abstractmethod
    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as (1, C, h, W)."""


class Padded(Node):
    """The picture, made larger at the right and at the bottom as `apply_padded` does."""

    def __init__(self, source: RowSource, multiple: int, least: int, device: torch.device):
        self.source, self.device = source, device
        self.channels = source.channels
        self.height = max(least, -(-source.height // multiple) * multiple)
        self.width = max(least, -(-source.width // multiple) * multiple)
        self.right = self.width - source.width
        bottom = self.height - source.height
        reflects = bottom < source.height and self.right < source.width
        self.mode = "reflect" if reflects else "replicate"

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        last = self.source.height - 1
        if bottom <= last + 1:
            rows = self.source.rows(top, bottom)
        else:
            wanted = torch.arange(top, bottom)
            beyond = 2 * last - wanted if self.mode == "reflect" else torch.full_like(wanted, last)
            wanted = torch.where(wanted > last, beyond, wanted)
            low = int(wanted.min())
            rows = self.source.rows(low, last + 1)[:, wanted - low]
        rows = rows[None].to(self.device)
        return F.pad(rows, (0, self.right, 0, 0), mode=self.mode) if self.right else rows


class Convolution(Node):
    """A convolution with the padding that comes before it, or its own zeros."""

    def __init__(self, source: Node, conv: nn.Conv2d, pad: int, mode: str):
        self.inputs = (source,)
        self.conv, self.pad, self.mode = conv, pad, mode
        (self.kernel, _), (self.stride, _) = conv.kernel_size, conv.stride
        self.channels = conv.out_channels
        self.height = (source.height + 2 * pad - self.kernel) // self.stride + 1
        self.width = (source.width + 2 * pad - self.kernel) // self.stride + 1

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        (source,) = self.inputs
        low = top * self.stride - self.pad
        high = (bottom - 1) * self.stride - self.pad + self.kernel
        x = source.rows(max(low, 0), min(high, source.height))
        sides = (self.pad, self.pad, max(-low, 0), max(high - source.height, 0))
        if any(sides):
            x = F.pad(x, sides, mode=self.mode)
        return F.conv2d(x, self.conv.weight, self.conv.bias, self.stride)


class TransposedConvolution(Node):
    """The convolution that doubles height and width."""

    def __init__(self, source: Node, conv: nn.ConvTranspose2d):
        self.inputs = (source,)
        self.conv = conv
        (self.kernel, _), (self.stride, _) = conv.kernel_size, conv.stride
        self.pad, more = int(conv.padding[0]), int(conv.output_padding[0])
        self.more = more
        self.channels = conv.out_channels
        self.height = (source.height - 1) * self.stride - 2 * self.pad + self.kernel + more
        self.width = (source.width - 1) * self.stride - 2 * self.pad + self.kernel + more

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        (source,) = self.inputs
        low = max(0, -((self.kernel - 1 - top - self.pad) // self.stride))
        high = min(source.height, (bottom - 1 + self.pad) // self.stride + 1)
        y = F.conv_transpose2d(
            source.rows(low, high),
            self.conv.weight,
            self.conv.bias,
            self.stride,
            (0, self.pad),
            (0, self.more),
        )
        first = top + self.pad - low * self.stride
        return y[:, :, first : first + bottom - top]


class Norm(Node):
    """A norm whose statistics are set before its rows are asked for."""

    def __init__(self, source: Node, module: nn.Module):
        self.inputs = (source,)
        self.channels, self.height, self.width = source.channels, source.height, source.width
        self.module = module
        self.eps = float(module.eps)  # type: ignore[arg-type]
        self.known = not uses_own_statistics(module)
        if self.known:
            self.freeze(module.running_mean, module.running_var)  # type: ignore[arg-type]

    def freeze(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Use this mean and this (biased) variance (C,) from now on."""
        weight, bias = self.module.weight, self.module.bias
        scale = (variance.double() + self.eps).rsqrt()
        self.mean, self.scale = mean, scale
        if weight is not None:
            self.scale = scale * weight.detach().double()
        self.shift = bias
        self.known = True

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        mean, scale = (
            v.to(x.device, torch.float32)[:, None, None] for v in (self.mean, self.scale)
        )
        y = (x.float() - mean).mul_(scale)
        return y if self.shift is None else y.add_(self.shift[:, None, None])

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return self.apply(self.inputs[0].rows(top, bottom))


class SameNorm(Node):
    """A norm read in a second place, with the statistics of the first."""

    def __init__(self, source: Node, norm: Norm):
        self.inputs = (source,)
        self.channels, self.height, self.width = source.channels, source.height, source.width
        self.norm = norm

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return self.norm.apply(self.inputs[0].rows(top, bottom))


class Each(Node):
    """A function of each value by itself; it must not change what it is given."""

    def __init__(self, source: Node, function: Callable[[torch.Tensor], torch.Tensor]):
        self.inputs = (source,)
        self.channels, self.height, self.width = source.channels, source.height, source.width
        self.function = function

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        return self.function(self.inputs[0].rows(top, bottom))


class Sum(Node):
    """The sum of a skip connection and its block."""

    def __init__(self, *inputs: Node):
        self.inputs = inputs
        one = inputs[0]
        self.channels, self.height, self.width = one.channels, one.height, one.width

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        first, second = (node.rows(top, bottom) for node in self.inputs)
        return first + second


class Joined(Sum):
    """The channels of several nodes beside each other."""

    def __init__(self, *inputs: Node):
        super().__init__(*inputs)
        self.channels = sum(node.channels for node in inputs)

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        first, second = (node.rows(top, bottom) for node in self.inputs)
        return torch.cat([first, second.to(first.dtype)], 1)


class Store(Node):
    """Rows that have been computed and will be asked for again."""

    def __init__(self, source: Node, whole: bool):
        self.inputs = (source,)
        self.channels, self.height, self.width = source.channels, source.height, source.width
        self.whole = whole  # kept from pass to pass
        self.norm: Norm | None = None  # waits for the statistics of these rows
        self.readers: list[Reader] = []
        self.active: list[Reader] = []
        self.may_drop, self.step = False, 1
        self.room: Room | None = None
        self.clear()

    @property
    def size(self) -> int:
        """Values of a whole store."""
        return self.channels * self.height * self.width

    def clear(self) -> None:
        for chunk in getattr(self, "chunks", []):
            chunk.drop()
        self.chunks: list[Chunk] = []
        self.first = self.next = 0  # the rows that are there: [first, next)
        self.count, self.mean, self.squares = 0, None, None

    def begin_pass(self, active: list[Reader], may_drop: bool, step: int) -> None:
        """`active` are the readers of this pass; without any, dropped rows need not be kept."""
        self.active, self.may_drop, self.step = active, may_drop, step
        for reader in active:
            reader.low = 0

    def advance(self, bottom: int) -> None:
        """Compute up to a row, `step` rows at a time."""
        while self.next < bottom:
            top, self.next = self.next, min(bottom, self.next + self.step)
            rows = self.inputs[0].rows(top, self.next)
            if self.norm is not None and not self.norm.known:
                self._count(rows)
            if self.may_drop and not self.active:
                continue
            rows = rows.contiguous()
            if self.whole and self.room is not None:
                self.chunks.append(self.room.keep(rows))
            else:
                self.chunks.append(Chunk(None, rows, None, 0))
            if self.room is not None:
                self.room.tidy()

    def _count(self, rows: torch.Tensor) -> None:
        """Take rows into mean and sum of squared differences (Chan et al. 1979), in float64."""
        count = rows.shape[2] * rows.shape[3]
        variance, mean = torch.var_mean(rows[0].float(), dim=(1, 2), correction=0)
        mean, squares = mean.double(), variance.double() * count
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta**2 * (self.count * count / total)
        self.count = total

    def finish_norm(self) -> None:
        assert self.norm is not None
        assert self.mean is not None
        assert self.squares is not None
        self.norm.freeze(self.mean, self.squares / self.count)

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        self.advance(bottom)
        parts, start = [], self.first
        for chunk in self.chunks:
            low, high = max(top, start), min(bottom, start + chunk.height)
            if low < high:
                parts.append(chunk.rows(low - start, high - start))
            start += chunk.height
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def drop(self) -> None:
        """Let go of the rows above what the readers of this pass may still ask for."""
        if not self.may_drop:
            return
        low = min(reader.low for reader in self.active)
        while self.chunks and self.first + self.chunks[0].height <= low:
            self.first += self.chunks[0].height
            self.chunks.pop(0).drop()


class Reader(Node):
    """One place where a store is read; it asks for rows from top to bottom."""

    def __init__(self, store: Store):
        self.store = store
        self.channels, self.height, self.width = store.channels, store.height, store.width
        self.low = 0
        store.readers.append(self)

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        self.low = max(self.low, top)
        rows = self.store.rows(top, bottom)
        self.store.drop()
        return rows


# ------------------------------------------------------------------------------- network to nodes
class Plan:
    """The nodes of a network for one picture, and the passes that compute it."""

    def __init__(self, net: nn.Module, source: RowSource, device: torch.device):
        multiple, least = size_needed(net)
        self.source = source
        self.stores: list[Store] = []
        self.pad, self.mode = 0, "constant"
        self.picture = Padded(source, multiple, least, device)
        first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
        # values for each pixel of the picture up to which a layer is kept between passes
        self.small = first.out_channels / 4
        self.output = self._module(net.model, self.picture)  # type: ignore[arg-type]
        self.passes: list[Node] = [s for s in self.stores if s.norm and not s.norm.known]
        self.passes.append(self.output)
        self._schedule()

    def _store(self, node: Node, whole: bool = False) -> Store:
        pixels = self.picture.height * self.picture.width
        small = node.channels * node.height * node.width <= self.small * pixels
        store = Store(node, whole or small)
        self.stores.append(store)
        return store

    def _module(self, module: nn.Module, node: Node) -> Node:
        if isinstance(module, UnetSkipConnectionBlock):
            return self._level(module, node)
        if isinstance(module, ResnetBlock):
            # not only what is added, but also what goes into the block is read twice
            store = node.store if isinstance(node, Reader) else self._store(node, whole=True)
            inner = self._module(module.conv_block, Reader(store))
            return Reader(self._store(Sum(Reader(store), inner), whole=True))
        if isinstance(module, nn.Sequential):
            for layer in module:
                node = self._module(layer, node)
            return node
        if isinstance(module, (nn.ReflectionPad2d, nn.ReplicationPad2d)):
            self.pad = int(module.padding[0])
            self.mode = "reflect" if isinstance(module, nn.ReflectionPad2d) else "replicate"
            return node
        if isinstance(module, nn.Conv2d):
            pad, mode = (self.pad, self.mode) if self.pad else (int(module.padding[0]), "constant")
            self.pad = 0
            return Reader(self._store(Convolution(node, module, pad, mode)))
        if isinstance(module, nn.ConvTranspose2d):
            return Reader(self._store(TransposedConvolution(node, module)))
        if isinstance(module, (INSTANCE, *BATCH)):
            norm = Norm(node, module)
            if not norm.known:
                assert isinstance(node, Reader)
                node.store.norm = norm
            return norm
        if isinstance(module, nn.Dropout):
            # kept, or the rows would be drawn anew each time that they are read
            return Reader(self._store(Each(node, module), whole=True)) if module.training else node
        if isinstance(module, nn.ReLU):
            return Each(node, F.relu)
        if isinstance(module, nn.LeakyReLU):
            slope = module.negative_slope
            return Each(node, lambda x: F.leaky_relu(x, slope))
        if isinstance(module, nn.Tanh):
            return Each(node, torch.tanh)
        if isinstance(module, nn.Identity):
            return node
        raise UserError(
            f"a layer of type {type(module).__name__} can't be run in exact tiles: "
            "use --tile_mode quick"
        )

    def _level(self, block: UnetSkipConnectionBlock, node: Node) -> Node:
        layers = list(block.model)
        if block.outermost:
            for layer in layers:
                node = self._module(layer, node)
            return node
        # what skips and what goes in is the result of the first layer; each reads the store
        store = next(s for s in [getattr(self._below(node), "store", None)] if s)
        paths = []
        for _ in range(2):
            paths.append(self._module(layers[0], self._again(node, store)))
        skip, inner = paths
        for layer in layers[1:]:
            inner = self._module(layer, inner)
        return Joined(skip, inner)

    @staticmethod
    def _below(node: Node) -> Node:
        """The reader under the norm and the functions of a node."""
        while not isinstance(node, Reader):
            (node,) = node.inputs
        return node

    def _again(self, node: Node, store: Store) -> Node:
        """The same node over a reader of its own."""
        if isinstance(node, Reader):
            return Reader(store)
        assert isinstance(node, (Norm, Each))
        below = self._again(node.inputs[0], store)
        if isinstance(node, Each):
            return Each(below, node.function)
        return SameNorm(below, node)

    # ------------------------------------------------------------------------------------- passes
    def _schedule(self) -> None:
        """Which stores and readers each pass uses, and when a kept store is used last."""
        self.use: list[tuple[dict[Store, list[Reader]], list[Store]]] = []
        complete: set[Store] = set()
        last: dict[Store, int] = {}
        self.peak = 0
        for number, target in enumerate(self.passes):
            readers: dict[Store, list[Reader]] = {}
            filled: list[Store] = []
            self._walk(target, complete, readers, filled)
            for store in readers:
                last[store] = number
            self.use.append((readers, filled))
            complete |= {s for s in filled if s.whole}
        self.last = last
        live: set[Store] = set()
        for number, (_, filled) in enumerate(self.use[:-1]):
            before = sum(s.size for s in live)
            live |= {s for s in filled if s.whole}
            live = {s for s in live if last.get(s, 0) > number}
            self.peak = max(self.peak, before, sum(s.size for s in live))

    def _walk(
        self,
        node: Node,
        complete: set[Store],
        readers: dict[Store, list[Reader]],
        filled: list[Store],
    ) -> None:
        if isinstance(node, Reader):
            seen = readers.setdefault(node.store, [])
            if node in seen:
                return
            seen.append(node)
            node = node.store
        if isinstance(node, Store):
            if node in complete or node in filled:
                return
            filled.append(node)
        for below in node.inputs:
            self._walk(below, complete, readers, filled)

    def run(self, room: Room, band_pixels: int) -> Iterator[torch.Tensor]:
        """The result in bands (C', h, W), top to bottom, cut to the size of the picture."""
        for store in self.stores:
            store.room = room
        rows = max(8, band_pixels // self.picture.width)  # of the picture
        for number, target in enumerate(self.passes):
            readers, filled = self.use[number]
            used = {*readers, *filled}
            needed_later = {s for s in used if s.whole and self.last.get(s, -1) > number}
            for store in used:
                if store in filled:
                    store.clear()
                may_drop = store not in needed_later
                store.begin_pass(readers.get(store, []), may_drop, self._step(store, rows))
            if isinstance(target, Store):
                target.advance(target.height)
                for store in filled:
                    if store.whole:
                        store.advance(store.height)
                target.finish_norm()
            else:
                step = self._step(target, rows)
                for top in range(0, self.source.height, step):
                    bottom = min(self.source.height, top + step)
                    yield target.rows(top, bottom)[0, :, :, : self.source.width]
            for store in used - needed_later:
                store.clear()

    def _step(self, node: Node, rows: int) -> int:
        """How many rows of a node belong to so many of the picture."""
        return max(1, rows * node.height // self.picture.height)
