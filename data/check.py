"""Load a whole dataset as training does, and report errors and unusual files.

The command line is `scripts/check_dataset.py`.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from util.background import map_in_threads
from util.errors import UserError
from util.picture_files import frames, is_image_file, opened, orientation
from util.result_names import lists_of_files

from . import check_channels, find_dataset_using_name
from .base_dataset import open_picture
from .loader import EpochLoader
from .pictures.values import MAX_MAGNITUDE

PHASES = ("train", "val", "test")
SHOWN = 10  # files of each kind, unless all are asked for
NEARLY_ONE_COLOUR = 2.0 / 127.5  # in [-1, 1]: at most this standard deviation in each channel
USUAL = 0.8  # if this share of a folder agrees, the others are exceptions

Files = defaultdict[str, dict[str, None]]  # by what is wrong; each inner dict is an ordered set


@dataclass
class Findings:
    """The table of folders (`rows`), what training stops at, and what is unusual (`remarks`).

    `skippable`: whether training goes on with `--skip_broken`.
    """

    rows: list[list[str]] = field(default_factory=list)
    problems: Files = field(default_factory=lambda: defaultdict(dict))
    remarks: Files = field(default_factory=lambda: defaultdict(dict))
    skippable: bool = True

    def stops(self, skip_broken: bool) -> bool:
        """Whether training would stop, without or with `--skip_broken`."""
        return bool(self.problems) and not (skip_broken and self.skippable)


def check(opt: argparse.Namespace) -> Findings:
    """Load every item of `--dataroot`: of `--phase`, or else of all phases that exist."""
    found, seen = Findings(), []
    root = Path(opt.dataroot)
    there = [p for p in PHASES if any((root / (p + side)).is_dir() for side in ("", "A", "B"))]
    for phase in [opt.phase] if opt.phase else there or PHASES[:1]:
        own = copy.copy(opt)
        # in order, so that each file is loaded; all broken files are reported, not only the first
        own.phase, own.isTrain, own.serial_batches, own.skip_broken = phase, True, True, True
        try:
            check_channels(own)
            dataset = find_dataset_using_name(opt.dataset_mode)(own)
        except UserError as e:
            found.problems["the dataset as a whole"][str(e)] = None
            found.skippable = False
            continue
        files = listed(dataset)
        if not files or files not in seen:  # some datasets ignore the phase
            seen.append(files)
            _check_dataset(dataset, own, found)
    return found


def listed(dataset: Any) -> list[str]:
    """The files in a dataset's lists (`A_paths`, `image_paths`, ...)."""
    flat = map(str, chain.from_iterable(lists_of_files(dataset)))
    # a link to nothing is there as well, and counts as broken
    return list(dict.fromkeys(filter(os.path.lexists, flat)))


def _check_dataset(dataset: Any, opt: argparse.Namespace, found: Findings) -> None:
    loader = EpochLoader(
        dataset, 1, False, opt.num_threads, opt.max_dataset_size, seed=0, broken="drop"
    )
    sizes: defaultdict[str, set[tuple[int, ...]]] = defaultdict(set)
    loaded: dict[str, None] = {}  # files
    count = len(loader.order)
    for batch in tqdm(loader, total=count, unit="img", desc="reading", disable=None):
        if not isinstance(batch, dict):
            title = f"items are of {type(batch).__name__}, not dictionaries"
            found.problems[title]["item 0"] = None
            found.skippable = False
            continue
        for key, x in batch.items():
            paths = batch.get(f"{key}_paths", [])
            loaded.update(dict.fromkeys(map(str, paths)))
            if torch.is_tensor(x) and key in ("A", "B"):
                _check_values(key, x[0], paths, found)
            if torch.is_tensor(x) and x.dim() == 4:
                sizes[key].add(tuple(x.shape[2:]))
                if float(x[0].float().std((1, 2)).max()) < NEARLY_ONE_COLOUR:
                    found.remarks["nearly one colour"][str([*paths, f"an image {key}"][0])] = None
    loader.close()
    reasons = loader.broken
    broken_items = len(reasons)
    paths = list(dict.fromkeys([*listed(dataset), *filter(os.path.exists, loaded)]))
    # loading an item stops at its first broken file: look for others
    for path in (p for p in paths if reasons and p not in loaded and is_image_file(p)):
        try:
            open_picture(opt, path)
        except UserError as e:
            reasons[str(e)] = None
    if reasons:
        found.problems["what can't be used"] |= dict.fromkeys(sorted(reasons))
    for key, different in sizes.items():
        if opt.batch_size > 1 and len(different) > 1:
            what = (
                f"--batch_size {opt.batch_size} needs images of one size, and --preprocess "
                f"{opt.preprocess} leaves them as they are"
            )
            found.problems[what][f"{key}: {len(different)} sizes"] = None
            found.skippable = False
    broken = {path for path in paths if any(_names(path, reason) for reason in reasons)}
    folders = {
        os.path.relpath(folder, opt.dataroot): [p for p in paths if Path(p).is_relative_to(folder)]
        for folder in getattr(dataset, "folders", [])
    }
    for name, inside in (folders or ({".": paths} if paths else {})).items():
        _check_folder(name, inside, broken, opt, found)
    if not paths:  # a user's dataset that names no files
        found.rows.append([f"items of {opt.dataset_mode}", str(count), str(broken_items)])


