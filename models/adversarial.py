"""Options of discriminators, for all models that have one."""

from __future__ import annotations

import argparse

from util.argument_types import count, number

from .losses import GRADIENT_PENALTIES
from .norms import NORMS


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of discriminators that a model passes on to `define_D` and its losses."""
    add = parser.add_argument_group("discriminator").add_argument
    add("--num_D", type=count, default=2, help="scales of --netD multiscale")
    add(
        "--lambda_feat",
        type=number(),
        default=0.0,
        help="weight of feature matching, with --netD multiscale; 10 in pix2pixHD",
    )
    add("--gp", choices=GRADIENT_PENALTIES, help="gradient penalty [that of --gan_mode wgangp]")
    add(
        "--gp_every",
        type=count,
        default=1,
        help="compute the gradient penalty each so many batches, weighted as much more",
    )
    add("--normD", "--norm_D", choices=NORMS, help="norm in D; as --norm if it is not given")
