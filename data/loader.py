"""Batches whose order and random draws depend on seed, epoch and item alone.

So a run is the same for any number of workers, and can resume in the middle of an epoch: no state
of the workers has to be saved, and no items that they had prefetched are lost.
"""

from __future__ import annotations

import atexit
import os
import signal
import struct
import sys
import threading
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from util import distributed
from util.errors import UserError, ignore_warnings, in_one_line
from util.randomness import derived_seed, new_seed, seed_cpu, seeded
from util.result_names import lists_of_files
from util.run.stopping import leave_signals_to_parent

from .cache import WORKER_START_METHOD
from .shared_batches import SharedBatches


class SeededIndex(NamedTuple):
    """Which item to load, and the seed of its random draws."""

    index: int
    seed: int


class EpochOrder(Sampler):
    """The items of one epoch: a permutation made from (seed, epoch), or 0, 1, 2, ...

    `share` (rank, world size, batch size) selects the items of one process of several: its part of
    every global batch. If the last batch does not divide evenly, the first items are repeated, so
    that every process has equally many.
    """

    def __init__(
        self, size: int, shuffle: bool, seed: int, share: tuple[int, int, int] = (0, 1, 1)
    ):
        self.size, self.shuffle, self.seed, self.share = size, shuffle, seed, share
        self.epoch, self.start = 0, 0
        self.positions: Sequence[int] | None = None  # in the order; None: all

    def __iter__(self) -> Iterator[SeededIndex]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator).tolist()
        else:
            order = list(range(self.size))
        for index in self._own(order):
            yield SeededIndex(index, derived_seed(self.seed, self.epoch, index))

    def _own(self, order: list[int]) -> Iterator[int]:
        if self.positions is not None:
            yield from (order[i] for i in self.positions)
            return
        rank, world_size, batch_size = self.share
        for first in range(self.start, len(order), world_size * batch_size):
            batch = order[first : first + world_size * batch_size]
            part = -(-len(batch) // world_size)
            batch += [order[i % len(order)] for i in range(world_size * part - len(batch))]
            yield from batch[rank * part : (rank + 1) * part]

    def __len__(self) -> int:
        return self.size


# what decoders raise on a damaged file; open_image turns it into a UserError, which is a ValueError
BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
MAX_TRIES = 100  # broken items in a row: after that, single images are not the fault


class Loaded(NamedTuple):
    """An item, and the errors of broken ones it replaces. `item` is None if it was dropped."""

    item: Any
    broken: list[str]


class SeededItems(Dataset):
    """Loads an item with its own random seed, which leaves the main process's random state alone.

    `broken` says what to do with an item that can't be loaded: `raise` the error, `replace` it
    with the next one that loads (which depends only on the item and its seed), or `drop` it.
    """

    def __init__(self, dataset: Dataset, broken: str = "raise", size: int | None = None):
        self.dataset, self.broken = dataset, broken
        self.size = len(dataset) if size is None else size  # type: ignore[arg-type]

    def __getitem__(self, draw: SeededIndex) -> Loaded:
        if self.broken == "raise":
            return Loaded(self._load(draw.index, draw.seed), [])
        reasons: list[str] = []
        for attempt in range(min(self.size, MAX_TRIES)):
            index = (draw.index + attempt) % self.size
            # another seed each time, since a randomly chosen partner may be the broken one
            seed = derived_seed(draw.seed, attempt) if attempt else draw.seed
            try:
                return Loaded(self._load(index, seed), reasons)
            except BROKEN as e:
                reasons.append(self._reason(e, index))
            if self.broken == "drop":
                return Loaded(None, reasons)
        raise UserError(
            f"--skip_broken: {len(reasons)} items in a row can't be loaded, the last one because: "
            f"{reasons[-1]}"
        )

    def _load(self, index: int, seed: int) -> Any:
        if get_worker_info() is None:
            with seeded(seed):
                item = self.dataset[index]
        else:
            # restoring NumPy's state would take a twentieth of the time, and a worker draws for
            # items only
            seed_cpu(seed)
            item = self.dataset[index]
        if item is None:
            raise UserError(
                f"item {index} of {type(self.dataset).__name__} is None: return a dictionary from "
                "__getitem__ (--skip_broken takes the next one)"
            )
        return item

    def _reason(self, error: Exception, index: int) -> str:
        text = in_one_line(error)
        if isinstance(error, UserError):
            return text  # names the file
        # a user's dataset: find the files of the item in its lists of paths
        paths = [v[index] for v in lists_of_files(self.dataset) if index < len(v)]
        named = [str(p) for p in paths if str(p) not in text]
        return f"{', '.join(named) or f'item {index}'}: {text}"


class NoSuchEntry(UserError, KeyError):
    """The model needs an entry that the dataset does not return."""

    __str__ = BaseException.__str__  # KeyError's adds quotes


class Batch(dict):
    """A batch by name; a missing entry raises NoSuchEntry."""

    def __missing__(self, key: Any) -> Any:
        raise NoSuchEntry(
            f"the model needs '{key}', and the dataset gives only {', '.join(map(str, self))}: "
            "--model and --dataset_mode do not go together"
        )


class Collate:
    """Returns a batch (None if all its items were dropped), and the errors of broken items."""

    def __init__(self) -> None:
        self.shared = SharedBatches()

    def __call__(self, loaded: list[Loaded]) -> tuple[Any, list[str]]:
        items = [one.item for one in loaded if one.item is not None]
        _check_sizes(items)
        batch = self.shared.collate(items) if items else None
        return batch, [r for one in loaded for r in one.broken]


def _check_sizes(items: list[Any]) -> None:
    """Raise UserError if images of different sizes would be in one batch."""
    if not items or not isinstance(items[0], dict):
        return
    for name, first in items[0].items():
        pictures = [item.get(name) for item in items]
        if not all(torch.is_tensor(x) and x.dim() == 3 for x in pictures):
            continue
        other = next((x for x in pictures if x.shape[1:] != first.shape[1:]), None)
        if other is not None:
            sizes = [f"{x.shape[2]}x{x.shape[1]}" for x in (first, other)]
            raise UserError(
                f"images of {sizes[0]} and {sizes[1]} ({name}) make no batch: say --batch_size 1 "
                "or --preprocess resize_and_crop"
            )


_open_loaders: weakref.WeakSet[EpochLoader] = weakref.WeakSet()


# Registered after torch is imported, so that it runs before two other exit handlers: torch's, after
# which a DataLoader no longer ends its workers, and multiprocessing's, which waits for them.
@atexit.register
def _close_all() -> None:
    for loader in list(_open_loaders):
        if loader.process == os.getpid():  # not in a fork: the workers are its parent's
            loader.close()


class EpochLoader:
    """Iterating over it gives the batches of the epoch that was set, or else of the next one.

    `broken` says what to do with items that can't be loaded, see `SeededItems`; `self.broken`
    collects the reasons, once each. Each of `world_size` processes gets its share.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        shuffle: bool,
        workers: int,
        limit: float = float("inf"),
        seed: int | None = None,
        pin_memory: bool = False,
        broken: str = "raise",
        rank: int = 0,
        world_size: int = 1,
    ):
        size = int(min(len(dataset), limit))
        seed = new_seed() if seed is None else seed
        self.order = EpochOrder(size, shuffle, seed, (rank, world_size, batch_size))
        self.collate = Collate()
        self.loader = DataLoader(
            SeededItems(dataset, broken, size),
            collate_fn=self.collate,
            batch_size=batch_size,
            sampler=self.order,
            num_workers=workers,
            multiprocessing_context=WORKER_START_METHOD if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=start_worker,
            # its own generator, so that starting an epoch does not change the model's random state
            generator=torch.Generator().manual_seed(0),
        )
        self._epoch, self._start = 0, 0
        self.broken: dict[str, None] = {}  # in the order in which they came up
        self.process = os.getpid()
        _open_loaders.add(self)
        # a program that uses this one as a library may have its own
        if pin_memory and threading.excepthook is threading.__excepthook__:
            threading.excepthook = _quiet_when_workers_end

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch that the next iteration yields, and the item to start it at."""
        self._epoch, self._start = epoch, start

    def __iter__(self) -> Iterator[Any]:
        self.order.epoch, self.order.start = self._epoch, self._start
        self._epoch, self._start = self._epoch + 1, 0
        handler = _sigchld_handler()
        loaded = iter(self.loader)
        if _sigchld_handler() is not handler:
            # torch's raises in the middle of whatever runs; without it, the next batch raises
            signal.signal(signal.SIGCHLD, handler)
        return self._batches(loaded)

    def _batches(self, loaded: Iterator[tuple[Any, list[str]]]) -> Iterator[Any]:
        for batch, broken in loaded:
            self.broken.update(dict.fromkeys(broken))
            if batch is not None:
                yield Batch(batch) if type(batch) is dict else batch

    def close(self) -> None:
        """End the workers; at exit this happens by itself."""
        iterator = getattr(self.loader, "_iterator", None)
        shut_down = getattr(iterator, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
            self.loader._iterator = None  # or the next epoch would ask the workers that ended
        self.collate.shared.close()


def _sigchld_handler() -> Any:
    """The signal handler for the end of a child process; None on Windows."""
    return signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None


def _quiet_when_cut_off(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    # not an error: a main process that ends early does not take the batches waiting for it
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, traceback)


def _quiet_when_workers_end(args: Any) -> None:
    # if a worker is killed, the thread that pins memory fails too, but the next batch says why
    pinning = args.thread is not None and "_pin_memory_loop" in args.thread.name
    if not (pinning and issubclass(args.exc_type, (EOFError, OSError))):
        threading.__excepthook__(args)


def start_worker(worker: int) -> None:
    sys.excepthook = _quiet_when_cut_off
    ignore_warnings()
    # several workers with a pool of threads each only get in each other's way
    torch.set_num_threads(1)
    leave_signals_to_parent()
    if distributed.world_size() > 1:
        # a worker inherits its parent's connections: if it outlived the parent, other ranks would
        # not see them closed
        distributed.signal_on_parent_death(signal.SIGKILL)
