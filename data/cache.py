"""Decoded and scaled pictures, kept in memory that all loading processes share."""

from __future__ import annotations

import argparse
import hashlib
import mmap
import multiprocessing
from typing import NamedTuple

import numpy as np
from PIL import Image

from util import distributed
from util.memory import free_memory

# how much of the free memory each choice of --cache_images may fill
SHARES = {"auto": 0.5, "ram": 0.9, "off": 0.0}
_CHANNELS = {"L": 1, "RGB": 3}
_MODES = {channels: mode for mode, channels in _CHANNELS.items()}
# seconds to wait for what takes a thousandth of one: then the process that has the lock is gone
LOCK_PATIENCE = 5.0
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # pages count once they are written to


class Kept(NamedTuple):
    """A picture after the steps that are always the same, and its size (width, height) before."""

    image: Image.Image
    original_size: tuple[int, int]


class PictureCache:
    """Pictures of 8 bits by name, in a block of anonymous memory that forked processes inherit.

    What one process puts in, all of them find. When the block is full, nothing more goes in. Needs
    a system that forks; the memory is taken as it fills up and goes back with the processes.

    A process that is killed, such as for a lack of memory, may leave the lock closed and a picture
    half written. The others then go on without the cache, until somebody notices that one died.
    """

    def __init__(self, size: int, entries: int):
        """`size` is the limit in bytes; `entries` that of the pictures. Raises OSError."""
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self.size, self.entries, self.slots = size, entries, 2 * entries + 1
        self._pixels = mmap.mmap(-1, size, flags=flags)
        # hash, offset, channels, width and height as kept, width and height before
        fields = 7
        table = mmap.mmap(-1, 8 * (2 + fields * self.slots), flags=flags)
        numbers = np.frombuffer(table, np.int64)
        # bytes in use and number of pictures; a row for each picture
        self._counts, self._table = numbers[:2], numbers[2:].reshape(self.slots, fields)
        self._lock = multiprocessing.get_context("fork").Lock()
        self._lost = False

    def get(self, name: str) -> Kept | None:
        """The picture of this name; None if it is not there."""
        key = _hash(name)
        if not self._locked():
            return None
        try:
            row = self._table[self._slot(key)].tolist()
        finally:
            self._lock.release()
        found, offset, channels, width, height, *original = row
        if found != key:
            return None
        length = channels * width * height
        pixels = memoryview(self._pixels)[offset : offset + length]
        mode = _MODES[channels]
        # a copy: pictures that share this memory would change for everybody
        image = Image.frombytes(mode, (width, height), pixels)
        return Kept(image, (original[0], original[1]))

    def put(self, name: str, kept: Kept) -> None:
        """Add a picture, if it is of 8 bits and there is room."""
        image = kept.image
        if image.mode not in _CHANNELS:
            return
        key, channels = _hash(name), _CHANNELS[image.mode]
        pixels = image.tobytes()
        if not self._locked():
            return
        try:
            slot = self._slot(key)
            offset, count = self._counts.tolist()
            full = count >= self.entries or offset + len(pixels) > self.size
            if full or self._table[slot, 0] == key:
                return
            self._pixels[offset : offset + len(pixels)] = pixels
            self._table[slot] = (key, offset, channels, *image.size, *kept.original_size)
            self._counts[:] = offset + len(pixels), count + 1
        finally:
            self._lock.release()

    def __len__(self) -> int:
        """The number of pictures."""
        return int(self._counts[1])

    @property
    def used(self) -> int:
        """Bytes of pixels."""
        return int(self._counts[0])

    def __reduce__(self) -> tuple:
        # a process that is spawned does not inherit the memory: it has no cache
        return type(None), ()

    def _locked(self) -> bool:
        """Take the lock; False, from then on, where nobody is left to give it back."""
        self._lost = self._lost or not self._lock.acquire(timeout=LOCK_PATIENCE)
        return not self._lost

    def _slot(self, key: int) -> int:
        """Where a key is, or would go: the first row from its own on that is free."""
        slot = key % self.slots
        while self._table[slot, 0] not in (0, key):  # at most half of the rows are taken
            slot = (slot + 1) % self.slots
        return slot


def open_cache(opt: argparse.Namespace, pictures: int, workers: int) -> PictureCache | None:
    """A cache for so many pictures as `--cache_images` says, with a line about it; None for none.

    In testing each picture is read once, so there is none.
    """
    share = SHARES[getattr(opt, "cache_images", "off")]
    if not share or not opt.isTrain:
        return None
    reason, limit = _why_not(opt, workers), 0
    if not reason:
        # each of the processes of torchrun on this machine comes to see all pictures
        limit = int(free_memory() * share / distributed.local_world_size())
        if "resize" in opt.preprocess:
            limit = min(limit, pictures * opt.load_size**2 * max(_CHANNELS.values()))
        try:
            cache = PictureCache(limit, pictures)
        except (OSError, ValueError) as e:
            reason = f"no memory for it ({e})"
        else:
            print(f"pictures stay in memory once read, up to {limit / 1e6:.0f} MB (--cache_images)")
            return cache
    if opt.cache_images == "ram":
        print(f"--cache_images is off: {reason}")
    return None


def _why_not(opt: argparse.Namespace, workers: int) -> str:
    if getattr(opt, "value_range", None):
        return "with --value_range pictures are not of 8 bits"
    if "fork" not in multiprocessing.get_all_start_methods():
        return "this system can't share memory with processes that load"
    if workers and multiprocessing.get_start_method() != "fork":
        return "the processes that load do not share memory unless they are forked"
    return "" if free_memory() else "it is not known how much memory is free"


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1
