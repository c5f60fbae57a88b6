"""Memory: how much is free, and giving back what is not needed any more."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path


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


def free_memory() -> int:
    """Bytes that this process may still take without swapping; 0 where that is not known.

    Looks at the whole machine and at the limits of the container or job, as far as Linux has them.
    """
    try:
        free = [_numbers("/proc/meminfo")["MemAvailable:"] * 1024]
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            for group in (Path(name), *Path(name).parents):
                if not controllers:  # version 2
                    free += _left(f"/sys/fs/cgroup{group}", "memory.max", "memory.current")
                elif controllers == "memory":
                    names = "memory.limit_in_bytes", "memory.usage_in_bytes"
                    free += _left(f"/sys/fs/cgroup/memory{group}", *names)
    except (OSError, ValueError, KeyError):
        return 0
    return max(0, min(free))


def _left(folder: str, limit: str, used: str) -> list[int]:
    try:
        most = Path(folder, limit).read_text().strip()
        if most == "max":
            return []
        now = int(Path(folder, used).read_text())
        # files that were read lately count as used, but go when room is needed
        return [int(most) - now + _numbers(f"{folder}/memory.stat").get("inactive_file", 0)]
    except FileNotFoundError:  # the group has no limits of its own
        return []


def _numbers(path: str) -> dict[str, int]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
