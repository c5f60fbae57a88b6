"""Read images of any depth and any number of channels.

Pillow reads 8 bits, `imagecodecs` PNG of 16 bits, `tifffile` TIFF of more than 8 bits. `.npy` files
hold any number of channels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from util.errors import UserError
from util.picture_files import (
    SIGNED,
    TURNS,
    frames,
    has_16_bits,
    misread_tiff,
    opened,
    orientation,
    wrap_image_errors,
)

TIFF = (".tif", ".tiff")
# EXIF tags that are kept: description, maker, model, software, date, artist, computer, copyright;
# and the parts about the camera's settings and the place. Others describe the layout of the file.
EXIF_TEXTS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x013C, 0x8298)
_EXIF_PARTS = (0x8769, 0x8825)


@dataclass
class Picture:
    """`pixels` (H, W, C) and, where there is any, `alpha` (H, W) of the same type.

    `alpha_unspecified`: the file does not say that this sample is alpha. `info` is the metadata in
    the form that Pillow's `save` takes: `icc_profile`, `exif` and `dpi`, each if the file has it.
    `frames` is the number of images in the file.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)
    frames: int = 1
    alpha_unspecified: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.shape[1], self.pixels.shape[0]


def read_picture(path: str | os.PathLike, upright: bool = False) -> Picture:
    """Read an image at its full depth; `upright` as in `from_pil`.

    Palettes become RGB. Raises UserError, which names the file, if it can't be read.
    """
    ending = Path(path).suffix.lower()
    with wrap_image_errors(path):
        if ending == ".npy":
            return _from_array(np.load(path, allow_pickle=False))
        try:
            with opened(path, any_size=True) as image:
                return from_pil(image, upright)
        except UserError as e:
            if ending not in TIFF or not isinstance(e.__cause__, Image.UnidentifiedImageError):
                raise
        return _foreign_tiff(path, upright)  # a kind that Pillow does not know


def from_pil(image: Image.Image, upright: bool = False) -> Picture:
    """Convert a Pillow image. One that was opened but not decoded yet is read at full depth.

    `upright` applies the EXIF orientation, as viewers do.
    """
    if (decode := _deep_decoder(image)) is None:
        picture = _from_pil(image)
    else:
        with _file_of(image) as file:
            picture = decode(file)
    picture.info, picture.frames = _info(image), frames(image)
    # read the orientation after decoding, in which Pillow itself turns TIFF
    return _turned(picture, orientation(image) if upright else 1)


def _turned(picture: Picture, orientation: int) -> Picture:
    """Turn an image in place, so that it is as viewers show it, and return it."""
    if (turn := TURNS.get(orientation)) is not None:
        picture.pixels = np.ascontiguousarray(turn(picture.pixels))
        picture.alpha = None if picture.alpha is None else np.ascontiguousarray(turn(picture.alpha))
    return picture


def _deep_decoder(image: Image.Image) -> Callable[[IO[bytes]], Picture] | None:
    """A function that reads the file, if Pillow would lose bits or samples of it; else None."""
    misread = misread_tiff(image)
    if not getattr(image, "tile", None):  # decoded already
        if misread and not (misread == SIGNED and image.mode == "I"):  # read correctly
            raise UserError(f"Pillow reads {misread} with wrong values: give the path of the file")
        return None
    if misread or (image.format == "TIFF" and _loses_samples(image)):
        return functools.partial(_read_tiff, page=image.tell())
    if image.format == "PNG" and not image.mode.startswith("I"):
        with _file_of(image) as file:
            depth = file.read(25)[24]  # in the header, which always comes first
        return _read_png if depth == 16 else None
    return None


@contextlib.contextmanager
def _file_of(image: Image.Image) -> Iterator[IO[bytes]]:
    """The file of an image that is not decoded yet, from its beginning.

    It is opened by its name, if that is still the name of the file that Pillow has open. Else, as
    for an upload or an image in memory, Pillow's own file is used, and put back where it was.
    """
    own: Any = getattr(image, "fp", None)
    path = getattr(image, "filename", "")
    named = own is None  # closed
    with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, or in memory
        named = named or os.path.samestat(os.stat(path), os.fstat(own.fileno()))
    if named:
        with open(path, "rb") as file:
            yield file
        return
    position = own.tell()
    own.seek(0)
    try:
        yield own
    finally:
        own.seek(position)


def _loses_samples(image: Image.Image) -> bool:
    """Whether Pillow would drop bits of a TIFF, or one sample such as infrared."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, samples = max(tags.get(258, (1,))), tags.get(277, 1)
    return bits > 8 or (image.mode in ("L", "RGB") and samples == len(image.getbands()) + 1)


def _from_pil(image: Image.Image) -> Picture:
    if image.mode.startswith("I;16"):
        return Picture(_values(image, np.uint16))
    if image.mode == "I":
        levels = _values(image, np.int32)
        if levels.min() < 0 or levels.max() > 65535:
            return Picture(levels)
        return Picture(levels.astype(np.uint16 if has_16_bits(image, levels) else np.uint8))
    if image.mode == "F":
        return Picture(_values(image, np.float32))
    transparent = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or (
        image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info
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
        exif.update({tag: as_stored(given[tag]) for tag in EXIF_TEXTS if tag in given})
        for part in _EXIF_PARTS:
            if values := given.get_ifd(part):
                exif[part] = {tag: as_stored(value) for tag, value in values.items()}
        if len(exif):
            info["exif"] = exif.tobytes()
    return info


def as_stored(value: Any) -> Any:
    """An EXIF value; non-ASCII text as bytes, since Pillow reads Latin-1 but would write "?"."""
    return value if not isinstance(value, str) or value.isascii() else value.encode("latin-1")


def read_info(path: str | os.PathLike) -> dict[str, Any]:
    """The metadata of a file, as in `Picture`; empty if Pillow can't open it."""
    with contextlib.suppress(UserError), opened(path, any_size=True) as image:
        return _info(image)
    return {}


