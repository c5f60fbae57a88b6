"""How much memory is free."""

from __future__ import annotations

from pathlib import Path


def free_memory() -> int:
    """Bytes that this process can allocate without swapping; 0 if that is unknown.

    The minimum over the machine and the memory limits of control groups (containers, jobs); on
    Linux only.
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
        # the page cache counts as used, but is freed on demand
        return [int(most) - now + _numbers(f"{folder}/memory.stat").get("inactive_file", 0)]
    except FileNotFoundError:  # the group has no limits of its own
        return []


def _numbers(path: str) -> dict[str, int]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
