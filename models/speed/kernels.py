"""GPU kernels for images in channels-last layout, where PyTorch's own first copy them to NCHW.

Instance norm with the ReLU that follows, and reflection padding, in Triton. Both are read and
written as seldom as possible, and sums are always added up in the same order, unlike the gradient
of PyTorch's padding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
import triton  # comes with PyTorch for CUDA, on Linux
import triton.language as tl

jit = cast(Any, triton.jit)  # whose type lacks `[grid]`

TILE = 2048  # numbers that a program holds at a time: so many pixels of so many channels
CHANNELS = 64  # of a tile, at most
PROGRAMS = 1024  # about as many as keep a GPU busy
CHUNKS = 64  # parts into which an image is divided, at most


def normalize(
    x: torch.Tensor, slope: float, eps: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`leaky_relu(instance_norm(x + bias), slope)`, computed in float32; no ReLU if `slope` is 1.

    (N, C, H, W) on a GPU, to the same shape and type in channels-last layout. A `bias` (C) has no
    effect, since the norm subtracts the mean, and its gradient is exactly zero.
    """
    if x.shape[2:].numel() == 1:
        F.instance_norm(x)  # raises the error
    # copied here, where second gradients can follow
    return _Normalize.apply(_channels_last(x), slope, eps, bias)


def reflect(x: torch.Tensor, size: int) -> torch.Tensor:
    """Pad by reflection on all four sides, by less than the height and width.

    (N, C, H, W) on a GPU, to (N, C, H + 2 size, W + 2 size) in channels-last layout.
    """
    return _Reflect.apply(x, size)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, slope: float, eps: float, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.slope, ctx.eps = slope, eps
        y, moments = torch.empty_like(x), x.new_empty((2, *x.shape[:2]), dtype=torch.float32)
        _run_norm(x, x, moments, y, slope, eps, backward=False)
        ctx.save_for_backward(x, moments)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
        x, moments = ctx.saved_tensors
        x = _channels_last(x)  # which `torch.autograd.graph.save_on_cpu` may not have kept
        zero = moments.new_zeros(x.shape[1]) if ctx.needs_input_grad[3] else None
        if torch.is_grad_enabled():  # the gradient will be differentiated, as in a gradient penalty
            y = F.instance_norm(x, eps=ctx.eps)
            y = y if ctx.slope == 1 else F.leaky_relu(y, ctx.slope)
            return torch.autograd.grad(y, x, dy, create_graph=True)[0], None, None, zero
        dx = torch.empty_like(x)
        _run_norm(x, _channels_last(dy), moments, dx, ctx.slope, ctx.eps, backward=True)
        return dx, None, None, zero


class _Reflect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int) -> torch.Tensor:
        ctx.size = size
        n, c, h, w = x.shape
        return _run_pad(x, (n, c, h + 2 * size, w + 2 * size), size, backward=False)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
        return _Unreflect.apply(dy, ctx.size), None


