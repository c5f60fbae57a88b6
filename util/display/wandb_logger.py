"""Losses and images on Weights & Biases, or in its offline folder."""

from __future__ import annotations

import argparse
import contextlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError, in_one_line, warn
from util.files import write_whole

from .base import BackgroundLogger, scalars_of

ID_FILE = "wandb_id.txt"
START_SECONDS = 30


class WandbLogger(BackgroundLogger):
    """Logs losses, rates and images to a W&B run, by images seen.

    The run's id is kept in the experiment's folder, so that a resumed run continues the same W&B
    run. W&B itself decides what is uploaded: WANDB_MODE=offline keeps everything on this machine.
    Raises UserError if W&B can't start the run.

    Args:
        opt: the options, which are shown with the run.
        dir: the experiment's folder.
        resumed: whether to continue the run whose id is in the folder.
    """

    name = "W&B"
    picture_backlog = 4

    def __init__(self, opt: argparse.Namespace, dir: Path, resumed: bool = False):
        super().__init__()
        import wandb

        self._wandb = wandb
        self.run_id = _run_id(dir / ID_FILE, resumed)
        # Here and not on the thread: W&B may ask for a key, and whoever asked for W&B should learn
        # at once if it does not work. Training has hardly begun.
        resume = "allow" if resumed else None
        self._run_handle = start_run(opt, dir, id=self.run_id, resume=resume)
        # Not W&B's own step, which can only grow: a run may go on from an older checkpoint.
        self._run_handle.define_metric("images")
        self._run_handle.define_metric("*", step_metric="images")
        self._thread.start()

    def _write_record(self, record: dict[str, Any]) -> None:
        values = {**scalars_of(record), "epoch": record.get("progress"), "images": record["images"]}
        self._run_handle.log(values)

    def _write_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        at = f"epoch {step['epoch']}, image {step['iters']}"
        media = {
            f"pictures/{label}": self._wandb.Image(array, caption=at)
            for label, array in pictures.items()
        }
        self._run_handle.log({**media, "images": step["images"]})

    def _finish(self) -> None:
        # What this can't send within the time of `close`, W&B sends when Python exits.
        self._run_handle.finish()


def start_run(opt: argparse.Namespace, dir: Path, **more: Any) -> Any:
    """Start a W&B run whose files go to `dir`; raises UserError if W&B can't."""
    import wandb

    try:
        return wandb.init(
            project=opt.wandb_project_name,
            name=opt.name,
            config={k: v for k, v in vars(opt).items() if k != "device"},
            dir=str(dir),
            settings=wandb.Settings(init_timeout=START_SECONDS),
            **more,
        )
    except Exception as e:
        raise UserError(
            f"--use_wandb: W&B can't start a run ({in_one_line(e, 200)}); "
            "WANDB_MODE=offline keeps the run on this machine"
        ) from None


def log_result(name: str, files: Mapping[str, Path]) -> None:
    """Log the images of one input, by label, to the W&B run that this process has started.

    Only warns if W&B fails.
    """
    import wandb

    try:
        wandb.log({label: wandb.Image(str(file), caption=name) for label, file in files.items()})
    except Exception as e:
        warn(f"--use_wandb: the images of {name} are not logged ({in_one_line(e, 200)})")


def _run_id(path: Path, resumed: bool) -> str:
    """The id in the file for a resumed run, else a new one, which is written there."""
    if resumed:
        with contextlib.suppress(OSError):
            kept = path.read_text(encoding="utf-8").strip()
            if kept:
                return kept
    run_id = uuid.uuid4().hex[:12]
    write_whole(path, run_id + "\n")
    return run_id
