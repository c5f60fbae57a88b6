"""Pictures of any depth and any number of channels: reading, writing, and their values in [-1, 1].

A picture is an array (H, W, C) of its own type: uint8, uint16, or floats. Transparency is kept
aside. Pillow does what it can do; 16-bit colour in PNG is read through it and written here, TIFF of
more than 8 bits goes through `tifffile`, and `.npy` takes any number of channels. Large pictures
are written in bands of rows, as they are made.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.image_folder import IMG_EXTENSIONS, make_dataset
from util.errors import UserError

# --output_format: ending of the files
FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
DEEP_EXTENSIONS = [*IMG_EXTENSIONS, ".npy"]

Range = tuple[float, float]
HOW = "--value_range LOW HIGH (in Python value_range=(LOW, HIGH))"
_opening = threading.Lock()


@dataclass
class Picture:
    """`pixels` (H, W, C) and, where there is any, `alpha` (H, W) of the same type."""

    pixels: np.ndarray
    alpha: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]


# ----------------------------------------------------------------------------------------- reading
def read_picture(path: str | os.PathLike, upright: bool = False) -> Picture:
    """Read a picture at its full depth; `upright` as in `from_pil`.

    Palettes become RGB. Raises UserError, which names the file, where it can't be read.
    """
    ending = Path(path).suffix.lower()
    try:
        if ending == ".npy":
            return _from_array(np.load(path, allow_pickle=False))
        with open_unlimited(path, ending) as image:
            return from_pil(image, upright)
    except NeedsTifffile:
        return _read_tiff(path)
    except UserError as e:
        raise UserError(f"can't read the picture {path}: {e}") from e
    # decoders raise nearly anything on damaged files: struct.error, SyntaxError, ...
    except Exception as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"can't read the picture {path}: {reason}") from e


class NeedsTifffile(Exception):
    """A TIFF that Pillow can't read in full."""


def open_unlimited(path: str | os.PathLike, ending: str) -> Image.Image:
    """`Image.open`, for pictures of any size: these are the user's own, not from the net."""
    with _opening:  # the limit is one for all threads
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path)
        except Image.UnidentifiedImageError:
            if ending in (".tif", ".tiff"):
                raise NeedsTifffile from None
            raise
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    # Pillow reads colour of 16 bits as 8
    if image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8:  # type: ignore[attr-defined]
        image.close()
        raise NeedsTifffile
    return image


def from_pil(image: Image.Image, upright: bool = False) -> Picture:
    """The pixels of a picture of Pillow, by strips: a whole copy beside it would be too much.

    `upright` turns what a camera has stored sideways (EXIF) as viewers show it.
    """
    picture = _from_pil(image)
    # asked after the pixels are there: Pillow turns TIFF itself while it reads them
    turn = _TURNS.get(_orientation(image)) if upright else None
    if turn is not None:
        picture.pixels = np.ascontiguousarray(turn(picture.pixels))
        picture.alpha = None if picture.alpha is None else np.ascontiguousarray(turn(picture.alpha))
    return picture


# by EXIF's tag Orientation: from the stored rows to those that are shown
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(np.swapaxes(x, 0, 1), 2),
    8: np.rot90,
}


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged notes about a picture are no damage to it
        return 1


def _from_pil(image: Image.Image) -> Picture:
    raw = str(image.tile[0].args) if getattr(image, "tile", None) else ""
    if "16" in raw and image.mode in ("RGB", "RGBA") and image.format == "PNG":
        return _read_png16(image)
    if image.mode.startswith("I;16"):
        return Picture(_strips(image, np.uint16))
    if image.mode == "I":
        levels = _strips(image, np.int32)
        depth = np.uint16 if levels.max(initial=0) > 255 else np.uint8
        return Picture(levels.clip(0, np.iinfo(depth).max).astype(depth))
    if image.mode == "F":
        return Picture(_strips(image, np.float32))
    transparent = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or (
        image.mode == "P" and "transparency" in image.info
    )
    grey = image.mode in ("1", "L", "LA", "La")
    wanted = ("LA" if transparent else "L") if grey else "RGBA" if transparent else "RGB"
    return _split_alpha(_strips(image, np.uint8, wanted), transparent)


