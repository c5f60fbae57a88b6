"""Read a whole data set before training does, and say what is wrong with it.

    python -m data.check --dataroot ./datasets/maps
    python -m data.check --dataroot ./datasets/facades --dataset_mode aligned --phase train

Exit code 1 if training would stop at something, 0 if not, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageStat
from tqdm import tqdm

from util.errors import UserError, one_line_errors

from .image_folder import IMG_EXTENSIONS, is_image_file, make_dataset, open_image

PHASES = ("train", "val", "test")
MODES = ("unaligned", "aligned", "single", "colorization")
SHOWN = 10  # files of each kind, without --all
NEARLY_ONE_COLOUR = 2.0  # levels of 255: the largest standard deviation of a channel
USUAL = 0.8  # share of a folder that makes the others exceptions
ROTATED = range(2, 9)  # EXIF orientations other than upright


class Picture(NamedTuple):
    """What is known of a file after reading it."""

    path: str
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    kind: str = ""
    notes: tuple[str, ...] = ()
    broken: str = ""


@dataclass
class Folder:
    """The pictures of one folder of a data set; `name` is as the data set calls it."""

    name: str
    pictures: list[Picture] = field(default_factory=list)

    @property
    def whole(self) -> list[Picture]:
        """Those that can be read."""
        return [p for p in self.pictures if not p.broken]


@dataclass
class Findings:
    """Files by what is wrong with them: `problems` would stop training, `remarks` would not."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    skippable: bool = True

    def problem(self, what: str, file: str, skippable: bool = True) -> None:
        """Note something that training would stop at, `skippable` with `--skip_broken` if not."""
        self.problems.setdefault(what, []).append(file)
        self.skippable &= skippable

    def remark(self, what: str, file: str) -> None:
        """Note something that training would take, but that is unusual."""
        self.remarks.setdefault(what, []).append(file)


# ----------------------------------------------------------------------------------------- reading
def read_picture(path: str) -> Picture:
    """Decode a file as training does, and look at it."""
    try:
        with Image.open(path) as image:
            size, mode, kind = image.size, image.mode, image.format or "?"
            notes = list(_peculiarities(image))
        decoded = open_image(path)
    except UserError as e:
        return Picture(path, broken=str(e).removeprefix(f"can't read the picture {path}: "))
    except Exception as e:  # what Image.open raises, open_image would raise too
        return Picture(path, broken=" ".join(str(e).split()) or type(e).__name__)
    if max(ImageStat.Stat(decoded).stddev) < NEARLY_ONE_COLOUR:
        notes.append("nearly one colour")
    return Picture(path, size, mode, kind, tuple(notes))


def _peculiarities(image: Image.Image) -> Iterator[str]:
    if image.mode.startswith("I"):
        yield "16 bits a channel: scaled to 8 by value"
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        yield "transparency: left out"
    elif image.mode not in ("RGB", "L", "P", "1"):
        yield f"mode {image.mode}: converted to RGB"
    if getattr(image, "n_frames", 1) > 1:
        yield "several pictures in one file: the first is taken"
    if image.getexif().get(0x0112) in ROTATED:
        yield "to be shown rotated (EXIF): taken as it is stored"


