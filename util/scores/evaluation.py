"""Scores of a model on a data set: what scripts/evaluate.py and --val_freq compute.

A model's pictures are found by their names: `fake_X` is compared with `real_X`, one by one for
paired data and as a set always, and the cycle reconstruction `rec_X` with `real_X`. All are 8-bit
pictures, as test.py would save them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from util.errors import UserError
from util.files import sha256

from . import metrics
from .extractors import Inception, Lpips, Unavailable

PAIRED = ("L1", "PSNR", "SSIM", "MS-SSIM", "LPIPS")
SETS = ("FID", "KID")
SCORES = (*PAIRED, *SETS, "cycle", "grid")
HIGHER_IS_BETTER = frozenset(
    ("PSNR", "SSIM", "MS-SSIM", "pixel accuracy", "class accuracy", "class IoU")
)
VARIANTS = {
    "L1": "mean absolute difference, as a fraction of the range (0 to 1)",
    "PSNR": "dB, peak 255, mean over pictures",
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
    "class accuracy": "mean over the classes in the real pictures",
    "class IoU": "mean over the classes in real or translated pictures",
}


def better(name: str, value: float, than: float) -> bool:
    """Whether a value of this score is better than another; NaN never is."""
    return value > than if name in HIGHER_IS_BETTER else value < than


def direction_sides(opt: argparse.Namespace) -> tuple[str, str]:
    """The sides of the data set that translation starts from and goes to: `A`, `B` or reverse."""
    return ("A", "B") if opt.direction == "AtoB" else ("B", "A")


@dataclass
class Score:
    """A value, its standard deviation over pictures or subsets, and the number of pictures."""

    value: float
    spread: float | None = None
    pictures: int = 0


@dataclass
class Evaluation:
    """Scores by picture (`fake_B`) and name (`PSNR`), and reasons for those left out."""

    pictures: int = 0
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """Values by name; where several pictures have a score, `FID fake_B`, `FID fake_A`."""
        count: dict[str, int] = defaultdict(int)
        for scores in self.scores.values():
            for name in scores:
                count[name] += 1
        return {
            name if count[name] == 1 else f"{name} {visual}": score.value
            for visual, scores in self.scores.items()
            for name, score in scores.items()
        }

    def mean(self, name: str) -> float:
        """The score of that name, the mean where several pictures have it; NaN for none."""
        values = [scores[name].value for scores in self.scores.values() if name in scores]
        return sum(values) / len(values) if values else math.nan


class Evaluator:
    """Translates a data set and scores it.

    Args:
        opt: options as test.py has them, with `inception_weights` and `lpips_weights`.
        paired: whether A and B of an item of the data set show the same thing.
        wanted: names out of `SCORES`; one that can't be had is named in `left_out`.
        cityscapes: whether to score pictures of labels as well.
    """

    def __init__(
        self,
        opt: argparse.Namespace,
        paired: bool,
        wanted: Iterable[str] = SCORES,
        cityscapes: bool = False,
    ):
        self.opt, self.paired, self.cityscapes = opt, paired, cityscapes
        self.wanted = set(wanted)
        self.left_out: dict[str, str] = {}
        self.inception: Inception | None = None
        self.lpips: Lpips | None = None
        if not self.paired:
            for name in PAIRED:
                self._leave_out(name, "the data are no pairs")
        if opt.dataset_mode == "single":
            for name in SETS:
                self._leave_out(name, "there are no pictures to compare with")
        try:
            if self.wanted & set(SETS):
                self.inception = Inception(opt.inception_weights, opt.device)
        except Unavailable as e:
            for name in SETS:
                self._leave_out(name, str(e))
        try:
            if "LPIPS" in self.wanted:
                self.lpips = Lpips(opt.lpips_weights, opt.device)
        except Unavailable as e:
            self._leave_out("LPIPS", str(e))

    def _leave_out(self, name: str, why: str) -> None:
        if name in self.wanted:
            self.wanted.discard(name)
            self.left_out[name] = why

    def extractors(self) -> dict[str, Any]:
        """A description of the networks that scores use, for the report."""
        found = {"inception": self.inception, "lpips": self.lpips}
        return {name: net.weights.report() for name, net in found.items() if net is not None}

    def run(self, model: Any, dataset: Iterable[dict[str, Any]], count: int) -> Evaluation:
        """Translate the first `count` items of a data set of batches of one, and score them."""
        opt, collected = self.opt, _Collected(self)
        bar = tqdm(range(count), desc="scoring", unit="img", leave=False, disable=None)
        for _, data in zip(bar, dataset, strict=False):
            start, goal = direction_sides(opt)
            if opt.model == "test" and goal in data:
                # that model takes A, whatever the direction
                data = {"A": data[start], "A_paths": data[start + "_paths"], "B": data[goal]}
                data["B_paths"] = data["A_paths"]
                start, goal = "A", "B"
            model.set_input(data)
            model.test()
            visuals = dict(model.get_current_visuals())
            if "fake" in visuals:
                visuals = {"fake_B": visuals["fake"], "real_A": visuals["real"]}
                visuals |= {"real_B": data[goal]} if goal in data else {}
            paths = {"A": data[start + "_paths"][0]}
            paths["B"] = data.get(goal + "_paths", [paths["A"]])[0]
            kinds = ("real_", "fake_", "rec_")
            pictures = {k: levels(v) for k, v in visuals.items() if k.startswith(kinds)}
            collected.add(pictures, paths)
        return collected.result()


class _Collected:
    """Values and features of the pictures so far."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.features: dict[str, dict[str, np.ndarray]] = defaultdict(dict)  # by name and path
        self.labels: dict[str, metrics.LabelCounts] = defaultdict(metrics.LabelCounts)
        self.left_out = dict(evaluator.left_out)
        self.pictures = 0

    def add(self, visuals: dict[str, torch.Tensor], paths: dict[str, str]) -> None:
        self.pictures += 1
        for name, picture in visuals.items():
            kind, _, rest = name.partition("_")
            if kind != "rec":
                self._add_grid(name, picture)
            real = visuals.get(f"real_{rest}")
            if real is None or kind not in ("fake", "rec"):
                continue
            if kind == "rec":
                if "cycle" in self.evaluator.wanted:
                    self.values[name]["cycle"].append(float(metrics.l1(picture, real)))
                continue
            if self.evaluator.paired:
                self._add_pair(name, real, picture)
            # without pairs, pictures of the smaller side come more than once
            side = rest[:1]
            self._add_to_set(f"real_{rest}", real, paths.get(side, paths["A"]))
            other = {"A": "B", "B": "A"}.get(side, "A")
            self._add_to_set(name, picture, paths.get(other, paths["A"]))

    def _add_grid(self, name: str, picture: torch.Tensor) -> None:
        if "grid" not in self.evaluator.wanted or "grid" in self.left_out:
            return
        try:
            for period in metrics.GRID_PERIODS:
                self.values[name][f"grid {period}"].append(float(metrics.grid(picture, period)))
        except ValueError as e:  # too small for it
            self.left_out["grid"] = str(e)

    def _add_pair(self, name: str, real: torch.Tensor, fake: torch.Tensor) -> None:
        formulas = {
            "L1": metrics.l1,
            "PSNR": metrics.psnr,
            "SSIM": metrics.ssim,
            "MS-SSIM": metrics.ms_ssim,
        }
        wanted = self.evaluator.wanted
        for score, formula in formulas.items():
            if score not in wanted or score in self.left_out:
                continue
            try:
                self.values[name][score].append(float(formula(fake, real)))
            except ValueError as e:  # too small for it
                self.left_out[score] = str(e)
        lpips = self.evaluator.lpips
        if lpips is not None and "LPIPS" not in self.left_out:
            pair = as_rgb(fake), as_rgb(real)
            if pair[0] is None or pair[1] is None or min(fake.shape[-2:]) < 32:
                self.left_out["LPIPS"] = "it needs pictures in colour or grey of at least 32x32"
            else:
                self.values[name]["LPIPS"].append(lpips(pair[0], pair[1]))
        if self.evaluator.cityscapes:
            a, b = as_rgb(real), as_rgb(fake)
            if a is not None and b is not None:
                self.labels[name].add(*(x[0].permute(1, 2, 0).numpy() for x in (a, b)))

    def _add_to_set(self, name: str, picture: torch.Tensor, path: str) -> None:
        inception = self.evaluator.inception
        if inception is None or path in self.features[name]:
            return
        rgb = as_rgb(picture)
        if rgb is None:
            for score in SETS:
                self.left_out[score] = "it needs pictures in colour or grey"
            return
        self.features[name][path] = inception(rgb)[0]

    def result(self) -> Evaluation:
        scores: dict[str, dict[str, Score]] = defaultdict(dict)
        for visual, by_name in self.values.items():
            for name, values in by_name.items():
                if name.split()[0] not in self.left_out:  # "grid 2" goes with "grid"
                    array = np.array(values, np.float64)
                    scores[visual][name] = Score(_mean(array), _deviation(array), len(array))
        for visual, counts in self.labels.items():
            found = counts.scores()
            for name, value in (
                ("pixel accuracy", found.pixel_accuracy),
                ("class accuracy", found.class_accuracy),
                ("class IoU", found.class_iou),
            ):
                scores[visual][name] = Score(value, None, self.pictures)
        for visual in list(self.features):
            if visual.startswith("fake"):
                self._score_set(visual, scores[visual])
        return Evaluation(
            self.pictures, {k: v for k, v in sorted(scores.items()) if v}, self.left_out
        )

    def _score_set(self, visual: str, scores: dict[str, Score]) -> None:
        real, fake = (
            list(self.features[name].values())
            for name in (visual.replace("fake", "real", 1), visual)
        )
        if min(len(real), len(fake)) < 2:
            for name in SETS:
                self.left_out[name] = "it needs at least two pictures on each side"
            return
        wanted = self.evaluator.wanted
        if "FID" in wanted and "FID" not in self.left_out:
            scores["FID"] = Score(metrics.fid(np.array(real), np.array(fake)), None, len(fake))
        if "KID" in wanted and "KID" not in self.left_out:
            mean, deviation = metrics.kid(np.array(real), np.array(fake))
            scores["KID"] = Score(mean, deviation, len(fake))


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _deviation(values: np.ndarray) -> float | None:
    # equal pictures have an infinite PSNR, whose mean has no deviation
    return float(values.std()) if np.isfinite(values).all() else None


