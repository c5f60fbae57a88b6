"""The one object that the training loop reports to, and the saving of result images."""

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

import numpy as np
import torch
from tqdm import tqdm

from . import distributed, util
from .background import BackgroundWork
from .display.base import Logger
from .display.loggers import open_loggers
from .display.wandb_logger import log_result
from .errors import say, warn
from .files import replacing
from .html import HTML
from .run.position import Position

ADVICE_AFTER = 60.0  # seconds of training before the user is told that loading data is slow
ADVICE_SHARE = 0.3  # of the time: more waiting for data than this is slow


class Visualizer:
    """Passes losses and images on to loggers: console, log, record, page, and optional ones.

    A logger that fails is switched off with one warning; training goes on.
    """

    def __init__(
        self,
        opt: argparse.Namespace,
        epoch_size: int | None = None,
        position: Position | None = None,
    ):
        """`epoch_size` is the number of images in an epoch; `position` is kept by the loop.

        For a loop that keeps none, such as the original's, this keeps one, derived from what the
        loop shows, and opens the loggers at once. Otherwise `open` opens them.
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
        """Call `set_aside`, and open the loggers, which set aside files of an earlier training."""
        start = time.perf_counter()
        # only rank 0 shows anything: its own losses and images
        if distributed.is_main():
            self.loggers = open_loggers(self.opt, self.begun, set_aside)
        else:
            set_aside()
        atexit.register(self.close)  # for loops that do not close it
        self.since += time.perf_counter() - start  # does not count as time of an iteration

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
        """Set the number of images in an epoch."""
        self.epoch_size = size

    def _move_to(self, epoch: int, iters: int) -> None:
        """Set the position, for a loop that keeps none, to `iters` images into `epoch`."""
        position = self.position
        if not self.keeps_position:
            return
        before = position.total_iters - position.epoch_iter
        if epoch != position.epoch:
            seen = self.epoch_size or position.epoch_iter
            before += seen * (epoch - position.epoch)
        position.epoch, position.epoch_iter, position.total_iters = epoch, iters, before + iters

    def batches(self, dataset: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of a dataset, with a progress bar; measures the wait for each batch."""
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
            # starting the workers does not count as waiting for data
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
        """Do nothing; kept for loops that call it at the start of an epoch."""

    def timing(self) -> tuple[float, float]:
        """Seconds per image since the last call: of computing, and of waiting for data."""
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
                    f"{share:.0%} of the time goes to waiting for images: more --num_threads "
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
        """Show losses at `iters` images into `epoch`; `t_comp`, `t_data` are seconds per image."""
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
        """Draw nothing, since `print_current_losses` feeds all loggers; for loops that call both.

        The arguments tell the position of a loop of the original code: `(epoch, fraction of the
        epoch done, losses)`, in later versions `(images seen in all, losses)`.
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
        """Show images: `(visuals, epoch, save)`, or `(visuals, epoch, images seen in all, save)`.

        `visuals` are (N, C, H, W) in [-1, 1], the first of which is shown, or uint8 (H, W, C).
        `save` keeps them on the training page even if it already has some of this epoch.
        """
        position = self.position
        *images, save_result = images_and_save
        if self.keeps_position and epoch != position.epoch:
            self._move_to(epoch, 0)
        if self.keeps_position and images:
            position.epoch_iter += images[0] - position.total_iters
            position.total_iters = images[0]
        if not self.loggers:  # avoid copies from the GPU that nobody sees
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
        """Tell the loggers that an epoch is over; print its duration and the time left."""
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
        """Close all loggers; nothing is shown from then on."""
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
    """Save the images of one input below the page's `images/`, and add them to it as a row.

    `visuals` are (N, C, H, W) in [-1, 1], the first of which is saved, or uint8 (H, W, C); `width`
    is the width of an image on the page. `use_wandb` also logs them to the W&B run that this
    process has started.
    """
    name = Path(image_path[0]).stem
    files = write_visuals(
        webpage.get_image_dir(), visuals, image_path[0], name, aspect_ratio, BackgroundWork(0)
    )
    webpage.add_header(name)
    webpage.add_images(files, list(visuals), files, width=width)
    if use_wandb:
        paths = [webpage.get_image_dir() / file for file in files]
        log_result(name, dict(zip(visuals, paths, strict=True)))


def write_visuals(
    img_dir: Path,
    visuals: Mapping[str, Any],
    input_path: str,
    name: str,
    aspect_ratio: float,
    encoders: BackgroundWork,
) -> list[str]:
    """Write the images of one input in the background; returns the paths below `img_dir`.

    `visuals` are as for `save_images`. Files are called `<name>_<label>.png`; `name` may have
    folders in it.
    """
    files = []
    for label, image in visuals.items():
        file = f"{name}_{label}.png"
        path = img_dir / file
        path.parent.mkdir(parents=True, exist_ok=True)
        # an input of the model, whose file can be copied if its pixels are the same
        source = input_path if label in ("real", "real_A") and aspect_ratio == 1 else None
        own = _copy(image) if torch.is_tensor(image) else util.tensor2im(image)
        encoders.submit(_write_result, own, path, aspect_ratio, source)
        files.append(file)
    return files


def _copy(pictures: torch.Tensor) -> torch.Tensor:
    """A copy of the first image, since a model may reuse the memory of a result.

    It stays on its device, so that nothing waits for a GPU; a large one is copied to the CPU, since
    many may queue up.
    """
    first = pictures.detach()[:1]
    if first.device.type == "cpu":
        # by NumPy: torch would share the work between threads that are busy with other images
        return torch.from_numpy(first.float().numpy().copy())
    return first.clone() if first.numel() <= util.MAX_ON_GPU else first.to("cpu", copy=True)


def _write_result(image: Any, path: Path, aspect_ratio: float, source: str | None) -> None:
    if torch.is_tensor(image):
        image = image.float().cpu()
        if np.isnan(image.numpy().min()):
            warn(f"{path.name} is black where the model gave NaN")
    pixels = util.tensor2im(image)
    with replacing(path, flush=False) as file:
        if source is None or not util.copy_if_equal(source, pixels, file):
            util.save_image(pixels, file, aspect_ratio)
