"""Read and write pictures of any depth and any number of channels; map their values to [-1, 1].

A picture is an array (H, W, C) of uint8, uint16 or floats; its transparency is an array of its own.
Pillow reads and writes 8 bits, `imagecodecs` PNG of 16 bits, `tifffile` TIFF of more than 8 bits.
`.npy` files hold any number of channels. Large pictures are written in bands of rows: all their
pixels need never be in memory at once.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from util.errors import UserError
from util.files import replacing
from util.picture_files import (
    HOW_RANGE,
    TURNS,
    check_floats,
    frames,
    opened,
    orientation,
    reading,
)

# --output_format: ending of the files
FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
TIFF = (".tif", ".tiff")

Range = tuple[float, float]
FARTHEST = 2.0  # a tensor with values above it in magnitude can't be meant to be in [-1, 1]

# EXIF tags that are kept: description, maker, model, software, date, artist, computer, copyright;
# and the parts about the camera's settings and the place. Others describe the layout of the file.
_EXIF_TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298)
_EXIF_PARTS = (0x8769, 0x8825)


@dataclass
class Picture:
    """`pixels` (H, W, C) and, where there is any, `alpha` (H, W) of the same type.

    `info` is the file's metadata in the form that Pillow's `save` takes: `icc_profile`, `exif` and
    `dpi`, each if the file has it. `frames` is the number of pictures in the file.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)
    frames: int = 1

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
    with reading(path):
        if ending == ".npy":
            return _from_array(np.load(path, allow_pickle=False))
        try:
            with opened(path, any_size=True) as image:
                return from_pil(image, upright)
        except UserError as e:
            if ending not in TIFF or not isinstance(e.__cause__, Image.UnidentifiedImageError):
                raise
        return _read_tiff(path)  # a kind of TIFF that Pillow does not know


def from_pil(image: Image.Image, upright: bool = False) -> Picture:
    """Convert a Pillow picture. One that was opened but not decoded yet is read at full depth.

    `upright` applies the EXIF orientation, as viewers do.
    """
    decode = _deep_decoder(image)
    picture = _from_pil(image) if decode is None else decode(image.filename)  # type: ignore
    picture.info, picture.frames = _info(image), frames(image)
    # asked after decoding: Pillow itself turns TIFF then
    turn = TURNS.get(orientation(image)) if upright else None
    if turn is not None:
        picture.pixels = np.ascontiguousarray(turn(picture.pixels))
        picture.alpha = None if picture.alpha is None else np.ascontiguousarray(turn(picture.alpha))
    return picture


def _deep_decoder(image: Image.Image) -> Callable[[str], Picture] | None:
    """The function that reads a file of which Pillow would keep 8 bits of 16; else None."""
    path = getattr(image, "filename", "")
    if not path or not getattr(image, "tile", None):
        return None
    if image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8:  # type: ignore[attr-defined]
        return _read_tiff
    if image.format == "PNG" and not image.mode.startswith("I"):
        with open(path, "rb") as file:
            depth = file.read(25)[24]  # of the header, which is always the first thing
        return _read_png if depth == 16 else None
    return None


def _from_pil(image: Image.Image) -> Picture:
    if image.mode.startswith("I;16"):
        return Picture(_values(image, np.uint16))
    if image.mode == "I":
        levels = _values(image, np.int32)
        depth = np.uint16 if levels.max(initial=0) > 255 else np.uint8
        return Picture(levels.clip(0, np.iinfo(depth).max).astype(depth))
    if image.mode == "F":
        return Picture(_values(image, np.float32))
    transparent = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or (
        image.mode == "P" and "transparency" in image.info
    )
    grey = image.mode in ("1", "L", "LA", "La")
    wanted = ("LA" if transparent else "L") if grey else "RGBA" if transparent else "RGB"
    return _split_alpha(_values(image, np.uint8, wanted), transparent)


def _info(image: Image.Image) -> dict[str, Any]:
    info: dict[str, Any] = {}
    if image.info.get("icc_profile"):
        info["icc_profile"] = image.info["icc_profile"]
    with contextlib.suppress(Exception):  # damaged metadata must not stop the reading of pixels
        # Pillow says 1 dpi where a TIFF has no XResolution (tag 282)
        if image.format != "TIFF" or 282 in image.tag_v2:  # type: ignore[attr-defined]
            info["dpi"] = tuple(float(n) for n in image.info["dpi"])
    with contextlib.suppress(Exception):
        given, exif = image.getexif(), Image.Exif()
        exif.update({tag: given[tag] for tag in _EXIF_TEXTS if tag in given})
        for part in _EXIF_PARTS:
            if values := given.get_ifd(part):
                exif[part] = dict(values)
        if len(exif):
            info["exif"] = exif.tobytes()
    return info


