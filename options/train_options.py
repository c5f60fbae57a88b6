"""Options that only training has."""

from __future__ import annotations

import argparse
import difflib
import os

from data.cache import MEMORY_FRACTION
from models import diffaug
from models.losses import GAN_MODES
from models.schedulers import LR_POLICIES
from util import distributed
from util.argument_types import count, number, renamed, whole, whole_number
from util.errors import UserError, warn
from util.run import checkpoint, weight_files
from util.run.saved_options import DISCRIMINATOR_OPTIONS, GENERATOR_OPTIONS, experiment_folder
from util.scores.evaluation import SCORES

from .base_options import BaseOptions
from .evaluate_options import add_weights
from .restoring import warn_of_dropped
from .shared_options import group
from .test_options import picture_count

# between ranks: places and resources of a machine, what only rank 0 does, what it tells the others
MAY_DIFFER = set(
    "dataroot checkpoints_dir gpu_ids local_rank num_threads cache_images max_dataset_size "
    "display_id display_server display_port display_env display_ncols display_winsize use_wandb "
    "wandb_project_name use_tensorboard inception_weights lpips_weights keep_states verbose "
    "no_html update_html_freq seed".split()
)


class TrainOptions(BaseOptions):
    """Adds the options of display, checkpoints, validation and optimization."""

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
        self._add_views(parser)
        self._add_saving(parser)
        self._add_validation(parser)
        self._add_training(parser)
        return parser

    def _add_views(self, parser: argparse.ArgumentParser) -> None:
        add = group(parser, "display").add_argument
        add("--display_freq", type=count, default=400, help="images between two displays of images")
        add("--display_ncols", type=whole, default=4, help="images per row; 0: a window for each")
        add("--display_id", type=int, default=1, help="tells runs of one name apart; 0: no visdom")
        add("--display_server", default="http://localhost", help="address of the visdom server")
        add("--display_env", default="main", help="environment on the visdom page")
        port = whole_number(1, 65535)
        add("--display_port", type=port, default=8097, help="port of the visdom server")
        add("--update_html_freq", type=count, default=1000, help="images between two page updates")
        add("--print_freq", type=count, default=100, help="images between two lines of losses")
        add("--no_html", action="store_true", help="no training page in <name>/web")
        add("--use_tensorboard", action="store_true", help="log to <name>/tb (needs tensorboard)")

    def _add_saving(self, parser: argparse.ArgumentParser) -> None:
        add = group(parser, self.SAVES).add_argument
        add("--save_latest_freq", type=count, default=5000, help="images between two checkpoints")
        add("--save_epoch_freq", type=count, default=5, help="epochs between two kept checkpoints")
        add("--save_by_iter", action="store_true", help="save iter_N, not latest, and keep all")
        add("--continue_train", action="store_true", help="resume the training of this --name")
        add("--keep_states", type=whole, default=1, help="saved epochs that can be resumed from")
        add("--max_hours", type=number(), default=None, help="save and stop after this time")
        add("--on_nan", default="stop", choices=("stop", "skip"), help="when a loss is not finite")
        add("--epoch_count", type=count, default=1, help="number of the first epoch")
        add("--phase", default="train", help="folder of the dataset to read: train, val, test")

    def _add_validation(self, parser: argparse.ArgumentParser) -> None:
        validation = parser.add_argument_group("validation")
        add = validation.add_argument
        add("--val_freq", type=whole, default=0, help="epochs between two validations; 0: none")
        add("--val_phase", default="val", help="folder of the images to score: val, test")
        add(
            "--best_by",
            choices=[name for name in SCORES if name != "grid"],
            help="score that selects best_net_*.pth [L1, unpaired: cycle]",
        )
        add("--num_val", type=picture_count, default=float("inf"), help="images to score, or all")
        add_weights(validation)

    def _add_training(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("training").add_argument
        add("--n_epochs", type=whole, default=100, help="epochs at the full learning rate")
        add("--n_epochs_decay", type=whole, default=100, help="epochs of learning rate decay to 0")
        add("--lr", type=number(), default=0.0002, help="learning rate of Adam")
        add("--beta1", type=number(below=1), default=0.5, help="beta1 of Adam")
        add("--gan_mode", default="lsgan", choices=GAN_MODES, help="adversarial loss")
        add("--pool_size", type=whole, default=50, help="pool of earlier results for D; 0: none")
        add("--spectral_norm", action="store_true", help="spectral normalization in D")
        add(
            "--diffaug",
            type=diffaug.kinds,
            metavar="KINDS",
            help="augment what discriminators see: color,translation,cutout or some of these",
        )
        add(
            "--cache_images",
            default="auto",
            choices=MEMORY_FRACTION,
            help="cache decoded images; auto: in up to half of the free memory, ram: up to 90%%",
        )
        add("--accumulate", type=count, default=1, help="batches per step (gradient accumulation)")
        add(
            "--ema",
            type=number(below=1),
            default=0.0,
            metavar="DECAY",
            help="also save a moving average of the generators' weights, e.g. 0.999; 0: off",
        )
        add("--grad_checkpoint", action="store_true", help="less memory, slower (checkpointing)")
        policy = renamed({"lambda": "linear"})  # its name in 2017
        add(
            "--lr_policy",
            type=policy,
            default="linear",
            choices=LR_POLICIES,
            help="learning rate schedule",
        )
        add("--lr_decay_iters", type=count, default=50, help="epochs between decays of policy step")

    def restored_names(self, opt: argparse.Namespace) -> tuple[str, ...]:
        if not opt.continue_train:
            return ()
        return (*GENERATOR_OPTIONS, *DISCRIMINATOR_OPTIONS, "seed", "ema")

    def restore_saved(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        self.check_same_on_all_ranks(opt)
        self.resume_after_restart(opt)
        super().restore_saved(opt, explicit)
        if not opt.continue_train:
            return
        others = ("basic", "speed", "display", "validation", self.SAVES)
        groups = [g for g in self.parser._action_groups if g.title not in others]
        names = {action.dest for g in groups for action in g._group_actions}
        names |= {"val_freq", "on_nan", "precision", "deterministic"}
        warn_of_dropped(opt, names - explicit - {"phase", "epoch_count"}, self.saved)
        self.begin_if_nothing_is_saved(opt)

    def check_same_on_all_ranks(self, opt: argparse.Namespace) -> None:
        """Raise UserError if this rank has other options than rank 0.

        Before anything else is exchanged: what, and when, depends on the options.
        """
        own: dict[str, str] = {}
        for action in self.parser._actions:
            value = getattr(opt, action.dest, None)
            is_path = isinstance(value, str) and os.sep in value
            plain = value is None or isinstance(value, (bool, int, float, str, list))
            if plain and not is_path and action.dest not in MAY_DIFFER:
                own[action.dest] = str(value)
        wanted = distributed.broadcast_object(own)
        for name, value in own.items():
            if value != wanted.get(name, value):
                raise UserError(
                    f"--{name}: {value} here, {wanted[name]} in the first process: all machines "
                    "need the same options"
                )

    def begin_if_nothing_is_saved(self, opt: argparse.Namespace) -> None:
        """Unset --continue_train if there is nothing to resume, for models that read it."""
        newest = opt.epoch == "latest" and opt.load_iter == 0
        folder = experiment_folder(opt)
        if not (opt.continue_train and newest and checkpoint.nothing_saved(folder)):
            return
        opt.continue_train = False
        if not distributed.is_source():  # whose value counts
            return
        print(
            f"--continue_train: nothing is saved in {folder}, so this starts from scratch"
            f"{weight_files.earlier_hint(folder)}"
        )
        others = {*weight_files.experiments(folder.parent)} - {folder.name}
        if close := difflib.get_close_matches(folder.name, others, 1, 0.8):
            warn(f"there is no training --name {folder.name}; did you mean {close[0]}?")

    def resume_after_restart(self, opt: argparse.Namespace) -> None:
        """Set --continue_train if torchrun has restarted the processes after a failure."""
        restarted = distributed.any_rank(distributed.restart_count() > 0)
        if not restarted and (not opt.continue_train or distributed.world_size() == 1):
            return
        folder = experiment_folder(opt)
        # without a shared file system, rank 0 may now run on a machine without the newest save
        distributed.choose_source(
            checkpoint.newest_save(folder) if distributed.is_local_main() else None
        )
        if not restarted:
            return
        ours = distributed.is_source() and not (folder / checkpoint.EARLIER).exists()
        if distributed.any_rank(ours and checkpoint.newest_save(folder) is not None):
            opt.continue_train, opt.epoch, opt.load_iter = True, "latest", 0
            print("restarted by torchrun: training goes on from the newest save (--continue_train)")
        elif not opt.continue_train:
            print("restarted by torchrun before anything was saved: training starts from scratch")

    def validate(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        super().validate(opt, explicit)
        last = opt.n_epochs + opt.n_epochs_decay
        if not last or (opt.epoch_count > last and not opt.continue_train):
            self.parser.error(
                f"--n_epochs {opt.n_epochs} and --n_epochs_decay {opt.n_epochs_decay} leave "
                f"nothing to train from --epoch_count {opt.epoch_count} on: raise one, or say "
                "--continue_train to go on"
            )
        for name in sorted({"epoch", "load_iter"} & explicit):
            if getattr(opt, name) not in ("latest", 0) and not opt.continue_train:
                self.parser.error(
                    f"--{name} {getattr(opt, name)} has no effect on a training that begins: add "
                    "--continue_train to go on from that save, or leave it out"
                )
        unused = sorted({"best_by", "val_phase", "num_val"} & explicit)
        if unused and not opt.val_freq:
            self.parser.error(
                f"--{unused[0]} has no effect without validation: add --val_freq, in epochs, or "
                "leave it out"
            )
        penalized = getattr(opt, "gp", None) or opt.gan_mode == "wgangp"
        if "gp_every" in explicit and not penalized:
            self.parser.error(
                f"--gp_every {opt.gp_every} needs a gradient penalty: say --gp r1, or leave it out"
            )
