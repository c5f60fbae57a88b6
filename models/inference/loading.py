"""Find the weights of an experiment's generator, and rebuild the network that they belong to."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from data.pictures.values import Range
from models.ema import WEIGHTS, choose_weights
from models.networks import GENERATORS
from models.norms import NORMS, get_norm_layer
from models.speed.acceleration import PRECISIONS, prepare
from models.weights import State, describe, explain_mismatch, fit_state_dict, without_wrappers
from util import randomness
from util.errors import RaisingParser, UserError, first_line, warn
from util.run import weight_files
from util.run.saved_options import parse_range, read_saved_options

from .translator import Translator

# options that models read, but that `train_opt.txt` of the original code lacks
ADDED = {"precision": "tf32", "deterministic": False, "no_antialias": True, "no_antialias_up": True}

# building a model changes global state; reentrant, since the model may load a teacher
_rebuilding = threading.RLock()


def load_generator(
    folder: str | os.PathLike,
    direction: str | None = None,
    epoch: str | int = "latest",
    device: str | torch.device | None = None,
    precision: str = "tf32",
    eval: bool = False,
    value_range: Range | None = None,
    weights: str = "auto",
) -> Translator:
    """The generator of an experiment, ready to be called with images.

    Args:
        folder: the experiment's folder, such as `checkpoints/maps_cyclegan`.
        direction: `AtoB` or `BtoA`; None takes the direction of training.
        epoch: which checkpoint: `latest`, a number, or `iter_5000`.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; None takes a GPU if there is one.
        precision: `tf32`, `fp32`, `bf16` or `fp16`, as for `--precision`.
        eval: as `--eval`: batch norms use the statistics stored in training, and dropout is off.
            Without it both behave as in training, as in the papers and in `test.py`: batch norms
            use the statistics of each image, and dropout draws from torch's random generator.
            For the usual CycleGAN (instance norm, no dropout) it makes no difference.
        value_range: the values of images and arrays that become -1 and 1, as for
            `--value_range`. None takes the range of training; if there was none, the full range of
            an integer type, and [0, 1] for floats.
        weights: `ema` (averaged, from training with `--ema`), `raw`, or `auto`: `ema` if there are
            any.

    The model that `train_opt.txt` in the folder names builds the network. If that fails, a warning
    says so, and the architecture comes from the options in that file; without the file it is
    inferred from the weights. Raises UserError (a ValueError) that says what is missing or does not
    fit.
    """
    folder = _checked_folder(folder)
    _check_arguments(direction, precision, weights, value_range)
    chosen = _device(device)
    saved = read_saved_options(folder)
    name, path = _find_weights(folder, str(epoch), direction, weights, saved.get("direction"))
    state = weight_files.load_weights(path, "cpu")
    with unchanged_process(io.StringIO()):
        net, built = _rebuild(state, saved, path, name)
    options = {**saved, **built}
    options.update(
        direction=direction or saved.get("direction", "AtoB"), epoch=str(epoch), eval=eval
    )
    net.to(chosen).train(not eval)
    prepare(net, chosen, precision)
    value_range = value_range or parse_range(saved.get("value_range"))
    return Translator(net, chosen, options, path, value_range, precision)


def _check_arguments(direction: Any, precision: Any, weights: Any, value_range: Any) -> None:
    """Raise UserError for a value that `load_generator` does not take."""
    if direction not in ("AtoB", "BtoA", None):
        raise UserError(f"direction '{direction}': choose AtoB, BtoA or None")
    if precision not in PRECISIONS:
        raise UserError(f"precision '{precision}': choose from {', '.join(PRECISIONS)}")
    if weights not in WEIGHTS:
        raise UserError(f"weights '{weights}': choose from {', '.join(WEIGHTS)}")
    if value_range is not None:
        try:
            low, high = map(float, () if isinstance(value_range, str) else value_range)
        except (TypeError, ValueError):
            raise UserError(f"value_range {value_range}: give two numbers, (LOW, HIGH)") from None
        if not -math.inf < low < high < math.inf:
            raise UserError(
                f"value_range {value_range}: the first must be the lower one, and both finite"
            )


def _checked_folder(folder: Any) -> Path:
    """The folder of an experiment, as a path; raises UserError if it is not a folder."""
    if not isinstance(folder, (str, os.PathLike)):
        raise UserError(
            f"a {type(folder).__name__} in place of an experiment's folder: give a path, such as "
            "checkpoints/maps_cyclegan"
        )
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file: give the folder that it is in, {folder.parent}")
    if not folder.is_dir():
        there = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
        raise UserError(f"no folder {folder}: {folder.parent} has {', '.join(there[:8]) or 'none'}")
    return folder


def _find_weights(
    folder: Path, epoch: str, direction: str | None, weights: str, trained: str | None
) -> tuple[str, Path]:
    """The name and the weight file of the generator for this direction; the file may be missing."""
    name = "G_A" if direction in (trained or "AtoB", None) else "G_B"
    of_two, path = (choose_weights(folder, epoch, n, weights) for n in (name, "G"))
    # one of two, even if one was copied to the name of a single one, as the original advises
    if of_two.exists() or (not path.exists() and any(folder.glob("[!.]*_net_G_[AB]*.pth"))):
        return name, of_two
    if path.exists() and direction and trained and direction != trained:
        raise UserError(
            f"{folder} was trained {trained} and has one generator: it can't go {direction}"
        )
    return "G", path


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as e:
        raise UserError(f"device '{device}' can't be used: {first_line(e)}") from e
    return chosen


def _rebuild(
    state: State, saved: dict[str, str], path: Path, name: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The network with these weights loaded, and the options that it was built with.

    The saved model's own code has priority. If it fails, the saved options and the weights give the
    architecture, with a warning: the same weights may fit other networks, too.
    """
    failed = ""
    if "model" in saved:
        try:
            net, values = generator_of_model(saved, path.parent, name)
            if problem := _load(net, state):
                raise UserError(problem)
            channels = _channels(state, values["input_nc"], values["output_nc"])
            return net, {**values, **channels}
        except (Exception, SystemExit) as e:  # the code may have changed, or need other options
            failed = f"--model {saved['model']} fails: {first_line(e)}"
    reason = f"; {failed}" if failed else ""
    looks = describe(without_wrappers(state))
    # The keys of a ResNet show whether it has dropout. Without saved options a U-Net is taken to
    # have it, as in pix2pix, unless it is one of two, as in CycleGAN and DCLGAN.
    no_dropout = saved.get("no_dropout", str(name != "G")) == "True"
    options = _as_saved(state, saved)
    # a model of somebody's own need not build what the options say
    found = {**options, **looks} if failed else {**looks, **options}
    built = {"no_dropout": no_dropout, **found}
    down, up = (*built.pop("antialias", ()), False, False)[:2]  # known from the weights alone
    if built.keys() >= {"ngf", "norm", "input_nc", "output_nc"} and built.get("netG") in GENERATORS:
        net = GENERATORS[built["netG"]](
            built["input_nc"],
            built["output_nc"],
            built["ngf"],
            norm_layer=get_norm_layer(built["norm"]),
            use_dropout=not built["no_dropout"],
            **({"antialias": down, "antialias_up": up} if down or up else {}),
        )
        problem = _load(net, state)
        if problem is None:
            if failed:
                warn(f"{path}: its network is a guess from options and weights, as {failed}")
            return net, built
        if looks:
            raise UserError(f"the weights in {path} do not fit: {problem}{reason}")
    what = looks.get("netG") or looks.get("netD") or "no network of this code"
    raise UserError(f"{path} holds {what}, not one of {', '.join(GENERATORS)}{reason}")