def _strips(image: Image.Image, dtype: type, mode: str | None = None) -> np.ndarray:
    width, height = image.size
    image.load()
    pixels: np.ndarray | None = None
    step = max(1, 2**24 // max(1, width))
    for top in range(0, height, step):
        bottom = min(height, top + step)
        strip = image if step >= height else image.crop((0, top, width, bottom))
        if mode and strip.mode != mode:
            strip = strip.convert(mode)
        values = np.asarray(strip).astype(dtype, copy=False)
        values = values.reshape(*values.shape[:2], -1)
        if step >= height:
            return np.array(values)
        if pixels is None:
            pixels = np.empty((height, width, values.shape[2]), dtype)
        pixels[top : top + step] = values
    assert pixels is not None
    return pixels


def _split_alpha(pixels: np.ndarray, transparent: bool) -> Picture:
    if not transparent:
        return Picture(pixels)
    return Picture(np.ascontiguousarray(pixels[..., :-1]), np.ascontiguousarray(pixels[..., -1]))


def _read_png16(image: Image.Image) -> Picture:
    """16-bit colour: Pillow keeps only the first byte of each value, or, told so, only the other.

    Grey with alpha comes as two values of two bytes, which pass for four of one.
    """
    raw = str(image.tile[0].args)
    transparent = raw.startswith(("LA", "RGBA"))
    halves = []
    for order in ("RGBA",) if raw.startswith("LA") else (raw, raw.replace("16B", "16L")):
        with open_unlimited(image.filename, ".png") as half:
            half.tile = [half.tile[0]._replace(args=order)]
            halves.append(_strips(half, np.uint8))
    if len(halves) == 1:
        return _split_alpha(halves[0].view(">u2").astype(np.uint16), True)
    pixels = halves[0].astype(np.uint16)
    pixels <<= 8
    pixels |= halves[1]
    return _split_alpha(pixels, transparent)


def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError:
        raise UserError(
            "TIFF of more than 8 bits needs the package tifffile: pip install tifffile"
        ) from None
    return tifffile


def _read_tiff(path: str | os.PathLike) -> Picture:
    tifffile = _tifffile()
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            pixels = page.asarray()
            if pixels.ndim == 3 and page.planarconfig == 2:
                pixels = pixels.transpose(1, 2, 0)
            samples = pixels.shape[2] if pixels.ndim == 3 else 1
            colours = 3 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
            transparent = bool(page.extrasamples) and samples == colours + 1
        picture = _from_array(np.ascontiguousarray(pixels))
    except Exception as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        hint = ": pip install imagecodecs" if "imagecodecs" in reason else ""
        raise UserError(f"can't read the picture {path}: {reason}{hint}") from e
    return _split_alpha(picture.pixels, transparent)


def _from_array(array: np.ndarray) -> Picture:
    """An array (H, W) or (H, W, C) of numbers as a picture; raises UserError for others."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "uif":
        shape = " x ".join(map(str, array.shape)) or "a single value"
        raise UserError(
            f"an array of {shape} of {array.dtype} is no picture: it must be (height, width, "
            "channels) of integers or floats"
        )
    if array.dtype.byteorder not in "=|":
        array = array.astype(array.dtype.newbyteorder("="))
    return Picture(array)


def list_pictures(folder: str | os.PathLike) -> list[str]:
    """Paths of all pictures below a folder, `.npy` too, in a fixed order.

    They are not looked into. Raises UserError where there are none.
    """
    paths = make_dataset(folder, extensions=DEEP_EXTENSIONS)
    if not paths:
        raise UserError(f"no pictures in {folder}: looked for {' '.join(DEEP_EXTENSIONS)}")
    return paths


# ------------------------------------------------------------------------------------------ values
def range_of(dtype: np.dtype, value_range: Range | None = None) -> Range:
    """Which values become -1 and 1: as given, or 0 and the most of the type, or [0, 1] of floats.

    Raises UserError for signed integers, which have no such convention.
    """
    if value_range is not None:
        return value_range
    if dtype.kind == "i":
        raise UserError(f"values of type {dtype} need a range: {HOW}")
    return (0.0, 1.0) if dtype.kind == "f" else (0.0, float(np.iinfo(dtype).max))


def to_unit(pixels: np.ndarray, value_range: Range | None = None) -> torch.Tensor:
    """Pixels (H, W, C) as a tensor (C, H, W) of float32, the range mapped to [-1, 1].

    8-bit pixels without a range give the bits that the training transforms give. Raises UserError
    for floats out of [0, 1] that come without a range, and for those that are not finite.
    """
    low, high = range_of(pixels.dtype, value_range)
    if pixels.dtype == np.uint8 and value_range is None:
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return tensor.to(torch.float32).div_(255).sub_(0.5).div_(0.5)
    if pixels.dtype.kind == "f":
        least, most = float(pixels.min()), float(pixels.max())
        # a single one makes all of the result so, through the norms, which is then written as black
        if not (np.isfinite(least) and np.isfinite(most)):
            raise UserError("the picture has values that are NaN or infinite: replace them first")
        if value_range is None and (least < 0 or most > 1):
            raise UserError(f"floats from {least:g} to {most:g} need their range: {HOW}")
    unit = (pixels.transpose(2, 0, 1).astype(np.float64) - low) / ((high - low) / 2) - 1
    return torch.from_numpy(unit.astype(np.float32))


def from_unit(
    tensor: torch.Tensor, dtype: np.dtype | type, value_range: Range | None = None
) -> np.ndarray:
    """The inverse of `to_unit`: (C, H, W) in [-1, 1] to pixels (H, W, C) of `dtype`.

    Integers are rounded to the nearest and cut off at the ends of their type.
    """
    dtype = np.dtype(dtype)
    values = tensor.detach().float().cpu().numpy().transpose(1, 2, 0)
    if dtype == np.uint8 and value_range is None:
        # as `tensor2im` computes it, to the bit
        values = (values + 1) / 2 * 255.0
    else:
        low, high = range_of(dtype, value_range)
        values = (values.astype(np.float64) + 1) * ((high - low) / 2) + low
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        values = np.nan_to_num(values).round().clip(limits.min, limits.max)
    return np.ascontiguousarray(values.astype(dtype))


def fit_channels(pixels: np.ndarray, wanted: int) -> np.ndarray:
    """Grey repeated for a network of 3 channels, colour made grey for one of 1.

    Raises UserError where the number of channels is another one.
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
    raise UserError(f"the picture has {have} channels, the network takes {wanted} (--input_nc)")


def change_depth(values: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """Full scale of one type to full scale of another: 255 to 65535 or to 1.0."""
    dtype = np.dtype(dtype)
    if values.dtype == dtype:
        return values
    unit = values.astype(np.float64) / range_of(values.dtype, None)[1]
    scaled = unit * range_of(dtype, None)[1]
    return (scaled.round() if dtype.kind in "ui" else scaled).astype(dtype)


# ----------------------------------------------------------------------------------------- writing
def check_writable(ending: str, channels: int, dtype: np.dtype | type, alpha: bool = False) -> None:
    """Raise UserError where a kind of file can't hold such a picture."""
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
            "use --output_format tiff, or same with .npy pictures"
        )


def holds_alpha(ending: str) -> bool:
    """Whether transparency can be written to files of this ending."""
    return ending in (".png", ".webp", ".tif", ".tiff")


def write_picture(path: str | os.PathLike, pixels: np.ndarray, alpha: np.ndarray | None = None):
    """Write pixels (H, W, C) by the ending of `path`; see `write_bands`."""
    write_bands(path, [pixels], pixels.shape, pixels.dtype, alpha)


def write_bands(
    path: str | os.PathLike,
    bands: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    alpha: np.ndarray | None = None,
) -> None:
    """Write a picture of `shape` (H, W, C) that comes in bands of rows (h, W, C), top to bottom.

    `path` is the old file or the whole new one, never a part. Transparency that the format can't
    hold is left out. Raises UserError where it can't hold the rest.
    """
    path = Path(path)
    ending = path.suffix.lower()
    height, width, channels = shape
    if alpha is not None and not holds_alpha(ending):
        alpha = None
    check_writable(ending, channels, dtype, alpha is not None)
    if alpha is not None:
        bands = _with_alpha(bands, alpha)
        channels += 1
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.tmp{ending}")
    full = (height, width, channels)
    try:
        if ending == ".npy":
            _write_npy(unfinished, bands, full, dtype)
        elif ending in (".tif", ".tiff") and not _pillow_can(full, dtype, alpha is not None):
            _write_tiff(unfinished, bands, full, dtype, alpha is not None)
        elif ending == ".png" and (np.dtype(dtype) != np.uint8 or height * width > 2**24):
            _write_png(unfinished, bands, full, dtype)
        else:
            _write_pillow(unfinished, bands, full)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _with_alpha(bands: Iterable[np.ndarray], alpha: np.ndarray) -> Iterator[np.ndarray]:
    top = 0
    for band in bands:
        part = change_depth(alpha[top : top + len(band), :, None], band.dtype)
        top += len(band)
        yield np.concatenate([band, part], axis=2)


def _pillow_can(shape: tuple[int, ...], dtype: np.dtype | type, alpha: bool) -> bool:
    small = shape[0] * shape[1] <= 2**24
    return small and np.dtype(dtype) == np.uint8 and shape[2] - alpha in (1, 3)


def _write_pillow(path: Path, bands: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    height, width, channels = shape
    whole, top = None, 0
    for band in bands:
        strip = Image.fromarray(band[..., 0] if channels == 1 else np.ascontiguousarray(band))
        if len(band) == height:
            whole = strip
            break
        if whole is None:
            whole = Image.new(strip.mode, (width, height))
        whole.paste(strip, (0, top))
        top += len(band)
    assert whole is not None
    settings: dict[str, Any] = {}
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        settings = {"quality": 95}
    elif path.suffix.lower() in (".tif", ".tiff"):
        settings = {"compression": "tiff_adobe_deflate"}
    try:
        whole.save(path, **settings)
    except OSError as e:
        if e.errno is not None:  # the disk, not the picture
            raise
        raise UserError(f"{path.suffix[1:]} can't hold {width}x{height} pixels: {e}") from e


def _write_npy(
    path: Path, bands: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype | type
) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        for band in bands:
            file.write(np.ascontiguousarray(band).data)


def _write_tiff(
    path: Path,
    bands: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    alpha: bool,
) -> None:
    rows = max(1, min(shape[0], 2**21 // shape[1]))
    colours = shape[2] - alpha
    single = shape[2] == 1
    _tifffile().imwrite(
        path,
        (band[..., 0] if single else band for band in _rebanded(bands, rows)),
        shape=shape[:2] if single else shape,
        dtype=dtype,
        rowsperstrip=rows,
        photometric="rgb" if colours == 3 else "minisblack",
        planarconfig=None if single else "contig",
        extrasamples=["unassalpha"] if alpha else None,
        compression="adobe_deflate",
        metadata=None,
        bigtiff=int(np.prod(shape)) * np.dtype(dtype).itemsize > 2**31,
    )


def _rebanded(bands: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows in bands of equal height, but for the last."""
    held: list[np.ndarray] = []
    count = 0
    for band in bands:
        held.append(band)
        count += len(band)
        while count >= rows:
            joined = held[0] if len(held) == 1 else np.concatenate(held)
            yield np.ascontiguousarray(joined[:rows])
            held, count = [joined[rows:]], count - rows
    if count:
        yield np.ascontiguousarray(np.concatenate(held))


def _write_png(
    path: Path, bands: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype | type
) -> None:
    """PNG of 8 or 16 bits a value, one band in memory at a time (https://www.w3.org/TR/png)."""
    height, width, channels = shape
    depth = 8 * np.dtype(dtype).itemsize
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    packer = zlib.compressobj(6)
    with open(path, "wb") as file:

        def chunk(name: bytes, data: bytes) -> None:
            file.write(struct.pack(">I", len(data)) + name + data)
            file.write(struct.pack(">I", zlib.crc32(name + data)))

        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        above = np.zeros(width * channels * depth // 8, np.uint8)
        for band in _rebanded(bands, max(1, 2**20 // width)):
            values = band.astype(np.dtype(dtype).newbyteorder(">"), copy=False)
            lines = np.ascontiguousarray(values).view(np.uint8).reshape(len(band), -1)
            packed = packer.compress(_filtered(lines, above, channels * depth // 8).data)
            above = lines[-1]
            if packed:
                chunk(b"IDAT", packed)
        chunk(b"IDAT", packer.flush())
        chunk(b"IEND", b"")


def _filtered(lines: np.ndarray, above: np.ndarray, step: int) -> np.ndarray:
    """Each row as its difference to the left (filter 1) or to the row above (filter 2).

    Of the two the one with the smaller sum of magnitudes, as the standard advises.
    """
    up = lines - np.concatenate([above[None], lines[:-1]])
    left = lines.copy()
    left[:, step:] -= lines[:, :-step]
    sums = [np.abs(x.view(np.int8).astype(np.int16)).sum(1) for x in (left, up)]
    filters = (sums[1] < sums[0]).astype(np.uint8)
    best = np.where(filters[:, None] == 1, up, left)
    return np.concatenate([filters[:, None] + np.uint8(1), best], axis=1)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Put the file in front of a UserError that does not name it."""
    try:
        yield
    except UserError as e:
        named = str(path) in str(e)
        raise UserError(str(e) if named else f"{path}: {e}") from e