def levels(picture: torch.Tensor | np.ndarray) -> torch.Tensor:
    """A picture as it would be saved, (1, C, H, W) of uint8 on the CPU.

    Takes a tensor (1, C, H, W) in [-1, 1] or an array (H, W, 3) in [0, 255].
    """
    if isinstance(picture, np.ndarray):
        values = torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)[None]
    else:
        # as tensor2im does, to the bit: in float32, and divided before it is multiplied
        values = (picture.detach()[:1].float().cpu() + 1) / 2 * 255.0
    return torch.nan_to_num(values).round().clamp(0, 255).to(torch.uint8)


def as_rgb(picture: torch.Tensor) -> torch.Tensor | None:
    """(1, 1 or 3, H, W) as (1, 3, H, W); None for another number of channels."""
    if picture.shape[1] == 1:
        return picture.expand(-1, 3, -1, -1)
    return picture if picture.shape[1] == 3 else None


def evaluate(opt: argparse.Namespace, model: Any, dataset: Any) -> dict[str, Any]:
    """The report of a model that is set up, over a data set: what scripts/evaluate.py writes.

    Raises UserError where nothing can be scored.
    """
    evaluator = Evaluator(opt, dataset.paired, parse_scores(opt.scores), opt.cityscapes)
    if opt.eval:
        model.eval()
    with contextlib.closing(dataset):
        result = evaluator.run(model, dataset, int(min(opt.num_test, len(dataset))))
    if not result.scores:
        raise UserError(
            "nothing could be scored: "
            + "; ".join(f"{name}: {why}" for name, why in result.left_out.items())
            + "; pairs need --dataset_mode aligned, or a dataset with paired = True; sets need "
            "--model cycle_gan"
        )
    return report(opt, model, evaluator, result)


