"""Datasets by name, and the loader that the training loop goes through.

To add a dataset `dummy`, write `data/dummy_dataset.py` with a subclass of `BaseDataset` called
`DummyDataset` that has `__init__(self, opt)`, `__len__` and `__getitem__`, and perhaps
`modify_commandline_options`; then say `--dataset_mode dummy`. See `template_dataset.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from util.find_class import find_class

from .base_dataset import BaseDataset
from .loader import EpochLoader


def find_dataset_using_name(dataset_name: str) -> type[BaseDataset]:
    """The class in `data/<name>_dataset.py` whose name is `<name>dataset` in any case."""
    return find_class("data", "dataset", dataset_name, BaseDataset)


def get_option_setter(dataset_name: str) -> Callable:
    """The function by which that dataset adds and changes options."""
    return find_dataset_using_name(dataset_name).modify_commandline_options


def create_dataset(opt: argparse.Namespace) -> CustomDatasetDataLoader:
    """The dataset of `opt.dataset_mode`, ready to be iterated over in batches."""
    return CustomDatasetDataLoader(opt)


class CustomDatasetDataLoader:
    """A dataset with its loader: iterating over it gives the batches of one epoch."""

    def __init__(self, opt: argparse.Namespace):
        self.opt = opt
        self.dataset = find_dataset_using_name(opt.dataset_mode)(opt)
        print(f"dataset [{type(self.dataset).__name__}] was created")
        self.loader = EpochLoader(
            self.dataset,
            batch_size=opt.batch_size,
            shuffle=not opt.serial_batches,
            workers=int(opt.num_threads),
            limit=opt.max_dataset_size,
            seed=getattr(opt, "seed", None),
            pin_memory=bool(opt.gpu_ids),
        )

    def load_data(self) -> CustomDatasetDataLoader:
        """Itself; kept for code that calls it."""
        return self

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Make the next iteration that of `epoch`, without its first `start` items."""
        self.loader.set_epoch(epoch, start)

    def close(self) -> None:
        """End the processes that load pictures."""
        self.loader.close()

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
