"""Names of result files, the same for any number of processes."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def results_folder(opt: argparse.Namespace) -> Path:
    """`<results_dir>/<name>/<phase>_<epoch>`, followed by `_iter<n>` with `--load_iter`."""
    save = f"{opt.epoch}_iter{opt.load_iter}" if opt.load_iter > 0 else opt.epoch
    return Path(opt.results_dir, opt.name, f"{opt.phase}_{save}")


def result_name(relative_path: str, taken: set[str]) -> str:
    """The name of an image's results: its path without extension, unless that is taken.

    `a.png` and `a.jpg` in one folder become `a` and `a.jpg`. An image that is used several times,
    since the other side of the dataset has more, becomes `a`, `a.png`, `a-2`, `a-3`. Adds the name
    to `taken`.
    """
    stem = os.path.splitext(relative_path)[0]
    name, n = stem, 1
    while name in taken:
        name = relative_path if n == 1 else f"{stem}-{n}"
        n += 1
    taken.add(name)
    return name


def output_names(relative_paths: Sequence[str]) -> list[str]:
    """The names of the outputs of files: their paths without extensions.

    `a.png` and `a.jpg` in one folder both keep their extensions, so that an output `a` from before
    the second file existed is not mistaken for the output of the second file.
    """
    stems = [os.path.splitext(path)[0] for path in relative_paths]
    taken = Counter([*stems, *relative_paths])
    return [
        stem if taken[stem] == 1 else path for stem, path in zip(stems, relative_paths, strict=True)
    ]


class ResultNames:
    """Names results so that they do not depend on the number of processes.

    Each process names all `count` images, and uses the names of its `own` ones, given by their
    numbers in order.
    """

    def __init__(self, dataset: Any, own: Sequence[int], count: int):
        self.dataset, self.count = dataset, count
        self.lists = list(lists_of_files(dataset))
        self.everything = len(own) == count
        self.left = iter(own)
        self.last, self.taken = -1, set()
        self.names: list[str] = []

    def next(self, path: str) -> tuple[int, str]:
        """The number of the next item and the name of its results; `path` is its image.

        Numbers of items that the dataset skipped are passed over.
        """
        if self.everything:
            self.last += 1
            return self.last, result_name(self.dataset.relative_path(path), self.taken)
        for number in self.left:
            for paths in self.lists:
                if paths[number % len(paths)] == path:
                    self.last = number
                    if not self.names:
                        some = (paths[i % len(paths)] for i in range(self.count))
                        relative = [self.dataset.relative_path(p) for p in some]
                        self.names = [result_name(p, self.taken) for p in relative]
                    return number, self.names[number]
        # a dataset without lists of its files: names with extensions are mostly distinct
        return self.last, self.dataset.relative_path(path)


def lists_of_files(dataset: Any) -> Iterator[Sequence[str]]:
    """A dataset's lists of files; a list of pairs is split into one for each side."""
    for name, paths in vars(dataset).items():
        if name.endswith("paths") and isinstance(paths, (list, tuple)) and paths:
            pairs = isinstance(paths[0], tuple)
            yield from zip(*paths, strict=True) if pairs else [paths]
