"""Storage for feature maps larger than memory: on the device up to a limit, then in files."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from util.errors import UserError
from util.files import wrap_write_errors


class ScratchSpace:
    """Space for stored maps: up to `memory` bytes on the device, beyond that in unnamed files."""

    def __init__(self, memory: int, scratch: str | os.PathLike | None = None):
        self.memory, self.scratch = memory, Path(scratch or tempfile.gettempdir())
        self.used = self.peak = 0  # bytes, in memory and in files
        self.files = 0

    def open_file(self) -> Any:
        """An unnamed file: it disappears when the process ends, however that happens."""
        self.files += 1
        with self.wrap_errors():
            return tempfile.TemporaryFile(dir=self.scratch)

    def wrap_errors(self) -> contextlib.AbstractContextManager[None]:
        """Turn an OSError in the block into a UserError: results may go to another disk."""
        return wrap_write_errors(f"to --tile_scratch {self.scratch}")

    def check(self, needed: int) -> None:
        """Raise UserError if the disk has no room for the part of `needed` bytes beyond memory."""
        try:
            free = shutil.disk_usage(self.scratch).free
        except OSError as e:
            raise UserError(f"--tile_scratch {self.scratch}: {e.strerror}") from e
        if needed - self.memory > free * 0.95:
            gib = 2**30
            raise UserError(
                f"exact tiles of this image store {needed / gib:.1f} GiB: --tile_memory gives "
                f"{self.memory / gib:.1f} and {self.scratch} has {free / gib:.1f} free; use "
                "--tile_scratch FOLDER on a larger disk, or --tile_mode quick"
            )


class StoredMap:
    """All rows of a map; its space is free again when nothing refers to it any more.

    Rows are written from top to bottom. In a file they come first, (H, C, W), so that a band is
    contiguous.
    """

    def __init__(self, space: ScratchSpace, shape: tuple[int, int, int], like: torch.Tensor):
        """`like` has the dtype and the device of the map."""
        self.space, self.shape, self.like = space, shape, like.new_empty(0)
        self.size = math.prod(shape) * like.element_size()
        fits = space.used + self.size <= space.memory
        self.data = like.new_empty(1, *shape) if fits else None
        self.file: Any = None if fits else space.open_file()
        space.used += self.size
        space.peak = max(space.peak, space.used)

    def __del__(self) -> None:
        self.space.used -= self.size
        if self.file is not None:
            self.file.close()

    def write(self, top: int, rows: torch.Tensor) -> None:
        """Store rows (1, C, h, W) from row `top` on."""
        if self.data is not None:
            self.data[:, :, top : top + rows.shape[2]] = rows
        else:
            raw = rows[0].transpose(0, 1).contiguous().cpu()
            with self.space.wrap_errors():
                self.file.write(raw.view(torch.uint8).numpy())

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows [top, bottom) as (1, C, h, W)."""
        if self.data is not None:
            return self.data[:, :, top:bottom]
        c, h, w = self.shape
        raw = bytearray((bottom - top) * (self.size // h))
        self.file.seek(top * (self.size // h))
        self.file.readinto(raw)
        rows = torch.frombuffer(raw, dtype=self.like.dtype).view(bottom - top, c, w)
        return rows.transpose(0, 1).contiguous()[None].to(self.like.device)
