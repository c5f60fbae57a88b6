"""Restores the options an experiment was trained with, and warns of those that were dropped."""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterable
from typing import Any

from util import distributed
from util.errors import warn
from util.run.saved_options import parse_range


def restore(
    opt: argparse.Namespace,
    parser: argparse.ArgumentParser,
    names: Container[str],
    explicit: set[str],
    saved: dict[str, str],
) -> dict[str, Any]:
    """Set options in `names` that are not `explicit` to their saved values; returns the changes.

    Saved values that the parser would reject are ignored.
    """
    against = "direction" in explicit and opt.direction != saved.get("direction")
    if opt.model == "test" and saved.get("model") in ("cycle_gan", "dcl") and against:
        # the generator of the other direction: input and output channels swap
        channels = saved.get("input_nc", ""), saved.get("output_nc", "")
        saved = {**saved, "output_nc": channels[0], "input_nc": channels[1]}
    elif against and opt.model != "test" and "direction" in saved and distributed.is_main():
        warn(
            f"--direction {opt.direction}, but this experiment was trained --direction "
            f"{saved['direction']}: its networks get images of the other side"
        )
    changed: dict[str, Any] = {}
    for action in parser._actions:
        name = action.dest
        if name not in names or name in explicit or name not in saved:
            continue
        try:
            value = _value(action, saved[name])
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            continue
        if value != getattr(opt, name) and value in (action.choices or [value]):
            changed[name] = value
            setattr(opt, name, value)
    return changed


def _value(action: argparse.Action, text: str) -> Any:
    if action.nargs == 0:
        return text == "True"
    if action.nargs == 2:
        pair = parse_range(text)
        return list(pair) if pair else None
    kind: Any = action.type or str
    return kind(text)


def warn_of_dropped(opt: argparse.Namespace, names: Iterable[str], saved: dict[str, str]) -> None:
    """Warn of options in `names` that the training was given and this command line lacks."""
    now = {name: str(getattr(opt, name)) for name in sorted(names) if name in saved}
    dropped = [name for name, value in now.items() if value != saved[name]]
    if dropped and distributed.is_main():
        was, here = (", ".join(f"{n}={v[n]}" for n in dropped) for v in (saved, now))
        warn(f"this was trained with {was}, which is not given now: it continues with {here}")
