"""Two records held against each other: names exactly, numbers nearly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

RELATIVE, ABSOLUTE = 1e-3, 2e-4
ONE_LEVEL = 1.0  # of 255: the original cuts pixels off where this code rounds them


def checks(
    golden: Any,
    ours: Any,
    where: str,
    absolute: float = ABSOLUTE,
    relative: float = RELATIVE,
) -> Iterator[str | None]:
    """For each name and number in `golden`: None where `ours` agrees, else what differs.

    `ours` may hold more names. A list called `files` is a set of which ours holds at least all.
    """
    if isinstance(golden, dict):
        if not isinstance(ours, dict):
            yield f"{where}: expected a record, got {ours!r}"
            return
        for key, value in golden.items():
            here = f"{where}/{key}"
            if key == "error":
                continue
            if key not in ours:
                yield f"{here}: missing"
            elif key == "files":
                lacking = sorted(set(value) - set(ours[key]))
                yield f"{here}: no {lacking}" if lacking else None
            else:
                limit = ONE_LEVEL if key == "pixels" else absolute
                yield from checks(value, ours[key], here, limit, relative)
    elif isinstance(golden, list):
        if not isinstance(ours, list) or len(golden) != len(ours):
            yield f"{where}: {str(golden)[:80]} != {str(ours)[:80]}"
            return
        for i, (value, other) in enumerate(zip(golden, ours, strict=True)):
            yield from checks(value, other, f"{where}[{i}]", absolute, relative)
    elif isinstance(golden, (bool, str)) or golden is None:
        same = type(golden) is type(ours) and golden == ours
        yield None if same else f"{where}: {golden!r} != {ours!r}"
    else:
        number = isinstance(ours, (int, float)) and not isinstance(ours, bool)
        good = number and math.isclose(golden, ours, rel_tol=relative, abs_tol=absolute)
        yield None if good else f"{where}: {golden} != {ours}"


def assert_conforms(golden: Any, ours: Any, where: str, *limits: float) -> None:
    """Fail with the first differences where `ours` is not what the original gave.

    `limits` are the absolute and the relative one, where others are wanted than the usual.
    """
    results = list(checks(golden, ours, where, *limits))
    assert results, f"{where}: there is nothing to compare"
    wrong = [text for text in results if text]
    assert not wrong, f"{len(wrong)} of {len(results)} differ:\n" + "\n".join(wrong[:8])
