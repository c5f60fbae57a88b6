"""List images, with errors that name the folder and say what it has instead."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from util.errors import UserError
from util.files import NO_INPUT
from util.picture_files import (
    IMG_EXTENSIONS,
    frames,
    install_hint,
    is_image_file,
    open_image,
    opened,
)

from .pictures.reading import prefix_errors

# how files of a format end: reveals cut-off files, and is cheaper than decoding
_ENDINGS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}


# folders of a dataset
PARTS = {phase + side for phase in ("train", "val", "test") for side in ("", "A", "B")}


def parts_of_dataset(root: str | os.PathLike) -> list[str]:
    """Folders such as trainA and testB in `root`, if it is a dataset; else an empty list."""
    try:
        parts = sorted(p.name for p in Path(root).iterdir() if p.name in PARTS and p.is_dir())
    except OSError:
        return []
    return parts if len(parts) > 1 else []


def folder_of(root: str | os.PathLike) -> str:
    """The folder that paths of results are relative to: `root`, or its folder if it is a file."""
    root = os.fspath(root)
    return os.path.dirname(root) or "." if os.path.isfile(root) else root


def make_dataset(
    dir: str | os.PathLike,
    max_dataset_size: float = float("inf"),
    extensions: Sequence[str] = IMG_EXTENSIONS,
) -> list[str]:
    """Paths of all images in a folder and the folders below it, in a fixed order.

    Links to folders are followed, but no folder is read twice; hidden files and folders, and
    folders of results below `dir` (`mark_as_results`), are skipped. If `dir` is an image, the list
    has it alone. Raises UserError if `dir` is neither, and for a subfolder that can't be read.
    """
    return _walk(dir, max_dataset_size, extensions)[0]


def _walk(
    dir: str | os.PathLike, most: float, extensions: Sequence[str]
) -> tuple[list[str], Counter[str]]:
    """The images, and how many other files (by extension) and folders of results there are."""
    if os.path.isfile(dir) and is_image_file(dir, extensions):
        return [os.fspath(dir)], Counter()
    if not os.path.isdir(dir):
        raise _no_folder(Path(dir))
    images: list[str] = []
    others: Counter[str] = Counter()
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(dir, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        if NO_INPUT in names and seen:
            others[f"{os.path.basename(folder)}/ (results)"] += 1
            subfolders.clear()
            continue
        seen.add(real)
        # sorted, so that of two links to one folder the same one is followed on every disk
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if is_image_file(name, extensions):
                images.append(os.path.join(folder, name))
            elif not name.startswith("."):
                others[os.path.splitext(name)[1].lower() or name] += 1
    images.sort()
    return images[: int(min(most, len(images)))], others


def _refuse(e: OSError) -> None:
    raise UserError(f"can't read the folder {e.filename}: {e.strerror}") from e


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted; empty if there is no such folder."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as e:
        raise UserError(f"can't read the folder {folder}: {e.strerror}") from e


def _no_folder(root: Path) -> UserError:
    if root.is_file():
        return UserError(
            f"{root} is no image: give --dataroot a folder of images, such as {root.parent}, "
            f"or a file ({' '.join(IMG_EXTENSIONS)}){install_hint(root.suffix.lower())}"
        )
    return UserError(
        f"no folder {root}: give --dataroot a folder of images ({_contents(root.parent)})"
    )


def no_part(root: str | os.PathLike, part: str, validation: bool = False) -> UserError:
    """The error where a dataset lacks the folder `part`: what is there, and what to do."""
    root = Path(root)
    phase = part.rstrip("AB")
    both = part != phase
    wanted = f"{phase}A and {phase}B" if both else part
    inside = [p for p in _entries(root) if p.is_dir()]
    # validation needs images that training does not use
    phases, option = ("test", "val"), "--val_phase"
    if not validation:
        phases, option = ("test", "train", "val"), "--phase"
    other = [p for p in phases if (root / (p + "A" * both)).is_dir()]
    if not root.is_dir():
        todo = f"give the folder that has {wanted}"
    elif both and is_image_folder(root / phase):
        todo = "for pairs side by side in one file say --model pix2pix, or --dataset_mode aligned"
    elif nested := next((p for p in inside if (p / part).is_dir()), None):
        todo = f"say --dataroot {nested}"
    elif other and phase not in other:
        todo = f"say {option} {other[0]}, or rename them"
    elif is_image_folder(root):
        todo = (
            "move the images there; only test.py --model test and check_dataset.py "
            "--dataset_mode single can take them where they are"
        )
    else:
        todo = "put the images there, or give another --dataroot"
    read = "images of A and B are" if both else "images are"
    return UserError(
        f"no folder {root / part}: {read} read from {wanted} in --dataroot ({_contents(root)}); "
        f"{todo}"
    )


def _contents(folder: Path) -> str:
    """What is in a folder, in a few words."""
    if not folder.is_dir():
        here = f"{folder} is {'a file' if folder.is_file() else 'not there'}"
        return f"{here}; {_contents(folder.parent)}" if folder.parent.is_dir() else here
    there = [p for p in _entries(folder) if not p.name.startswith(".")]
    folders = [p.name for p in there if p.is_dir()]
    pictures = sum(is_image_file(p) for p in there if p.is_file())
    more = [f"{len(folders) - 8} more folders"] if len(folders) > 8 else []
    count = [f"{pictures} image{'s' if pictures > 1 else ''}"] if pictures else []
    parts = [*folders[:8], *more, *count]
    return f"{folder} has {', '.join(parts) or 'neither folders nor images'}"


def is_image_folder(dir: str | os.PathLike) -> bool:
    """Whether there is an image right in a folder."""
    try:
        return any(is_image_file(name) for name in os.listdir(dir))
    except OSError:
        return False


def list_pictures(
    dir: str | os.PathLike, max_dataset_size: float = float("inf"), arrays: bool = True
) -> list[str]:
    """Like `make_dataset`, but prints how many files of which kinds are not images.

    Includes `.npy` if `arrays`. Raises UserError if there are no images.
    """
    extensions = [*IMG_EXTENSIONS, *([".npy"] if arrays else [])]
    paths, others = _walk(dir, max_dataset_size, extensions)
    shown = others.most_common(4)
    rest = others.total() - sum(n for _, n in shown)
    counts = ", ".join(f"{n} {kind}" for kind, n in shown) + (f" and {rest} more" if rest else "")
    # for others that only need another package, or conversion
    hint = "".join(map(install_hint, others))
    if not paths:
        raise UserError(
            f"no images in {dir}: looked for {' '.join(extensions)}, found "
            f"{counts or 'nothing'}{hint}"
        )
    if counts:
        print(f"skipped in {dir}: {counts}{hint}")
    return paths


def quick_check(
    paths: Sequence[str], check_size: Callable | None = None, columns: int = 1, seconds: float = 2.0
) -> None:
    """Read the head and the tail of images, so that broken ones are known before work starts.

    Raises UserError for the first that is no image, is cut off, or has a width and height that
    `check_size` refuses (of one column, if there are several side by side). Stops after `seconds`:
    with many files or a slow disk, other broken ones are found when they are read.
    """
    end = time.monotonic() + seconds
    several: list[str] = []
    for path in paths:
        size = (0, 0)
        try:
            with opened(path) as image, open(path, "rb") as file:
                size = image.size
                if frames(image) > 1:
                    several.append(path)
                ending = _ENDINGS.get(image.format or "", b"")
                file.seek(-min(os.path.getsize(path), 64), os.SEEK_END)
                whole = ending in file.read()
        except UserError:
            whole = False
        if not whole:
            with skip_broken_hint():
                size = open_image(path).size  # an unusual end may be harmless: decoding decides
        if check_size:
            with prefix_errors(path):
                check_size(size[0] // columns, size[1])
        if time.monotonic() > end:
            break
    note_frames(several)


@contextlib.contextmanager
def skip_broken_hint() -> Iterator[None]:
    """Add to a UserError that `--skip_broken` skips images that can't be read."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{e} (--skip_broken skips such files)") from e


def note_frames(paths: Sequence[str]) -> None:
    """Print that files have several frames, of which only the first is read."""
    if paths:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        print(f"several frames in {paths[0]}{more}: the first one is taken")


def default_loader(path: str) -> Image.Image:
    """Open an image as RGB."""
    return open_image(path)


class ImageFolder(Dataset):
    """All images of a folder and the folders below it, each through `transform`."""

    def __init__(
        self,
        root: str,
        transform: Callable | None = None,
        return_paths: bool = False,
        loader: Callable = default_loader,
    ):
        self.root = root
        self.imgs = list_pictures(root, arrays=False)
        quick_check(self.imgs)
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
