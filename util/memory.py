"""Memory that is let go of, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library than glibc
        return None


def return_freed_memory() -> None:
    """Give back what the C library keeps for later; does nothing where that is not glibc.

    It keeps freed blocks of up to 32 MiB. After a while of many sizes these lie in between others,
    fit nothing, and can be several times what is in use.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
