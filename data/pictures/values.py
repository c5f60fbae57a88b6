"""Pixel values: from a file's range to [-1, 1] and back, to another depth, to other channels.

Pixels are arrays (H, W, C) of uint8, uint16 or floats.
"""

from __future__ import annotations

import numpy as np
import torch

from util.errors import UserError
from util.picture_files import HOW_RANGE, check_floats
from util.util import to_levels

Range = tuple[float, float]
MAX_MAGNITUDE = 2.0  # a tensor with values of larger magnitude can't be meant as [-1, 1]


def range_of(dtype: np.dtype, value_range: Range | None = None) -> Range:
    """The values that become -1 and 1: `value_range`; else 0 and the type's maximum, 1 for floats.

    Without a range, raises UserError for signed integers and for those of more than 16 bits.
    """
    if value_range is not None:
        return value_range
    if dtype.kind == "i" or (dtype.kind == "u" and dtype.itemsize > 2):
        raise UserError(f"values of type {dtype} need a range: {HOW_RANGE}")
    return (0.0, 1.0) if dtype.kind == "f" else (0.0, float(np.iinfo(dtype).max))


def normalize(pixels: np.ndarray, value_range: Range | None = None) -> torch.Tensor:
    """Pixels (H, W, C) as a float32 tensor (C, H, W), with the range mapped to [-1, 1].

    8-bit pixels without a range give exactly what the training transforms give. Raises UserError
    for floats outside [0, 1] without a range, and for NaN and infinity.
    """
    low, high = range_of(pixels.dtype, value_range)
    if pixels.dtype == np.uint8 and value_range is None:
        # not by torch, which would start helper threads for each thread that reads images
        unit = pixels.transpose(2, 0, 1).astype(np.float32, order="C")
        unit /= 255
        unit -= 0.5
        unit *= 2
        return torch.from_numpy(unit)
    if pixels.dtype.kind == "f":
        check_floats(pixels, any_range=value_range is not None)
    unit = (pixels.transpose(2, 0, 1).astype(np.float64) - low) / ((high - low) / 2) - 1
    return torch.from_numpy(unit.astype(np.float32))


def denormalize(
    tensor: torch.Tensor, dtype: np.dtype | type, value_range: Range | None = None
) -> np.ndarray:
    """The inverse of `normalize`: (C, H, W) in [-1, 1] to pixels (H, W, C) of `dtype`.

    Integers are rounded and clipped to their type. Raises UserError for NaN.
    """
    dtype = np.dtype(dtype)
    values = tensor.detach().float().cpu().numpy().transpose(1, 2, 0)
    if np.isnan(values.min(initial=0)):
        raise UserError(
            "the network gives NaN: its weights are damaged, or numbers in it are too large for "
            "the precision (--precision fp32 has the most room)"
        )
    if dtype == np.uint8 and value_range is None:
        values = to_levels(values)
    else:
        low, high = range_of(dtype, value_range)
        values = (values.astype(np.float64) + 1) * ((high - low) / 2) + low
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        values.round(out=values)
        values.clip(limits.min, limits.max, out=values)
    return values.astype(dtype, order="C")


def fit_channels(pixels: np.ndarray, wanted: int) -> np.ndarray:
    """Convert pixels (H, W, C) to `wanted` channels: grey to 3 equal channels, or colour to grey.

    Raises UserError for other numbers of channels.
    """
    have = pixels.shape[2]
    if have == wanted:
        return pixels
    if have == 1 and wanted == 3:
        return np.repeat(pixels, 3, axis=2)
    if have == 3 and wanted == 1:
        if pixels.dtype == np.uint8:  # as Pillow does
            weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
            return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]
        grey = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
        return (grey.round() if pixels.dtype.kind in "ui" else grey).astype(pixels.dtype)[..., None]
    raise UserError(f"the image has {have} channels, the network takes {wanted} (--input_nc)")


def opaque_value(alpha: np.ndarray, value_range: Range | None) -> float:
    """The value of alpha that means opaque; 0 is transparent.

    It is the upper end of `value_range`; or the maximum of the type (1 for floats) if there is no
    range, if its end is not positive, or if the values show another scale: floats up to 1, and
    unsigned integers above the range.
    """
    kind, most = alpha.dtype.kind, alpha.max(initial=0)
    high = value_range[1] if value_range else 0.0
    if high <= 0 or (kind == "f" and most <= 1) or (kind == "u" and most > high):
        return range_of(alpha.dtype)[1]
    return high


def change_depth(
    alpha: np.ndarray, dtype: np.dtype | type, opaque: float | None = None
) -> np.ndarray:
    """Scale alpha from `opaque`, or else its type's full range, to the full range of `dtype`."""
    dtype = np.dtype(dtype)
    if alpha.dtype == dtype:
        return alpha
    unit = alpha.astype(np.float64) / (opaque or range_of(alpha.dtype)[1])
    scaled = unit.clip(0, 1) * range_of(dtype)[1]
    return (scaled.round() if dtype.kind in "ui" else scaled).astype(dtype)
