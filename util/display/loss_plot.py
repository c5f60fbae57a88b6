"""Draw a run's loss curves as a picture, from its record.

Usage: python -m util.plot_losses EXPERIMENT_DIR [--out FILE]

Drawn with Pillow alone: the curves at twice the size and then halved, which smooths their edges,
the letters at the final size.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.errors import OneLineParser

from .loss_record import read_records

WIDTH = 1200
LEFT, RIGHT = 70, 24  # margins of a panel
SCALE = 2  # curves are drawn this much larger
BACKGROUND = (255, 255, 255)
INK, FAINT_INK, GRID, FRAME = (40, 40, 40), (110, 110, 110), (232, 232, 232), (150, 150, 150)

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (140, 109, 49),
    (0, 0, 0),
)

# Losses on very different scales get panels of their own: title and how the names begin or end.
RECONSTRUCTION = ("cycle", "idt", "identity", "rec", "l1")


def panel_of(name: str) -> str:
    """The title of the panel that a loss belongs to, judged by its name."""
    parts = name.lower().split("_")
    if any(part in RECONSTRUCTION for part in parts):
        return "Reconstruction"
    if parts[0] in ("d", "gp"):
        return "Discriminators"
    return "Generators"


def collect(records: Sequence[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The curves in the records: name to epochs and values, each (number of points,).

    Infinity is taken as a gap, as NaN is.
    """
    absent = object()
    every = np.array([record["progress"] for record in records], dtype=np.float64)
    curves = {}
    for name in dict.fromkeys(name for record in records for name in record["losses"]):
        values = [record["losses"].get(name, absent) for record in records]
        epochs = every
        if absent in values:  # not a gap: this loss is recorded more rarely than others
            epochs = every[[value is not absent for value in values]]
            values = [value for value in values if value is not absent]
        y = np.array(values, dtype=np.float64)  # None becomes NaN
        y[~np.isfinite(y)] = np.nan
        curves[name] = (epochs, y)
    return curves


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """The mean of the `window` points around each point, NaN left out; shorter at the ends."""
    known = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(y))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(y))
    n = counts[high] - counts[low]
    mean = np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), np.nan)
    return np.where(known, mean, np.nan)  # a gap stays a gap


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high], roughly `about` of them: steps of 1, 2 or 5 times 10^k."""
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def value_range(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """The range to show: nearly all points, so that a spike does not flatten the rest."""
    known = np.concatenate([y[np.isfinite(y)] for y in curves])
    if not len(known):
        return 0.0, 1.0
    low, high = np.percentile(known, [0.2, 99.5])
    whole = known.max() - known.min()
    if whole < 2 * (high - low):
        low, high = known.min(), known.max()
    if 0 <= low < 0.5 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(high), abs(low), 1e-30):
        low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
    pad = 0.05 * (high - low)
    return float(low if low == 0 else low - pad), float(high + pad)


def envelope(x: np.ndarray, y: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The points thinned to the lowest and highest of each of `columns` stretches."""
    if len(x) <= 2 * columns:
        return x, y
    size = math.ceil(len(x) / columns)
    pad = (-len(x)) % size
    xs = np.concatenate([x, np.full(pad, x[-1])]).reshape(-1, size)
    ys = np.concatenate([y, np.full(pad, np.nan)]).reshape(-1, size)
    gaps = np.isnan(ys).all(axis=1)
    low = np.where(gaps, np.nan, np.where(np.isnan(ys), np.inf, ys).min(axis=1))
    high = np.where(gaps, np.nan, np.where(np.isnan(ys), -np.inf, ys).max(axis=1))
    return np.repeat(xs[:, 0], 2), np.stack([low, high], axis=1).reshape(-1)


