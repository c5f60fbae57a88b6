"""Datasets by name, and the loader that the programs iterate over.

To add a dataset `dummy`, write `data/dummy_dataset.py` with a subclass of `BaseDataset` called
`DummyDataset` that has `__init__(self, opt)`, `__len__` and `__getitem__`, and perhaps
`modify_commandline_options`; then say `--dataset_mode dummy`. See `template_dataset.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from util import distributed
from util.errors import UserError
from util.find_class import find_class
from util.run.saved_options import experiment_folder, read_saved_options
from util.util import batched_by

from .cache import open_cache
from .loader import Batch, EpochLoader

if TYPE_CHECKING:
    from .base_dataset import BaseDataset

READ_AS_COLOUR = ("aligned", "unaligned", "single")  # --dataset_mode
TAKE_WHAT_IS_READ = ("cycle_gan", "pix2pix", "cut", "dcl", "test")  # --model
SCALING = ("resize_and_crop", "scale_width", "scale_width_and_crop")  # take --load_size


def find_dataset_using_name(dataset_name: str) -> type[BaseDataset]:
    """The class in `data/<name>_dataset.py` that is called `<name>dataset`, ignoring case.

    Raises UserError for an unknown name.
    """
    # lazily: it imports torchvision, which not every program needs
    from .base_dataset import BaseDataset

    return find_class(__name__, "dataset", dataset_name, BaseDataset)


def get_option_setter(dataset_name: str) -> Callable:
    """The `modify_commandline_options` of that dataset."""
    return find_dataset_using_name(dataset_name).modify_commandline_options


def check_channels(opt: argparse.Namespace) -> None:
    """Raise UserError for channels that images do not have; models of one's own may add some."""
    model = getattr(opt, "model", "")
    known = opt.dataset_mode in READ_AS_COLOUR and model in TAKE_WHAT_IS_READ
    if not known or getattr(opt, "value_range", None):
        return
    for name in ("input_nc",) if model == "test" else ("input_nc", "output_nc"):
        if (count := getattr(opt, name)) not in (1, 3):
            raise UserError(
                f"--{name} {count}: images are read with 1 or 3 channels; --value_range LOW HIGH "
                "(0 255 for 8 bits) reads those with others"
            )


def create_dataset(
    opt: argparse.Namespace, batch_size: int | None = None
) -> CustomDatasetDataLoader:
    """Create the dataset of `opt.dataset_mode` with its loader.

    Batches have `--batch_size` items unless `batch_size` is given. Raises UserError for mistakes.
    """
    check_channels(opt)
    return CustomDatasetDataLoader(opt, batch_size)