def _values(image: Image.Image, dtype: type, mode: str | None = None) -> np.ndarray:
    """The pixels (H, W, C) of an image, converted to `mode`."""
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


def package(name: str, what: str) -> Any:
    """Import a package that reads or writes `what`; raise UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{what} needs the package {name}: pip install {name}") from None


def _read_png(file: IO[bytes]) -> Picture:
    codecs = package("imagecodecs", "PNG of 16 bits")
    picture = _from_array(codecs.png_decode(file.read()))
    return _split_alpha(picture.pixels, picture.pixels.shape[2] in (2, 4))


def _foreign_tiff(path: str | os.PathLike, upright: bool) -> Picture:
    picture = _read_tiff(path)
    with package("tifffile", "TIFF").TiffFile(path) as file:
        tags = file.pages[0].tags
        profile = tags.valueof("InterColorProfile")
        picture.info = {"icc_profile": profile} if profile else {}
        return _turned(picture, int(tags.valueof("Orientation", 1)) if upright else 1)


def _read_tiff(source: str | os.PathLike | IO[bytes], page: int = 0) -> Picture:
    tifffile = package("tifffile", "TIFF of more than 8 bits")
    with tifffile.TiffFile(source) as file:
        frame = file.pages[page]
        kinds = tifffile.PHOTOMETRIC
        if frame.photometric == kinds.SEPARATED:
            raise UserError("CMYK of more than 8 bits: convert it to RGB")
        if frame.photometric in (kinds.CIELAB, kinds.ICCLAB, kinds.ITULAB):
            raise UserError("colours of CIE Lab with more than 8 bits: convert them to RGB")
        pixels = frame.asarray()
        if pixels.ndim == 3 and frame.planarconfig == 2:
            pixels = pixels.transpose(1, 2, 0)
        if frame.photometric == kinds.MINISWHITE and pixels.dtype.kind == "u":
            pixels = np.iinfo(pixels.dtype).max - pixels
        samples = pixels.shape[2] if pixels.ndim == 3 else 1
        colours = 3 if frame.photometric == kinds.RGB else 1
        extra = frame.extrasamples[0] if frame.extrasamples and samples == colours + 1 else None
    picture = _from_array(np.ascontiguousarray(pixels))
    picture = _split_alpha(picture.pixels, extra is not None)
    picture.alpha_unspecified = extra == tifffile.EXTRASAMPLE.UNSPECIFIED
    if extra == tifffile.EXTRASAMPLE.ASSOCALPHA and picture.alpha is not None:
        picture.pixels = _unmultiplied(picture.pixels, picture.alpha)
    return picture


def _unmultiplied(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Undo the multiplication of stored pixels (H, W, C) by their alpha (H, W)."""
    whole = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "ui" else 1.0
    opacity = alpha[..., None] / whole
    values = np.divide(pixels, opacity, out=np.zeros(pixels.shape), where=opacity > 0)
    values = values.round() if pixels.dtype.kind in "ui" else values
    return (values.clip(0, whole) if pixels.dtype.kind == "u" else values).astype(pixels.dtype)


def fit_samples(picture: Picture, channels: Container[int]) -> Picture:
    """Fit an image to networks that take one of these numbers of `channels`.

    An extra sample without a declared meaning, such as infrared, becomes a channel if the network
    takes one more. Else it counts as alpha, or is dropped if it has 8 bits, as Pillow does.
    """
    have, alpha = picture.pixels.shape[2], picture.alpha
    wanted = have not in channels and have + 1 in channels
    if picture.alpha_unspecified and alpha is not None and (wanted or alpha.dtype == np.uint8):
        if wanted:
            picture.pixels = np.concatenate([picture.pixels, alpha[..., None]], axis=2)
        picture.alpha = None
    return picture


def _from_array(array: np.ndarray) -> Picture:
    """An array (H, W) or (H, W, C) of numbers as an image; raises UserError for others."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape or array.dtype.kind not in "uif":
        shape = " x ".join(map(str, array.shape)) or "a single value"
        raise UserError(
            f"an array of {shape} of {array.dtype} is no image: it must be (height, width, "
            "channels) of integers or floats"
        )
    if array.dtype.byteorder not in "=|":
        array = array.astype(array.dtype.newbyteorder("="))
    return Picture(array)


@contextlib.contextmanager
def prefix_errors(path: str | os.PathLike) -> Iterator[None]:
    """Put the path in front of a UserError that does not name it."""
    try:
        yield
    except UserError as e:
        named = str(path) in str(e)
        raise UserError(str(e) if named else f"{path}: {e}") from e
