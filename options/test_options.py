"""Options that only testing has."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import models
from data.image_folder import parts_of_dataset
from data.pictures.writing import FORMATS
from models.ema import WEIGHTS
from models.inference.tiles import MODES
from util import distributed
from util.argument_types import number, whole, whole_number
from util.errors import RaisingParser
from util.run.saved_options import experiment_folder, read_saved_options

from .base_options import BaseOptions
from .shared_options import group

OUTPUT_FORMATS = (*FORMATS, "same")


def picture_count(text: str) -> int | float:
    """An argparse type: a number of images, or `all`."""
    return float("inf") if text == "all" else whole_number(1)(text)


def share_cores(cores: int, computing: int, wanted: int) -> tuple[int, int]:
    """On a CPU: how many threads read and write images, and how many compute.

    Threads that compute an operator wait for each other at its end, so one that shares its core
    with a decoder holds up all of them: this took two to three times as long as decoding first and
    computing then.
    """
    if computing < cores:  # the user has limited the threads that compute
        return min(wanted, cores - computing), computing
    helping = min(wanted, max(0, (cores - 2) // 2))
    return helping, max(1, computing - helping)


class TestOptions(BaseOptions):
    """Adds the options of results, large images and file formats."""

    __test__ = False  # not a test class for pytest
    isTrain = False
    GROUPS = (
        "basic",
        "data",
        "testing",
        "large images, other formats",
        "which weights",
        "scores",
        "model",
        "speed",
        "display",
    )
    DESCRIPTION = "Translate images with a trained model. Results go to <results_dir>/<name>."
    EXAMPLES = """examples:
  python test.py --dataroot ./datasets/maps --name maps_cyclegan --model cycle_gan
  python test.py --dataroot ./photos --name maps_cyclegan --only_outputs
  python test.py --dataroot ./scans --name maps_cyclegan --only_outputs --tile 1024
