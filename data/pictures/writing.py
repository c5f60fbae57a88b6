"""Write images of any depth, in the format of the file's extension.

Pillow writes 8 bits, `imagecodecs` PNG of 16 bits, `tifffile` TIFF of more than 8 bits. Large
images are written in bands of rows: all their pixels need never be in memory at once.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from util import util
from util.errors import UserError
from util.files import replacing

from .reading import EXIF_TEXTS, TIFF, as_stored, package
from .values import change_depth

# extensions of the files, by --output_format
FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tiff"}


def check_writable(ending: str, channels: int, dtype: np.dtype | type) -> None:
    """Raise UserError if files of this extension can't hold such an image."""
    dtype = np.dtype(dtype)
    able = {
        ".npy": True,
        ".tif": True,
        ".tiff": True,
        ".png": channels in (1, 3) and dtype in (np.uint8, np.uint16),
    }.get(ending, channels in (1, 3) and dtype == np.uint8)
    if not able:
        kind = ending.lstrip(".")
        raise UserError(
            f"{kind} can't hold {channels} channels of {dtype}: "
            "use --output_format tiff, or same with .npy images"
        )


def fits_profile(info: dict[str, Any], channels: int) -> bool:
    """Whether the colour profile in `info` fits the channels: one for CMYK does not fit RGB."""
    return info.get("icc_profile", b"")[16:20] == (b"GRAY" if channels == 1 else b"RGB ")


def write_picture(
    path: str | os.PathLike,
    pixels: np.ndarray,
    alpha: np.ndarray | None = None,
    info: dict[str, Any] | None = None,
) -> None:
    """Write pixels (H, W, C) in the format of the extension of `path`; see `write_bands`."""
    write_bands(path, [pixels], pixels.shape, pixels.dtype, alpha, info)


def write_bands(
    path: str | os.PathLike,
    bands: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    alpha: np.ndarray | None = None,
    info: dict[str, Any] | None = None,
    opaque: float | None = None,
) -> None:
    """Write an image of `shape` (H, W, C) that comes in bands of rows (h, W, C), top to bottom.

    `path` is the old file or the whole new one, never a part. Transparency and metadata (`info` of
    `Picture`) that the format can't hold are left out. Raises UserError if it can't hold the
    pixels. `opaque` is the alpha value that means opaque; None: the maximum of its type.
    """
    ending = Path(path).suffix.lower()
    height, width, channels = shape
    if ending not in (".png", ".webp", ".avif", ".heic", ".heif", *TIFF):
        alpha = None
    check_writable(ending, channels, dtype)
    info = dict(info or {})
    if not fits_profile(info, channels):
        info.pop("icc_profile", None)
    if alpha is not None:
        bands = _with_alpha(bands, alpha, opaque)
        channels += 1
    full = (height, width, channels)
    simple = _pillow_can(full, dtype, alpha is not None)
    with replacing(path, flush=False) as unfinished, _whole(path, bands, full, dtype) as array:
        if ending == ".npy":
            np.save(unfinished, array)
        elif ending in TIFF and not simple:
            _write_tiff(unfinished, array, alpha is not None, info)
        elif ending == ".png" and not simple:
            _write_png(unfinished, array, info)
        else:
            _write_pillow(unfinished, array, info)


@contextlib.contextmanager
def _whole(
    path: str | os.PathLike,
    bands: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype | type,
) -> Iterator[np.ndarray]:
    """All bands as one array; several are memory-mapped from a temporary file beside `path`."""
    bands = iter(bands)
    first = next(bands)
    if len(first) == shape[0]:
        yield np.ascontiguousarray(first)
        return
    with tempfile.TemporaryFile(dir=Path(path).parent) as file:
        for band in itertools.chain([first], bands):
            file.write(np.ascontiguousarray(band).data)
        file.flush()
        yield np.memmap(file, dtype, "r", shape=shape)


