"""Datasets by name, and the loader that the training loop goes through.

To add a dataset `dummy`, write `data/dummy_dataset.py` with a subclass of `BaseDataset` called
`DummyDataset` that has `__init__(self, opt)`, `__len__` and `__getitem__`, and perhaps
`modify_commandline_options`; then say `--dataset_mode dummy`. See `template_dataset.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import util.lazy_imports  # noqa: F401 - in front of torchvision
from util import distributed
from util.errors import UserError
from util.find_class import find_class

from .cache import open_cache
from .loader import EpochLoader

if TYPE_CHECKING:
    from .base_dataset import BaseDataset


SCALING = ("resize_and_crop", "scale_width", "scale_width_and_crop")  # take --load_size


def find_dataset_using_name(dataset_name: str) -> type[BaseDataset]:
    """The class in `data/<name>_dataset.py` whose name is `<name>dataset` in any case."""
    # not at the top: it imports torchvision, which takes as long as torch
    from .base_dataset import BaseDataset

    return find_class(__name__, "dataset", dataset_name, BaseDataset)


def get_option_setter(dataset_name: str) -> Callable:
    """The function by which that dataset adds and changes options."""
    return find_dataset_using_name(dataset_name).modify_commandline_options


def create_dataset(
    opt: argparse.Namespace, batch_size: int | None = None
) -> CustomDatasetDataLoader:
    """The dataset of `opt.dataset_mode`, ready to be iterated over in batches.

    Batches are of `--batch_size` unless another size is given.
    """
    return CustomDatasetDataLoader(opt, batch_size)


def equal_batches(
    items: Iterable[dict[str, Any]], size: int, count: int | None = None
) -> Iterator[dict[str, Any]]:
    """Put neighbours of equal size together: batches of one item become batches of up to `size`.

    Takes `count` items, all if that is not given; their order stays.
    """
    waiting: list[dict[str, Any]] = []

    def joined() -> dict[str, Any]:
        batch = {
            key: torch.cat([item[key] for item in waiting])
            if isinstance(value, torch.Tensor)
            else [v for item in waiting for v in item[key]]
            for key, value in waiting[0].items()
        }
        waiting.clear()
        return batch

    def sizes(item: dict[str, Any]) -> list[torch.Size]:
        return [value.shape for value in item.values() if isinstance(value, torch.Tensor)]

    for item in itertools.islice(items, count):
        if size == 1:
            yield item
            continue
        if waiting and (len(waiting) == size or sizes(item) != sizes(waiting[-1])):
            yield joined()
        waiting.append(item)
    if waiting:
        yield joined()


def _same_name(A_path: Any, B_path: Any) -> bool:
    named = isinstance(A_path, str) and isinstance(B_path, str)
    return named and Path(A_path).stem == Path(B_path).stem


class CustomDatasetDataLoader:
    """A dataset with its loader: iterating over it gives the batches of one epoch."""

    def __init__(self, opt: argparse.Namespace, batch_size: int | None = None):
        self.opt = opt
        self.batch_size = batch_size or opt.batch_size
        self._open(opt.load_size, getattr(opt, "seed", None))

    def _open(self, load_size: int, seed: int | None) -> None:
        """Make the dataset for pictures of `load_size`, with a cache and loading processes."""
        opt = argparse.Namespace(**{**vars(self.opt), "load_size": load_size})
        self.load_size = load_size
        self.dataset = find_dataset_using_name(opt.dataset_mode)(opt)
        print(f"dataset [{type(self.dataset).__name__}] was created")
        self.dataset.cache = open_cache(
            opt, self.dataset.listed or 2 * len(self.dataset), int(opt.num_threads)
        )
        self.loader = EpochLoader(
            self.dataset,
            batch_size=self.batch_size,
            shuffle=not opt.serial_batches,
            workers=int(opt.num_threads),
            limit=opt.max_dataset_size,
            seed=seed,
            pin_memory=bool(opt.gpu_ids),
            broken=self._treatment_of_broken(),
            # results, unlike batches, are not to come twice: test.py shares its pictures itself
            rank=distributed.rank() if opt.isTrain else 0,
            processes=distributed.world_size() if opt.isTrain else 1,
        )

    def _treatment_of_broken(self) -> str:
        if not getattr(self.opt, "skip_broken", False):
            return "raise"
        # in training an epoch keeps its length; a result of another picture would be a false one
        return "replace" if self.opt.isTrain else "drop"

    def load_data(self) -> CustomDatasetDataLoader:
        """Itself; kept for code that calls it."""
        return self

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Make the next iteration that of `epoch`, without its first `start` items.

        With `--decay_at_crop_size` pictures are scaled to another size from some epoch on.
        """
        opt = self.opt
        decays = getattr(opt, "decay_at_crop_size", False) and epoch > opt.n_epochs
        load_size = opt.crop_size if decays and opt.preprocess in SCALING else opt.load_size
        if load_size != self.load_size:
            print(f"epoch {epoch}: pictures are scaled to {load_size} from now on")
            self.close()
            self._open(load_size, self.seed)
        self.loader.set_epoch(epoch, start)

    def take(self, items: Sequence[int]) -> None:
        """Let epochs consist of these items only, given by their places in the order."""
        self.loader.order.only = items

    def close(self) -> None:
        """End the processes that load pictures, and list what `--skip_broken` passed over."""
        self.loader.close()
        broken, self.loader.broken = sorted(self.loader.broken), {}
        if broken:
            distributed.print_on_all_ranks(
                f"--skip_broken passed over {len(broken)}:", *broken, sep="\n  "
            )

    @property
    def paired(self) -> bool:
        """Whether A and B of an item show the same thing.

        A dataset that does not say so (`paired`) has pairs if A and B come from one file, or from
        files of the same name: looked at in its first, middle and last item.
        """
        declared = getattr(self.dataset, "paired", None)
        if declared is not None or len(self.dataset) == 0:
            return bool(declared)
        last = len(self.dataset) - 1
        items = []
        for i in sorted({0, last // 2, last}):
            with contextlib.suppress(UserError):  # broken pictures are told, or skipped, later
                items.append(self.dataset[i])
        same = [_same_name(item.get("A_paths"), item.get("B_paths")) for item in items]
        return bool(same) and all(same)

    @property
    def seed(self) -> int:
        """What orders and random draws are made from, with the epoch and the item."""
        return self.loader.order.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.loader.order.seed = seed

    def __len__(self) -> int:
        """The number of items in an epoch."""
        return len(self.loader.order)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.loader)
