"""Draw the losses and scores of a run as curves; as a program, draw those of its training page.

Nothing here imports torch. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from util import files
from util.errors import UserError

from .loss_record import read_records

# Okabe and Ito's colours, which colour-blind people can tell apart; black comes last.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#000000")
WIDE, NARROW = 1200, 390  # pixels: for a desktop, and for a phone, whose pixels are half as large

# Losses on very different scales get separate panels, according to the parts of their names.
RECONSTRUCTION = ("cycle", "idt", "identity", "rec", "l1")

Curves = dict[str, tuple[np.ndarray, np.ndarray]]  # name to epochs and values, each (N,)


def panel_of(name: str) -> str:
    """The title of the panel that a loss belongs to, judged by its name."""
    parts = name.lower().split("_")
    if any(part in RECONSTRUCTION for part in parts):
        return "Reconstruction"
    if parts[0] in ("d", "gp"):
        return "Discriminators"
    return "Generators"


def collect(records: Sequence[dict[str, Any]], key: str = "losses") -> Curves:
    """The curves in the records; infinity and NaN are gaps."""
    curves = {}
    for name in dict.fromkeys(name for record in records for name in record[key]):
        having = [record for record in records if name in record[key]]
        y = np.array([record[key][name] for record in having], dtype=np.float64)  # None is NaN
        y[~np.isfinite(y)] = np.nan
        curves[name] = (np.array([record["progress"] for record in having], np.float64), y)
    return curves


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """The moving average of (N,) over `window` points, without NaN; over fewer at the ends."""
    known, ones = np.isfinite(y), np.ones(window // 2 * 2 + 1)
    sums = np.convolve(np.where(known, y, 0.0), ones, "same")
    mean = sums / np.maximum(np.convolve(known, ones, "same"), 1)
    return np.where(known, mean, np.nan)  # a gap stays a gap


def range_without_spikes(values: np.ndarray) -> tuple[float, float] | None:
    """The range of nearly all values (N,), if a few outliers would flatten the rest; else None."""
    values = values[np.isfinite(values)]
    if len(values) < 20:
        return None
    low, high = np.percentile(values, [0.2, 99.5])
    if not np.ptp(values) > 2 * (high - low) > 0:
        return None
    pad = 0.05 * (high - low)
    return float(low - pad), float(high + pad)


def panels_of_losses(records: Sequence[dict[str, Any]]) -> dict[str, Curves]:
    """The losses by panel."""
    panels: dict[str, Curves] = {"Generators": {}, "Discriminators": {}, "Reconstruction": {}}
    for name, curve in collect(records).items():
        panels[panel_of(name)][name] = curve
    return {title: curves for title, curves in panels.items() if curves}


def panels_of_scores(records: Sequence[dict[str, Any]]) -> dict[str, Curves]:
    """The scores by panel: one each, since their scales differ."""
    return {name: {name: curve} for name, curve in collect(records, "scores").items()}


def draw(
    panels: Mapping[str, Curves], path: str | os.PathLike, title: str, width: int = WIDE
) -> None:
    """Draw curves over the epochs, a pair of axes for each panel, and write them to `path`.

    Long curves are shown faintly, below their moving average. The legend has the last values.
    `width` is in pixels; up to NARROW the plot is made for a phone, and the file has twice as many.
    The file appears whole or not at all. Raises UserError if the package matplotlib is not
    installed, or there is nothing to draw.
    """
    if not any(panels.values()):
        raise UserError("there is nothing to draw")
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a display
    except ImportError:
        raise UserError(
            "drawing losses needs the package matplotlib, which is not installed: "
            "pip install matplotlib"
        ) from None
    narrow = width <= NARROW
    height = {1: 4.6, 2: 3.3, 3: 2.7}.get(len(panels), 2.0)  # of a panel, in inches
    size = (width / 100, 0.8 + height * len(panels))
    figure = Figure(size, dpi=200 if narrow else 100, layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    pairs = zip(axes, panels.items(), strict=True)
    averaged = [_draw_panel(ax, name, curves, narrow) for ax, (name, curves) in pairs]
    axes[-1].set_xlabel("epoch (bold lines: moving average)" if any(averaged) else "epoch")
    figure.suptitle(title, fontsize=13 if narrow else 16, x=0.01, ha="left", parse_math=False)
    with files.replacing(path, flush=False) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks
        figure.savefig(temporary)


def _draw_panel(ax: Any, title: str, curves: Curves, narrow: bool) -> bool:
    """Draw the curves of a panel; returns whether moving averages are among them."""
    averaged = False
    for (name, (x, y)), colour in zip(curves.items(), itertools.cycle(COLOURS), strict=False):
        window = len(y) // 60
        if window >= 2:
            averaged = True
            ax.plot(x, y, color=colour, alpha=0.28, linewidth=0.8)
            y = smooth(smooth(y, window), window)  # twice, to round the corners
        known = y[np.isfinite(y)]
        last = f"{known[-1]:.4g}" if len(known) else "NaN"
        label = f"{name}  {last}".lstrip("_")  # matplotlib leaves out labels that begin with "_"
        marker = "." if len(y) < 60 else ""  # also shows a point between two gaps
        ax.plot(x, y, color=colour, linewidth=1.8, marker=marker, label=label)
    ax.grid(color="gainsboro")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    values = np.concatenate([y for _, y in curves.values()])
    if (limits := range_without_spikes(values)) is not None:
        ax.set_ylim(limits)
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        ends = [f"down to {low:.4g}"] if low < limits[0] else []
        ends += [f"up to {high:.4g}"] if high > limits[1] else []
        note = f"values {' and '.join(ends)} are cut off"
        behind = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        place = {"transform": ax.transAxes, "ha": "right", "va": "top"}
        ax.text(0.99, 0.98, note, fontsize=8, bbox=behind, **place)
    legend: dict[str, Any] = {"frameon": False, "fontsize": 9, "handlelength": 1.2}
    if narrow:  # a separate title would lie beneath the legend
        legend |= {"title": title, "alignment": "left", "title_fontsize": 11, "ncols": 2}
    else:
        ax.set_title(title, loc="left", fontsize=11)
        legend |= {"ncols": len(curves), "columnspacing": 1.2}
    side, x = ("left", 0) if narrow else ("right", 1)
    drawn = ax.legend(loc=f"lower {side}", bbox_to_anchor=(x, 1), borderaxespad=0, **legend)
    for text in drawn.get_texts():
        text.set_parse_math(False)
    return averaged


def draw_page(folder: Path, name: str) -> None:
    """Draw what the training page in `folder / "web"` shows, and `folder / "loss.png"`."""
    losses = panels_of_losses(read_records(folder / "losses.jsonl"))
    scores = panels_of_scores(read_records(folder / "scores.jsonl", "scores"))
    plots = {"loss": (losses, name), "scores": (scores, f"{name}: scores")}
    for file, (panels, title) in plots.items():
        if panels:
            draw(panels, folder / "web" / f"{file}.png", title)
            draw(panels, folder / "web" / f"{file}_narrow.png", title, NARROW)
    if losses:
        with files.replacing(folder / "loss.png", flush=False) as temporary:
            shutil.copyfile(folder / "web" / "loss.png", temporary)


if __name__ == "__main__":
    if hasattr(os, "nice"):
        os.nice(10)  # training goes first
    draw_page(Path(sys.argv[1]), sys.argv[2])
