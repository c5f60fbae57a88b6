#!/usr/bin/env python3
"""Load a whole dataset as training does, and say what is wrong with it.

    python scripts/check_dataset.py --dataroot ./datasets/maps
    python scripts/check_dataset.py --dataroot ./datasets/facades --model pix2pix --phase train

Takes the options of train.py. Exit code 1 if something would stop training, 0 if not, 2 for a wrong
command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before the imports, which take seconds

from data.check import check, report
from models.adversarial import min_size
from options.shared_options import group
from options.train_options import TrainOptions
from util.errors import one_line_errors


class CheckOptions(TrainOptions):
    """The options of training; only those that load images matter."""

    DESCRIPTION = "Load a whole dataset as training does, and say what is wrong with it."
    EXAMPLES = """examples:
  python scripts/check_dataset.py --dataroot ./datasets/maps
  python scripts/check_dataset.py --dataroot ./datasets/facades --model pix2pix --phase train"""

    def initialize(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = super().initialize(parser)
        basic = group(parser, "basic")
        basic.add_argument("--all", action="store_true", help="list all files of each kind")
        parser.set_defaults(phase="", num_threads=os.cpu_count() or 1)
        return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print, and return the exit code."""
    options = CheckOptions(argv)
    opt = options.gather_options()
    options.validate(opt, options.explicit_options())
    opt.min_size = min_size(opt)  # of images that are not resized: --preprocess none
    found = check(opt)
    print(report(found, opt.all, opt.skip_broken))
    return 1 if found.stops(opt.skip_broken) else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
