"""Opening the loggers that the options ask for; the logger that keeps losses or scores."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from util.errors import UserError, warn
from util.files import backup_path
from util.run.position import Position
from util.run.saved_options import experiment_folder

from .base import Logger
from .console import ConsoleLogger, TextFileLogger
from .loss_record import append_record, cut, read_records
from .page import PageLogger
from .tensorboard_logger import TensorBoardLogger
from .wandb_logger import WandbLogger


class RecordLogger(Logger):
    """Appends each record that has `key` as a line of `<key>.jsonl`, which other views read."""

    def __init__(self, folder: Path, key: str, position: Position):
        """`position` is where the run starts: a resumed one has seen images, a new one none."""
        self.name, self.key = f"{key}.jsonl", key
        self.path = path = folder / self.name
        if not position.total_iters and path.exists() and path.stat().st_size:
            # from an earlier training under this name: kept, but not continued
            os.replace(path, backup_path(path))
        images, epoch = position.total_iters, position.epoch
        # an epoch is saved before it is scored, so its scores are computed again after a resume
        scores = key == "scores"
        cut(path, key, lambda r: r["images"] <= images and not (scores and r["epoch"] >= epoch))
        self.unwritten: list[dict[str, Any]] = []

    def log_losses(self, record: dict[str, Any]) -> None:
        if self.key not in record:
            return
        self.unwritten.append(record)
        self._write()

    def _write(self) -> None:
        try:
            while self.unwritten:
                append_record(self.path, self.unwritten[0])
                del self.unwritten[0]
        except OSError as e:  # a full disk may have room again
            if len(self.unwritten) == 1:
                warn(f"{self.path}: {e.strerror or e}; tried again with the next record")

    log_scores = log_losses

    def close(self) -> None:
        self._write()


def open_loggers(
    opt: argparse.Namespace, position: Position, set_aside: Callable[[], None]
) -> list[Logger]:
    """The loggers that the options ask for, of a run that is at `position`.

    Calls `set_aside` once the services are open. A logger that can't be opened is disabled with a
    warning, unless it raises UserError.
    """
    folder = experiment_folder(opt)
    folder.mkdir(parents=True, exist_ok=True)
    resumed, scores = position.total_iters > 0, folder / "scores.jsonl"

    def visdom() -> Logger:
        from .visdom_logger import VisdomLogger

        return VisdomLogger(
            server=opt.display_server,
            port=opt.display_port,
            env=opt.display_env,
            display_id=opt.display_id,
            ncols=opt.display_ncols,
            title=opt.name,
            history=read_records(folder / "losses.jsonl"),
            scores=read_records(scores, "scores"),
            winsize=opt.display_winsize,
        )

    loggers: list[Logger] = []

    def add(make: Callable[..., Logger], *args: Any) -> None:
        try:
            loggers.append(make(*args))
        except UserError:
            raise
        except Exception as e:
            warn(f"a view of this run can't be opened and is disabled: {type(e).__name__}: {e}")

    # opened before anything is set aside, since a failure of theirs ends training
    if opt.use_wandb:
        add(WandbLogger, opt, folder, resumed)
    if opt.use_tensorboard:
        add(TensorBoardLogger, folder / "tb", position.total_iters)
    set_aside()
    add(ConsoleLogger)
    add(TextFileLogger, folder / "loss_log.txt")
    add(RecordLogger, folder, "losses", position)  # before others, which read it
    # also to set aside the scores of an earlier training under this name
    if opt.val_freq > 0 or scores.exists():
        add(RecordLogger, folder, "scores", position)
    if not opt.no_html:
        resumed_at = position.epoch if resumed else None
        add(PageLogger, folder, opt.name, opt.display_winsize, resumed_at)
    if opt.display_id > 0:
        add(visdom)
    return loggers
