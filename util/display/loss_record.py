"""The record of a run's losses: one JSON object per line, appended during training.

Plots, and the other views of a resumed run, are drawn from this file, so it survives a crash and
an incomplete last line. NaN and infinity, which JSON does not have, are written as `null`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from util.files import replacing

T = TypeVar("T")


def _plain(value: Any) -> Any:
    """`value` with all numbers made plain Python numbers, and NaN and infinity made None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)  # also NumPy and torch scalars
    return number if math.isfinite(number) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_record(line: bytes | str, key: str = "losses") -> dict[str, Any] | None:
    """One line as a record, None if it is not one; a loss of `null` becomes NaN.

    `key` is where the numbers are: records of scores have them under `scores`.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        return None
    if not isinstance(record, dict) or not isinstance(record.get(key), dict):
        return None
    if not (_is_number(record.get("images")) and _is_number(record.get("progress"))):
        return None
    record[key] = {
        name: math.nan if value is None else value
        for name, value in record[key].items()
        if value is None or _is_number(value)
    }
    return record


def read_records(path: str | os.PathLike, key: str = "losses") -> list[dict[str, Any]]:
    """The records in a file, in order; torn and foreign lines are left out.

    A missing file has no records.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := parse_record(line, key)) is not None]


def thin(points: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the points: every second, fourth, ... of them, and always the last.

    The step is a power of two, so a point once shown stays shown until the step doubles, and a
    curve that grows does not flicker.
    """
    step = 1
    while -(-(len(points) - 1) // step) + 1 > limit and step < len(points):
        step *= 2
    kept = list(points[::step])
    if points and (len(points) - 1) % step:
        kept.append(points[-1])
    return kept


def cut(path: Path, key: str, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop records that `keep` rejects, and a torn last line; other lines are unchanged.

    For a run that resumes from a checkpoint older than its last record, or after a crash.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = [parse_record(line, key) for line in lines]
    kept = [x for x, r in zip(lines, records, strict=True) if r is None or keep(r)]
    if kept and not kept[-1].endswith(b"\n"):
        last = kept.pop()
        kept += [last + b"\n"] if parse_record(last, key) is not None else []
    if kept != lines:
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Write one record as one line; `cut` repairs the end that a crash has left.

    Raises OSError if that fails; if possible, the file is left without a torn line.
    """
    line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:  # unbuffered: the line is one write
        size = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError(f"only a part of a line could be written to {path}")
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise
