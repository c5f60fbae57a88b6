"""Memory that is let go of, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_MMAP_THRESHOLD = -3


def return_freed_blocks(least: int = 2**22) -> None:
    """From now on the C library gives blocks of `least` bytes and more back when they are freed.

    By default glibc soon keeps blocks of up to 32 MiB, in which a large picture and the layers of a
    network are laid out: what is freed between them can't be used for anything larger. Does nothing
    on other systems.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, least)
