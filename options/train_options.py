"""Options that only training has."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from data.cache import SHARES
from models.losses import GAN_MODES
from models.schedulers import LR_POLICIES
from util import distributed
from util.run import checkpoint
from util.run.saved_options import DISCRIMINATOR_OPTIONS, GENERATOR_OPTIONS
from util.scores.evaluation import SCORES

from .base_options import BaseOptions, fraction_below_one, non_negative, whole_number
from .evaluate_options import add_weights
from .test_options import picture_count


class TrainOptions(BaseOptions):
    """Adds what is shown, what is saved, and how long and how fast to train."""

    isTrain = True
    GROUPS = (
        "basic",
        "data",
        "model",
        "training",
        "display",
        "saving and resuming",
        "validation",
        "speed",
    )
    SAVES = "saving and resuming"
    DESCRIPTION = "Train a model. Weights, losses and pages go to <checkpoints_dir>/<name>."
    EXAMPLES = """examples:
  python train.py --dataroot ./datasets/maps --name maps_cyclegan --model cycle_gan
  python train.py --dataroot ./datasets/facades --name facades --model pix2pix --direction BtoA
  python train.py --dataroot ./datasets/maps --name maps_cyclegan --continue_train --n_epochs 150
options of another model: python train.py --model pix2pix --help"""

    def initialize(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = super().initialize(parser)

        group = self.group(parser, "display")
        add = group.add_argument
        add(
            "--display_freq",
            type=whole_number(1),
            default=400,
            help="images between two sets of pictures that are shown",
        )
        add(
            "--display_ncols",
            type=whole_number(0),
            default=4,
            help="pictures beside each other in visdom; 0: a window each",
        )
        add("--display_id", type=int, default=1, help="window of the visdom page; 0: no visdom")
        add("--display_server", default="http://localhost", help="address of the visdom server")
        add("--display_env", default="main", help="environment on the visdom page")
        add("--display_port", type=whole_number(1), default=8097, help="port of the visdom server")
        add(
            "--update_html_freq",
            type=whole_number(1),
            default=1000,
            help="images between two sets of pictures saved to the page",
        )
        add(
            "--print_freq",
            type=whole_number(1),
            default=100,
            help="images between two lines of losses",
        )
        add("--no_html", action="store_true", help="no training page in <name>/web")

        add("--use_tensorboard", action="store_true", help="log to <name>/tb (needs tensorboard)")

        group = self.group(parser, self.SAVES)
        add = group.add_argument
        add(
            "--save_latest_freq",
            type=whole_number(1),
            default=5000,
            help="images between two saves of the latest weights",
        )
        add(
            "--save_epoch_freq",
            type=whole_number(1),
            default=5,
            help="epochs between two saves that are kept",
        )
        add(
            "--save_by_iter",
            action="store_true",
            help="call the saves of --save_latest_freq iter_N, and keep them",
        )
        add(
            "--continue_train",
            action="store_true",
            help="go on where the training of this --name was left",
        )
        add(
            "--keep_states",
            type=whole_number(0),
            default=1,
            help="how many kept epochs training can go on from",
        )
        add("--max_hours", type=non_negative, default=None, help="save and stop after this time")
        add(
            "--on_nan",
            default="stop",
            choices=("stop", "skip"),
            help="what to do when a loss is NaN or infinite",
        )
        add(
            "--epoch_count",
            type=whole_number(1),
            default=1,
            help="number of the first epoch of a new training",
        )
        add("--phase", default="train", help="folder of the data set to read: train, val, test")

        group = parser.add_argument_group("validation")
        add = group.add_argument
        add(
            "--val_freq",
            type=whole_number(0),
            default=0,
            help="epochs between two validations; 0: none",
        )
        add("--val_phase", default="val", help="folder of the pictures to score: val, test")
        add(
            "--best_by",
            choices=[name for name in SCORES if name != "grid"],
            help="score that best_net_*.pth has [L1, unpaired: cycle]",
        )
        add(
            "--num_val",
            type=picture_count,
            default=float("inf"),
            help="how many pictures to score, or all",
        )
        add_weights(group)

        group = parser.add_argument_group("training")
        add = group.add_argument
        add(
            "--n_epochs", type=whole_number(0), default=100, help="epochs at the full learning rate"
        )
        add(
            "--n_epochs_decay",
            type=whole_number(0),
            default=100,
            help="epochs in which the learning rate falls to zero",
        )
        add("--lr", type=non_negative, default=0.0002, help="learning rate of Adam")
        add("--beta1", type=fraction_below_one, default=0.5, help="beta1 of Adam")
        add("--gan_mode", default="lsgan", choices=GAN_MODES, help="adversarial loss")
        add("--lambda_gp", type=non_negative, default=10.0, help="gradient penalty of wgangp")
        add(
            "--pool_size",
            type=whole_number(0),
            default=50,
            help="earlier results that discriminators see too; 0: none",
        )
        add(
            "--cache_images",
            default="auto",
            choices=SHARES,
            help="decoded pictures in memory: auto: up to half of what is free; ram: up to 90%%",
        )
        add(
            "--accumulate",
            type=whole_number(1),
            default=1,
            help="batches whose gradients are summed before each step",
        )
        add(
            "--grad_checkpoint",
            action="store_true",
            help="recompute activations: less memory, a third more time",
        )
        add(
            "--lr_policy",
            default="linear",
            choices=LR_POLICIES,
            help="how the learning rate decays",
        )
        add(
            "--lr_decay_iters",
            type=whole_number(1),
            default=50,
            help="epochs between two steps of --lr_policy step",
        )
        return parser

    def restored_names(self, opt: argparse.Namespace) -> tuple[str, ...]:
        if not opt.continue_train:
            return ()
        return (*GENERATOR_OPTIONS, *DISCRIMINATOR_OPTIONS, "seed")

    def restore_saved(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        self.go_on_after_restart(opt)
        super().restore_saved(opt, explicit)

    def go_on_after_restart(self, opt: argparse.Namespace) -> None:
        """Set --continue_train where torchrun has started these processes in place of others."""
        restarted = distributed.any_rank(distributed.restart_count() > 0)
        if not restarted and (not opt.continue_train or distributed.world_size() == 1):
            return
        folder = Path(opt.checkpoints_dir) / opt.name
        # machines with folders of their own: the first process may not be where it was before
        distributed.choose_source(
            checkpoint.newest_save(folder) if distributed.is_local_main() else None
        )
        newest = distributed.broadcast_object(
            checkpoint.newest_save(folder), src=distributed.source_rank()
        )
        if not restarted:
            return
        # without one (the store may be gone) better go on than start over the newest save
        if newest is not None and newest[0] >= (distributed.saved_run_id() or ""):
            opt.continue_train, opt.epoch, opt.load_iter = True, "latest", 0
            print("restarted by torchrun: training goes on from the newest save (--continue_train)")
        elif not opt.continue_train:
            print("restarted by torchrun before anything was saved: training starts anew")

    def validate(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        super().validate(opt, explicit)
        unused = sorted({"best_by", "val_phase", "num_val"} & explicit)
        if unused and not opt.val_freq:
            self.parser.error(
                f"--{unused[0]} is about scores in training, which --val_freq 0 turns off: add "
                "--val_freq, in epochs, or leave it out"
            )
        for flag, package in (("use_wandb", "wandb"), ("use_tensorboard", "tensorboard")):
            if getattr(opt, flag) and importlib.util.find_spec(package) is None:
                self.parser.error(
                    f"--{flag} needs the package {package}, which is not installed: pip install "
                    f"{package}, or leave the flag out"
                )