def equal_batches(
    items: Iterable[dict[str, Any]],
    size: int,
    count: int | None = None,
    largest: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """Combine consecutive batches (1, C, H, W) of equally large images into (`size`, C, H, W).

    Takes the first `count` items, or all; keeps their order. An image of more than `largest` values
    is a batch by itself.
    """

    def sizes(item: dict[str, Any]) -> list[torch.Size] | None:
        tensors = [value for value in item.values() if isinstance(value, torch.Tensor)]
        return None if any(t.numel() > largest for t in tensors) else [t.shape for t in tensors]

    for batch in batched_by(itertools.islice(items, count), size, sizes):
        if len(batch) == 1:
            yield batch[0]
            continue
        yield {
            key: torch.cat([item[key] for item in batch])
            if isinstance(value, torch.Tensor)
            else [v for item in batch for v in item[key]]
            for key, value in batch[0].items()
        }


def _same_name(A_path: Any, B_path: Any) -> bool:
    named = isinstance(A_path, str) and isinstance(B_path, str)
    return named and Path(A_path).stem == Path(B_path).stem


def _trained_with(opt: argparse.Namespace) -> str:
    """A note on training's `--dataset_mode` if testing uses another one; else empty."""
    if opt.isTrain or opt.model == "test":  # `test` reads a folder of inputs, whatever was trained
        return ""
    trained = read_saved_options(experiment_folder(opt)).get("dataset_mode")
    if trained in (None, opt.dataset_mode):
        return ""
    return (
        f"; this experiment was trained with --dataset_mode {trained}: say that here too if these "
        "images are stored in the same way"
    )


class CustomDatasetDataLoader:
    """A dataset with its loader: iterating over it gives the batches of one epoch."""

    def __init__(self, opt: argparse.Namespace, batch_size: int | None = None):
        self.opt = opt
        self.batch_size = batch_size or opt.batch_size
        self.listed: set[str] = set()  # images that --skip_broken has skipped
        self._open(opt, getattr(opt, "seed", None))

    def _open(self, opt: argparse.Namespace, seed: int | None) -> None:
        """Create the dataset that `opt` describes, its cache, and its worker processes."""
        self.opened_with = opt
        try:
            self.dataset = find_dataset_using_name(opt.dataset_mode)(opt)
        except UserError as e:
            raise UserError(f"{e}{_trained_with(opt)}") from e
        if len(self.dataset) == 0:
            raise UserError(
                f"the {type(self.dataset).__name__} has no items: nothing to go through"
            )
        print(f"dataset [{type(self.dataset).__name__}] was created")
        self.dataset.cache = open_cache(
            opt, self.dataset.listed or 2 * len(self.dataset), int(opt.num_threads)
        )
        # training keeps the length of an epoch; in testing a replacement would be a wrong result
        broken = "replace" if opt.isTrain else "drop"
        self.loader = EpochLoader(
            self.dataset,
            batch_size=self.batch_size,
            shuffle=not opt.serial_batches,
            workers=int(opt.num_threads),
            limit=opt.max_dataset_size,
            seed=seed,
            pin_memory=bool(opt.gpu_ids),
            broken=broken if getattr(opt, "skip_broken", False) else "raise",
            # training may repeat items to fill batches, testing may not: test.py uses `take`
            rank=distributed.rank() if opt.isTrain else 0,
            world_size=distributed.world_size() if opt.isTrain else 1,
        )

    def load_data(self) -> CustomDatasetDataLoader:
        """Return the loader itself, as in the original."""
        return self

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch that the next iteration yields, and the item to start it at.

        With `--decay_at_crop_size` images are scaled to the crop size after `n_epochs` epochs.
        """
        opt = self.opt
        if getattr(opt, "decay_at_crop_size", False) and opt.preprocess in SCALING:
            load_size = opt.crop_size if epoch > opt.n_epochs else opt.load_size
            if load_size != self.opened_with.load_size:
                print(f"epoch {epoch}: images are scaled to {load_size} from now on")
                self.close()
                self.dataset.cache = None  # frees its memory for the next one
                changed = argparse.Namespace(**{**vars(opt), "load_size": load_size})
                self._open(changed, self.seed)
        self.loader.set_epoch(epoch, start)

    def take(self, items: Sequence[int]) -> None:
        """Restrict epochs to these items, given by their positions in the order."""
        self.loader.order.positions = items

    def first(self) -> dict[str, Any]:
        """A batch from the beginning of the order, loaded in this process."""
        draws = itertools.islice(itertools.cycle(self.loader.order), self.batch_size)
        batch, _ = self.loader.collate([self.loader.loader.dataset[draw] for draw in draws])
        return Batch(batch) if type(batch) is dict else batch

    def close(self) -> None:
        """End the worker processes, and list the images that `--skip_broken` has skipped."""
        self.loader.close()
        broken, self.loader.broken = sorted(self.loader.broken.keys() - self.listed), {}
        self.listed.update(broken)
        if broken:
            lines = [f"--skip_broken skipped {len(broken)}:", *broken]
            distributed.print_on_all_ranks("\n  ".join(lines))

    @property
    def paired(self) -> bool:
        """Whether A and B of an item show the same thing.

        If the dataset leaves `paired` open: whether A and B come from one file, or from files of
        the same name, in the first, middle and last item.
        """
        declared = getattr(self.dataset, "paired", None)
        if declared is not None or len(self.dataset) == 0:
            return bool(declared)
        last = len(self.dataset) - 1
        items = []
        for i in sorted({0, last // 2, last}):
            with contextlib.suppress(UserError):  # broken images are reported or skipped later
                items.append(self.dataset[i])
        same = [_same_name(item.get("A_paths"), item.get("B_paths")) for item in items]
        return bool(same) and all(same)

    @property
    def seed(self) -> int:
        """The seed of the order and of random augmentation."""
        return self.loader.order.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.loader.order.seed = seed

    def __len__(self) -> int:
        """The number of items in an epoch."""
        return len(self.loader.order)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.loader)