# ------------------------------------------------------------------------------------------ reports
def weight_files(model: Any, suffix: str) -> list[dict[str, str]]:
    """File and SHA-256 of a model's generators in the save of that suffix."""
    paths = [model.weights_file(suffix, n) for n in model.model_names if n.startswith("G")]
    return [{"file": path.name, "sha256": sha256(path)} for path in paths if path.exists()]


def report(
    opt: argparse.Namespace,
    model: Any,
    evaluator: Evaluator,
    result: Evaluation,
    suffix: str | None = None,
) -> dict[str, Any]:
    """All that a reader needs to know about a set of scores, as plain values for JSON.

    `suffix` says which save of the networks was scored, if it is not that of the options. Numbers
    that JSON does not have, an infinite PSNR for one, become text.
    """
    saved = suffix if suffix is not None else str(model.load_suffix())
    names = {name for scores in result.scores.values() for name in scores}
    return {
        "name": opt.name,
        "model": opt.model,
        "direction": opt.direction,
        "epoch": saved,
        "phase": opt.phase,
        "pictures": result.pictures,
        "variant": {
            "network": {k: getattr(opt, k) for k in ("netG", "norm", "ngf", "no_dropout")},
            "mode": "eval" if opt.eval else "train (batch statistics, dropout if there is any)",
            "pictures": "8-bit levels, as saved by test.py",
            "scores": {name: VARIANTS[name] for name in VARIANTS if name in names},
        },
        "resize": {
            "preprocess": opt.preprocess,
            "load_size": opt.load_size,
            "crop_size": opt.crop_size,
        },
        "weights": weight_files(model, saved),
        "extractors": evaluator.extractors(),
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


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def table(facts: dict[str, Any]) -> str:
    """The scores of a report as text, a line each, under a heading with what they hold for."""
    resize = facts["resize"]
    sizes = f"{resize['preprocess']}, {resize['load_size']} to {resize['crop_size']}"
    heading = [
        f"{facts['name']}: {facts['model']} {facts['direction']}, epoch {facts['epoch']}, "
        f"{facts['pictures']} pictures of {facts['phase']}, {sizes}",
        f"network in {facts['variant']['mode']} mode",
        *(f"{w['file']}  sha256 {w['sha256']}" for w in facts["weights"]),
        *(
            f"{w['file']}  sha256 {w['sha256']} ({'' if w['released'] else 'not '}as released)"
            for w in facts["extractors"].values()
        ),
    ]
    lines = [f"{'picture':<12}{'score':<16}{'value':>10}{'spread':>10}{'pictures':>10}  better"]
    for visual, scores in facts["scores"].items():
        for name, score in scores.items():
            which = "higher" if name in HIGHER_IS_BETTER else "lower"
            value, spread = _digits(score["value"]), _digits(score["spread"])
            count = score["pictures"]
            lines.append(f"{visual:<12}{name:<16}{value:>10}{spread:>10}{count:>10}  {which}")
    gone = [f"{name} is left out: {why}" for name, why in facts["left_out"].items()]
    return "\n".join([*heading, "", *lines, *([""] if gone else []), *gone])


def _digits(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.5g}"


def parse_scores(text: str) -> tuple[str, ...]:
    """Names of scores from a list with commas, or `all`. Raises UserError for an unknown one."""
    if text == "all":
        return SCORES
    known = {name.lower(): name for name in SCORES}
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name.lower() not in known]
    if unknown or not names:
        raise UserError(
            f"--scores '{text}': {', '.join(unknown) or 'nothing'} is no score; choose from "
            f"{', '.join(SCORES)}, or all"
        )
    return tuple(known[name.lower()] for name in names)
