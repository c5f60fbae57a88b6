"""Which files are images, and the one place that opens them. Needs only Pillow and NumPy."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from .errors import UserError, in_one_line
from .temporarily import temporarily

with contextlib.suppress(ImportError):  # optional: pip install pillow-heif
    import pillow_heif

    pillow_heif.register_heif_opener()

_OPTIONAL = (".avif", ".heic", ".heif")  # need certain builds of Pillow, or pillow-heif
# names are compared in lower case: .PNG and .Png count too
IMG_EXTENSIONS = [
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp"),
    *(ending for ending in _OPTIONAL if ending in Image.registered_extensions()),
]

ORIENTATION = 0x0112  # EXIF's tag: 1 is upright
# by EXIF orientation: from the stored array to the upright one
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(np.swapaxes(x, 0, 1), 2),
    8: np.rot90,
}

ROUNDING = 1e-5  # by how much floats may exceed [0, 1]: less than one step of 16 bits
SIGNED = "signed integers"  # one of the kinds of `misread_tiff`
UNREADABLE = "can't read the image"  # how errors of `wrap_image_errors` begin
HOW_RANGE = "--value_range LOW HIGH (in Python value_range=(LOW, HIGH))"

_opening = threading.Lock()


def install_hint(ending: str) -> str:
    """How to make files with this ending readable, for an error; empty if nothing would help."""
    if ending not in _OPTIONAL:
        known = ending in Image.registered_extensions() and ending not in IMG_EXTENSIONS
        return f" (convert {ending}, for example to .png)" if known else ""
    heif = "the package pillow-heif: pip install pillow-heif"
    return f" ({ending} needs {'Pillow 11.3 or newer' if ending == '.avif' else heif})"


def is_image_file(filename: str | os.PathLike, extensions: Sequence[str] = IMG_EXTENSIONS) -> bool:
    """Whether the name ends like an image's, in any case, and is not hidden (`._a.jpg`)."""
    name = os.path.basename(os.fspath(filename))
    return os.path.splitext(name)[1].lower() in extensions and not name.startswith(".")


@contextlib.contextmanager
def wrap_image_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever a decoder raises in the block into a UserError that names the file."""
    try:
        yield
    except UserError as e:
        if str(path) in str(e):
            raise
        raise UserError(f"{UNREADABLE} {path}: {e}") from e
    # decoders raise nearly anything on damaged files: struct.error, SyntaxError, ...
    except Exception as e:
        reason = in_one_line(e)
        if isinstance(e, Image.DecompressionBombError):
            most = round(2 * (Image.MAX_IMAGE_PIXELS or 0) / 10**6)
            reason = f"it has more than {most} megapixels: scale it down (--only_outputs reads it)"
        ending = os.path.splitext(path)[1].lower()
        if ending not in IMG_EXTENSIONS:
            reason += install_hint(ending)
        raise UserError(f"{UNREADABLE} {path}: {reason}") from e


@contextlib.contextmanager
def opened(path: str | os.PathLike, any_size: bool = False) -> Iterator[Image.Image]:
    """Open an image with Pillow, at its first frame if there are several.

    Raises UserError, which names the file, for any error in the block; and, unless `any_size`, for
    more pixels than Pillow's limit, which damaged files exceed more often than real images.
    """
    with wrap_image_errors(path):
        limit = {"MAX_IMAGE_PIXELS": None} if any_size else {}
        with _opening, temporarily(Image, **limit):  # a global that all threads share
            image = Image.open(path)
        with image:
            yield image


def open_image(path: str | os.PathLike, mode: str = "RGB", upright: bool = True) -> Image.Image:
    """Open an image and decode it to `mode` (`RGB` or `L`), 8 bits a channel.

    16-bit grey and floats in [0, 1] are rescaled to 8 bits. `upright` applies the EXIF orientation,
    as image viewers do. Raises UserError, which names the file, if it can't be decoded, and for
    floats in another range and rare kinds of TIFF.
    """
    with opened(path) as image:
        if kind := misread_tiff(image):
            raise UserError(f"{kind} need their range: {HOW_RANGE}")
        deep = image.mode.startswith(("I", "F"))
        decoded = (_to_8_bits(image) if deep else image).convert(mode)
        # read after the pixels: Pillow itself turns a TIFF while it decodes it
        turn = TURNS.get(orientation(image)) if upright else None
        return decoded if turn is None else Image.fromarray(turn(np.asarray(decoded)))


def misread_tiff(image: Image.Image) -> str | None:
    """The kind of data in a TIFF file whose values Pillow reads wrongly; None for other files."""
    if image.format != "TIFF":
        return None
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, kinds = max(tags.get(258, (1,))), tags.get(339, (1,))  # BitsPerSample, SampleFormat
    if 2 in kinds:
        return SIGNED
    if bits == 32 and 1 in kinds:
        return "integers of 32 bits"
    if bits == 16 and tags.get(284) == 2:  # PlanarConfiguration
        return "planes of 16 bits"
    if bits == 16 and tags.get(262) == 0:  # PhotometricInterpretation
        return "16 bits in which 0 is white"
    return None


def _to_8_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        check_floats(levels)
        levels *= 255
    elif has_16_bits(image, levels):
        levels = levels / 257
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def has_16_bits(image: Image.Image, levels: np.ndarray) -> bool:
    """Whether the integers of an image in mode I or I;16 are on a scale of 16 bits.

    Those of PNG and PPM files and of mode I;16 are; others only if one of them exceeds 255.
    """
    from_file = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    return from_file or levels.max(initial=0) > 255


def check_floats(values: np.ndarray, any_range: bool = False) -> None:
    """Raise UserError for NaN and infinity, and unless `any_range` for values outside [0, 1]."""
    least, most = float(values.min()), float(values.max())
    # a single NaN spreads through the norms and turns the whole result black
    if not (np.isfinite(least) and np.isfinite(most)):
        raise UserError("the image has values that are NaN or infinite: replace them first")
    if not any_range and (least < -ROUNDING or most > 1 + ROUNDING):
        raise UserError(f"floats from {least:g} to {most:g} need their range: {HOW_RANGE}")


def orientation(image: Image.Image) -> int:
    """How the camera was held, according to EXIF: 1 is upright, see `TURNS` for the others."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata does not make the image unreadable
        return 1


def frames(image: Image.Image) -> int:
    """How many images there are in a file; the previews that cameras add (MPO) do not count."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
