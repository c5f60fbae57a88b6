"""The one place that the training loop shows things to, and the saving of result pictures."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import distributed, util
from .background import BackgroundWork
from .display.base import Logger
from .display.loggers import open_loggers
from .errors import say, warn
from .html import HTML
from .run.position import Position

ADVICE_AFTER = 60.0  # seconds of training in which waiting for data must have been too much
ADVICE_SHARE = 0.3
SMALL = 2**20  # values of a picture up to which results wait on the GPU to be encoded


class Visualizer:
    """Passes losses and pictures on to loggers: console, log, record, page, and what is asked for.

    A logger that fails is switched off with one warning; training goes on.
    """

    def __init__(
        self,
        opt: argparse.Namespace,
        epoch_size: int | None = None,
        position: Position | None = None,
    ):
        """`epoch_size` is the number of images in an epoch; `position` is kept by the loop.

        For a loop that keeps none, as the original's, this keeps one, by what the loop shows, and
        opens the views at once. Otherwise `open` does.
        """
        self.opt = opt
        self.epoch_size = epoch_size
        self.keeps_position = position is None
        self.position = position or Position(epoch=opt.epoch_count)
        self._start_timing(time.perf_counter())
        self.total_waited = self.total_time = 0.0
        self.advised = False
        self.epoch_begun = time.monotonic(), self.position.total_iters
        self.begun = dataclasses.replace(self.position)
        self.loggers: list[Logger] = []
        if position is None:
            self.open()

    def open(self, set_aside: Callable[[], None] = lambda: None) -> None:
        """Open the views, which set files of an earlier training aside, after `set_aside`."""
        start = time.perf_counter()
        # what the first of several processes shows are its own losses and pictures
        if distributed.is_main():
            self.loggers = open_loggers(self.opt, self.begun, set_aside)
        else:
            set_aside()
        atexit.register(self.close)  # for loops that do not close it
        self.since += time.perf_counter() - start  # is no time of an iteration

    def _each(self, call: str, *args: Any) -> None:
        for logger in list(self.loggers):
            try:
                getattr(logger, call)(*args)
            except Exception as e:
                self.loggers.remove(logger)
                warn(f"{logger.name} is switched off: {type(e).__name__}: {e}")
                with contextlib.suppress(Exception):
                    logger.switch_off()

    def __enter__(self) -> Visualizer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- the loop
    def set_dataset_size(self, size: int) -> None:
        """Tell the number of images in an epoch."""
        self.epoch_size = size

    def _move_to(self, epoch: int, iters: int) -> None:
        """Move the position of a loop that keeps none: `iters` images into `epoch`."""
        position = self.position
        if not self.keeps_position:
            return
        before = position.total_iters - position.epoch_iter
        if epoch != position.epoch:
            seen = self.epoch_size or position.epoch_iter
            before += seen * (epoch - position.epoch)
        position.epoch, position.epoch_iter, position.total_iters = epoch, iters, before + iters

    def batches(self, dataset: Iterable[Any]) -> Iterator[Any]:
        """The batches of a dataset, with the wait for each one measured, under a progress bar."""
        position, size = self.position, self.epoch_size
        self.epoch_begun = time.monotonic(), position.total_iters
        bar = tqdm(
            total=size,
            initial=position.epoch_iter,
            desc=f"epoch {position.epoch}",
            unit="img",
            leave=False,
            disable=not sys.stderr.isatty(),
        )
        with bar:
            iterator = iter(dataset)
            # the start of the workers is no sign of slow data
            self._start_timing(time.perf_counter())
            while True:
                start = time.perf_counter()
                try:
                    data = next(iterator)
                except StopIteration:
                    return
                self.waited += time.perf_counter() - start
                before = position.epoch_iter
                yield data
                bar.update(position.epoch_iter - before)

    def _start_timing(self, now: float) -> None:
        self.since, self.since_images, self.waited = now, self.position.total_iters, 0.0

    def reset(self) -> None:
        """At the start of an epoch; nothing to do, kept for loops that call it."""

    def timing(self) -> tuple[float, float]:
        """Seconds an image since the last call: for computing, and for waiting on data."""
        now = time.perf_counter()
        elapsed, waited = now - self.since, self.waited
        images = max(1, self.position.total_iters - self.since_images)
        self._start_timing(now)
        self.total_time += elapsed
        self.total_waited += waited
        slow = self.total_waited > ADVICE_SHARE * self.total_time
        if slow and self.total_time > ADVICE_AFTER and not self.advised:
            self.advised = True
            share = self.total_waited / self.total_time
            with contextlib.suppress(OSError):  # the terminal may be gone
                tqdm.write(
                    f"{share:.0%} of the time goes to waiting for pictures: more --num_threads "
                    f"(now {self.opt.num_threads}) or smaller files on a faster disk would help"
                )
        return (elapsed - waited) / images, waited / images

    def log_losses(self, losses: Mapping[str, float], lr: float) -> None:
        """Show the losses of the current iteration everywhere."""
        compute, data = self.timing()
        position = self.position
        self.print_current_losses(position.epoch, position.epoch_iter, losses, compute, data, lr=lr)

    def print_current_losses(
        self,
        epoch: int,
        iters: int,
        losses: Mapping[str, float],
        t_comp: float,
        t_data: float,
        lr: float = 0.0,
    ) -> None:
        """Show losses: `iters` images into `epoch`, at so many seconds an image."""
        self._move_to(epoch, iters)
        record = {
            "epoch": epoch,
            "iters": iters,
            "images": self.position.total_iters,
            "progress": epoch - 1 + iters / (self.epoch_size or max(1, iters)),
            "lr": lr,
            "time": t_comp,
            "data": t_data,
            "losses": dict(losses),
        }
        self._each("log_losses", record)

    def plot_current_losses(self, *args: Any) -> None:
        """Draw nothing: `print_current_losses` feeds every view, for loops that call both.

        What loops of the original say here tells where they are: `(epoch, share of the epoch that
        is over, losses)`, later `(images seen in all, losses)`.
        """
        position = self.position
        if not self.keeps_position or len(args) < 2:
            return
        if len(args) == 2:
            position.total_iters = int(args[0])
        elif args[1] > 0:
            self.epoch_size = round(position.epoch_iter / args[1])

    def display_current_results(
        self, visuals: Mapping[str, Any], epoch: int, *images_and_save: int
    ) -> None:
        """Show pictures: `(visuals, epoch, save)`, or `(visuals, epoch, images seen in all, save)`.

        `visuals` are (N, C, H, W) in [-1, 1], the first of which is shown, or uint8 (H, W, C).
        `save` keeps them on the training page even if it has some of this epoch.
        """
        position = self.position
        *images, save_result = images_and_save
        if self.keeps_position and epoch != position.epoch:
            self._move_to(epoch, 0)
        if self.keeps_position and images:
            position.epoch_iter += images[0] - position.total_iters
            position.total_iters = images[0]
        if not self.loggers:  # no copies from the GPU for nobody
            return
        step = {
            "epoch": epoch,
            "iters": position.epoch_iter,
            "images": position.total_iters,
            "save": bool(save_result),
        }
        pictures = {label: util.tensor2im(image) for label, image in visuals.items()}
        self._each("show_pictures", pictures, step)

    def log_scores(self, record: Mapping[str, Any]) -> None:
        """Show the scores of a validation everywhere."""
        self._each("log_scores", record)

    def end_epoch(self, epoch: int) -> None:
        """Tell the views that an epoch is over, and print what it took and what is left."""
        self._each("end_epoch", epoch)
        last = self.opt.n_epochs + self.opt.n_epochs_decay
        begun, images = self.epoch_begun
        seconds = time.monotonic() - begun
        # a resumed epoch has fewer images
        share = (self.position.total_iters - images) / (self.epoch_size or 1)
        hours = seconds / share * (last - epoch) / 3600 if share > 0 else 0.0
        left = f", about {hours:.1f} h left" if hours >= 0.1 else ""
        say(f"End of epoch {epoch} / {last} \t Time Taken: {seconds:.0f} sec{left}")

    def close(self) -> None:
        """Finish all views; they show nothing from then on."""
        atexit.unregister(self.close)
        self._each("close")
        self.loggers = []


def save_images(
    webpage: HTML,
    visuals: Mapping[str, Any],
    image_path: list[str],
    aspect_ratio: float = 1.0,
    width: int = 256,
    use_wandb: bool = False,
) -> None:
    """Save the pictures of one input below the page's `images/`, and add them to it as a row.

    `visuals` are (N, C, H, W) in [-1, 1], the first of which is saved, or uint8 (H, W, C); `width`
    is that of a picture on the page.
    """
    name = Path(image_path[0]).stem
    files = write_visuals(
        webpage.get_image_dir(), visuals, image_path[0], name, aspect_ratio, BackgroundWork(0)
    )
    webpage.add_header(name)
    webpage.add_images(files, list(visuals), files, width=width)


def write_visuals(
    img_dir: Path,
    visuals: Mapping[str, Any],
    input_path: str,
    name: str,
    aspect_ratio: float,
    encoders: BackgroundWork,
) -> list[str]:
    """Write the pictures of one input in the background; returns the paths below `img_dir`.

    `visuals` are as for `save_images`. Files are called `<name>_<label>.png`; `name` may have
    folders in it.
    """
    files = []
    for label, image in visuals.items():
        file = f"{name}_{label}.png"
        path = img_dir / file
        path.parent.mkdir(parents=True, exist_ok=True)
        # inputs of the models here, in files as large as they are
        source = input_path if label in ("real", "real_A") and aspect_ratio == 1 else None
        own = _copy(image) if torch.is_tensor(image) else util.tensor2im(image)
        encoders.submit(_write_result, own, path, aspect_ratio, source)
        files.append(file)
    return files


def _copy(pictures: torch.Tensor) -> torch.Tensor:
    """A copy of the first picture: a model may use the memory of a result again.

    Where it is, so that nothing waits for a GPU; of a large one on the CPU, since many may queue.
    """
    first = pictures.detach()[:1]
    return first.clone() if first.numel() <= SMALL else first.to("cpu", copy=True)


def _write_result(image: Any, path: Path, aspect_ratio: float, source: str | None) -> None:
    if torch.is_tensor(image) and image.isnan().any():
        warn(f"{path.name} is black where the model gave NaN")
    pixels = util.tensor2im(image)
    if source is None or not util.copy_if_equal(source, pixels, path):
        util.save_image(pixels, path, aspect_ratio)
