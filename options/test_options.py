"""Options that only testing has."""

from __future__ import annotations

import argparse

from .base_options import BaseOptions, whole_number


def picture_count(text: str) -> int | float:
    """An argparse type: a number of pictures, or `all`."""
    return float("inf") if text == "all" else whole_number(1)(text)


class TestOptions(BaseOptions):
    """Adds what to translate and where to put it."""

    __test__ = False  # not a test class for pytest
    isTrain = False

    def initialize(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = super().initialize(parser)
        group = parser.add_argument_group("testing")
        add = group.add_argument
        add("--results_dir", default="./results/", help="where results are written")
        add("--aspect_ratio", type=float, default=1.0, help="scale the width of result pictures")
        add("--phase", default="test", help="train, val, test: which folder to read")
        add("--eval", action="store_true", help="networks in eval mode (batch norm, dropout)")
        add("--num_test", type=picture_count, default=50, help="how many pictures, or all")
        parser.set_defaults(model="test")
        # no cropping unless asked for: what is loaded is as large as what is cropped
        parser.set_defaults(load_size=parser.get_default("crop_size"))
        return parser

    def validate(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        super().validate(opt, explicit)
        if opt.aspect_ratio <= 0:
            self.parser.error(f"--aspect_ratio {opt.aspect_ratio:g} must be above 0")
