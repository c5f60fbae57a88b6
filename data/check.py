"""Load a whole data set as training does, and report errors and unusual files.

The command line is `scripts/check_dataset.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from util.errors import UserError
from util.picture_files import frames, opened, orientation

from . import find_dataset_using_name
from .base_dataset import open_picture
from .loader import Draw, SeededItems, start_worker

PHASES = ("train", "val", "test")
SHOWN = 10  # files of each kind, unless all are asked for
NEARLY_ONE_COLOUR = 2.0 / 127.5  # of [-1, 1]: the largest standard deviation of a channel
USUAL = 0.8  # share of a folder that makes the others exceptions


class Look(NamedTuple):
    """What was found in one item, or in the header of one file."""

    problems: list[str] = []
    remarks: list[tuple[str, str]] = []
    sizes: list[tuple[str, tuple[int, ...]]] = []
    file: tuple[str, str, str, str] | None = None  # path, size, mode, format


@dataclass
class Findings:
    """What was found: rows of the table of folders, and lists of files by what is wrong."""

    rows: list[list[str]] = field(default_factory=list)
    problems: dict[str, dict[str, None]] = field(default_factory=dict)
    remarks: dict[str, dict[str, None]] = field(default_factory=dict)
    skippable: bool = True

    def problem(self, what: str, which: str, skippable: bool = True) -> None:
        """Note an error that stops training; `skippable` if `--skip_broken` avoids that."""
        self.problems.setdefault(what, {})[which] = None
        self.skippable &= skippable

    def remark(self, what: str, which: str) -> None:
        """Note something unusual that does not stop training."""
        self.remarks.setdefault(what, {})[which] = None


class Looks(Dataset):
    """All items of a dataset, then the headers of its files; each as a `Look`."""

    def __init__(self, dataset: Any, size: int, paths: Sequence[str]):
        self.items, self.size, self.paths = SeededItems(dataset, "drop", size), size, paths

    def __len__(self) -> int:
        return self.size + len(self.paths)

    def __getitem__(self, index: int) -> Look:
        return self._item(index) if index < self.size else self._file(self.paths[index - self.size])

    def _item(self, index: int) -> Look:
        item, problems = self.items[Draw(index, 0)]
        dataset: Any = self.items.dataset
        if item is None:
            # loading stops at the first broken file: look for others of this item
            for path in listed(dataset, index):
                try:
                    open_picture(dataset.opt, path)
                except UserError as e:
                    problems.append(str(e))
        remarks, sizes = [], []
        item = item if isinstance(item, dict) else {}
        for key, x in item.items():
            if isinstance(x, torch.Tensor) and x.dim() == 3:
                sizes.append((key, tuple(x.shape[1:])))
                if float(x.float().std((1, 2)).max()) < NEARLY_ONE_COLOUR:
                    path = item.get(f"{key}_paths", f"item {index}")
                    remarks.append(("nearly one colour", str(path)))
        return Look(problems, remarks, sizes)

    def _file(self, path: str) -> Look:
        if path.lower().endswith(".npy"):
            return Look()
        try:
            with opened(path, any_size=True) as image:
                stored = getattr(self.items.dataset, "opt", None)
                notes = list(_peculiarities(image, getattr(stored, "ignore_orientation", False)))
                facts = path, f"{image.width}x{image.height}", image.mode, image.format or "?"
        except UserError:
            return Look()  # among the problems already
        return Look([], [(note, path) for note in notes], [], facts)


def _peculiarities(image: Image.Image, as_stored: bool) -> Iterator[str]:
    if image.mode.startswith("I"):
        yield "16 bits a channel: scaled to 8 by value, unless --value_range is given"
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        yield "transparency: left out"
    elif image.mode not in ("RGB", "L", "P", "1"):
        yield f"mode {image.mode}: converted to RGB"
    if frames(image) > 1:
        yield "several pictures in one file: the first is taken"
    if 2 <= orientation(image) <= 8:
        taken = "taken as it is stored (--ignore_orientation)" if as_stored else "turned upright"
        yield f"stored sideways by the camera (EXIF): {taken}"


def listed(dataset: Any, index: int | None = None) -> list[str]:
    """The paths in a dataset's lists (`A_paths`, `image_paths`, ...); those of one item, or all."""
    lists = [v for k, v in vars(dataset).items() if k.endswith("paths") and isinstance(v, list)]
    chosen = [v if index is None else [v[index % len(v)]] for v in lists if v]
    flat = (p for v in chosen for pair in v for p in (pair if isinstance(pair, tuple) else (pair,)))
    return list(dict.fromkeys(p for p in map(str, flat) if os.path.exists(p)))