class _Panel:
    """One pair of axes inside the picture; `box` is its frame in pixels of the final picture."""

    def __init__(
        self, box: tuple[int, int, int, int], x: tuple[float, float], y: tuple[float, float]
    ):
        self.box, self.x, self.y = box, x, y

    def pixels(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Points in the enlarged picture (n, 2), kept in the frame from above and below."""
        left, top, right, bottom = self.box
        px = left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (right - left)
        py = bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - top)
        return np.stack([px, np.clip(py, top, bottom)], axis=1) * SCALE

    def line(self, canvas: ImageDraw.ImageDraw, x: np.ndarray, y: np.ndarray, colour, width):
        """Draw one curve; NaN makes a gap, and a point alone between two gaps a dot."""
        points = self.pixels(x, np.nan_to_num(y))
        known = np.isfinite(y)
        for run in np.split(np.arange(len(y)), np.flatnonzero(np.diff(known)) + 1):
            if not len(run) or not known[run[0]]:
                continue
            if len(run) == 1:
                px, py = points[run[0]]
                r = 2.5 * SCALE
                canvas.ellipse((px - r, py - r, px + r, py + r), fill=colour)
            else:
                canvas.line(points[run].ravel().tolist(), fill=colour, width=width)


def _faint(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(round(255 - (255 - c) * 0.28) for c in colour)  # type: ignore[return-value]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2e}"


def draw(records: Sequence[dict[str, Any]], path: str | os.PathLike, title: str) -> None:
    """Draw the losses in `records` over the epochs and write the picture to `path`.

    Each panel shows the raw values faintly and their moving average; the legend has the average's
    last value. The file appears as a whole or not at all.

    Raises:
        ValueError: no record holds a loss.
    """
    curves = collect(records)
    if not curves:
        raise ValueError("no record holds a loss")
    panels: dict[str, list[str]] = {}
    for name in curves:
        panels.setdefault(panel_of(name), []).append(name)
    order = ("Generators", "Discriminators", "Reconstruction")
    titles = [t for t in order if t in panels]

    plot_height = {1: 440, 2: 270}.get(len(titles), 220)
    header, above, below = 56, 40, 34  # the title; a panel's legend; its tick labels
    step = above + plot_height + below
    height = header + step * len(titles) + 24

    every_x = np.concatenate([x for x, _ in curves.values()])
    x_range = (float(every_x.min()), float(every_x.max()))
    if x_range[0] < 0.1 * x_range[1]:
        x_range = (0.0, x_range[1])
    if x_range[1] <= x_range[0]:
        x_range = (x_range[0] - 0.5, x_range[0] + 0.5)
    ticks_x = nice_ticks(*x_range, about=10)

    image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    layout = []
    for i, panel_title in enumerate(titles):
        top = header + i * step + above
        names = panels[panel_title]
        columns = (WIDTH - LEFT - RIGHT) // 2  # a point every two pixels is as fine as it looks
        means, raws = {}, {}
        for name in names:
            x, y = curves[name]
            raws[name] = envelope(x, y, columns)
            # Twice, which rounds the corners that one moving average has.
            mean = smooth(smooth(y, len(y) // 60), len(y) // 60)
            keep = np.unique(np.linspace(0, len(x) - 1, min(len(x), columns)).round().astype(int))
            means[name] = (x[keep], mean[keep])
        y_range = value_range([curves[name][1] for name in names])
        panel = _Panel((LEFT, top, WIDTH - RIGHT, top + plot_height), x_range, y_range)
        ticks_y = nice_ticks(*y_range, about=max(3, plot_height // 50))
        _draw_grid(canvas, panel, ticks_x, ticks_y)
        for j, name in enumerate(names):
            x, y = raws[name]
            panel.line(canvas, x, y, _faint(COLOURS[j % len(COLOURS)]), 2)
        for j, name in enumerate(names):
            x, y = means[name]
            panel.line(canvas, x, y, COLOURS[j % len(COLOURS)], 4)
        layout.append((panel_title, panel, names, means, ticks_y))

    image = image.reduce(SCALE)
    canvas = ImageDraw.Draw(image)
    font, small, big = (ImageFont.load_default(size=s) for s in (15, 13, 22))
    canvas.text((LEFT, 18), title, fill=INK, font=big)
    for panel_title, panel, names, means, ticks_y in layout:
        left, top, right, bottom = panel.box
        canvas.text((left, top - 12), panel_title, fill=INK, font=font, anchor="ls")
        at = left + canvas.textlength(panel_title, font=font) + 28
        for j, name in enumerate(names):
            known = means[name][1][np.isfinite(means[name][1])]
            text = f"{name}  {_number(known[-1]) if len(known) else 'NaN'}"
            canvas.line((at, top - 17, at + 20, top - 17), COLOURS[j % len(COLOURS)], 3)
            canvas.text((at + 26, top - 12), text, fill=INK, font=small, anchor="ls")
            at += 26 + canvas.textlength(text, font=small) + 24
        highest = max(
            (np.nanmax(y) for n in names if np.isfinite(y := curves[n][1]).any()), default=0
        )
        if highest > panel.y[1]:
            note = f"spikes up to {_number(float(highest))} are cut off"
            canvas.text((right, top - 12), note, fill=FAINT_INK, font=small, anchor="rs")
        for value in ticks_y:
            y = panel.pixels(np.zeros(1), np.array([value]))[0, 1] / SCALE
            canvas.text((left - 8, y), f"{value:g}", fill=FAINT_INK, font=small, anchor="rm")
        for value in ticks_x:
            x = panel.pixels(np.array([value]), np.zeros(1))[0, 0] / SCALE
            canvas.text((x, bottom + 7), f"{value:g}", fill=FAINT_INK, font=small, anchor="ma")
    canvas.text(((LEFT + WIDTH - RIGHT) / 2, height - 14), "epoch", INK, small, anchor="mm")
    note = "moving average over the raw values; numbers: last average"
    canvas.text((WIDTH - RIGHT, 24), note, fill=FAINT_INK, font=small, anchor="ra")
    _save(image, Path(path))


def _draw_grid(canvas: ImageDraw.ImageDraw, panel: _Panel, ticks_x, ticks_y) -> None:
    left, top, right, bottom = (SCALE * v for v in panel.box)
    for value in ticks_x:
        x = panel.pixels(np.array([value]), np.zeros(1))[0, 0]
        canvas.line((x, top, x, bottom), GRID, SCALE)
    for value in ticks_y:
        y = panel.pixels(np.zeros(1), np.array([value]))[0, 1]
        canvas.line((left, y, right, y), GRID, SCALE)
    canvas.line((left, top, left, bottom, right, bottom), FRAME, SCALE)


def _save(image: Image.Image, path: Path) -> None:
    # The temporary name keeps the suffix, from which Pillow takes the format.
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        image.save(temporary, compress_level=4)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = OneLineParser(
        prog="python -m util.plot_losses", description="Draw the loss curves of a run."
    )
    parser.add_argument("experiment", metavar="EXPERIMENT_DIR", help="for one: checkpoints/NAME")
    parser.add_argument("--out", metavar="FILE", help="[default: EXPERIMENT_DIR/loss.png]")
    args = parser.parse_args(argv)
    folder = Path(args.experiment)
    record = folder / "losses.jsonl"
    records = read_records(record) if record.is_file() else []
    out = Path(args.out) if args.out else folder / "loss.png"
    if not any(r["losses"] for r in records):
        print(f"error: no losses are recorded in {record}", file=sys.stderr)
        return 1
    try:
        draw(records, out, folder.resolve().name)
    except (OSError, ValueError) as e:  # ValueError: Pillow knows no such suffix
        print(
            f"error: {out} can't be written: {getattr(e, 'strerror', None) or e}", file=sys.stderr
        )
        return 1
    print(f"{len(records)} records drawn in {out}")
    return 0
