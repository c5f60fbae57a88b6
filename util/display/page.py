"""The training page: `web/index.html` with the losses and the images of all epochs."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from util import util
from util.errors import warn
from util.files import backup_path
from util.html import HTML

from .base import Logger
from .console import format_scores
from .loss_plot import draw_page
from .loss_record import read_records

PLOT_SECONDS = 60  # minimum time between two plots, each of which takes 1 to 2 s of a core
_PICTURE = re.compile(r"epoch(\d+)_(.+)\.png")


class PageLogger(Logger):
    """Saves one set of images per epoch, and lists those that exist, newest first.

    Args:
        folder: the folder of the experiment; the page is in its subfolder `web`.
        title: name of the experiment.
        width: width of an image, in pixels.
        resumed_at: the epoch in which a run resumes, None for a new run. A new run renames the
            page of an earlier one; a resumed run drops later epochs.
    """

    name = "training page"

    def __init__(self, folder: Path, title: str, width: int = 256, resumed_at: int | None = None):
        self.folder, self.title, self.width = folder, title, width
        self.web_dir = folder / "web"
        self.epoch = resumed_at or 0
        self.saved_epoch = 0
        self.not_before = 0.0
        self.plotting: subprocess.Popen | None = None
        self.plotted_at = time.monotonic()
        self.can_plot = importlib.util.find_spec("matplotlib") is not None
        if not self.can_plot:
            warn("no plot of the losses: the package matplotlib is not installed")
        if resumed_at is None and (self.web_dir / "index.html").exists():
            os.replace(self.web_dir, backup_path(self.web_dir))
        # labels stand on the page in the order in which the model names its images
        self.labels: list[str] = []
        (self.web_dir / "images").mkdir(parents=True, exist_ok=True)

    def show_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        if not step["save"] and self.saved_epoch == step["epoch"]:
            return
        self.epoch = self.saved_epoch = step["epoch"]
        self.labels = list(pictures)
        for label, picture in pictures.items():
            path = self.web_dir / "images" / f"epoch{step['epoch']:03d}_{label}.png"
            util.save_image(picture, path)
        self.write()

    def log_scores(self, record: dict[str, Any]) -> None:
        self.write()

    def end_epoch(self, epoch: int) -> None:
        """Start drawing the plots, in a separate process that training does not wait for."""
        busy = self.plotting is not None and self.plotting.poll() is None
        if self.can_plot and not busy and time.monotonic() - self.plotted_at > PLOT_SECONDS:
            self.plotted_at = time.monotonic()
            self.plotting = subprocess.Popen(
                [sys.executable, "-m", draw_page.__module__, self.folder.resolve(), self.title],
                cwd=Path(__file__).resolve().parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def close(self) -> None:
        if self.can_plot:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if self.plotting is not None:
                    self.plotting.wait(10)  # or it might overwrite the last plots
            draw_page(self.folder, self.title)
        self._write()

    def write(self) -> None:
        """Write the page, unless that would take more than a hundredth of the time."""
        start = time.monotonic()
        if start >= self.not_before:
            self._write()
            end = time.monotonic()
            self.not_before = end + 99 * (end - start)

    def _write(self) -> None:
        """Write the page from the files that exist."""
        page = HTML(self.web_dir, f"Experiment name = {self.title}", refresh=0)
        scores = read_records(self.folder / "scores.jsonl", "scores")
        for name, text in (("loss", "losses by epoch"), ("scores", "scores by epoch")):
            if (self.web_dir / f"{name}_narrow.png").exists():
                page.add_wide_image(f"{name}.png", text, f"{name}_narrow.png")
        if scores:
            page.add_text(format_scores(scores[-1]))
        epochs: dict[int, dict[str, str]] = {}
        for path in page.get_image_dir().iterdir():
            match = _PICTURE.fullmatch(path.name)
            if match and int(match.group(1)) <= self.epoch:
                epochs.setdefault(int(match.group(1)), {})[match.group(2)] = path.name
        for epoch in sorted(epochs, reverse=True):
            files = epochs[epoch]
            labels = [label for label in self.labels if label in files]
            labels += sorted(files.keys() - set(labels))
            names = [files[label] for label in labels]
            page.add_header(f"epoch {epoch}")
            page.add_images(names, labels, names, width=self.width)
        page.save()