options of another model: python test.py --model pix2pix --help"""

    def initialize(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = super().initialize(parser)
        add = parser.add_argument_group("testing").add_argument
        add("--results_dir", default="./results/", help="where results are written")
        add("--aspect_ratio", type=number(), default=1.0, help="scale the width of result images")
        add("--phase", default="test", help="folder of the dataset to read: train, val, test")
        add("--eval", action="store_true", help="networks in eval mode (batch norm, dropout)")
        add("--num_test", type=picture_count, default=50, help="images to translate, or all")
        group(parser, self.SAVES).add_argument(
            "--weights",
            default="auto",
            choices=WEIGHTS,
            help="ema: moving average (of --ema); raw: without; auto: ema if there is one",
        )
        add = parser.add_argument_group("large images, other formats").add_argument
        add("--keep_size", action="store_true", help="no scaling: pad inputs, crop outputs")
        add("--tile", type=whole_number(16), help="compute large images in tiles of this size")
        add("--tile_overlap", type=whole, help="overlap of quick tiles in pixels [64]")
        add("--tile_mode", choices=MODES, help="how tiles are computed [exact if the disk allows]")
        add(
            "--tile_memory",
            type=number(),
            default=1.0,
            help="GiB of memory for exact tiles; the rest goes to disk",
        )
        add("--tile_scratch", help="folder for temporary files of exact tiles [that of the system]")
        add(
            "--only_outputs",
            action="store_true",
            help="no page: write only the results, with names and sizes of the inputs",
        )
        add(
            "--output_format",
            default="png",
            choices=OUTPUT_FORMATS,
            help="format of the results of --only_outputs",
        )
        add("--skip_existing", action="store_true", help="skip images whose result already exists")
        parser.set_defaults(model="test")
        # no cropping by default: load_size equals crop_size
        parser.set_defaults(load_size=parser.get_default("crop_size"))
        return parser

    def restore_saved(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        super().restore_saved(opt, explicit)
        chosen = {"preprocess", "crop_size", "load_size"} & explicit
        kept = opt.keep_size or opt.tile or opt.only_outputs or chosen
        trained = [self.saved.get(name, "") for name in ("preprocess", "crop_size")]
        if all(trained) and not kept and trained != [opt.preprocess, str(opt.crop_size)]:
            flags = f"--preprocess {trained[0]} --crop_size {trained[1]}"
            if trained[0] != "resize_and_crop":
                flags += f" --load_size {self.saved.get('load_size', trained[1])}"
            print(
                f"images are scaled to {opt.crop_size}x{opt.crop_size}, unlike in the training, "
                f"which had {flags}"
            )

    def without_effect(self, unknown: list[str], model: str) -> list[str]:
        """Leave out, and name, options that the model has in training only.

        The published commands of CUT give some of them to test.py.
        """
        own = self.parser
        try:
            training = self.initialize(RaisingParser(add_help=False, allow_abbrev=False))
            training = models.get_option_setter(model)(training, True)
            for action in training._actions:
                action.required = False
            left = training.parse_known_args(unknown)[1]
        except Exception:  # a model that can't be trained here, or whatever its code raises
            return unknown
        finally:
            self.parser = own  # some `initialize` sets it
        ignored = [word for word in unknown if word.startswith("--") and word not in left]
        if ignored:
            print(f"without effect here, since only training uses it: {' '.join(ignored)}")
        return left

    def choose_speed(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        super().choose_speed(opt, explicit)
        if "num_threads" in explicit:
            return
        cores = distributed.cores()
        if opt.device.type == "cpu":
            wanted = opt.num_threads
            opt.num_threads, computing = share_cores(cores, torch.get_num_threads(), wanted)
            torch.set_num_threads(computing)
        elif opt.device.type == "cuda":  # enough to keep up with the GPU
            opt.num_threads = max(opt.num_threads, min(8, cores // 2))

    def validate(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        if opt.model == "test" and self.saved.get("model") == "colorization":
            self.parser.error(
                f"{opt.name} was trained with --model colorization, which turns lightness into "
                "colour: say --model colorization, --model test can't"
            )
        # these options keep the size of images, so they turn scaling off
        keeps = "--keep_size" if opt.keep_size else "--tile" if opt.tile else ""
        if keeps and "preprocess" in explicit and opt.preprocess != "none":
            self.parser.error(f"{keeps} and --preprocess {opt.preprocess} contradict each other")
        if (keeps or opt.only_outputs) and "preprocess" not in explicit:
            opt.preprocess = "none"
        opt.keep_size = opt.preprocess == "none" and bool(keeps or opt.only_outputs)
        if opt.only_outputs and "num_test" not in explicit:
            opt.num_test = float("inf")
        super().validate(opt, explicit)
        for name in ("tile_overlap", "tile_mode", "tile_memory", "tile_scratch"):
            if name in explicit and not opt.tile:
                self.parser.error(f"--{name} needs --tile, the size of a tile, such as --tile 512")
        if opt.tile_scratch and not Path(opt.tile_scratch).is_dir():
            # checked here: later, only the images that need it would fail
            self.parser.error(f"--tile_scratch {opt.tile_scratch} is not a folder")
        if opt.tile and (opt.tile_overlap or 0) >= opt.tile:
            self.parser.error(f"--tile_overlap {opt.tile_overlap} is not below --tile {opt.tile}")
        if opt.only_outputs and opt.model != "test":
            self.parser.error(f"--only_outputs needs --model test, not {opt.model}")
        for name in ("output_format", "skip_existing"):
            if name in explicit and not opt.only_outputs:
                self.parser.error(f"--{name} needs --only_outputs: a page shows all results as PNG")
        if opt.aspect_ratio == 0:
            self.parser.error("--aspect_ratio 0 must be above 0")

    def notes(self, opt: argparse.Namespace, folder: Path) -> list[str]:
        """Warnings about options that look like a mistake, one line each; call before `save`.

        `folder` is where results will be written.
        """
        found = []
        parts = parts_of_dataset(opt.dataroot) if opt.dataset_mode == "single" else []
        if parts:
            wanted = ["testB", "testA"] if opt.direction == "BtoA" else ["testA", "testB"]
            one = next((name for name in [*wanted, "test"] if name in parts), parts[0])
            found.append(
                f"the images of {', '.join(parts)} are all read; to read those of one alone: "
                f"--dataroot {Path(opt.dataroot) / one}"
            )
        before = read_saved_options(experiment_folder(opt), "test")
        place = ("results_dir", "only_outputs", "phase", "epoch", "load_iter")
        what = ("model", "direction", "weights", *([] if opt.only_outputs else ["dataroot"]))
        now = {name: str(getattr(opt, name)) for name in (*place, *what)}
        was = " ".join(f"--{n} {before[n]}" for n in what if before.get(n, now[n]) != now[n])
        there = all(before.get(n) == now[n] for n in place) and any(folder.glob("[!.]*"))
        if was and there:
            # --skip_existing compares names only, so these would pass for results of this run
            then = "left as they are" if opt.skip_existing else "replaced"
            page = "" if opt.only_outputs else "the page and "
            found.append(
                f"{folder} has results of {was}: {page}those of the same names are {then}; another "
                "--results_dir keeps both"
            )
        if opt.use_wandb and opt.only_outputs:
            found.append("--use_wandb has no effect with --only_outputs: it logs results of a page")
        return found
