"""Pictures of any depth and any number of channels: reading, writing, and their values in [-1, 1].

A picture is an array (H, W, C) of its own type: uint8, uint16, or floats. Transparency is kept
aside. Pillow does what it can do; PNG of 16 bits goes through `imagecodecs`, TIFF of more than 8
bits through `tifffile`, and `.npy` takes any number of channels. Large pictures are written in
bands of rows, as they are made.
"""

from __future__ import annotations

import contextlib
import importlib
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
from util.picture_files import TURNS, frames, opened, orientation, reading

# --output_format: ending of the files
FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tiff": ".tiff"}
TIFF = (".tif", ".tiff")

Range = tuple[float, float]
HOW = "--value_range LOW HIGH (in Python value_range=(LOW, HIGH))"

# of EXIF: description, maker, model, software, date, artist, computer, copyright; how the picture
# was taken, and where. What is left out says how the pixels lie in the file.
_EXIF_TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298)
_EXIF_PARTS = (0x8769, 0x8825)


@dataclass
class Picture:
    """`pixels` (H, W, C) and, where there is any, `alpha` (H, W) of the same type.

    `info` is what the file says about itself, as Pillow's `save` takes it: `icc_profile`, `exif`
    and `dpi`, each if it is there. `frames` is the number of pictures in the file.
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
        return _read_tiff(path)  # of a kind that Pillow does not know


def from_pil(image: Image.Image, upright: bool = False) -> Picture:
    """The pixels of a picture of Pillow; of one that was just opened, at the file's full depth.

    `upright` turns what a camera has stored sideways (EXIF) as viewers show it.
    """
    decode = _deep_decoder(image)
    picture = _from_pil(image) if decode is None else decode(image.filename)  # type: ignore
    picture.info, picture.frames = _info(image), frames(image)
    # asked after the pixels are there: Pillow turns TIFF itself while it reads them
    turn = TURNS.get(orientation(image)) if upright else None
    if turn is not None:
        picture.pixels = np.ascontiguousarray(turn(picture.pixels))
        picture.alpha = None if picture.alpha is None else np.ascontiguousarray(turn(picture.alpha))
    return picture


def _deep_decoder(image: Image.Image) -> Callable[[str], Picture] | None:
    """What reads a file, not yet decoded, of which Pillow would keep 8 bits of 16."""
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


def _info(image: Image.Image) -> dict[str, Any]:
    info: dict[str, Any] = {}
    if image.info.get("icc_profile"):
        info["icc_profile"] = image.info["icc_profile"]
    with contextlib.suppress(Exception):  # damaged notes about a picture are no damage to it
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

    `path` is the old file or the whole new one, never a part. Transparency, and what of `info` (see
    `Picture`) the format can't hold, is left out. Raises UserError where it can't hold the rest.
    """
    ending = Path(path).suffix.lower()
    height, width, channels = shape
    if alpha is not None and not holds_alpha(ending):
        alpha = None
    check_writable(ending, channels, dtype, alpha is not None)
    info = dict(info or {})
    # a profile of grey, or of ink, says nothing about RGB
    if info.get("icc_profile", b"")[16:20] != (b"GRAY" if channels == 1 else b"RGB "):
        info.pop("icc_profile", None)
    if alpha is not None:
        bands = _with_alpha(bands, alpha)
        channels += 1
    full = (height, width, channels)
    simple = _pillow_can(full, dtype, alpha is not None)
    with replacing(path, flush=False) as unfinished:
        if ending == ".npy":
            _write_npy(unfinished, bands, full, dtype)
        elif ending in TIFF and not simple:
            _write_tiff(unfinished, bands, full, dtype, alpha is not None, info)
        elif ending == ".png" and not simple:
            _write_png(unfinished, bands, full, dtype, info)
        else:
            _write_pillow(unfinished, bands, full, info)


def _with_alpha(bands: Iterable[np.ndarray], alpha: np.ndarray) -> Iterator[np.ndarray]:
    top = 0
    for band in bands:
        part = change_depth(alpha[top : top + len(band), :, None], band.dtype)
        top += len(band)
        yield np.concatenate([band, part], axis=2)


def _pillow_can(shape: tuple[int, ...], dtype: np.dtype | type, alpha: bool) -> bool:
    small = shape[0] * shape[1] <= 2**24
    return small and np.dtype(dtype) == np.uint8 and shape[2] - alpha in (1, 3)


def _write_pillow(
    path: Path, bands: Iterable[np.ndarray], shape: tuple[int, ...], info: dict[str, Any]
) -> None:
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
    settings = dict(info)
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif"):
        settings["quality"] = 95
    elif path.suffix.lower() in TIFF:
        settings["compression"] = "tiff_adobe_deflate"
        settings["exif"] = _exif_texts(info).tobytes()
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


def _exif_texts(info: dict[str, Any]) -> Image.Exif:
    """What TIFF can hold of EXIF: neither libtiff nor tifffile writes the parts below it."""
    given, texts = Image.Exif(), Image.Exif()
    given.load(info.get("exif", b""))
    texts.update({tag: given[tag] for tag in _EXIF_TEXTS if tag in given})
    return texts


def _write_tiff(
    path: Path,
    bands: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    alpha: bool,
    info: dict[str, Any],
) -> None:
    rows = max(1, min(shape[0], 2**21 // shape[1]))
    colours = shape[2] - alpha
    single = shape[2] == 1
    _package("tifffile", "TIFF of more than 8 bits").imwrite(
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
        software=False,
        bigtiff=int(np.prod(shape)) * np.dtype(dtype).itemsize > 2**31,
        iccprofile=info.get("icc_profile"),
        resolution=info.get("dpi"),
        resolutionunit="INCH" if "dpi" in info else None,
        extratags=[(tag, "s", 0, text, True) for tag, text in _exif_texts(info).items()],
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
    path: Path,
    bands: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype | type,
    info: dict[str, Any],
) -> None:
    codecs = _package("imagecodecs", "PNG of 16 bits, or of more than 16 million pixels,")
    # libpng wants all rows at once: those of a large picture wait in a file
    with tempfile.TemporaryFile(dir=path.parent) as waiting:
        pixels, top = np.memmap(waiting, dtype, "w+", shape=shape), 0
        for band in bands:
            pixels[top : top + len(band)] = band
            top += len(band)
        data = memoryview(codecs.png_encode(pixels[..., 0] if shape[2] == 1 else pixels))
        del pixels
    header = 33  # bytes; what is said about the picture comes behind it
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
