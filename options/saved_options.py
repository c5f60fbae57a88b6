"""Options that an experiment was trained with, read back from the text file in its folder."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import Any

DEFAULT_NAME = "experiment_name"  # of an experiment, where --name is not given

# what has to agree for weights to fit and for pictures to go the way that was learned
NETWORK_OPTIONS = ("netG", "norm", "ngf", "no_dropout", "input_nc", "output_nc")
GENERATOR_OPTIONS = (*NETWORK_OPTIONS, "direction", "value_range")
DISCRIMINATOR_OPTIONS = ("netD", "ndf", "n_layers_D")

_LINE = re.compile(r"^\s*(\w+): (.*?)\s*(?:\t?\[default: .*\])?\s*$")


def read_saved_options(folder: str | Path, phase: str = "train") -> dict[str, str]:
    """Names and values, as text, of `<folder>/<phase>_opt.txt`; empty where there is no such file.

    Reads the files of the original too.
    """
    path = Path(folder) / f"{phase}_opt.txt"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    matches = (_LINE.match(line) for line in lines)
    return {m.group(1): m.group(2) for m in matches if m}


def parse_range(text: str | None) -> tuple[float, float] | None:
    """Two numbers from `[0.0, 4095.0]` as it is saved; None from anything else."""
    try:
        low, high = ast.literal_eval(text or "")
        return float(low), float(high)
    except (ValueError, SyntaxError, TypeError):
        return None


def restore(
    opt: argparse.Namespace,
    parser: argparse.ArgumentParser,
    explicit: set[str],
    saved: dict[str, str],
    names: tuple[str, ...],
) -> dict[str, Any]:
    """Set those of `names` in `opt` that the user did not give to what was saved.

    Returns what changed. A saved text that the option does not take is passed over.
    """
    changed: dict[str, Any] = {}
    for action in parser._actions:
        name = action.dest
        if name not in names or name in explicit or name not in saved or name in changed:
            continue
        text = saved[name]
        try:
            kind: Any = action.type or str
            if action.nargs == 0:
                value = text == "True"
            elif action.nargs == 2:
                pair = parse_range(text)
                value = pair and list(pair)
            else:
                value = kind(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            continue
        if action.choices is not None and value not in action.choices:
            continue
        if value != getattr(opt, name):
            setattr(opt, name, value)
            changed[name] = value
    return changed
