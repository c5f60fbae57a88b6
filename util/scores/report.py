"""Reports of scores, and of the conditions that they hold for: as JSON values and as a table."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from util.errors import warn
from util.files import sha256

from . import metrics
from .extractors import Inception, Lpips

if TYPE_CHECKING:
    from .evaluation import Evaluation

HIGHER_IS_BETTER = frozenset(
    ("PSNR", "SSIM", "MS-SSIM", "pixel accuracy", "class accuracy", "class IoU")
)
VARIANTS = {
    "L1": "mean absolute difference, as a fraction of the range (0 to 1)",
    "PSNR": "dB, peak 255, mean over images; equal ones count as one value off by one level",
    "SSIM": "Gaussian window 11x11, sigma 1.5, K 0.01 and 0.03, mean over places and RGB channels",
    "MS-SSIM": "SSIM over 5 scales, weights 0.0448 0.2856 0.3001 0.2363 0.1333",
    "LPIPS": Lpips.variant,
    "FID": Inception.variant,
    "KID": f"{Inception.variant}; cubic kernel, mean and deviation over 100 subsets",
    "cycle": "L1 of the cycle reconstruction",
    **{
        f"grid {period}": f"energy at a period of {period} pixels over its neighbours', 1: no grid"
        for period in metrics.GRID_PERIODS
    },
    "pixel accuracy": "19 Cityscapes classes by nearest colour, void left out",
    "class accuracy": "mean over the classes in the real images",
    "class IoU": "mean over the classes in real or translated images",
}


def better(name: str, value: float, than: float) -> bool:
    """Whether a value of this score is better than another; NaN never is."""
    return value > than if name in HIGHER_IS_BETTER else value < than


def hashed_weights(model: Any, suffix: str) -> list[dict[str, str]]:
    """File and SHA-256 of each generator of a model, in the save of that suffix."""
    paths = [model.weights_file(suffix, n) for n in model.model_names if n.startswith("G")]
    return [{"file": path.name, "sha256": sha256(path)} for path in paths if path.exists()]


def report(
    opt: argparse.Namespace, model: Any, result: Evaluation, suffix: str | None = None
) -> dict[str, Any]:
    """All that a reader needs to know about a set of scores, as plain values for JSON.

    `suffix` says which save of the networks was scored, if not the one that the options choose.
    Numbers that JSON does not have, such as NaN, become text.
    """
    saved = suffix if suffix is not None else str(model.load_suffix())
    names = {name for scores in result.scores.values() for name in scores}
    return {
        "name": opt.name,
        "model": opt.model,
        "direction": opt.direction,
        "epoch": saved,
        "dataroot": opt.dataroot,
        "dataset_mode": opt.dataset_mode,
        "phase": opt.phase,
        "pictures": result.pictures,
        "variant": {
            "network": {k: getattr(opt, k) for k in ("netG", "norm", "ngf", "no_dropout")},
            "mode": "eval" if opt.eval else "train (batch statistics, dropout if there is any)",
            "precision": opt.precision,
            "pictures": "8-bit levels, as saved by test.py",
            "scores": {name: VARIANTS[name] for name in VARIANTS if name in names},
        },
        "resize": {
            "preprocess": opt.preprocess,
            "load_size": opt.load_size,
            "crop_size": opt.crop_size,
            "more": _size_options(opt),
        },
        "value_range": opt.value_range,
        "seed": opt.seed,
        "weights": hashed_weights(model, saved),
        "extractors": result.extractors,
        "scores": {
            visual: {
                name: {
                    "value": _json_number(score.value),
                    "spread": _json_number(score.spread),
                    "pictures": score.pictures,
                }
                for name, score in scores.items()
            }
            for visual, scores in result.scores.items()
        },
        "left_out": result.left_out,
        "torch": torch.__version__,
    }


def _size_options(opt: argparse.Namespace) -> str:
    """The options for large images and for keeping sizes, which training does not have."""
    names = ("keep_size", "tile", "tile_mode", "tile_overlap")
    given = {name: getattr(opt, name, None) for name in names}
    flags = (f"--{k}" if v is True else f"--{k} {v}" for k, v in given.items() if v)
    return " ".join(flags)


def warn_of_replaced(path: Path, facts: dict[str, Any]) -> None:
    """Warn if the report in a file, which is to be replaced, is of something else than `facts`."""
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return
    names = ("model", "direction", "dataroot")
    was = " ".join(f"--{k} {before[k]}" for k in names if before.get(k, facts[k]) != facts[k])
    if was:
        warn(f"{path} was made with {was} and is replaced; another --results_dir keeps both")


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def table(facts: dict[str, Any]) -> str:
    """A report as text: a heading with the conditions that it holds for, and a line per score."""
    resize = facts["resize"]
    sizes = f"{resize['preprocess']}, {resize['load_size']} to {resize['crop_size']}"
    heading = [
        f"{facts['name']}: {facts['model']} {facts['direction']}, epoch {facts['epoch']}, "
        f"{facts['pictures']} images of {facts['phase']} of {facts['dataroot']}, {sizes}"
        f" {resize['more']}".rstrip(),
        f"network in {facts['variant']['mode']} mode, {facts['variant']['precision']}",
        *(f"{w['file']}  sha256 {w['sha256']}" for w in facts["weights"]),
        *(
            f"{w['file']}  sha256 {w['sha256']} ({'' if w['released'] else 'not '}as released)"
            for w in facts["extractors"].values()
        ),
    ]
    rows = [["image", "score", "value", "spread", "images", "better"]]
    for visual, scores in facts["scores"].items():
        for name, score in scores.items():
            which = "higher" if name in HIGHER_IS_BETTER else "lower"
            numbers = _digits(score["value"]), _digits(score["spread"]), str(score["pictures"])
            rows.append([visual, name, *numbers, which])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    picture, score, value, spread, pictures, _ = widths
    line = f"{{:{picture}}}  {{:{score}}}  {{:>{value}}}  {{:>{spread}}}  {{:>{pictures}}}  {{}}"
    lines = [line.format(*row) for row in rows]
    gone = [f"{name} is left out: {why}" for name, why in facts["left_out"].items()]
    return "\n".join([*heading, "", *lines, *([""] if gone else []), *gone])


def _digits(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.5g}"
