"""Scores on held-out images while training, and the best weights so far."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from util import distributed, randomness
from util.errors import UserError, in_one_line, say, warn
from util.files import write_whole
from util.run.position import Position
from util.run.saved_options import experiment_folder

from .evaluation import PAIRED, SETS, Evaluation, Evaluator
from .report import better, report

BEST = "best_scores.json"
WRITTEN = ".best_new"  # suffix of weights until all are written; hidden, so nothing resumes there


class _Stopped(Exception):
    """The run has to stop before all images are scored."""


class Validation:
    """Scores the model on the split `--val_phase` every `--val_freq` epochs; off if that is 0.

    The best networks by `--best_by` are kept as `best_net_*.pth`, with their scores in
    `best_scores.json`. Validation does not change training: random state, running statistics and
    the attributes of the model are restored.

    Raises UserError at once if the split does not exist or `--best_by` can't be computed.
    `create_dataset` is `data.create_dataset`.
    """

    def __init__(
        self,
        opt: argparse.Namespace,
        model: Any,
        create_dataset: Callable[[argparse.Namespace], Any],
    ):
        self.every, self.model = opt.val_freq, model
        self.folder = experiment_folder(opt)
        if not self.every or not distributed.is_main():
            return
        self.opt = validation_options(opt)
        with _undisturbed_random():
            try:
                self.dataset = create_dataset(self.opt)
                paired = self.dataset.paired
            except UserError as e:
                raise UserError(
                    f"--val_freq needs images to score (--val_phase {opt.val_phase}): {e}"
                ) from e
        self.by = opt.best_by or ("L1" if paired else "cycle")
        needs_network = {*SETS, "LPIPS"} & {self.by}
        wanted = {"L1", "PSNR", "SSIM", "MS-SSIM", "cycle", self.by}
        # FID and KID use the same features
        wanted |= set(SETS) if self.by in SETS or opt.inception_weights else set()
        wanted |= {"LPIPS"} if opt.lpips_weights else set()
        if self.by in PAIRED and not paired:
            raise UserError(
                f"--best_by {self.by} needs pairs, which --dataset_mode {opt.dataset_mode} does "
                "not give (a dataset of pairs says paired = True); choose cycle, FID or KID"
            )
        goes_back = any(str(name).startswith("rec_") for name in model.visual_names)
        if opt.best_by == "cycle" and not goes_back:
            raise UserError(
                f"--best_by cycle: --model {opt.model} has no image that went there and back; "
                "choose FID or KID"
            )
        with _undisturbed_random():
            self.evaluator = Evaluator(self.opt, paired, wanted)
            if needs_network and self.by in self.evaluator.left_out:
                raise UserError(f"--best_by {self.by}: {self.evaluator.left_out[self.by]}")
        self.count = int(min(opt.num_val, len(self.dataset)))
        data = f"{self.count} images of {opt.val_phase} of {Path(opt.dataroot).resolve().name}"
        size = self.opt.load_size if opt.preprocess == "scale_width" else opt.crop_size
        self.validated_on = f"{data} ({opt.preprocess}, {size}, {opt.direction})"
        # of FID, KID or LPIPS: other weights give other scores
        net = self.evaluator.lpips if self.by == "LPIPS" else self.evaluator.inception
        self.extractor = net.weights.sha256 if needs_network and net is not None else ""
        self.best: dict[str, Any] | None = None

    def resume(self, position: Position) -> None:
        """Restore the best so far, unless it is from after the checkpoint that is resumed."""
        if not self.every or not distributed.is_main() or not position.total_iters:
            return
        best = self._read_best()
        if best is not None and best["images"] > position.total_iters:
            print(f"the best so far, of epoch {best['epoch']}, is later than this: discarded")
        elif best is not None:
            self.best = best
            self.print_best("best so far")

    def print_best(self, title: str = "best") -> None:
        """Print which epoch is the best, if there has been a validation."""
        if self.every and distributed.is_main() and self.best:
            value = f"{self.by} {self.best['value']:.5g}"
            print(f"{title}: {value} of epoch {self.best['epoch']}, kept as best_net_*.pth")

    def _read_best(self) -> dict[str, Any] | None:
        try:
            best = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
            kept = {key: best[key] for key in ("by", "value", "epoch", "images")}
            of, extractors = best["of"], best.get("extractors", {}).values()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as e:
            warn(f"{self.folder / BEST} can't be read ({e}): the best score is reset")
            return None
        if kept["by"] != self.by:
            warn(f"the best so far was by {kept['by']}: --best_by {self.by} resets it")
            return None
        if of != self.validated_on:
            warn(f"the best so far is of {of}: with {self.validated_on}, it is reset")
            return None
        if self.extractor and self.extractor not in {x.get("sha256") for x in extractors}:
            warn(f"the best so far is by other weights for {self.by}: it is reset")
            return None
        # a model may name its files in its own way
        if not {path.name for path in self.folder.glob("best_*")} - {BEST}:
            warn(f"the weights of {self.folder / BEST} are gone: the best score is reset")
            return None
        return kept

    def end_epoch(
        self, position: Position, visualizer: Any, stopping: Callable[[], bool] = lambda: False
    ) -> bool:
        """Score the model if `--val_freq` divides this epoch; log scores, keep the best weights.

        Rank 0 does this, and the others wait. Returns whether it was left unfinished because of
        `stopping`, which is asked before each image. Whatever fails, such as a broken image or
        the code of a user's dataset, it only warns, since the epoch is not saved yet.
        """
        if not self.every or position.epoch % self.every:
            return False
        unfinished = False
        if distributed.is_main():
            try:
                with distributed.local_norms(), self.model.uncompiled():
                    visualizer.log_scores(self._score(position, stopping))
            except _Stopped:
                unfinished = True
            except Exception as e:
                kind = "" if isinstance(e, UserError) else f"{type(e).__name__}: "
                warn(f"no scores of epoch {position.epoch}: {kind}{in_one_line(e, 300)}")
            self.dataset.close()  # lists what --skip_broken has skipped
        return distributed.broadcast_object(unfinished)

    def _score(self, position: Position, stopping: Callable[[], bool]) -> dict[str, Any]:
        """Compute the scores of the model, as a record for loggers."""
        start = time.perf_counter()
        result = self._run(stopping)
        scores = result.flat()
        with self.model.averaged_weights() as averaged:
            if averaged:  # test.py uses the averaged weights, so they decide
                raw, result = result, self._run(stopping)
                scores = result.flat() | {f"{name} raw": x for name, x in scores.items()}
                self._compare(result.mean(self.by), raw.mean(self.by))
        value = result.mean(self.by)
        if math.isnan(value):
            why = result.left_out.get(self.by, "the model makes no images that have it")
            warn(f"no best_net_*.pth of epoch {position.epoch}: --best_by {self.by}: {why}")
        elif self.best is None or better(self.by, value, self.best["value"]):
            self._keep(position, value, result)
        return {
            "epoch": position.epoch,
            "images": position.total_iters,
            "progress": float(position.epoch),
            "phase": self.opt.phase,
            "pictures": result.pictures,
            "seconds": time.perf_counter() - start,
            "scores": scores,
            "best": {k: self.best[k] for k in ("by", "value", "epoch")} if self.best else {},
        }

    def _run(self, stopping: Callable[[], bool]) -> Evaluation:
        with undisturbed(self.model):
            return self.evaluator.run(self.model, self._until(stopping), self.count)

    def _until(self, stopping: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        for data in self.dataset:
            if stopping():
                raise _Stopped
            yield data

    def _compare(self, averaged: float, raw: float) -> None:
        """Print which weights are better."""
        if math.isnan(averaged) or math.isnan(raw):
            return
        which = "averaged" if better(self.by, averaged, raw) else "raw"
        which = "neither" if averaged == raw else which
        say(f"better weights: {which} ({self.by} {averaged:.4g} averaged, {raw:.4g} raw)")

    def _keep(self, position: Position, value: float, result: Evaluation) -> None:
        """Write the weights, then their scores; if killed in between, the epoch is repeated."""
        best = {
            "by": self.by,
            "value": value,
            "epoch": position.epoch,
            "images": position.total_iters,
            "of": self.validated_on,
        }
        try:
            self._remove_unfinished()  # left by a run that was killed here
            self.model.save_networks(WRITTEN)
            for path in self.folder.glob(f"{WRITTEN}_*"):
                path.replace(path.with_name(path.name.replace(WRITTEN, "best", 1)))
            facts = report(self.opt, self.model, result, "best")
            facts |= best
            write_whole(self.folder / BEST, json.dumps(facts, indent=2) + "\n")
        except (OSError, RuntimeError) as e:
            self._remove_unfinished()
            reason = in_one_line(e, 200)
            warn(f"best_net_*.pth of epoch {position.epoch} could not be saved: {reason}")
            return
        self.best = best

    def _remove_unfinished(self) -> None:
        for path in self.folder.glob(f"{WRITTEN}_*"):
            path.unlink()


def validation_options(opt: argparse.Namespace) -> argparse.Namespace:
    """The options of a training run as test.py would have them for its validation split."""
    val = copy.copy(opt)
    val.isTrain, val.phase, val.eval, val.seed = False, opt.val_phase, False, 0
    val.serial_batches = val.no_flip = True
    val.num_threads, val.batch_size = 0, 1
    val.min_size = 1  # there is no discriminator
    val.max_dataset_size = math.inf
    if "crop" in val.preprocess and val.preprocess != "crop":
        val.load_size = val.crop_size  # the whole image, as in testing
    return val


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Context manager: a model may run, always with the same seed; it is restored at the end.

    Networks run in training mode, as in test.py without `--eval`. This changes their running
    statistics, which are restored too.
    """
    held = dict(vars(model))
    modules = list(dict.fromkeys(m for n in model.all_modules().values() for m in n.modules()))
    modes = [(module, module.training) for module in modules]
    buffers = [(b, b.clone()) for module in modules for b in module.buffers(recurse=False)]
    with _undisturbed_random():
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for buffer, value in buffers:
                buffer.copy_(value)
            vars(model).clear()
            vars(model).update(held)


@contextlib.contextmanager
def _undisturbed_random() -> Iterator[None]:
    with randomness.preserved(), randomness.seeded(0):
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(0)
        if torch.backends.mps.is_available():
            torch.mps.manual_seed(0)
        yield
