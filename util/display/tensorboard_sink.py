"""Losses and pictures as TensorBoard event files."""

from __future__ import annotations

import os
from typing import Any

from util.errors import UserError

from .background import BackgroundSink

FLUSH_SECONDS = 10


class TensorBoardSink(BackgroundSink):
    """Writes `loss/<name>`, `val/<name>`, `lr` and `time/...` by images seen, and the pictures.

    Args:
        log_dir: folder of the event files.
        resumed_at: images seen when a run is resumed, None for a new one; what an earlier part of
            the run has written beyond it is no longer shown, so that each curve goes on from there.

    Raises:
        UserError: the package is not installed, or the folder can't be written.
    """

    name = "TensorBoard"
    picture_backlog = 4

    def __init__(self, log_dir: str | os.PathLike, resumed_at: int | None = None):
        super().__init__()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "--use_tensorboard needs the package tensorboard, which is not installed: "
                "pip install tensorboard, or leave the flag out"
            ) from None
        try:
            self._writer = SummaryWriter(
                os.fspath(log_dir),
                purge_step=None if resumed_at is None else resumed_at + 1,
                flush_secs=FLUSH_SECONDS,
            )
        except OSError as e:
            raise UserError(f"--use_tensorboard can't write to {log_dir}: {e.strerror}") from None
        self._thread.start()

    def _run(self) -> None:
        while True:
            last = self._stop.is_set()
            while self._records:
                self._write_record(self._records.popleft())
            while self._pictures:
                pictures, step = self._pictures.popleft()
                for label, array in pictures.items():
                    self._writer.add_image(
                        f"pictures/{label}", array, step["images"], dataformats="HWC"
                    )
            if last:
                self._writer.close()
                return
            self._wake.wait()
            self._wake.clear()

    def _write_record(self, record: dict[str, Any]) -> None:
        step = record["images"]
        scalars = {f"loss/{name}": value for name, value in record["losses"].items()}
        scalars |= {f"val/{name}": value for name, value in record.get("scores", {}).items()}
        scalars |= {
            tag: record.get(key)
            for tag, key in (("lr", "lr"), ("time/compute", "time"), ("time/data", "data"))
        }
        for tag, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)
