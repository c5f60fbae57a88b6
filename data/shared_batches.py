"""Pass batches from worker processes through shared memory that is reused.

Touching memory for the first time costs most. So each worker keeps a few slots, writes a batch into
a free one, and sends only its number. A slot is free again when the last tensor that views it is
gone, so a batch that somebody keeps is never overwritten.
"""

from __future__ import annotations

import math
import uuid
import weakref
from typing import Any, NamedTuple

import torch
from torch.utils.data import default_collate, get_worker_info

# Two batches of a worker wait, one is being made, one is in use. If all slots are taken or too
# small, a batch is sent in PyTorch's own way.
MAX_SLOTS = 4
HEADER = 64  # bytes; the first one says whether the slot is in use
ALIGNED = 64


class Layout(NamedTuple):
    """Where a tensor starts in a slot, in bytes, with its dtype and shape."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


class SharedBatches:
    """Both ends of the handover for one loader: workers use `collate`, the parent `close`."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        self.slots: list[torch.Tensor] = []  # this worker's, as bytes
        self.opened: dict[tuple[int, int], torch.Tensor] = {}  # by worker and slot number
        _receivers[self.token] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"token": self.token, "slots": [], "opened": {}}

    def collate(self, items: list[Any]) -> Any:
        """Collate items. In a worker: a handle that unpickles to the batch."""
        worker = get_worker_info()
        if worker is None or type(items[0]) is not dict:
            return default_collate(items)
        layouts: dict[str, Layout] = {}
        end = HEADER
        for name in items[0]:
            tensors = [item.get(name) for item in items]
            if _make_a_batch(tensors):
                shape = torch.Size((len(items), *tensors[0].shape))
                layouts[name] = Layout(end, tensors[0].dtype, shape)
                end += math.ceil(_bytes(layouts[name]) / ALIGNED) * ALIGNED
        found = self._free_slot(end) if layouts else None
        if found is None:
            return default_collate(items)
        number, fresh = found
        memory = self.slots[number]
        memory[0] = 1
        for name, layout in layouts.items():
            torch.stack([item[name] for item in items], out=_view(memory, layout))
        rest = [{k: v for k, v in item.items() if k not in layouts} for item in items]
        names = list(items[0])
        batch = {**default_collate(rest), **layouts}
        place = (self.token, worker.id, number)
        return _InSlot(place, memory if fresh else None, {name: batch[name] for name in names})

    def _free_slot(self, size: int) -> tuple[int, bool] | None:
        """Number of a free slot of `size` bytes or more, and whether it is new to the other end."""
        for number, memory in enumerate(self.slots):
            if not memory[0] and len(memory) >= size:
                return number, False
        if len(self.slots) == MAX_SLOTS:
            return None
        self.slots.append(torch.zeros(size, dtype=torch.uint8).share_memory_())
        return len(self.slots) - 1, True

    def close(self) -> None:
        """Let go of all slots that no tensor views."""
        self.opened.clear()


_receivers: weakref.WeakValueDictionary[str, SharedBatches] = weakref.WeakValueDictionary()


class _InSlot:
    """A batch whose tensors are in a slot; unpickling it gives the batch."""

    def __init__(
        self, place: tuple[str, int, int], memory: torch.Tensor | None, items: dict[str, Any]
    ):
        self.args = (place, memory, items)

    def __reduce__(self) -> tuple:
        return _take_out, self.args


def _take_out(
    place: tuple[str, int, int], memory: torch.Tensor | None, items: dict[str, Any]
) -> dict[str, Any]:
    token, worker, number = place
    opened = _receivers[token].opened
    if memory is not None:
        opened[worker, number] = memory
    known = opened[worker, number]
    # the tensors' storage keeps this array alive until the last of them is gone
    array = known.numpy()
    # by NumPy: the finalizer may run while a compiler traces what torch does
    weakref.finalize(array, known.numpy().__setitem__, 0, 0).atexit = False
    whole = torch.from_numpy(array)
    return {k: _view(whole, v) if isinstance(v, Layout) else v for k, v in items.items()}


def _view(memory: torch.Tensor, layout: Layout) -> torch.Tensor:
    part = memory[layout.offset : layout.offset + _bytes(layout)]
    return part.view(layout.dtype).view(layout.shape)


def _bytes(layout: Layout) -> int:
    return layout.shape.numel() * layout.dtype.itemsize


def _make_a_batch(values: list[Any]) -> bool:
    """Whether these are plain, non-empty tensors of one kind and shape."""
    if not all(type(x) is torch.Tensor and x.numel() for x in values):
        return False
    kinds = {(x.dtype, x.shape, x.layout, x.device.type, x.requires_grad) for x in values}
    return kinds == {(values[0].dtype, values[0].shape, torch.strided, "cpu", False)}
