"""What the adversarial part of several models shares: its options."""

from __future__ import annotations

import argparse

from .norms import NORMS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of discriminators that a model passes on to `define_D` and its losses."""
    add = parser.add_argument_group("discriminator").add_argument
    add("--normD", "--norm_D", choices=NORMS, help="norm in D; as --norm if it is not given")