def check(opt: argparse.Namespace) -> Findings:
    """Load every item of `--dataroot`: of `--phase`, or else of all phases that exist."""
    found, seen = Findings(), []
    for phase in [opt.phase] if opt.phase else _phases_there(Path(opt.dataroot)):
        own = copy.copy(opt)
        # in order, so that each file is loaded; and report all broken files, not the first only
        own.phase, own.isTrain, own.serial_batches, own.skip_broken = phase, True, True, True
        try:
            dataset = find_dataset_using_name(opt.dataset_mode)(own)
        except UserError as e:
            found.problem("the data set as a whole", str(e), skippable=False)
            continue
        if listed(dataset) not in seen:  # some datasets ignore the phase
            seen.append(listed(dataset))
            _check_dataset(dataset, own, found)
    return found


def _phases_there(root: Path) -> Sequence[str]:
    there = [p for p in PHASES if any((root / (p + side)).is_dir() for side in ("", "A", "B"))]
    return there or PHASES[:1]


def _check_dataset(dataset: Any, opt: argparse.Namespace, found: Findings) -> None:
    paths = listed(dataset)
    looks = Looks(dataset, int(min(len(dataset), opt.max_dataset_size)), paths)
    reasons: dict[str, None] = {}
    sizes: dict[str, set[tuple[int, ...]]] = {}
    files: list[tuple[str, str, str, str]] = []
    for look in _load(looks, opt.num_threads):
        reasons.update(dict.fromkeys(look.problems))
        for key, size in look.sizes:
            sizes.setdefault(key, set()).add(size)
        for what, which in look.remarks:
            found.remark(what, which)
        files += [look.file] if look.file else []
    for reason in sorted(reasons):
        found.problem("what can't be used", reason)
    for key, different in sizes.items():
        if opt.batch_size > 1 and len(different) > 1:
            found.problem(
                f"--batch_size {opt.batch_size} needs pictures of one size, and --preprocess "
                f"{opt.preprocess} leaves them as they are",
                f"{key}: {len(different)} sizes",
                skippable=False,
            )
    for folder in getattr(dataset, "folders", [opt.dataroot]) or [opt.dataroot]:
        inside = [path for path in paths if Path(path).is_relative_to(folder)]
        broken = [path for path in inside if any(f"picture {path}: " in r for r in reasons)]
        whole = [f for f in files if f[0] in {*inside} - {*broken}]
        columns = [[f[i] for f in whole] for i in (1, 2, 3)]
        name = os.path.relpath(folder, opt.dataroot)
        counts = [str(len(inside)), str(len(broken))]
        found.rows.append([name, *counts, *(_counts(column) for column in columns)])
        for what, column in zip(("size", "mode"), columns, strict=False):
            usual = _usual(Counter(column))
            for (path, *_), value in zip(whole, column, strict=True):
                if usual not in (None, value):
                    title = f"of another {what} than nearly all in {name}: {usual}"
                    found.remark(title, f"{path}: {value}")


def _load(looks: Looks, workers: int) -> Iterator[Look]:
    loader = DataLoader(
        looks, batch_size=8, num_workers=workers, collate_fn=list, worker_init_fn=start_worker
    )
    bar = tqdm(total=len(looks), unit="img", desc="reading", disable=None)
    try:
        with bar:
            for batch in loader:
                yield from batch
                bar.update(len(batch))
    except RuntimeError as e:
        if "DataLoader worker" not in str(e):
            raise
        raise UserError(
            "a process that reads pictures was killed, perhaps for want of memory: try fewer "
            "--num_threads"
        ) from e


def _usual(counts: Counter) -> Any:
    """The value that nearly all have, so that others may be mistakes; None if there is none."""
    value, count = counts.most_common(1)[0] if counts else (None, 0)
    return value if count >= USUAL * counts.total() else None


def _counts(values: Iterable[str], most: int = 3) -> str:
    counted = Counter(values)
    if len(counted) == 1:
        return next(iter(counted))
    parts = [f"{value} ({n})" for value, n in counted.most_common(most)]
    return ", ".join(parts + ([f"and {len(counted) - most} others"] if len(counted) > most else []))


def report(found: Findings, everything: bool = False) -> str:
    """The findings as text; `everything` lists all files, not only the first of each kind."""
    rows = [["folder", "pictures", "broken", "size", "mode", "format"], *found.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(t.ljust(w) for t, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    for title, group in [
        ("training would stop at", found.problems),
        ("worth a look", found.remarks),
    ]:
        for what, files in group.items():
            shown = list(files)[: None if everything else SHOWN]
            lines += ["", f"{title}: {what} ({len(files)})", *(f"  {file}" for file in shown)]
            if len(files) > len(shown):
                lines.append(f"  ... and {len(files) - len(shown)} more (--all lists them)")
    if not found.problems:
        end = "training would go through all of it"
    elif found.skippable:
        end = "training would stop; with --skip_broken it would pass over these files"
    else:
        end = "training would stop"
    return "\n".join([*lines, "", end])
