"""The contract of a sink: one small class for each place where losses and pictures go."""

from __future__ import annotations

from typing import Any

import numpy as np


class Sink:
    """One view of a training run.

    The methods run on the training loop's thread, on the main process only, and must return at
    once: whatever waits for a disk that may hang or for the network belongs on a thread of the
    sink. A sink that raises is switched off with one warning, and training goes on.
    """

    name = "sink"

    def log_losses(self, record: dict[str, Any]) -> None:
        """Take one line of the record of the run.

        `record` holds `epoch` (from 1), `iters` (images seen in it), `images` (seen in all),
        `progress` (epochs gone by, a fraction: 0.5 is the middle of the first), `lr`, `time` and
        `data` (seconds an image for computing and for waiting on data) and `losses` (name: value).
        """

    def show_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        """Take the current pictures: label to array (H, W, 3) of uint8.

        `step` holds `epoch`, `iters`, `images` as above, and `save`: whether this is also the time
        to keep the pictures as files.
        """

    def log_scores(self, record: dict[str, Any]) -> None:
        """Take the scores of a validation (`--val_freq`).

        `record` holds `epoch`, `images` and `progress` as above, `phase` (`val`), `pictures` (how
        many), `scores` (name: value) and `best` (`by` which score, its `value`, of which `epoch`).
        """

    def end_epoch(self, epoch: int) -> None:
        """Called when an epoch is over."""

    def switch_off(self) -> None:
        """Called, in place of `close`, when one of these methods has raised: end all activity."""

    def close(self) -> None:
        """Finish and let go of everything within a few seconds."""
