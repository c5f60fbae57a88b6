"""Batches in an order, and with random draws, that depend on seed, epoch and item alone.

So a run is the same for every number of workers, and can go on in the middle of an epoch: nothing
has to be known of the workers, and nothing that they had loaded ahead is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from util.randomness import derived_seed, drawn_from, new_seed
from util.stopping import leave_signals_to_parent


class Draw(NamedTuple):
    """Which item to load, and the seed of its random draws."""

    index: int
    seed: int


class EpochOrder(Sampler):
    """The items of one epoch: a permutation made from (seed, epoch), or 0, 1, 2, ..."""

    def __init__(self, size: int, shuffle: bool, seed: int):
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.epoch, self.start = 0, 0

    def __iter__(self) -> Iterator[Draw]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        for index in order[self.start :]:
            yield Draw(index, derived_seed(self.seed, self.epoch, index))

    def __len__(self) -> int:
        return self.size


class SeededItems(Dataset):
    """Loads an item with its own random draws, and leaves the random sources as they were."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> Any:
        with drawn_from(draw.seed):
            return self.dataset[draw.index]


class EpochLoader:
    """Iterating over it gives the batches of the epoch that was set, else of the next one."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        shuffle: bool,
        workers: int,
        limit: float = float("inf"),
        seed: int | None = None,
        pin_memory: bool = False,
    ):
        size = int(min(len(dataset), limit))
        self.order = EpochOrder(size, shuffle, new_seed() if seed is None else seed)
        self.loader = DataLoader(
            SeededItems(dataset),
            batch_size=batch_size,
            sampler=self.order,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            # of its own, so that starting an epoch draws nothing from what the model draws from
            generator=torch.Generator().manual_seed(0),
        )
        self._epoch, self._start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Make the next iteration that of `epoch`, without its first `start` items."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[Any]:
        self.order.epoch, self.order.start = self._epoch, self._start
        self._epoch, self._start = self._epoch + 1, 0
        return iter(self.loader)

    def close(self) -> None:
        """End the workers. Without this they are joined at exit, where they no longer listen."""
        iterator = getattr(self.loader, "_iterator", None)
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def _start_worker(worker: int) -> None:
    # several workers with a pool of threads each only get in each other's way
    torch.set_num_threads(1)
    leave_signals_to_parent()
