"""Scores of a model on a dataset: what scripts/evaluate.py and --val_freq compute.

A model's images are matched by name: `fake_X` is compared with `real_X`, as sets and, for paired
data, also one by one; the cycle reconstruction `rec_X` is compared with `real_X`. All are 8-bit
images, as test.py would save them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from util.errors import UserError, warn
from util.util import to_levels

from . import metrics
from .extractors import Inception, Lpips, WeightsUnavailable
from .report import report

PAIRED = ("L1", "PSNR", "SSIM", "MS-SSIM", "LPIPS")
SETS = ("FID", "KID")
SCORES = (*PAIRED, *SETS, "cycle", "grid")
NOT_LABELS = 10  # levels from the colours of classes; those of JPEG files of labels are 2 at most
FEW = 2048  # features of Inception; with fewer images, FID says less about the images


@dataclass
class Score:
    """A value, its standard deviation over images or subsets, and the number of images."""

    value: float
    spread: float | None = None
    pictures: int = 0


@dataclass
class Evaluation:
    """Scores by image (`fake_B`) and name (`PSNR`), and why others are left out.

    `extractors` describes the networks that some scores use.
    """

    pictures: int = 0
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    extractors: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """Values by name; if several images have that score, by `FID fake_B`, `FID fake_A`."""
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
        """The score of that name, averaged over the images that have it; NaN if none has."""
        values = [scores[name].value for scores in self.scores.values() if name in scores]
        return sum(values) / len(values) if values else math.nan


class Evaluator:
    """Translates a dataset and scores it.

    Args:
        opt: options as test.py has them, with `inception_weights` and `lpips_weights`.
        paired: whether A and B of an item of the dataset show the same thing.
        wanted: names from `SCORES`; `left_out` says which of them can't be computed, and why.
        cityscapes: whether to score images of labels as well.
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
            self._leave_out(PAIRED, "the images are not paired")
            self.left_out |= {"cityscapes": "the images are not paired"} if cityscapes else {}
        if opt.dataset_mode == "single":
            self._leave_out(SETS, "there are no images to compare with")
        try:
            if self.wanted & set(SETS):
                self.inception = Inception(opt.inception_weights, opt.device)
        except WeightsUnavailable as e:
            self._leave_out(SETS, str(e))
        try:
            if "LPIPS" in self.wanted:
                self.lpips = Lpips(opt.lpips_weights, opt.device)
        except WeightsUnavailable as e:
            self._leave_out(["LPIPS"], str(e))

    def _leave_out(self, names: Iterable[str], why: str) -> None:
        self.left_out |= dict.fromkeys(self.wanted & set(names), why)
        self.wanted -= set(names)

    def run(self, model: Any, dataset: Iterable[dict[str, Any]], count: int) -> Evaluation:
        """Translate the first `count` items of a dataset of batches of one, and score them."""
        opt, collected = self.opt, _Collected(self)
        bar = tqdm(range(count), desc="scoring", unit="img", leave=False, disable=None)
        for number, data in zip(bar, dataset, strict=False):
            start, goal = ("A", "B") if opt.direction == "AtoB" else ("B", "A")
            if opt.model == "test" and goal in data:
                # --model test takes A, whatever the direction
                paths = [data.get(side + "_paths") for side in (start, goal)]
                data = {"A": data[start], "A_paths": paths[0] or paths[1], "B": data[goal]}
                data["B_paths"] = paths[1] or paths[0]
                start, goal = "A", "B"
            model.set_input(data)
            model.test()
            visuals = dict(model.get_current_visuals())
            if "fake" in visuals:
                visuals = {"fake_B": visuals["fake"], "real_A": visuals["real"]}
                visuals |= {"real_B": data[goal]} if goal in data else {}
            paths = {"A": (data.get(start + "_paths") or [str(number)])[0]}
            paths["B"] = data.get(goal + "_paths", [paths["A"]])[0]
            kinds = ("real_", "fake_", "rec_")
            shown = {k: v for k, v in visuals.items() if k.startswith(kinds)}
            if nan := [k for k, v in shown.items() if torch.as_tensor(v).isnan().any()]:
                collected.leave_out_all(f"{nan[0]} has NaN, for one of {paths['A']}")
            collected.add({k: levels(v) for k, v in shown.items()}, paths)
        return collected.result()


