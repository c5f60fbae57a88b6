"""Option types for argparse: they parse a value, or say in an error what is allowed."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path


def whole_number(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """An integer from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is too large: at most {maximum}")
        return value

    return parse


def number(below: float = math.inf, positive: bool = False) -> Callable[[str], float]:
    """A number in [0, below), or in (0, below)."""
    allowed = "above 0" if positive else "at least 0"
    allowed += f" and below {below:g}" if below < math.inf else ""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not 0 <= value < below or (positive and value == 0):
            raise argparse.ArgumentTypeError(f"{text} is out of range: {allowed}")
        return value

    return parse


def numbers(what: str) -> Callable[[str], list[int]]:
    """Whole numbers above 0, separated by commas."""

    def parse(text: str) -> list[int]:
        parts = text.split(",")
        if not all(part.isdecimal() and int(part) for part in parts):
            raise argparse.ArgumentTypeError(
                f"'{text}': give numbers{what} above 0, separated by commas"
            )
        return [int(part) for part in parts]

    return parse


def boolean(text: str) -> bool:
    """True or False, also as other words for yes and no."""
    words = {"true": True, "yes": True, "t": True, "y": True, "1": True}
    words |= {"false": False, "no": False, "f": False, "n": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return words[text.lower()]


def experiment_name(text: str) -> str:
    """A relative path, without `..`, of a folder in `--checkpoints_dir`."""
    outside = os.path.isabs(text) or os.pardir in Path(text).parts
    if outside or os.path.normpath(text) == os.curdir:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a folder inside --checkpoints_dir: give a name without "
            "'..', such as maps or maps/first, and --checkpoints_dir for another place"
        )
    return text


def renamed(older: dict[str, str]) -> Callable[[str], str]:
    """A word that may be given by an older name."""
    return lambda text: older.get(text, text)


whole = whole_number(0)
count = whole_number(1)
width = whole_number(1, 10**6)  # of an image or a layer