def read_all(paths: Sequence[str], processes: int) -> list[Picture]:
    """Read files in so many processes (0: in this one), with a progress bar; in their order."""
    progress = {"total": len(paths), "unit": "img", "desc": "reading", "disable": None}
    if processes == 0:
        return [read_picture(path) for path in tqdm(paths, **progress)]
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(start)
    with ProcessPoolExecutor(min(processes, max(1, len(paths))), context) as pool:
        chunk = max(1, min(16, len(paths) // (4 * processes)))
        try:
            return list(tqdm(pool.map(read_picture, paths, chunksize=chunk), **progress))
        except BrokenProcessPool as e:
            raise UserError(
                "a process that reads pictures was killed, perhaps for want of memory: try fewer "
                "--num_threads"
            ) from e


# ---------------------------------------------------------------------------------------- checking
def folder_names(mode: str, root: Path, phase: str) -> list[str]:
    """The folders that a dataset of this mode reads, as paths below `root`."""
    if mode == "single":
        return ["."]
    sides = [f"{phase}A", f"{phase}B"]
    if mode == "unaligned" or (
        mode == "aligned" and not (root / phase).is_dir() and (root / sides[0]).is_dir()
    ):
        return sides
    return [phase]


def _usual(counts: Counter) -> Any:
    """What nearly all agree in, so that others may be mistakes; None in a set of all kinds."""
    if counts:
        value, count = counts.most_common(1)[0]
        if count >= USUAL * counts.total():
            return value
    return None


def check_folder(folder: Folder, opt: argparse.Namespace, pairs: bool, found: Findings) -> None:
    """Note what is wrong with single files; `pairs`: A and B are side by side in each."""
    sizes = Counter(p.size for p in folder.whole)
    usual_size, usual_mode = _usual(sizes), _usual(Counter(p.mode for p in folder.whole))
    for picture in folder.pictures:
        if picture.broken:
            found.problem("can't be read", f"{picture.path}: {picture.broken}")
            continue
        width, height = picture.size
        shown = f"{picture.path}: {width}x{height}"
        if pairs and width % 2:
            found.problem("A and B side by side, but of odd width", shown)
        side = width // 2 if pairs else width
        if opt.preprocess == "crop" and min(side, height) < opt.crop_size:
            found.problem(f"too small for --crop_size {opt.crop_size}", shown)
        if usual_size not in (None, picture.size):
            w, h = usual_size
            found.remark(f"of another size than nearly all in {folder.name}: {w}x{h}", shown)
        if usual_mode not in (None, picture.mode):
            what = f"of another mode than nearly all in {folder.name}: {usual_mode}"
            found.remark(what, f"{picture.path}: {picture.mode}")
        for note in picture.notes:
            found.remark(note, picture.path)
    if opt.batch_size > 1 and opt.preprocess in ("none", "scale_width") and len(sizes) > 1:
        found.problem(
            f"--batch_size {opt.batch_size} needs pictures of one size with --preprocess "
            f"{opt.preprocess}",
            f"{folder.name}: {len(sizes)} sizes",
            skippable=False,
        )


def check_pairs(A: Folder, B: Folder, root: Path, found: Findings) -> None:
    """Note files of two folders that have no partner, or one of another size."""
    sides = [
        {
            os.path.splitext(os.path.relpath(p.path, root / folder.name))[0]: p
            for p in folder.pictures
        }
        for folder in (A, B)
    ]
    for ours, theirs, other in [(sides[0], sides[1], B), (sides[1], sides[0], A)]:
        for name in sorted(ours.keys() - theirs.keys()):
            what = f"no partner of this name in {other.name}"
            found.problem(what, ours[name].path, skippable=False)
    for name in sorted(sides[0].keys() & sides[1].keys()):
        a, b = sides[0][name], sides[1][name]
        if not (a.broken or b.broken) and a.size != b.size:
            sizes = [f"{w}x{h}" for w, h in (a.size, b.size)]
            pair = f"{a.path}: {sizes[0]}, and {b.path}: {sizes[1]}"
            found.problem("a pair of two sizes", pair)


def list_folder(folder: Folder, root: Path, most: float, found: Findings) -> None:
    """Find the pictures of a folder; note what is none, and where there are none."""
    place = root / folder.name
    try:
        folder.pictures = [Picture(path) for path in make_dataset(place, most)]
    except UserError as e:
        found.problem("missing", str(e), skippable=False)
        return
    if not folder.pictures:
        what = f"no pictures ({' '.join(IMG_EXTENSIONS)})"
        found.problem(what, str(place), skippable=False)
    files = [name for _, _, names in os.walk(place) for name in names]
    others = Counter(Path(n).suffix or n for n in files if not is_image_file(n))
    for ending, count in others.most_common():
        found.remark("not taken for pictures, by their names", f"{place}: {count} {ending}")


def check(opt: argparse.Namespace) -> tuple[list[Folder], Findings]:
    """Read the folders of `opt` and look for everything.

    Raises UserError where there is nothing that a dataset of this mode could read.
    """
    root, found = Path(opt.dataroot), Findings()
    phases = [opt.phase] if opt.phase else _phases_there(opt.dataset_mode, root)
    groups = []
    for phase in phases:
        folders = [Folder(name) for name in folder_names(opt.dataset_mode, root, phase)]
        groups.append(folders)
        for folder in folders:
            list_folder(folder, root, opt.max_dataset_size, found)
    every = [folder for folders in groups for folder in folders]
    read = iter(read_all([p.path for f in every for p in f.pictures], opt.num_threads))
    for folder in every:
        folder.pictures = [next(read) for _ in folder.pictures]
    for folders in groups:
        pairs_in_files = opt.dataset_mode == "aligned" and len(folders) == 1
        for folder in folders:
            check_folder(folder, opt, pairs_in_files, found)
        if opt.dataset_mode == "aligned" and len(folders) == 2:
            check_pairs(folders[0], folders[1], root, found)
    return every, found


def _phases_there(mode: str, root: Path) -> list[str]:
    if mode == "single":
        return [""]
    there = [
        phase
        for phase in PHASES
        if any((root / name).is_dir() for name in folder_names(mode, root, phase))
    ]
    if there or not root.is_dir():
        return there or ["train"]
    folders = sorted(p.name for p in root.iterdir() if p.is_dir())
    raise UserError(
        f"--dataset_mode {mode} needs {' and '.join(folder_names(mode, root, 'train'))} in {root}, "
        f"which has {', '.join(folders[:8]) or 'no folders'}: choose another --dataset_mode "
        f"({', '.join(MODES)}) or --phase"
    )


# --------------------------------------------------------------------------------------- reporting
def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of texts as lines with columns one below the other; the first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]]]