class _Collected:
    """Values and features of the images so far."""

    def __init__(self, evaluator: Evaluator):
        self.evaluator = evaluator
        self.wanted, self.left_out = set(evaluator.wanted), dict(evaluator.left_out)
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.features: dict[str, dict[str, np.ndarray]] = defaultdict(dict)  # by name and source
        self.labels: dict[str, metrics.LabelCounts] = defaultdict(metrics.LabelCounts)
        self.sources: dict[str, set[str]] = defaultdict(set)  # by name of the image
        self.pictures = 0

    def add(self, visuals: dict[str, torch.Tensor], paths: dict[str, str]) -> None:
        """Score the images of one item, each (1, C, H, W) of uint8."""
        self.pictures += 1
        for name, picture in visuals.items():
            kind, _, rest = name.partition("_")
            side = rest[:1]  # of the dataset
            if kind == "fake":  # a translation of an image of the other side
                side = {"A": "B", "B": "A"}.get(side, "A")
            source = self._source(side, visuals, paths)
            # without pairs, images of the smaller side occur more than once
            is_new = self.evaluator.paired or source not in self.sources[name]
            self.sources[name].add(source)
            if kind != "rec" and is_new:
                for period in metrics.GRID_PERIODS:
                    self._score(name, f"grid {period}", metrics.grid, picture, period)
            real = visuals.get(f"real_{rest}")
            if real is not None and kind == "rec" and is_new:
                self._score(name, "cycle", metrics.l1, picture, real)
            elif real is not None and kind == "fake":
                self._add_pair(name, real, picture)
                self._add_to_set(f"real_{rest}", real, self._source(rest[:1], visuals, paths))
                self._add_to_set(name, picture, source)

    def _source(self, side: str, visuals: dict[str, torch.Tensor], paths: dict[str, str]) -> str:
        """A key for the image of a side: its file, which may hold several, and its content."""
        real = visuals.get(f"real_{side}")
        content = "" if real is None else hash(real.numpy().tobytes())
        return f"{paths.get(side, paths['A'])} {content}"

    def _score(self, name: str, score: str, formula: Callable[..., Any], *given: Any) -> None:
        """Add a value to a score, if wanted; a ValueError of `formula` makes it left out."""
        group = score.split()[0]  # "grid 2" is part of "grid"
        if group in self.wanted:
            try:
                self.values[name][score].append(float(formula(*given)))
            except ValueError as e:  # the images are too small for it
                self._leave_out(group, str(e))

    def _leave_out(self, name: str, why: str) -> None:
        self.wanted.discard(name)
        self.left_out[name] = why

    def leave_out_all(self, why: str) -> None:
        """Leave out every score."""
        for name in (*self.wanted, *(["cityscapes"] if self.evaluator.cityscapes else [])):
            self._leave_out(name, why)

    def _add_pair(self, name: str, real: torch.Tensor, fake: torch.Tensor) -> None:
        if self.evaluator.paired:
            self._score(name, "L1", metrics.l1, fake, real)
            self._score(name, "PSNR", finite_psnr, fake, real)
            self._score(name, "SSIM", metrics.ssim, fake, real)
            self._score(name, "MS-SSIM", metrics.ms_ssim, fake, real)
            self._score(name, "LPIPS", self._lpips, as_rgb(fake), as_rgb(real))
            a, b = as_rgb(real), as_rgb(fake)
            if self.evaluator.cityscapes and a is not None and b is not None:
                if a.shape != b.shape:
                    sizes = " and ".join("x".join(map(str, x.shape[:1:-1])) for x in (a, b))
                    self._leave_out("cityscapes", f"sizes differ: {sizes}")
                    return
                self.labels[name].add(*(x[0].permute(1, 2, 0).numpy() for x in (a, b)))

    def _lpips(self, fake: torch.Tensor | None, real: torch.Tensor | None) -> float:
        if fake is None or real is None or min(fake.shape[-2:]) < 32:
            raise ValueError("it needs images in colour or grey of at least 32x32")
        metrics.same_shape(fake, real)
        assert self.evaluator.lpips is not None
        return self.evaluator.lpips(fake, real)

    def _add_to_set(self, name: str, picture: torch.Tensor, source: str) -> None:
        inception = self.evaluator.inception
        if inception is None or source in self.features[name]:
            return
        rgb = as_rgb(picture)
        if rgb is None:
            for score in SETS:
                self._leave_out(score, "it needs images in colour or grey")
            return
        self.features[name][source] = inception(rgb)[0]

    def result(self) -> Evaluation:
        """All scores, and why some are left out."""
        scores: dict[str, dict[str, Score]] = defaultdict(dict)
        for visual, by_name in self.values.items():
            for name, values in by_name.items():
                if name.split()[0] not in self.left_out:
                    spread = float(np.std(values)) if len(values) > 1 else None
                    scores[visual][name] = Score(float(np.mean(values)), spread, len(values))
        labels = {} if "cityscapes" in self.left_out else self.labels
        if labels:
            # a model that translates both ways also makes photographs: take the labels
            visual = min(labels, key=lambda name: labels[name].distance())
            if (distance := labels[visual].distance()) > NOT_LABELS:
                why = f"real images are {distance:.0f} levels off the colours of classes"
                self._leave_out("cityscapes", f"{why}, so they are no label images")
            else:
                for name, value in labels[visual].scores().items():
                    scores[visual][name] = Score(value, None, self.pictures)
        for visual in list(self.features):
            if visual.startswith("fake"):
                self._score_set(visual, scores[visual])
        by_visual = {visual: found for visual, found in sorted(scores.items()) if found}
        networks = {"inception": self.evaluator.inception, "lpips": self.evaluator.lpips}
        extractors = {k: net.weights.report() for k, net in networks.items() if net is not None}
        left_out = dict(sorted(self.left_out.items()))
        return Evaluation(self.pictures, by_visual, left_out, extractors)

    def _score_set(self, visual: str, scores: dict[str, Score]) -> None:
        names = visual.replace("fake", "real", 1), visual
        real, fake = (np.array(list(self.features[name].values())) for name in names)
        if min(len(real), len(fake)) < 2:
            for name in self.wanted & {*SETS}:
                self._leave_out(name, "it needs at least two images on each side")
        if "FID" in self.wanted:
            scores["FID"] = Score(metrics.fid(real, fake), None, len(fake))
        if "KID" in self.wanted:
            scores["KID"] = Score(*metrics.kid(real, fake), len(fake))


