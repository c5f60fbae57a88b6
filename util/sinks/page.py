"""The training page: `web/index.html` with the losses and the pictures of all epochs."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from util import util
from util.html import HTML
from util.loss_record import read_records
from util.plot_losses import draw

from .base import Sink

_PICTURE = re.compile(r"epoch(\d+)_(.+)\.png")


class PageSink(Sink):
    """Keeps the pictures of one moment of each epoch and lists those that exist, newest first."""

    name = "training page"

    def __init__(self, folder: Path, title: str, width: int = 256):
        """`folder` is that of the experiment; `width` is that of a picture, in pixels."""
        self.folder, self.title, self.width = folder, title, width
        self.web_dir = folder / "web"
        self.saved_epoch = 0
        self.plot_time, self.plot_cost = 0.0, 0.0
        # the order of labels on the page is that in which the model names its pictures
        self.labels: list[str] = []
        (self.web_dir / "images").mkdir(parents=True, exist_ok=True)

    def show_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        if not step["save"] and self.saved_epoch == step["epoch"]:
            return
        self.saved_epoch, self.labels = step["epoch"], list(pictures)
        for label, picture in pictures.items():
            path = self.web_dir / "images" / f"epoch{step['epoch']:03d}_{label}.png"
            util.save_image(picture, path)
        self.write()

    def end_epoch(self, epoch: int) -> None:
        # a plot costs time too: at most a hundredth of it
        if time.monotonic() - self.plot_time > 100 * self.plot_cost:
            self.plot()

    def close(self) -> None:
        self.plot()

    def plot(self) -> None:
        """Draw the losses, to the experiment's folder and to the page."""
        start = time.monotonic()
        records = read_records(self.folder / "losses.jsonl")
        if records:
            first = not (self.web_dir / "loss.png").exists()
            draw(records, self.folder / "loss.png", self.title)
            shutil.copyfile(self.folder / "loss.png", self.web_dir / "loss.png")
            if first:
                self.write()
        self.plot_time = time.monotonic()
        self.plot_cost = self.plot_time - start

    def write(self) -> None:
        """Write the page from the files there are."""
        page = HTML(self.web_dir, f"Experiment name = {self.title}", refresh=0)
        if (self.web_dir / "loss.png").exists():
            page.add_wide_image("loss.png", "losses by epoch")
        epochs: dict[int, dict[str, str]] = {}
        for path in page.get_image_dir().iterdir():
            if match := _PICTURE.fullmatch(path.name):
                epochs.setdefault(int(match.group(1)), {})[match.group(2)] = path.name
        for epoch in sorted(epochs, reverse=True):
            files = epochs[epoch]
            labels = [label for label in self.labels if label in files]
            labels += sorted(files.keys() - set(labels))
            names = [files[label] for label in labels]
            page.add_header(f"epoch {epoch}")
            page.add_images(names, labels, names, width=self.width)
        page.save()