def _load(net: nn.Module, state: State) -> str | None:
    """Load weights into a network; returns why they do not fit, or None."""
    fitting = fit_state_dict(state, net)
    problem = explain_mismatch("G", fitting, net)
    if problem is None:
        net.load_state_dict(fitting)
    return problem


def _as_saved(state: State, saved: dict[str, str]) -> dict[str, Any]:
    """Those of the generator's options that `train_opt.txt` has, except dropout."""
    known = {"netG": GENERATORS, "norm": NORMS}
    found: dict[str, Any] = {n: saved[n] for n, names in known.items() if saved.get(n) in names}
    with contextlib.suppress(KeyError, ValueError):
        found.update({name: int(saved[name]) for name in ("ngf", "input_nc", "output_nc")})
        found.update(_channels(state, found["input_nc"], found["output_nc"]))
    return found


def _channels(state: State, input_nc: int, output_nc: int) -> dict[str, int]:
    """`input_nc` and `output_nc` of the generator with these weights."""
    first = next((w for w in state.values() if w.dim() == 4), None)
    # the second generator of a CycleGAN takes the channels that the first one returns
    if first is not None and first.shape[1] == output_nc != input_nc:
        input_nc, output_nc = output_nc, input_nc
    return {"input_nc": input_nc, "output_nc": output_nc}


def generator_of_model(
    saved: dict[str, str], folder: Path, name: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The generator `name` that the saved model builds from the saved options, and its options.

    Its weights are not loaded. Raises whatever the code of a user's model raises.
    """
    kind = models.find_model_using_name(saved["model"])
    parser = kind.modify_commandline_options(RaisingParser(), False)
    for action in parser._actions:
        action.required = False  # needed by training only; given values are in the saved options
    values = {**ADDED, **vars(parser.parse_args([]))}
    # argparse's types convert single values; flags, lists and the options that all models have are
    # saved as literals
    words = (a for a in parser._actions if isinstance(a, argparse._StoreAction) and not a.nargs)
    readers: dict[str, Any] = {action.dest: action.type or str for action in words}
    for option, text in saved.items():
        if option in values and text == str(values[option]):
            continue  # the default, which may be of another type: None for an int
        try:
            values[option] = readers.get(option, ast.literal_eval)(text)
        except (ValueError, SyntaxError, TypeError):
            values[option] = text
    values.update(isTrain=False, gpu_ids=[], device=torch.device("cpu"), name=folder.name)
    values.update(checkpoints_dir=str(folder.parent), phase="test", model=saved["model"])
    model = kind(argparse.Namespace(**values))
    if name == "G" and not hasattr(model, "netG"):
        name = "G_A"  # one of two generators, copied to the name of a single one
    return getattr(model, "net" + name), values


class _ThreadStdout:
    """A stand-in for `sys.stdout` that redirects what one thread prints."""

    def __init__(self, usual: Any, other: Any):
        self.usual, self.other, self.thread = usual, other, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        here = threading.get_ident() == self.thread
        return getattr(self.other if here else self.usual, name)


@contextlib.contextmanager
def unchanged_process(prints: Any) -> Iterator[None]:
    """Restore at the end what building a model changes: random state, warnings and backend flags.

    Within, tensors are float32 by default, and what the thread prints goes to the file `prints`.
    One thread at a time may be within.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with _rebuilding, randomness.preserved():
        flags = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        elsewhere = contextlib.redirect_stdout(_ThreadStdout(sys.stdout, prints))  # type: ignore
        try:
            with elsewhere, warnings.catch_warnings():
                yield
        finally:
            cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = flags
            torch.set_default_dtype(dtype)
