"""How a command line becomes an `opt`: parsing, checking, printing and saving."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import math
import shlex
import sys
from collections.abc import Callable, Container, Sequence
from typing import Any

import data
import models
from util import distributed, find_class
from util.argument_types import experiment_name
from util.distributed import select_device
from util.errors import OneLineParser, UserError
from util.randomness import new_seed, seed_everything
from util.run.saved_options import (
    GENERATOR_OPTIONS,
    experiment_folder,
    read_saved_options,
    write_saved_options,
)

from . import shared_options
from .restoring import restore
from .speed import (
    choose_fast,
    hint_for_busy_cores,
    too_few_to_compile,
    why_not_compile,
    why_not_graphs,
)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option that has one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS):
            return text
        return f"{text} [%(default)s]"


# option names in the original code of 2017 and 2018, and what they are called now
RENAMED = {
    "align_data": "dataset_mode aligned",
    "batchSize": "batch_size",
    "display_single_pane_ncols": "display_ncols",
    "fineSize": "crop_size",
    "how_many": "num_test",
    "identity": "lambda_identity",
    "loadSize": "load_size",
    "nThreads": "num_threads",
    "niter": "n_epochs",
    "niter_decay": "n_epochs_decay",
    "no_lsgan": "gan_mode vanilla",
    "ntest": "num_test",
    "resize_or_crop": "preprocess",
    "use_dropout": "dropout",
    "which_direction": "direction",
    "which_epoch": "epoch",
    "which_model_netD": "netD",
    "which_model_netG": "netG",
}
# on command lines also one of pix2pix, which other models have under this name
OLDER_FLAGS = {**RENAMED, "lambda_A": "lambda_L1"}


class BaseOptions:
    """Defines the options that training and testing share, and parses a command line.

    The command line is parsed twice before the final parse, for `--model` and for
    `--dataset_mode`: their classes may add options and change defaults
    (`modify_commandline_options`).
    """

    isTrain = False
    # the order in --help; groups that models and datasets add come after "model"
    GROUPS = ("basic", "data", "model")
    SAVES = "which weights"  # the group of --epoch
    DESCRIPTION, EXAMPLES = "", ""
    PARSER = OneLineParser  # replaced for options that do not come from a command line

    def __init__(self, cmd_line: str | Sequence[str] | None = None):
        """`cmd_line`, a string or a list of words, replaces the arguments of the program."""
        self.argv = shlex.split(cmd_line) if isinstance(cmd_line, str) else cmd_line
        self.parser: argparse.ArgumentParser
        self.message = ""
        self.saved: dict[str, str] = {}  # what the experiment was trained with, as text

    def initialize(self, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add the options that training and testing share."""
        shared_options.add_all(parser, self.SAVES)
        return parser

    def gather_options(self) -> argparse.Namespace:
        """Parse the command line, with the options of the chosen model and dataset."""
        parser = self.PARSER(
            usage="%(prog)s --dataroot FOLDER [--name NAME] [--model MODEL] [more options]",
            description=self.DESCRIPTION,
            epilog=self.EXAMPLES,
            add_help=False,
            formatter_class=HelpFormatter,
        )
        parser = self.parser = self.initialize(parser)
        try:
            opt, _ = parser.parse_known_args(self._without_help())
            parser = self._extended(parser, models.get_option_setter(opt.model))
            opt, _ = parser.parse_known_args(self._without_help())
            parser = self._extended(parser, data.get_option_setter(opt.dataset_mode))
        except UserError as e:
            parser.error(str(e))
        self.parser = parser
        order = {title: place for place, title in enumerate(self.GROUPS)}
        last_of_model = order["model"] + 0.5
        parser._action_groups.sort(key=lambda group: order.get(group.title or "", last_of_model))
        # added last, so that --help also lists the options of the model and the dataset
        basic = shared_options.group(parser, "basic")
        basic.add_argument("-h", "--help", action="help", help="show this and exit")
        opt, unknown = parser.parse_known_args(self.argv)
        if OLDER_FLAGS.keys() & {_name(word) for word in unknown}:
            self.argv = _renamed(self._words(), unknown, parser._option_string_actions)
            opt, unknown = parser.parse_known_args(self.argv)
        unknown = self.without_effect(unknown, opt.model) if unknown else []
        if unknown and not unknown[0].startswith("-"):
            parser.error(
                f"'{unknown[0]}' is no option and belongs to none: put a name with spaces in "
                "quotes, give a folder in place of several files, and no value to a flag"
            )
        if unknown:
            hint = self._meant(unknown[0].partition("=")[0], parser, opt.model)
            parser.error(f"unknown option '{unknown[0]}'{hint}")
        if opt.dataroot is None:  # argparse would say so before what may be a misspelt one
            parser.error("the following arguments are required: --dataroot")
        opt.isTrain = self.isTrain
        return opt

    def without_effect(self, unknown: list[str], model: str) -> list[str]:
        """Leave out, and name, unknown options that are harmless here."""
        return unknown

    def _meant(self, option: str, parser: argparse.ArgumentParser, model: str) -> str:
        """A hint for an unknown option: the models that have it, or an option spelled like it."""
        having, known = [], {}
        for name in find_class.available_names(models.__name__, "model"):
            with contextlib.suppress(Exception):  # another model's file may be half written
                other = self.initialize(argparse.ArgumentParser(add_help=False))
                other = self._extended(other, models.get_option_setter(name))
                having += [name] if option in other._option_string_actions else []
                known |= {flag.lower(): flag for flag in other._option_string_actions}
        if having:
            return f" of --model {model}: it belongs to {' and '.join(having)}"
        if same := known.get(option.lower()):
            return f"; did you mean {same}?"
        close = difflib.get_close_matches(option, parser._option_string_actions, 1)
        return f"; did you mean {close[0]}?" if close else f" of --model {model}"

    def _extended(self, parser: argparse.ArgumentParser, setter: Callable) -> Any:
        """The parser, extended by the `modify_commandline_options` of a class."""
        where = f"{setter.__qualname__} in {setter.__module__.replace('.', '/')}.py"
        try:
            extended = setter(parser, self.isTrain)
        except argparse.ArgumentError as e:
            raise UserError(
                f"{where} adds {e.argument_name}, which exists already: give it another name, or "
                "change its default by parser.set_defaults"
            ) from e
        if not isinstance(extended, argparse.ArgumentParser):
            raise UserError(f"{where} returns {extended}: it must end with `return parser`")
        for old in RENAMED.keys() & extended._defaults.keys():  # set for older code
            name, _, value = RENAMED[old].partition(" ")
            extended.set_defaults(**{name: value or extended._defaults[old]})
        return extended

    def _words(self) -> list[str]:
        return list(sys.argv[1:] if self.argv is None else self.argv)

    def _without_help(self) -> list[str]:
        return [w for w in self._words() if w not in ("-h", "--help")]

    def explicit_options(self) -> set[str]:
        """Names of the options that are given on the command line."""
        untouched = object()
        blank = argparse.Namespace(**{a.dest: untouched for a in self.parser._actions})
        given = vars(self.parser.parse_known_args(self.argv, namespace=blank)[0])
        return {name for name, value in given.items() if value is not untouched}

    def validate(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        """End the program with one line if options contradict each other."""
        try:
            models.find_model_using_name(opt.model).check_options(opt)
        except UserError as e:
            self.parser.error(str(e))
        crops_scaled = opt.preprocess in ("resize_and_crop", "scale_width_and_crop")
        if crops_scaled and opt.load_size < opt.crop_size:
            self.parser.error(
                f"--load_size {opt.load_size} is smaller than --crop_size {opt.crop_size}: "
                f"--preprocess {opt.preprocess} needs it at least as large"
            )
        low, high = opt.value_range or (0, 1)
        if not (low < high and math.isfinite(high - low)):
            self.parser.error(
                f"--value_range {low:g} {high:g}: give two numbers, the lower one first"
            )
        for flag, package in (("use_wandb", "wandb"), ("use_tensorboard", "tensorboard")):
            if getattr(opt, flag, False) and importlib.util.find_spec(package) is None:
                self.parser.error(
                    f"--{flag} needs the package {package}, which is not installed: pip install "
                    f"{package}, or leave the flag out"
                )
        if opt.cuda_graphs == "on" and getattr(opt, "accumulate", 1) > 1:
            self.parser.error(
                f"--cuda_graphs and --accumulate {opt.accumulate} exclude each other: gradients "
                "are overwritten by those of the next batch; leave one out"
            )

    def restored_names(self, opt: argparse.Namespace) -> tuple[str, ...]:
        """Options that are read from `train_opt.txt` unless they are given."""
        return GENERATOR_OPTIONS

    def restore_saved(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        """Set the architecture that the experiment was trained with, and print what was set."""
        names = self.restored_names(opt)
        # without saved weights, the options were left by a run that failed early
        folder = experiment_folder(opt)
        if names and next(folder.glob("[!.]*.pth"), None) is not None:
            changed = restore(opt, self.parser, names, explicit, self.saved)
            if changed:
                what = ", ".join(f"{k}={v}" for k, v in changed.items())
                print(f"options taken from {folder / 'train_opt.txt'}: {what}")

    def parse(self, save: bool = True) -> argparse.Namespace:
        """Parse and check the options, and seed all random sources with `--seed`.

        `save` also prints them and writes them to the experiment's folder. train.py and test.py do
        that later, once they have found the data and the model.
        """
        distributed.init_process_group()  # for programs that do not use `process_group`
        opt = self.gather_options()
        explicit = self.explicit_options()
        opt.name = self.name_with_suffix(opt)
        self.saved = read_saved_options(experiment_folder(opt))
        if not self.isTrain and "load_size" not in explicit:
            opt.load_size = opt.crop_size
        self.restore_saved(opt, explicit)
        if opt.seed is None:
            opt.seed = new_seed()
        # drawn at random, or read from files that other machines may not have
        names = {"seed", "continue_train", "epoch", "load_iter", *self.restored_names(opt)}
        shared = {name: getattr(opt, name) for name in names if hasattr(opt, name)}
        vars(opt).update(distributed.broadcast_object(shared, src=distributed.source_rank()))
        self.validate(opt, explicit)
        self.message = self.table(opt)
        try:
            opt.gpu_ids, opt.device = select_device(opt.gpu_ids)
        except UserError as e:
            self.parser.error(str(e))
        self.choose_speed(opt, explicit)
        seed_everything(opt.seed, opt.deterministic)
        self.opt = opt
        if save:
            self.save(opt)
        return opt

    def name_with_suffix(self, opt: argparse.Namespace) -> str:
        """`--name`, with `--suffix` filled in."""
        if not opt.suffix:
            return opt.name
        try:
            return experiment_name(f"{opt.name}_{opt.suffix.format(**vars(opt))}")
        except (LookupError, ValueError, AttributeError, TypeError) as e:
            self.parser.error(f"--suffix '{opt.suffix}' names no option: {e}")
        except argparse.ArgumentTypeError as e:
            self.parser.error(f"--suffix '{opt.suffix}': {e}")

    def choose_speed(self, opt: argparse.Namespace, explicit: set[str]) -> None:
        """Set `--fast`, `--compile` and `--cuda_graphs` as the device allows, and say so."""
        if opt.fast:
            print(f"--fast stands for {' '.join(choose_fast(opt, opt.device, explicit))}")
        decided_later = opt.fast and "compile" not in explicit  # once the images are counted
        if opt.compile and not decided_later:
            self._compile_unless(opt, why_not_compile(opt, opt.device))
        if opt.device.type == "cpu" and (hint := hint_for_busy_cores()):
            print(hint)
        asked = opt.cuda_graphs
        reason = why_not_graphs(opt, opt.device, networks=asked == "on")
        if asked == "on" and reason:
            print(f"--cuda_graphs is off: {reason}")
        opt.cuda_graphs = asked != "off" and not reason

    def decide_compile(
        self, opt: argparse.Namespace, pictures: int, trial: Callable[[], str | None] = lambda: None
    ) -> None:
        """With `--fast`, turn `--compile` off where it does not save time.

        That is with too few `pictures` in total, or if `trial()` returns a reason not to.
        """
        if opt.fast and opt.compile and "compile" not in self.explicit_options():
            reason = too_few_to_compile(opt, pictures) or why_not_compile(opt, opt.device)
            # one rank's reason counts for all: they must compute alike
            reason = next(filter(None, distributed.all_gather_object(reason)), None)
            self._compile_unless(opt, reason or trial())
            opt.cuda_graphs = opt.cuda_graphs and not why_not_graphs(opt, opt.device)
        if opt.compile:
            minutes = "a minute or more" if opt.device.type == "cuda" else "one to three minutes"
            print(f"compiling: the first iterations take {minutes}, the others are faster")

    @staticmethod
    def _compile_unless(opt: argparse.Namespace, reason: str | None) -> None:
        if reason:
            print(f"--compile is off: {reason}")
            opt.compile = False

    def table(self, opt: argparse.Namespace) -> str:
        """All options, one per line, each with its default where it differs."""
        lines = ["----------------- Options ---------------"]
        for name, value in sorted(vars(opt).items()):
            default = self.parser.get_default(name)
            comment = "" if str(value) == str(default) else f"\t[default: {default}]"
            lines.append(f"{name:>25}: {value!s:<30}{comment}")
        lines.append("----------------- End -------------------")
        return "\n".join(lines)

    def save(self, opt: argparse.Namespace) -> None:
        """Print the options, and write them to the experiment's folder."""
        print(self.message)
        if not distributed.is_main():
            return
        # not `--phase`, which selects the data: `test.py --phase train` does not train
        phase = "train" if self.isTrain else "test"
        write_saved_options(experiment_folder(opt), self.message, phase)


def _name(word: str) -> str:
    """The name in `--option` or `--option=value`; empty for any other word."""
    return word.removeprefix("--").partition("=")[0] if word.startswith("--") else ""


def _renamed(words: list[str], unknown: list[str], known: Container[str]) -> list[str]:
    """Replace the option names of 2017 and 2018 in a command line with the current ones."""
    found: list[str] = []
    for word in words:
        new = OLDER_FLAGS.get(_name(word), "") if word in unknown else ""
        name, *value = new.split(" ")
        if f"--{name}" not in known:
            found.append(word)
        else:
            print(f"--{_name(word)} is an older name of --{new}")
            found += [f"--{name}{word[2:].removeprefix(_name(word))}", *value]
    return found