def _names(path: str, reason: str) -> bool:
    """Whether a reason names `path` itself, not a file whose name only begins with it."""
    return re.search(re.escape(path) + r"(?![\w.])", reason) is not None


def _check_values(key: str, x: torch.Tensor, paths: Sequence[Any], found: Findings) -> None:
    """Look for what is no image (C, H, W) of float32, NaN, and values far outside [-1, 1]."""
    file = str([*paths, f"an image {key}"][0])
    wrong = ""
    if x.dim() != 3:
        wrong = f"has the shape {tuple(x.shape)}, not (C, H, W)"
    elif x.dtype != torch.float32:
        wrong = f"is a tensor of {x.dtype}, not of float32 in [-1, 1]"
    elif not x.isfinite().all():
        wrong = "has values that are NaN or infinite"
    if wrong:
        found.problems[f"{key} {wrong}"][file] = None
        found.skippable = False
    elif (largest := float(x.abs().max())) > MAX_MAGNITUDE:
        title = f"{key} has values far out of [-1, 1], which models expect"
        found.remarks[title][f"{file}: up to {largest:g} in magnitude"] = None


def _check_folder(
    name: str, paths: list[str], broken: set[str], opt: argparse.Namespace, found: Findings
) -> None:
    as_stored = getattr(opt, "ignore_orientation", False)
    whole = [path for path in paths if path not in broken]
    looks = [x for x in map_in_threads(lambda path: _read_header(path, as_stored), whole) if x]
    for path, _, remarks in looks:
        for remark in remarks:
            found.remarks[remark][path] = None
    columns = [[facts[i] for _, facts, _ in looks] for i in range(3)]
    texts = [str(len(paths)), str(sum(path in broken for path in paths)), *map(_counts, columns)]
    found.rows.append([name, *texts])
    for i, what in enumerate(("size", "mode")):
        usual, most = (Counter(columns[i]).most_common(1) or [("", 0)])[0]
        for path, facts, _ in looks:
            if facts[i] != usual and most >= USUAL * len(looks):
                title = f"{what} differs from nearly all in {name}, which have {usual}"
                found.remarks[title][f"{path}: {facts[i]}"] = None


def _read_header(path: str, as_stored: bool) -> tuple[str, tuple[str, str, str], list[str]] | None:
    """The path; size, mode and format by the header; remarks. None if it is not an image."""
    if not is_image_file(path):
        return None
    try:
        with opened(path, any_size=True) as image:
            facts = f"{image.width}x{image.height}", image.mode, image.format or "?"
            return path, facts, list(_peculiarities(image, as_stored))
    except UserError:
        return None


def _peculiarities(image: Image.Image, as_stored: bool) -> Iterator[str]:
    if image.mode.startswith("I"):
        yield "16 bits a channel: scaled to 8 by value, unless --value_range is given"
    elif image.mode == "F":
        yield "floats: scaled from [0, 1] to 8 bits by value, unless --value_range is given"
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        yield "transparency: left out"
    elif image.mode not in ("RGB", "L", "P", "1"):
        yield f"mode {image.mode}: converted to RGB"
    if frames(image) > 1:
        yield "several images in one file: the first is taken"
    if 2 <= orientation(image) <= 8:
        taken = "taken as it is stored (--ignore_orientation)" if as_stored else "turned upright"
        yield f"stored sideways by the camera (EXIF): {taken}"


def _counts(values: Iterable[str], most: int = 3) -> str:
    counted = Counter(values)
    if len(counted) == 1:
        return next(iter(counted))
    parts = [f"{value} ({n})" for value, n in counted.most_common(most)]
    return ", ".join(parts + ([f"and {len(counted) - most} others"] if len(counted) > most else []))


def report(found: Findings, everything: bool = False, skip_broken: bool = False) -> str:
    """The findings as text; `everything` lists all files, not only the first of each kind."""
    rows = [["folder", "images", "broken", "size", "mode", "format"], *found.rows]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    for title, group in [
        (f"training would {'stop at' if found.stops(skip_broken) else 'skip'}", found.problems),
        ("worth a look", found.remarks),
    ]:
        for what, files in group.items():
            shown = list(files)[: None if everything else SHOWN]
            lines += ["", f"{title}: {what} ({len(files)})", *(f"  {file}" for file in shown)]
            if len(files) > len(shown):
                lines.append(f"  ... and {len(files) - len(shown)} more (--all lists them)")
    if not found.problems:
        end = "training would go through all of it"
    elif not found.stops(skip_broken):
        end = "training would go through all others (--skip_broken)"
    elif found.skippable:
        end = "training would stop; with --skip_broken it would pass over these files"
    else:
        end = "training would stop"
    return "\n".join([*lines, "", end])
