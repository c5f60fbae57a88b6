"""Decoded and scaled images, kept in memory that all loading processes share."""

from __future__ import annotations

import argparse
import hashlib
import math
import mmap
import multiprocessing
import sys
import tempfile
from typing import NamedTuple

import numpy as np
from PIL import Image

from util import distributed
from util.memory import free_memory

# How workers are started; None: Python's default. That is not fork from 3.14 on, nor in a process
# that was itself started by another method. Other methods take seconds, and share no memory.
WORKER_START_METHOD = "fork" if sys.platform == "linux" else None
# how much of the free memory each choice of --cache_images may fill
MEMORY_FRACTION = {"auto": 0.5, "ram": 0.9, "off": 0.0}
_CHANNELS = {"L": 1, "RGB": 3}
_MODES = {channels: mode for mode, channels in _CHANNELS.items()}
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # memory is allocated on first write


class CachedImage(NamedTuple):
    """An image after the deterministic transforms, and its original size (width, height)."""

    image: Image.Image
    original_size: tuple[int, int]


class _Lock:
    """A lock between processes. Unlike multiprocessing's, it is released if its owner is killed."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()  # noqa: SIM115

    def __del__(self) -> None:
        self.file.close()

    def __enter__(self) -> None:
        import fcntl  # missing where there is no fork

        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        import fcntl

        fcntl.lockf(self.file, fcntl.LOCK_UN)


class PictureCache:
    """8-bit images by name, in anonymous shared memory that forked processes inherit.

    All processes share its content. When it is full, it takes no more images. Memory is
    allocated as the cache fills, and freed when the processes end. Needs a system with `fork`.
    """

    def __init__(self, size: int, entries: int):
        """`size` is the capacity in bytes, `entries` in images. Raises OSError without memory."""
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self.size, self.entries, self.slots = size, entries, 2 * entries + 1
        self._pixels = mmap.mmap(-1, size, flags=flags)
        # hash, offset, channels, width and height as cached, original width and height
        fields = 7
        table = mmap.mmap(-1, 8 * (2 + fields * self.slots), flags=flags)
        numbers = np.frombuffer(table, np.int64)
        # first bytes in use and number of images, then a row for each image
        self._counts, self._table = numbers[:2], numbers[2:].reshape(self.slots, fields)
        self._lock = _Lock()

    def get(self, name: str) -> CachedImage | None:
        """The image of this name; None if it is not in the cache."""
        key = _hash(name)
        with self._lock:
            row = self._table[self._slot(key)].tolist()
        found, offset, channels, width, height, *original = row
        if found != key:
            return None
        length = channels * width * height
        pixels = memoryview(self._pixels)[offset : offset + length]
        mode = _MODES[channels]
        # a copy: changes to an image must not change the cache
        image = Image.frombytes(mode, (width, height), pixels)
        return CachedImage(image, (original[0], original[1]))

    def put(self, name: str, kept: CachedImage) -> None:
        """Add an image, if it is of 8 bits and there is room."""
        image = kept.image
        if image.mode not in _CHANNELS:
            return
        key, channels = _hash(name), _CHANNELS[image.mode]
        pixels = image.tobytes()
        with self._lock:
            slot = self._slot(key)
            offset, count = self._counts.tolist()
            full = count >= self.entries or offset + len(pixels) > self.size
            if full or self._table[slot, 0] == key:
                return
            self._pixels[offset : offset + len(pixels)] = pixels
            # in this order: a process killed in between leaves a gap, not a half-written image
            self._counts[:] = offset + len(pixels), count + 1
            self._table[slot] = (key, offset, channels, *image.size, *kept.original_size)

    def __len__(self) -> int:
        """The number of images."""
        return int(self._counts[1])

    @property
    def used(self) -> int:
        """Bytes of pixels."""
        return int(self._counts[0])

    def _slot(self, key: int) -> int:
        """The row of a key, or the free row for it (linear probing)."""
        slot = key % self.slots
        while self._table[slot, 0] not in (0, key):  # at most half of the rows are taken
            slot = (slot + 1) % self.slots
        return slot


def open_cache(opt: argparse.Namespace, pictures: int, workers: int) -> PictureCache | None:
    """Create the cache that `--cache_images` asks for, and print its capacity; or return None.

    There is none in testing, where each image is read once.
    """
    share = MEMORY_FRACTION[getattr(opt, "cache_images", "off")]
    if not share or not opt.isTrain:
        return None
    reason, limit = _why_not(opt, workers), 0
    if not reason:
        # each rank on this machine has its own cache of all images
        limit = int(free_memory() * share / distributed.local_world_size())
        if "resize" in opt.preprocess:
            limit = min(limit, pictures * opt.load_size**2 * max(_CHANNELS.values()))
        try:
            cache = PictureCache(limit, pictures)
        except (OSError, ValueError) as e:
            reason = f"no memory for it ({e})"
        else:
            room = math.ceil(limit / 1e6)
            print(f"decoded images are cached: up to {room} MB (--cache_images)")
            return cache
    if opt.cache_images == "ram":
        print(f"--cache_images is off: {reason}")
    return None


def _why_not(opt: argparse.Namespace, workers: int) -> str:
    if getattr(opt, "value_range", None):
        return "with --value_range images are not of 8 bits"
    if "fork" not in multiprocessing.get_all_start_methods():
        return "this system can't share memory with workers"
    if workers and WORKER_START_METHOD != "fork":
        return "workers share memory only if they are forked"
    return "" if free_memory() else "the amount of free memory is unknown"


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1
