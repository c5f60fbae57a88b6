"""Losses and images as TensorBoard event files."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from util.errors import UserError

from .base import BackgroundLogger, scalars_of

FLUSH_SECONDS = 10


class TensorBoardLogger(BackgroundLogger):
    """Writes `loss/<name>`, `val/<name>`, `lr` and `time/...` by images seen, and the images.

    Raises UserError if the folder can't be written.

    Args:
        log_dir: folder of the event files.
        resumed_at: images seen so far; events beyond that, of an earlier part of the run or of
            another run, are no longer shown, so that each curve continues from there.
    """

    name = "TensorBoard"
    picture_backlog = 4

    def __init__(self, log_dir: str | os.PathLike, resumed_at: int = 0):
        super().__init__()
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(
                os.fspath(log_dir), purge_step=resumed_at + 1, flush_secs=FLUSH_SECONDS
            )
        except OSError as e:
            raise UserError(f"--use_tensorboard can't write to {log_dir}: {e.strerror}") from None
        self._thread.start()

    def _write_record(self, record: dict[str, Any]) -> None:
        for tag, value in scalars_of(record).items():
            self._writer.add_scalar(tag, value, record["images"])

    def _write_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        for label, array in pictures.items():
            tag = f"pictures/{label}"
            self._writer.add_image(tag, array, step["images"], dataformats="HWC")

    def _finish(self) -> None:
        self._writer.close()
