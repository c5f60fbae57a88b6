"""How far training has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from util.util import crossed


@dataclass
class Position:
    """Epoch and images seen; `epoch` is the one in progress, counted from 1."""

    epoch: int = 1
    epoch_iter: int = 0  # images seen in this epoch
    total_iters: int = 0  # images seen in all

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Position:
        """The position in a training state."""
        return cls(state["epoch"], state["epoch_iter"], state["total_iters"])

    def advance(self, batch_size: int, epoch_size: int) -> None:
        """Count a batch; the last one of an epoch may be smaller."""
        images = min(batch_size, epoch_size - self.epoch_iter)
        self.epoch_iter += images
        self.total_iters += images

    def due(self, frequency: int, before: int, epoch_size: int) -> bool:
        """Whether to show something: a multiple of `frequency` was crossed since `before` images.

        If an epoch crosses none, its end counts.
        """
        over = self.epoch_iter >= epoch_size
        silent = not crossed(frequency, self.total_iters - self.epoch_iter, self.total_iters)
        return crossed(frequency, before, self.total_iters) or (over and silent)

    def next_epoch(self) -> None:
        """Go to the start of the next epoch."""
        self.epoch += 1
        self.epoch_iter = 0