def finite_psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR (N,) in dB, but finite for equal images too, so that means are finite.

    Equal images get the PSNR of two images that differ in a single value by one level.
    """
    return metrics.psnr(a, b).clamp(max=10 * math.log10(metrics.PEAK**2 * a[0].numel()))


def levels(picture: torch.Tensor | np.ndarray) -> torch.Tensor:
    """An image as it would be saved, (1, C, H, W) of uint8 on the CPU.

    Takes a tensor (1, C, H, W) in [-1, 1] or an array (H, W, 3) in [0, 255].
    """
    if isinstance(picture, np.ndarray):
        values = torch.from_numpy(picture.astype(np.float64)).permute(2, 0, 1)[None]
    else:
        values = torch.from_numpy(to_levels(picture.detach()[:1].float().cpu().numpy()))
    return torch.nan_to_num(values).round().clamp(0, 255).to(torch.uint8)


def as_rgb(picture: torch.Tensor) -> torch.Tensor | None:
    """(1, 1 or 3, H, W) as (1, 3, H, W); None for another number of channels."""
    if picture.shape[1] == 1:
        return picture.expand(-1, 3, -1, -1)
    return picture if picture.shape[1] == 3 else None


def evaluate(opt: argparse.Namespace, model: Any, dataset: Any) -> dict[str, Any]:
    """Score a model that is set up on a dataset; returns the report of scripts/evaluate.py.

    Raises UserError if nothing can be scored.
    """
    names = [str(name) for name in model.visual_names]
    if not any(name.startswith(("fake", "rec_")) for name in names):
        raise UserError(
            "nothing can be scored: scores compare images called fake_B with real_B, and "
            f"--model {opt.model} has visual_names {', '.join(names)}"
        )
    evaluator = Evaluator(opt, dataset.paired, parse_scores(opt.scores), opt.cityscapes)
    with contextlib.closing(dataset):
        result = evaluator.run(model, dataset, int(min(opt.num_test, len(dataset))))
    if not result.scores:
        reasons = [f"{name}: {why}" for name, why in result.left_out.items()]
        if result.left_out.keys() & set(PAIRED):
            reasons.append("pairs need --dataset_mode aligned, or a dataset with paired = True")
        if opt.dataset_mode == "single":
            reasons.append("sets need images of both sides: --dataset_mode unaligned")
        raise UserError(f"nothing could be scored: {'; '.join(reasons)}")
    sets = {n: s[n].pictures for s in result.scores.values() for n in SETS if n in s}
    if sets and min(sets.values()) < FEW:
        warn(
            f"{' and '.join(sets)} of {min(sets.values())} images depend on that number: compare "
            f"only with those of as many, and do not rely on fewer than {FEW}"
        )
    return report(opt, model, result)


def parse_scores(text: str) -> tuple[str, ...]:
    """Names of scores from a comma-separated list, or `all`; raises UserError for unknown ones."""
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