def _with_alpha(
    bands: Iterable[np.ndarray], alpha: np.ndarray, opaque: float | None
) -> Iterator[np.ndarray]:
    top = 0
    for band in bands:
        part = change_depth(alpha[top : top + len(band), :, None], band.dtype, opaque)
        top += len(band)
        yield np.concatenate([band, part], axis=2)


def _pillow_can(shape: tuple[int, ...], dtype: np.dtype | type, alpha: bool) -> bool:
    small = shape[0] * shape[1] <= 2**24
    return small and np.dtype(dtype) == np.uint8 and shape[2] - alpha in (1, 3)


def _plane(array: np.ndarray) -> np.ndarray:
    """Pixels (H, W, C), without the channel axis if there is only one channel."""
    return array[..., 0] if array.shape[2] == 1 else array


def _write_pillow(path: Path, array: np.ndarray, info: dict[str, Any]) -> None:
    settings = dict(info)
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif"):
        settings["quality"] = 95
    elif path.suffix.lower() in TIFF:
        settings["compression"] = "tiff_adobe_deflate"
        settings["exif"] = _exif_texts(info)
    elif path.suffix.lower() == ".png":
        settings["compress_level"] = util.PNG_LEVEL
    encoded, kind = io.BytesIO(), Image.registered_extensions()[path.suffix.lower()]
    try:
        Image.fromarray(_plane(array)).save(encoded, kind, **settings)
    except OSError as e:
        size = f"{array.shape[1]}x{array.shape[0]}"
        raise UserError(f"{path.suffix[1:]} can't hold {size} pixels: {e}") from e
    path.write_bytes(encoded.getvalue())  # not by libtiff, which hides the system's error


def _exif_texts(info: dict[str, Any]) -> Image.Exif:
    """The EXIF that TIFF can hold: neither libtiff nor tifffile writes its nested parts."""
    given, texts = Image.Exif(), Image.Exif()
    given.load(info.get("exif", b""))
    texts.update({tag: as_stored(given[tag]) for tag in EXIF_TEXTS if tag in given})
    return texts


def _write_tiff(path: Path, array: np.ndarray, alpha: bool, info: dict[str, Any]) -> None:
    height, width, channels = array.shape
    package("tifffile", "TIFF of more than 8 bits").imwrite(
        path,
        _plane(array),
        rowsperstrip=max(1, min(height, 2**21 // width)),
        photometric="rgb" if channels - alpha == 3 else "minisblack",
        planarconfig=None if channels == 1 else "contig",
        extrasamples=["unassalpha"] if alpha else None,
        compression="adobe_deflate",
        metadata=None,
        software=False,
        bigtiff=array.nbytes > 2**31,
        iccprofile=info.get("icc_profile"),
        resolution=info.get("dpi"),
        resolutionunit="INCH" if "dpi" in info else None,
        extratags=[(tag, "s", 0, text, True) for tag, text in _exif_texts(info).items()],
    )


def _write_png(path: Path, array: np.ndarray, info: dict[str, Any]) -> None:
    codecs = package("imagecodecs", "PNG of 16 bits, or of more than 16 million pixels,")
    data = memoryview(codecs.png_encode(_plane(array)))
    header = 33  # bytes; metadata comes after it
    with open(path, "wb") as file:
        file.write(data[:header])
        if "icc_profile" in info:
            packed = zlib.compress(info["icc_profile"])
            PngImagePlugin.putchunk(file, b"iCCP", b"ICC Profile\0\0" + packed)
        if "exif" in info:
            PngImagePlugin.putchunk(file, b"eXIf", info["exif"].removeprefix(b"Exif\0\0"))
        if "dpi" in info:
            per_metre = [round(n / 0.0254) for n in info["dpi"]]
            PngImagePlugin.putchunk(file, b"pHYs", struct.pack(">IIB", *per_metre, 1))
        file.write(data[header:])