def _counts(values: Iterable[str], most: int = 3) -> str:
    counted = Counter(values)
    if len(counted) == 1:
        return next(iter(counted))
    parts = [f"{value} ({n})" for value, n in counted.most_common(most)]
    return ", ".join(parts + (["..."] if len(counted) > most else [])) or "-"


def _sizes(pictures: Sequence[Picture]) -> str:
    counted = Counter(p.size for p in pictures)
    if len(counted) <= 3:
        return _counts(f"{w}x{h}" for w, h in (p.size for p in pictures))
    widths, heights = zip(*counted, strict=True)
    return (
        f"{len(counted)} sizes, {min(widths)} to {max(widths)} wide, "
        f"{min(heights)} to {max(heights)} high"
    )


def report(folders: Sequence[Folder], found: Findings, everything: bool = False) -> str:
    """The findings as text."""
    rows = [["folder", "pictures", "broken", "size", "mode", "format"]]
    for folder in folders:
        whole = folder.whole
        rows.append(
            [
                folder.name,
                str(len(folder.pictures)),
                str(len(folder.pictures) - len(whole)),
                _sizes(whole),
                _counts(p.mode for p in whole),
                _counts(p.kind for p in whole),
            ]
        )
    lines = table(rows)
    for title, group in [
        ("training would stop at", found.problems),
        ("worth a look", found.remarks),
    ]:
        for what, files in group.items():
            lines += ["", f"{title}: {what} ({len(files)})"]
            shown = files if everything else files[:SHOWN]
            lines += [f"  {file}" for file in shown]
            if len(files) > len(shown):
                lines.append(f"  ... and {len(files) - len(shown)} more (--all lists them)")
    lines.append("")
    if not found.problems:
        lines.append("training would go through all of it")
    elif found.skippable:
        lines.append("training would stop; with --skip_broken it would pass over these files")
    else:
        lines.append("training would stop")
    return "\n".join(lines)


def options() -> argparse.ArgumentParser:
    """The command line: the options of training that say which files are read, and how."""
    from options.base_options import PREPROCESS, HelpFormatter, whole_number
    from util.errors import OneLineParser

    parser = OneLineParser("data.check", description=__doc__.splitlines()[0])  # type: ignore
    parser.formatter_class = HelpFormatter
    add = parser.add_argument
    add("--dataroot", required=True, help="folder of the data set")
    add("--dataset_mode", default="unaligned", choices=MODES, help="as for train.py")
    add("--phase", default="", help="train, val, test, ...; without it those that are there")
    add("--preprocess", default="resize_and_crop", choices=PREPROCESS, help="as for train.py")
    add("--load_size", type=whole_number(1), default=286, help="as for train.py")
    add("--crop_size", type=whole_number(1), default=256, help="as for train.py")
    add("--batch_size", type=whole_number(1), default=1, help="as for train.py")
    add(
        "--max_dataset_size",
        type=whole_number(1),
        default=float("inf"),
        help="read at most this many pictures of a folder",
    )
    add("--num_threads", type=whole_number(0), default=os.cpu_count() or 1, help="processes")
    add("--all", action="store_true", help="list all files, not only the first of each kind")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print, and return the exit code."""
    opt = options().parse_args(argv)
    folders, found = check(opt)
    print(report(folders, found, opt.all))
    return 1 if found.problems else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
