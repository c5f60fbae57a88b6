"""Options of scripts/evaluate.py: those of test.py, and which scores to compute."""

from __future__ import annotations

import argparse
from pathlib import Path

from util.errors import UserError
from util.run.saved_options import read_saved_options
from util.scores.evaluation import parse_scores

from .test_options import TestOptions


class EvaluateOptions(TestOptions):
    """`TestOptions` that default to all images, and to the `--model` of the training."""

    GROUPS = tuple(dict.fromkeys(("basic", "scores", *TestOptions.GROUPS)))
    DESCRIPTION = "Score a trained model. Scores go to <results_dir>/<name>/<phase>_<epoch>."
    EXAMPLES = """examples:
  python scripts/evaluate.py --dataroot ./datasets/facades --name facades_pix2pix
  python scripts/evaluate.py --dataroot ./datasets/maps --name maps_cyclegan --phase val"""

    def initialize(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = super().initialize(parser)
        group = parser.add_argument_group("scores")
        add = group.add_argument
        add("--scores", default="all", help="comma-separated scores: L1,PSNR,SSIM,FID,...")
        add_weights(group)
        add("--cityscapes", action="store_true", help="also score Cityscapes label maps")
        parser.set_defaults(num_test=float("inf"))
        early, _ = parser.parse_known_args(self._without_help())
        self.parser = parser
        trained = read_saved_options(Path(early.checkpoints_dir, self.name_with_suffix(early)))
        if "model" in trained:
            parser.set_defaults(model=trained["model"])
        return parser

    def parse(self, save: bool = True) -> argparse.Namespace:
        opt = super().parse(save)
        opt.num_threads, opt.batch_size = 0, 1
        opt.serial_batches = opt.no_flip = True
        return opt

    def choose_speed(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        # the process that computes also reads the images: no cores are reserved for that
        super().choose_speed(opt, explicit | {"num_threads"})

    def validate(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        super().validate(opt, explicit)
        try:
            parse_scores(opt.scores)
        except UserError as e:
            self.parser.error(str(e))


def add_weights(group: argparse._ArgumentGroup) -> None:
    """Add the options that name the weight files of the FID, KID and LPIPS networks."""
    add = group.add_argument
    add(
        "--inception_weights", metavar="FILE", help="Inception weights for FID and KID [downloaded]"
    )
    add("--lpips_weights", metavar="FILE", help="AlexNet weights for LPIPS [downloaded]")
