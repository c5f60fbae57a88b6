"""Options that an experiment was trained with, in the text file in its folder."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

from util.errors import UserError, warn
from util.files import write_whole

DEFAULT_NAME = "experiment_name"  # of an experiment, if --name is not given

# must be as in training, so that the weights fit and translate in the same direction
NETWORK_OPTIONS = (
    *("netG", "norm", "ngf", "no_dropout", "no_antialias", "no_antialias_up"),
    *("input_nc", "output_nc"),
)
GENERATOR_OPTIONS = (*NETWORK_OPTIONS, "normG", "direction", "value_range")
# of the networks that exist only in training
DISCRIMINATOR_OPTIONS = (
    *("netD", "ndf", "n_layers_D", "num_D", "normD", "spectral_norm"),
    *("netF", "netF_nc", "nce_layers"),
)

_LINE = re.compile(r"^\s*(\w+): (.*?)\s*(?:\t?\[default: .*\])?\s*$")


def experiment_folder(opt: argparse.Namespace) -> Path:
    """`<checkpoints_dir>/<name>`."""
    return Path(opt.checkpoints_dir, opt.name)


def read_saved_options(folder: str | Path, phase: str = "train") -> dict[str, str]:
    """Names and values, as text, in `<folder>/<phase>_opt.txt`; empty if there is no such file.

    Reads files of the original code too. `normG`, the norm of the generator, replaces `norm`.
    Raises UserError if the options of training can't be read.
    """
    path = Path(folder) / f"{phase}_opt.txt"
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as e:
        # those of test.py serve notes alone; without those of training, the direction, the range
        # of values and more would be guessed
        if isinstance(e, (FileNotFoundError, NotADirectoryError)) or phase != "train":
            return {}
        raise UserError(f"can't read {path}: {e.strerror}") from e
    matches = (_LINE.match(line) for line in lines)
    options = {m.group(1): m.group(2) for m in matches if m}
    return {**options, "norm": options["normG"]} if "normG" in options else options


def write_saved_options(folder: Path, text: str, phase: str = "train") -> None:
    """Write `<folder>/<phase>_opt.txt`; if that fails, warn."""
    path = folder / f"{phase}_opt.txt"
    try:
        write_whole(path, text + "\n")
    except OSError as e:
        warn(f"the options were not saved to {path}: {e.strerror}")


def parse_range(text: str | None) -> tuple[float, float] | None:
    """The two numbers of a saved `[0.0, 4095.0]`; None for any other text."""
    try:
        low, high = ast.literal_eval(text or "")
        return float(low), float(high)
    except (ValueError, SyntaxError, TypeError):
        return None