class _Unreflect(torch.autograd.Function):
    """The gradient of `_Reflect`: adds the padding to the pixels that it repeats."""

    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, size: int) -> torch.Tensor:
        ctx.size = size
        n, c, h, w = dy.shape
        return _run_pad(dy, (n, c, h - 2 * size, w - 2 * size), size, backward=True)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> Any:  # type: ignore[override]
        return _Reflect.apply(dx, ctx.size), None


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _run_norm(
    x: torch.Tensor,
    dy: torch.Tensor,
    moments: torch.Tensor,
    out: torch.Tensor,
    slope: float,
    eps: float,
    backward: bool,
) -> None:
    """Write the result, and mean and 1 / deviation to `moments`; or write the gradient."""
    n, c, h, w = x.shape
    channels = min(CHANNELS, triton.next_power_of_2(c))
    rows, blocks = TILE // channels, triton.cdiv(c, channels)
    # each image is divided into chunks; all of them are summed up, and then all normalized
    wanted = min(CHUNKS, triton.next_power_of_2(max(1, PROGRAMS // (n * blocks))))
    steps = triton.next_power_of_2(triton.cdiv(h * w, wanted * rows))
    chunks = triton.cdiv(h * w, steps * rows)
    sums = moments.new_empty(n, chunks, 2, c)
    grid = chunks, n, blocks
    kinds = {"BACKWARD": backward, "STEPS": steps, "ROWS": rows, "CHANNELS": channels}
    with torch.cuda.device_of(x):
        _sum_up[grid](x, dy, moments, sums, h * w, c, slope, **kinds)
        every = triton.next_power_of_2(chunks)
        _apply[grid](x, dy, moments, sums, out, h * w, c, slope, eps, CHUNKS=every, **kinds)


def _run_pad(x: torch.Tensor, shape: tuple[int, ...], size: int, backward: bool) -> torch.Tensor:
    x = _channels_last(x)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    n, c, h, w = shape
    channels = min(CHANNELS, triton.next_power_of_2(c))
    columns = TILE // channels
    grid = n * h, triton.cdiv(w, columns), triton.cdiv(c, channels)
    small_h, small_w = (h, w) if backward else x.shape[2:]
    kernel = _unreflect if backward else _reflect
    with torch.cuda.device_of(x):
        kernel[grid](x, out, small_h, small_w, c, size, COLUMNS=columns, CHANNELS=channels)
    return out


@jit
def _mean(means, count, row, total):
    """The mean of all, from the means of rows of `count`; exact if all are equal."""
    one = tl.sum(tl.where((row == 0)[:, None], means, 0.0), 0)
    return one + tl.sum((means - one[None, :]) * count, 0) / total


@jit
def _sum_up(
    x_ptr,
    dy_ptr,
    moments_ptr,
    sums_ptr,
    pixels,
    channels,
    slope,
    BACKWARD: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Over a chunk of pixels, the mean of x and its squared deviations; or sums of dy and dy * y.

    Deviations are from a running mean (Welford 1962), or squares of a large mean would cancel.
    """
    chunk, n = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    image = n.to(tl.int64) * pixels * channels
    row = tl.arange(0, ROWS)
    start = tl.cast(chunk, tl.int64) * STEPS * ROWS
    if BACKWARD:
        mean = tl.load(moments_ptr + n * channels + c, exists, 0.0)
        scale = tl.load(moments_ptr + (tl.num_programs(1) + n) * channels + c, exists, 0.0)
    first = tl.zeros((ROWS, CHANNELS), tl.float32)
    second = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step in range(STEPS):
        pixel = start + step * ROWS + row
        inside = (pixel < pixels)[:, None] & exists[None, :]
        offset = image + pixel[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + offset, inside, 0.0).to(tl.float32)
        if BACKWARD:
            y = (x - mean[None, :]) * scale[None, :]
            dy = tl.load(dy_ptr + offset, inside, 0.0).to(tl.float32)
            dy = tl.where(y > 0, dy, dy * slope)
            first += dy
            second += dy * y
        else:
            change = tl.where(inside, x - first, 0.0)
            first += change * (1.0 / (step + 1))
            second += change * (x - first)
    if BACKWARD:
        first = tl.sum(first, 0)
    else:
        count = tl.minimum(tl.maximum(pixels - start - row + ROWS - 1, 0) // ROWS, STEPS)
        count = count.to(tl.float32)[:, None]
        mean = _mean(first, count, row, tl.sum(count))
        change = first - mean[None, :]
        second += count * change * change
        first = mean
    sums = (n * tl.num_programs(0) + chunk) * 2 * channels + c
    tl.store(sums_ptr + sums, first, exists)
    tl.store(sums_ptr + sums + channels, tl.sum(second, 0), exists)


@jit
def _apply(
    x_ptr,
    dy_ptr,
    moments_ptr,
    sums_ptr,
    out_ptr,
    pixels,
    channels,
    slope,
    eps,
    CHUNKS: tl.constexpr,
    BACKWARD: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Normalize a chunk of pixels, or compute their gradient, with the sums of all chunks."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    exists = c < channels
    image = n.to(tl.int64) * pixels * channels
    each = tl.arange(0, CHUNKS)
    sums = (n * tl.num_programs(0) + each[:, None]) * 2 * channels + c[None, :]
    known = (each < tl.num_programs(0))[:, None] & exists[None, :]
    first = tl.load(sums_ptr + sums, known, 0.0)
    second = tl.load(sums_ptr + sums + channels, known, 0.0)
    mean_ptr = moments_ptr + n * channels + c
    scale_ptr = moments_ptr + (tl.num_programs(1) + n) * channels + c
    if BACKWARD:
        mean_dy, mean_dy_y = tl.sum(first, 0) / pixels, tl.sum(second, 0) / pixels
        mean = tl.load(mean_ptr, exists, 0.0)
        scale = tl.load(scale_ptr, exists, 0.0)
    else:
        size = STEPS * ROWS  # of all chunks but the last
        count = tl.minimum(tl.maximum(pixels - each * size, 0), size).to(tl.float32)[:, None]
        mean = _mean(first, count, each, pixels)
        change = first - mean[None, :]
        variance = tl.sum(second + count * change * change, 0) / pixels
        scale = 1 / tl.sqrt(variance + eps)
        if chunk == 0:
            tl.store(mean_ptr, mean, exists)
            tl.store(scale_ptr, scale, exists)
    for step in range(STEPS):
        pixel = (tl.cast(chunk, tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (pixel < pixels)[:, None] & exists[None, :]
        offset = image + pixel[:, None] * channels + c[None, :]
        x = tl.load(x_ptr + offset, inside, 0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :]
        if BACKWARD:
            dy = tl.load(dy_ptr + offset, inside, 0.0).to(tl.float32)
            dy = tl.where(y > 0, dy, dy * slope)
            out = (dy - mean_dy[None, :] - y * mean_dy_y[None, :]) * scale[None, :]
        else:
            out = tl.where(y > 0, y, y * slope)
        tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), inside)


@jit
def _reflect(
    x_ptr, out_ptr, height, width, channels, size, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):
    """A part of a row of the result, for images of `height` x `width`."""
    row = tl.program_id(0).to(tl.int64)
    n, h = row // (height + 2 * size), row % (height + 2 * size)
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (w < width + 2 * size)[:, None] & (c < channels)[None, :]
    from_h = height - 1 - tl.abs(height - 1 - tl.abs(h - size))
    from_w = width - 1 - tl.abs(width - 1 - tl.abs(w - size))
    source = ((n * height + from_h) * width + from_w)[:, None] * channels + c[None, :]
    target = (row * (width + 2 * size) + w)[:, None] * channels + c[None, :]
    tl.store(out_ptr + target, tl.load(x_ptr + source, inside), inside)


@jit
def _unreflect(
    dy_ptr, dx_ptr, height, width, channels, size, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):
    """A part of a row of the gradient: a pixel has up to nine copies in the padded image."""
    row = tl.program_id(0).to(tl.int64)
    n, h = row // height, row % height
    w = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (w < width)[:, None] & (c < channels)[None, :]
    total = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    for i in tl.static_range(3):  # itself, and reflected at the first and at the last row
        y = h + size if i == 0 else (size - h if i == 1 else size + 2 * (height - 1) - h)
        edge = h == 0 if i == 1 else h == height - 1  # which is not repeated
        if (i == 0) | ((y >= 0) & (y < height + 2 * size) & (edge == 0)):
            for j in tl.static_range(3):
                x = w + size if j == 0 else (size - w if j == 1 else size + 2 * (width - 1) - w)
                fits = (x >= 0) & (x < width + 2 * size)
                if j == 1:
                    fits = fits & (w > 0)
                if j == 2:
                    fits = fits & (w < width - 1)
                source = (n * (height + 2 * size) + y) * (width + 2 * size) + x
                offset = source[:, None] * channels + c[None, :]
                total += tl.load(dy_ptr + offset, inside & fits[:, None], 0.0).to(tl.float32)
    target = (row * width + w)[:, None] * channels + c[None, :]
    tl.store(dx_ptr + target, total.to(dx_ptr.dtype.element_ty), inside)
