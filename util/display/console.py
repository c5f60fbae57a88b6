"""Losses as lines of text: on the console, and in `loss_log.txt`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .base import Logger


def format_line(record: dict[str, Any]) -> str:
    """A record as a line of text: `(epoch: 1, iters: 100, time: 0.094, data: 0.009) G: 2.0`."""
    head = (
        f"(epoch: {record['epoch']}, iters: {record['iters']}, "
        f"time: {record['time']:.3f}, data: {record['data']:.3f})"
    )
    return " ".join([head, *(f"{name}: {value:.3f}" for name, value in record["losses"].items())])


def format_scores(record: dict[str, Any]) -> str:
    """Scores as a line of text: `(epoch: 5, val) L1: 0.081 PSNR: 20.31 | best L1: 0.081 ...`."""
    scores = " ".join(f"{name}: {value:.4g}" for name, value in record["scores"].items())
    best = record.get("best") or {}
    known = best.get("value") is not None
    tail = f" | best {best['by']}: {best['value']:.4g} (epoch {best['epoch']})" if known else ""
    return f"(epoch: {record['epoch']}, {record['phase']}) {scores}{tail}"


class ConsoleLogger(Logger):
    """Prints a line for each record, without breaking the progress bar below."""

    name = "console"

    def log_losses(self, record: dict[str, Any]) -> None:
        tqdm.write(format_line(record))

    def log_scores(self, record: dict[str, Any]) -> None:
        tqdm.write(format_scores(record))


class TextFileLogger(Logger):
    """Appends a line for each record to a file."""

    name = "loss_log.txt"

    def __init__(self, path: Path):
        self.path = path
        self._append(f"================ Training Loss ({time.strftime('%c')}) ================")

    def _append(self, line: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log_losses(self, record: dict[str, Any]) -> None:
        self._append(format_line(record))

    def log_scores(self, record: dict[str, Any]) -> None:
        self._append(format_scores(record))