def _values(image: Image.Image, dtype: type, mode: str | None = None) -> np.ndarray:
    """The pixels (H, W, C) of a picture, converted to `mode`."""
    image.load()
    width, height = image.size
    pixels = np.empty(0)
    step = max(1, 2**24 // max(1, width))  # in strips, or Pillow would hold all pixels three times
    for top in range(0, height, step):
        strip = image.crop((0, top, width, min(height, top + step)))
        values = np.asarray(strip if mode in (None, strip.mode) else strip.convert(mode))
        if top == 0:
            pixels = np.empty((height, *values.shape[1:]), dtype)
        pixels[top : top + step] = values
    return pixels.reshape(height, width, -1)


def _split_alpha(pixels: np.ndarray, transparent: bool) -> Picture:
    if not transparent:
        return Picture(pixels)
    return Picture(np.ascontiguousarray(pixels[..., :-1]), np.ascontiguousarray(pixels[..., -1]))


def _package(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what} needs the package {name}: pip install {name}") from None


def _read_png(path: str | os.PathLike) -> Picture:
    codecs = _package("imagecodecs", "PNG of 16 bits")
    picture = _from_array(codecs.png_decode(Path(path).read_bytes()))
    return _split_alpha(picture.pixels, picture.pixels.shape[2] in (2, 4))


def _read_tiff(path: str | os.PathLike) -> Picture:
    tifffile = _package("tifffile", "TIFF of more than 8 bits")
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        pixels = page.asarray()
        if pixels.ndim == 3 and page.planarconfig == 2:
            pixels = pixels.transpose(1, 2, 0)
        samples = pixels.shape[2] if pixels.ndim == 3 else 1
        colours = 3 if page.photometric == tifffile.PHOTOMETRIC.RGB else 1
        transparent = bool(page.extrasamples) and samples == colours + 1
    picture = _from_array(np.ascontiguousarray(pixels))
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


# ------------------------------------------------------------------------------------------ values
def range_of(dtype: np.dtype, value_range: Range | None = None) -> Range:
    """The values that become -1 and 1: as given; else 0 and the type's maximum, for floats 1.

    Raises UserError for signed integers without a range.
    """
    if value_range is not None:
        return value_range
    if dtype.kind == "i":
        raise UserError(f"values of type {dtype} need a range: {HOW_RANGE}")
    return (0.0, 1.0) if dtype.kind == "f" else (0.0, float(np.iinfo(dtype).max))


def to_unit(pixels: np.ndarray, value_range: Range | None = None) -> torch.Tensor:
    """Pixels (H, W, C) as a tensor (C, H, W) of float32, the range mapped to [-1, 1].

    8-bit pixels without a range give exactly what the training transforms give. Raises UserError
    for floats outside [0, 1] without a range, and for NaN and infinity.
    """
    low, high = range_of(pixels.dtype, value_range)
    if pixels.dtype == np.uint8 and value_range is None:
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return tensor.to(torch.float32).div_(255).sub_(0.5).div_(0.5)
    if pixels.dtype.kind == "f":
        check_floats(pixels, any_range=value_range is not None)
    unit = (pixels.transpose(2, 0, 1).astype(np.float64) - low) / ((high - low) / 2) - 1
    return torch.from_numpy(unit.astype(np.float32))


def from_unit(
    tensor: torch.Tensor, dtype: np.dtype | type, value_range: Range | None = None
) -> np.ndarray:
    """The inverse of `to_unit`: (C, H, W) in [-1, 1] to pixels (H, W, C) of `dtype`.

    Integers are rounded and clipped to their type.
    """
    dtype = np.dtype(dtype)
    values = tensor.detach().float().cpu().numpy().transpose(1, 2, 0)
    if dtype == np.uint8 and value_range is None:
        # exactly as `tensor2im` computes it
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
    """Scale from the full range of one type to that of another: 255 to 65535 or to 1.0."""
    dtype = np.dtype(dtype)
    if values.dtype == dtype:
        return values
    unit = values.astype(np.float64) / range_of(values.dtype, None)[1]
    scaled = unit * range_of(dtype, None)[1]
    return (scaled.round() if dtype.kind in "ui" else scaled).astype(dtype)


# ----------------------------------------------------------------------------------------- writing
def check_writable(ending: str, channels: int, dtype: np.dtype | type, alpha: bool = False) -> None:
    """Raise UserError where files of this ending can't hold such a picture."""
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
    return ending in (".png", ".webp", ".avif", ".heic", ".heif", *TIFF)


def write_picture(
    path: str | os.PathLike,
    pixels: np.ndarray,
    alpha: np.ndarray | None = None,
    info: dict[str, Any] | None = None,
) -> None:
    """Write pixels (H, W, C) by the ending of `path`; see `write_bands`."""
    write_bands(path, [pixels], pixels.shape, pixels.dtype, alpha, info)


def write_bands(
    path: str | os.PathLike,
    bands: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    alpha: np.ndarray | None = None,
    info: dict[str, Any] | None = None,
) -> None:
    """Write a picture of `shape` (H, W, C) that comes in bands of rows (h, W, C), top to bottom.

    `path` is the old file or the whole new one, never a part. Transparency and metadata (`info` of
    `Picture`) that the format can't hold are left out. Raises UserError where it can't hold the
    pixels.
    """
    ending = Path(path).suffix.lower()
    height, width, channels = shape
    if alpha is not None and not holds_alpha(ending):
        alpha = None
    check_writable(ending, channels, dtype, alpha is not None)
    info = dict(info or {})
    # a profile for grey or CMYK does not fit RGB
    if info.get("icc_profile", b"")[16:20] != (b"GRAY" if channels == 1 else b"RGB "):
        info.pop("icc_profile", None)
    if alpha is not None:
        bands = _with_alpha(bands, alpha)
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
    """All bands as one array; of several it is mapped from a temporary file beside `path`."""
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


def _with_alpha(bands: Iterable[np.ndarray], alpha: np.ndarray) -> Iterator[np.ndarray]:
    top = 0
    for band in bands:
        part = change_depth(alpha[top : top + len(band), :, None], band.dtype)
        top += len(band)
        yield np.concatenate([band, part], axis=2)


def _pillow_can(shape: tuple[int, ...], dtype: np.dtype | type, alpha: bool) -> bool:
    small = shape[0] * shape[1] <= 2**24
    return small and np.dtype(dtype) == np.uint8 and shape[2] - alpha in (1, 3)


def _plane(array: np.ndarray) -> np.ndarray:
    """Pixels (H, W, C), without the axis of channels if there is one channel."""
    return array[..., 0] if array.shape[2] == 1 else array


def _write_pillow(path: Path, array: np.ndarray, info: dict[str, Any]) -> None:
    settings = dict(info)
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif"):
        settings["quality"] = 95
    elif path.suffix.lower() in TIFF:
        settings["compression"] = "tiff_adobe_deflate"
        settings["exif"] = _exif_texts(info).tobytes()
    try:
        Image.fromarray(_plane(array)).save(path, **settings)
    except OSError as e:
        if e.errno is not None:  # the disk, not the picture
            raise
        size = f"{array.shape[1]}x{array.shape[0]}"
        raise UserError(f"{path.suffix[1:]} can't hold {size} pixels: {e}") from e


def _exif_texts(info: dict[str, Any]) -> Image.Exif:
    """The EXIF that TIFF can hold: neither libtiff nor tifffile writes its nested parts."""
    given, texts = Image.Exif(), Image.Exif()
    given.load(info.get("exif", b""))
    texts.update({tag: given[tag] for tag in _EXIF_TEXTS if tag in given})
    return texts


def _write_tiff(path: Path, array: np.ndarray, alpha: bool, info: dict[str, Any]) -> None:
    height, width, channels = array.shape
    _package("tifffile", "TIFF of more than 8 bits").imwrite(
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
    codecs = _package("imagecodecs", "PNG of 16 bits, or of more than 16 million pixels,")
    data = memoryview(codecs.png_encode(_plane(array)))
    header = 33  # bytes; metadata comes behind it
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


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Put the file in front of a UserError that does not name it."""
    try:
        yield
    except UserError as e:
        named = str(path) in str(e)
        raise UserError(str(e) if named else f"{path}: {e}") from e
