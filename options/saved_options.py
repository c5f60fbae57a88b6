"""Options that an experiment was trained with, read back from the text file in its folder."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

# what has to agree for weights to fit and for pictures to go the way that was learned
GENERATOR_OPTIONS = ("netG", "norm", "ngf", "no_dropout", "input_nc", "output_nc", "direction")
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
            value = text == "True" if action.nargs == 0 else (action.type or str)(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            continue
        if value != getattr(opt, name):
            setattr(opt, name, value)
            changed[name] = value
    return changed
