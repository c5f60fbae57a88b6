"""The options that training and testing share, grouped as in --help."""

from __future__ import annotations

import argparse

from models.init import INIT_TYPES
from models.networks import DISCRIMINATORS, GENERATORS
from models.norms import NORMS
from models.speed.acceleration import PRECISIONS
from util.argument_types import (
    count,
    experiment_name,
    number,
    renamed,
    whole,
    whole_number,
    width,
)
from util.run.saved_options import DEFAULT_NAME

PREPROCESS = ("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none")


class Antialias(argparse.Action):
    """The positive form of two flags: sets `no_antialias` and `no_antialias_up` to False."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        namespace.no_antialias = namespace.no_antialias_up = False


def group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """The argument group of that title, created if it does not exist."""
    found = [group for group in parser._action_groups if group.title == title]
    return found[0] if found else parser.add_argument_group(title)


def add_all(parser: argparse.ArgumentParser, saves: str) -> None:
    """Add all of them; `saves` is the title of the group of `--epoch` and `--load_iter`."""
    for add in (add_basic, add_model, add_speed, add_data):
        add(parser)
    add_saves(parser, saves)
    add_display(parser)


def add_basic(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("basic").add_argument
    add("--dataroot", help="dataset: a folder with trainA, trainB, ...")
    add("--name", type=experiment_name, default=DEFAULT_NAME, help="name of experiment and folder")
    add("--gpu_ids", default="0", help="GPUs to use: 0 or 0,1,2; -1 for the CPU")
    add("--checkpoints_dir", default="./checkpoints", help="where experiments are kept")
    add("--seed", type=whole, help="random seed; if not given, a new one is drawn and printed")
    add("--deterministic", action="store_true", help="bit-identical runs, but slower")
    add("--verbose", action="store_true", help="print the networks layer by layer")
    add("--suffix", default="", help="appended to --name; {option} is filled in: {netG}_{norm}")


def add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="cycle_gan", help="cycle_gan | pix2pix | cut | dcl | test | ...")
    add("--input_nc", type=width, default=3, help="channels of input images")
    add("--output_nc", type=width, default=3, help="channels of output images")
    add("--ngf", type=width, default=64, help="filters in the generator's first convolution")
    add("--ndf", type=width, default=64, help="filters in the discriminator's first convolution")
    add("--netD", default="basic", choices=DISCRIMINATORS, help="D; basic: the 70x70 PatchGAN")
    add("--netG", default="resnet_9blocks", choices=GENERATORS, help="the generator's architecture")
    add("--n_layers_D", type=whole_number(1, 100), default=3, help="layers of --netD n_layers")
    # the names in the original's instructions for several GPUs, which its code refuses
    norm = renamed({"sync_batch": "syncbatch", "sync_instance": "instance"})
    add("--norm", type=norm, default="instance", choices=NORMS, help="normalization in G and D")
    add("--init_type", default="normal", choices=INIT_TYPES, help="how weights are drawn")
    add("--init_gain", type=number(), default=0.02, help="scale of normal, xavier, orthogonal")
    add("--no_dropout", action="store_true", help="no dropout in the generator")
    # the positive form of the flag above, which some models set by default
    add(
        "--dropout",
        dest="no_dropout",
        action="store_false",
        default=argparse.SUPPRESS,
        help="dropout in the generator, where the model's default is none",
    )
    # the default is no anti-aliasing, except for cut and dcl
    plain = {"action": "store_true", "default": True}
    add("--no_antialias", **plain, help="no anti-aliased downsampling in G and D")
    add("--no_antialias_up", **plain, help="no anti-aliased upsampling in G")
    add(
        "--antialias",
        dest="no_antialias",
        action=Antialias,
        nargs=0,
        default=argparse.SUPPRESS,
        help="anti-aliased down- and upsampling, against checkerboards",
    )


def add_speed(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("speed").add_argument
    add("--precision", default="tf32", choices=PRECISIONS, help="precision of the networks")
    add(
        "--channels_last",
        nargs="?",
        default="auto",
        const="on",
        choices=("auto", "on", "off"),
        help="memory layout (N, H, W, C); auto: on GPUs where that is faster",
    )
    add("--compile", action="store_true", help="torch.compile: slow start, then faster")
    add(
        "--cuda_graphs",
        nargs="?",
        default="auto",
        const="on",
        choices=("auto", "on", "off"),
        help="CUDA graphs; auto: of iterations, for models that allow it; on: otherwise of "
        "compiled networks; off: none",
    )
    add(
        "--batch_passes",
        default="auto",
        choices=("auto", "on", "off"),
        help="merge passes of a network into one batch; auto: where that is faster",
    )
    add("--fast", action="store_true", help="the fastest options for this machine; prints them")


def add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--dataset_mode", default="unaligned", help="unaligned | aligned | single | ...")
    add("--direction", default="AtoB", choices=("AtoB", "BtoA"), help="translate A to B, or B to A")
    add("--serial_batches", action="store_true", help="take images in order, not shuffled")
    add("--num_threads", type=whole, default=4, help="processes that load images")
    add("--batch_size", type=count, default=1, help="images in a batch")
    add("--load_size", type=width, default=286, help="scale images to this size before the crop")
    add("--crop_size", type=width, default=256, help="crop a square of this size after scaling")
    add("--max_dataset_size", type=count, default=float("inf"), help="use at most this many images")
    add("--preprocess", default="resize_and_crop", choices=PREPROCESS, help="scaling and cropping")
    add("--no_flip", action="store_true", help="no random horizontal flip in training")
    add(
        "--ignore_orientation",
        action="store_true",
        help="ignore the EXIF orientation, by which viewers turn photographs upright",
    )
    add("--skip_broken", action="store_true", help="skip unreadable images; list them at the end")
    add(
        "--value_range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="read .npy, 16-bit and float images at full depth; maps LOW, HIGH to -1, 1",
    )
    add("--display_winsize", type=count, default=256, help="image width on pages")


def add_saves(parser: argparse.ArgumentParser, title: str) -> None:
    add = group(parser, title).add_argument
    add("--epoch", default="latest", help="which epoch to load: a number, latest, ...")
    add("--load_iter", type=whole, default="0", help="load iter_N, saved by --save_by_iter")


def add_display(parser: argparse.ArgumentParser) -> None:
    add = group(parser, "display").add_argument
    add("--use_wandb", action="store_true", help="log to W&B (needs wandb)")
    add("--wandb_project_name", default="CycleGAN-and-pix2pix", help="W&B project of --use_wandb")
