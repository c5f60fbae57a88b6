"""Listing and opening pictures, with errors that name the file."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from util.errors import UserError

from .transforms import check_crop_size

# names are compared in lower case: .PNG and .Png count too
IMG_EXTENSIONS = [".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp"]

# where a file of this kind ends: cheaper to look at than decoding, and tells a cut-off file
_ENDINGS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}


# folders of a data set
_PARTS = {phase + side for phase in ("train", "val", "test") for side in ("", "A", "B")}


def parts_of_dataset(root: str | os.PathLike) -> list[str]:
    """Names of the folders in `root` that make it a data set and no folder of pictures, if any."""
    try:
        parts = sorted(p.name for p in Path(root).iterdir() if p.name in _PARTS and p.is_dir())
    except OSError:
        return []
    return parts if len(parts) > 1 else []


def is_image_file(filename: str | os.PathLike, extensions: Sequence[str] = IMG_EXTENSIONS) -> bool:
    """Whether the name ends as a picture's does, in any case."""
    return os.path.splitext(os.fspath(filename))[1].lower() in extensions


def make_dataset(
    dir: str | os.PathLike,
    max_dataset_size: float = float("inf"),
    extensions: Sequence[str] = IMG_EXTENSIONS,
) -> list[str]:
    """Paths of all pictures in a folder and the folders below it, in a fixed order.

    Links to folders are followed, once each. Raises UserError where there is no such folder.
    """
    root = Path(dir)
    if not root.is_dir():
        above = root.parent
        there = sorted(p.name for p in above.iterdir() if p.is_dir()) if above.is_dir() else []
        if there:
            hint = f"{above} has {', '.join(there[:8])}"
        else:
            hint = f"{above} has no folders" if above.is_dir() else f"there is no {above} either"
        what = "give --dataroot a folder of pictures"
        if root.is_file():
            raise UserError(f"{root} is a file: {what}, such as {above}")
        if root.name[-1:] in "AB" and is_image_folder(above / root.name[:-1]):
            what = "for pairs side by side in one file say --model pix2pix"
        raise UserError(f"no folder {root}: {what} ({hint})")
    images: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        images += [os.path.join(folder, name) for name in names if is_image_file(name, extensions)]
    images.sort()
    return images[: int(min(max_dataset_size, len(images)))]


def is_image_folder(dir: str | os.PathLike) -> bool:
    """Whether there is a picture right in a folder."""
    try:
        return any(is_image_file(name) for name in os.listdir(dir))
    except OSError:
        return False


def list_images(
    dir: str | os.PathLike,
    max_dataset_size: float = float("inf"),
    check: bool = True,
    crop_size: int = 0,
    columns: int = 1,
) -> list[str]:
    """Like `make_dataset`, and raises UserError for no pictures.

    `check` looks for broken ones as far as that can be done in a moment, and raises as well; so it
    does for those of which a column, if there are several side by side, is below `crop_size`.
    """
    paths = make_dataset(dir, max_dataset_size)
    if not paths:
        others = Counter(p.suffix or p.name for p in Path(dir).rglob("*") if p.is_file())
        found = ", ".join(f"{n} {kind}" for kind, n in others.most_common(4)) or "nothing"
        raise UserError(
            f"no pictures in {dir}: looked for {' '.join(IMG_EXTENSIONS)}, found {found}"
        )
    if check:
        quick_check(paths, crop_size, columns)
    return paths


def quick_check(
    paths: Sequence[str], crop_size: int = 0, columns: int = 1, seconds: float = 2.0
) -> None:
    """Read the head and the tail of pictures, so that a broken one is known before work starts.

    Raises UserError for the first that is no picture, is cut off, or is too small. Stops after
    `seconds`: on a large or slow disk the rest is found when it is read.
    """
    end = time.monotonic() + seconds
    for path in paths:
        size = (0, 0)
        try:
            with Image.open(path) as image, open(path, "rb") as file:
                size = image.size
                ending = _ENDINGS.get(image.format or "", b"")
                file.seek(-min(os.path.getsize(path), 64), os.SEEK_END)
                whole = ending in file.read()
        except Exception:
            whole = False
        if not whole:
            size = open_image(path).size  # an odd ending need not be a fault: decoding decides
        try:
            check_crop_size(size[0] // columns, size[1], crop_size)
        except UserError as e:
            raise UserError(f"{path}: {e}") from e
        if time.monotonic() > end:
            return


def open_image(path: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """Open a picture and decode it to `mode` (`RGB` or `L`), 8 bits a channel.

    16-bit grey is scaled to 8 by value. Raises UserError, which names the file, where it can't be
    decoded.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                return _to_8_bits(image).convert(mode)
            return image.convert(mode)
    # decoders raise nearly anything on damaged files: struct.error, SyntaxError, ...
    except Exception as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"can't read the picture {path}: {reason}") from e


def _to_8_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.float64)
    # 16-bit files come as mode I;16 or as I; small values in mode I are an 8-bit scale
    if image.mode.startswith("I;16") or levels.max(initial=0) > 255:
        levels = levels / 257
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def default_loader(path: str) -> Image.Image:
    """Open a picture as RGB."""
    return open_image(path)


class ImageFolder(Dataset):
    """All pictures of a folder and the folders below it, each through `transform`."""

    def __init__(
        self,
        root: str,
        transform: Callable | None = None,
        return_paths: bool = False,
        loader: Callable = default_loader,
    ):
        self.root = root
        self.imgs = list_images(root)
        self.transform = transform
        self.return_paths = return_paths
        self.loader = loader

    def __getitem__(self, index: int):
        path = self.imgs[index]
        image = self.loader(path)
        if self.transform is not None:
            image = self.transform(image)
        return (image, path) if self.return_paths else image

    def __len__(self) -> int:
        return len(self.imgs)


# a picture may be larger than Pillow's guess of an attack; above twice that it is still an error
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# what is only odd about a file (its EXIF data, say) is not worth a line; what is broken is an error
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
