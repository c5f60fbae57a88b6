"""Sets options to the values saved in `train_opt.txt`."""

from __future__ import annotations

import argparse
from typing import Any

from util.run.saved_options import parse_range


def restore(
    opt: argparse.Namespace,
    parser: argparse.ArgumentParser,
    explicit: set[str],
    saved: dict[str, str],
    names: tuple[str, ...],
) -> dict[str, Any]:
    """Set the options `names`, unless they are in `explicit`, to their saved values.

    Returns the ones that changed. Skips a saved text that the option does not accept.
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
