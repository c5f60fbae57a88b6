"""What models with a discriminator share: its options, and networks built from the options."""

from __future__ import annotations

import argparse

from torch import nn

from util.argument_types import count, number
from util.errors import UserError

from . import networks
from .losses import GRADIENT_PENALTIES
from .norms import NORMS

SCALES = 2  # of --netD multiscale


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the discriminator options that a model passes on to `define_D` and its losses."""
    add = parser.add_argument_group("discriminator").add_argument
    add("--num_D", type=count, default=SCALES, help="scales of --netD multiscale")
    add(
        "--lambda_feat",
        type=number(),
        default=0.0,
        help="weight of feature matching, with --netD multiscale; 10 in pix2pixHD",
    )
    add("--gp", choices=GRADIENT_PENALTIES, help="gradient penalty [wgangp with --gan_mode wgangp]")
    add("--lambda_gp", type=number(), default=10.0, help="weight of the gradient penalty")
    add(
        "--gp_every",
        type=count,
        default=1,
        help="compute the gradient penalty every N batches, scaled by N (lazy regularization)",
    )
    add("--normD", "--norm_D", choices=NORMS, help="normalization in D [same as --norm]")


def generator(opt: argparse.Namespace, input_nc: int, output_nc: int) -> nn.Module:
    """An initialized generator as the options describe it, for these numbers of channels."""
    return networks.define_G(
        input_nc,
        output_nc,
        opt.ngf,
        opt.netG,
        getattr(opt, "normG", opt.norm),
        not opt.no_dropout,
        *(opt.init_type, opt.init_gain, opt.gpu_ids),
        antialias=not opt.no_antialias,
        antialias_up=not opt.no_antialias_up,
    )


def discriminator(opt: argparse.Namespace, input_nc: int) -> nn.Module:
    """An initialized discriminator as the options describe it, for this number of channels."""
    return networks.define_D(
        input_nc,
        opt.ndf,
        opt.netD,
        opt.n_layers_D,
        opt.normD or opt.norm,
        *(opt.init_type, opt.init_gain, opt.gpu_ids),
        antialias=not opt.no_antialias,
        num_D=opt.num_D,
    )


def min_size(opt: argparse.Namespace) -> int:
    """The smallest side, in pixels, of images that the model's discriminator can judge."""
    if not hasattr(opt, "num_D"):  # a model without one, or with one of its own
        return 1
    layers = {"basic": (3,), "n_layers": (opt.n_layers_D,)}
    layers["multiscale"] = opt.n_layers_D, opt.num_D
    return networks.min_size(*layers[opt.netD]) if opt.netD in layers else 1


def check_options(opt: argparse.Namespace) -> None:
    """Raise UserError if options of a multiscale discriminator are given for another one."""
    given = {"num_D": opt.num_D != SCALES, "lambda_feat": opt.lambda_feat > 0}
    for_scales = [name for name, is_given in given.items() if is_given]
    if for_scales and opt.netD != "multiscale":
        raise UserError(
            f"--{for_scales[0]} is for --netD multiscale, not for --netD {opt.netD}: say "
            "--netD multiscale, or leave it out"
        )
