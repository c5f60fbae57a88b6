"""Translate a folder of images, keeping relative paths: `test.py --only_outputs`."""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.image_folder import note_frames
from data.pictures.reading import Picture, fit_samples, prefix_errors, read_info, read_picture
from data.pictures.values import opaque_value
from data.pictures.writing import FORMATS, check_writable, write_bands, write_picture
from models.speed.inspection import independent_of_batch
from util import util
from util.background import BackgroundWork
from util.errors import in_one_line, is_out_of_memory
from util.files import wrap_write_errors
from util.result_names import output_names
from util.util import batched_by

from .tiles import TileOptions
from .translator import Translator


class Job(NamedTuple):
    """An image to translate, and the file to write."""

    source: str
    target: Path


class Ready(NamedTuple):
    """An image that has been read. `x` is (C, H, W) in [-1, 1]; None: to be computed in tiles."""

    job: Job
    picture: Picture
    x: torch.Tensor | None


@dataclass
class FolderTranslation:
    """How the images of a folder are translated.

    Attributes:
        translator: the generator.
        format: `png`, `jpg` or `webp` (8 bits), `tiff` (the input's depth), or `same` (the input's
            format and depth).
        batch_size: largest number of consecutive images of equal size in a batch; 1 is used where
            results would depend on the batch.
        largest: an image of more values than this is a batch by itself, and neither are others read
            ahead then, nor written while it is computed: that would take much memory.
        threads: number of threads that read, and of those that write; 0: no threads.
        tiles: how to cut up large images; None computes each in one piece.
        load_resized: reads a file as (C, H, W) in [-1, 1], resized; None keeps the size.
    """

    translator: Translator
    format: str = "png"
    batch_size: int = 1
    largest: float = math.inf
    threads: int = 4
    tiles: TileOptions | None = None
    load_resized: Callable[[str], torch.Tensor] | None = None
    upright: bool = True

    def __post_init__(self) -> None:
        if self.tiles is not None:
            self.threads = 0  # one large image in memory at a time
        if self.batch_size > 1 and not independent_of_batch(self.translator.net):
            print("batch size 1: batch norm and dropout depend on the batch (not with --eval)")
            self.batch_size = 1
        if self.format in ("png", "jpg", "webp"):
            check_writable(FORMATS[self.format], self.translator.output_nc, np.uint8)

    # -------------------------------------------------------------------------------------- naming
    def jobs(self, paths: Sequence[str], root: str | os.PathLike, out: Path) -> list[Job]:
        """A job for each path: its result gets the same path below `out` as it has below `root`."""
        names = [os.path.relpath(path, root) for path in paths]
        if self.format != "same":
            names = [name + FORMATS[self.format] for name in output_names(names)]
        return [Job(path, out / name) for path, name in zip(paths, names, strict=True)]

    # ------------------------------------------------------------------------------------- running
    def run(self, jobs: Sequence[Job]) -> list[tuple[str, str]]:
        """Translate; returns the paths that failed, with the reasons, in the order of `jobs`."""
        failed: dict[str, str] = {}

        def fail(job: Job, error: Exception) -> None:
            reason = _reason(error)
            named = job.source in reason or str(job.target) in reason
            failed[job.source] = reason if named else f"{job.source}: {reason}"

        several: list[str] = []
        bar = tqdm(total=len(jobs), unit="images", disable=None)
        reading = contextlib.closing(self._read_all(jobs, fail))
        with bar, BackgroundWork(self.threads) as encoders, reading as pictures:
            for batch in batched_by(pictures, self.batch_size, self._size):
                several += [ready.job.source for ready in batch if ready.picture.frames > 1]
                try:
                    if batch[0].x is None:
                        self._write_tiled(batch[0])
                    else:
                        self._translate(batch, encoders, fail)
                except Exception as e:  # whatever it is, go on with the other images
                    for ready in batch:
                        fail(ready.job, e)
                bar.update(len(batch))
            bar.update(len(jobs) - bar.n)
        note_frames(several)
        return [(job.source, failed[job.source]) for job in jobs if job.source in failed]

    def _translate(
        self, batch: list[Ready], encoders: BackgroundWork, fail: Callable[[Job, Exception], None]
    ) -> None:
        if self._size(batch[0]) is None:
            encoders = BackgroundWork(0)
        xs = [ready.x for ready in batch if ready.x is not None]
        outputs = self.translator.run(torch.stack(xs))
        if outputs[0].numel() > util.MAX_ON_GPU:
            outputs = outputs.cpu()
        for ready, output in zip(batch, outputs, strict=True):

            def failed(e: Exception, job: Job = ready.job) -> None:
                fail(job, e)

            encoders.submit(self._write, ready, output, failed=failed)

    def _write(self, ready: Ready, output: torch.Tensor) -> None:
        dtype = self._dtype(ready.picture)
        result = self.translator.finish(output, ready.picture, dtype)
        with wrap_write_errors(ready.job.target):
            info = self._info(ready.picture)
            write_picture(ready.job.target, result.pixels, result.alpha, info)

    def _write_tiled(self, ready: Ready) -> None:
        assert self.tiles is not None
        picture, dtype = ready.picture, self._dtype(ready.picture)
        bands = self.translator.tiled(picture, self.tiles, dtype)
        shape = (*picture.pixels.shape[:2], self.translator.output_nc)
        try:
            info, alpha = self._info(picture), picture.alpha
            opaque = None if alpha is None else opaque_value(alpha, self.translator.value_range)
            with wrap_write_errors(ready.job.target):
                write_bands(ready.job.target, bands, shape, dtype, alpha, info, opaque)
        finally:
            bands.close()  # removes scratch files
            # free the memory now, before the next image is read
            picture.pixels, picture.alpha = picture.pixels[:0].copy(), None

    def _dtype(self, picture: Picture) -> np.dtype:
        return picture.pixels.dtype if self.format in ("tiff", "same") else np.dtype(np.uint8)

    def _info(self, picture: Picture) -> dict[str, Any]:
        """Metadata of the result: all of the input's, or only its colour profile."""
        if self.format == "same":
            return picture.info
        return {key: value for key, value in picture.info.items() if key == "icc_profile"}

    def _size(self, ready: Ready) -> torch.Size | None:
        """The key that the images of a batch share; None makes one a batch by itself."""
        x = ready.x
        return None if x is None or x.numel() > self.largest else x.shape

    # ------------------------------------------------------------------------------------- reading
    def _read(self, job: Job) -> Ready:
        with prefix_errors(job.source):
            if self.load_resized is not None:
                x = self.load_resized(job.source)
                # a placeholder for 8-bit pixels; a resized image has no alpha
                pixels, info = np.empty((0, 0, 1), np.uint8), read_info(job.source)
                return Ready(job, Picture(pixels, info=info), x)
            picture = read_picture(job.source, self.upright)
            picture = fit_samples(picture, {self.translator.input_nc})
            picture = self.translator.without_alpha(picture)
            if self.tiles is not None and max(picture.size) > self.tiles.size:
                return Ready(job, picture, None)
            return Ready(job, picture, self.translator.normalize(picture))

    def _read_all(
        self, jobs: Sequence[Job], fail: Callable[[Job, Exception], None]
    ) -> Generator[Ready, None, None]:
        """Images in order; with `threads` they are read ahead."""
        ahead = 1
        coming: deque[tuple[Job, Callable[[], Ready]]] = deque()
        left = iter(jobs)
        with BackgroundWork(self.threads) as decoders:
            while True:
                while len(coming) < ahead and (job := next(left, None)) is not None:
                    coming.append((job, decoders.call(self._read, job)))
                if not coming:
                    return
                job, read = coming.popleft()
                try:
                    ready = read()
                except Exception as e:
                    fail(job, e)
                else:
                    yield ready
                    large = self.threads == 0 or self._size(ready) is None
                    ahead = 1 if large else 2 * self.threads + self.batch_size


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory: try --tile 1024"
    return in_one_line(error)
