"""Makes weights from other sources fit, and explains a mismatch by the options at fault."""

from __future__ import annotations

import argparse
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from util.run.saved_options import DEFAULT_NAME, NETWORK_OPTIONS, read_saved_options

State = Mapping[str, torch.Tensor]
WRAPPERS = ("module.", "_orig_mod.")
SPECTRAL = ".parametrizations.weight.original"  # the end of a weight's key under --spectral_norm
# (downsampling, upsampling) is anti-aliased; a discriminator only downsamples
ANTIALIAS_FLAGS = {
    (True, True): "--antialias",
    (True, False): "--antialias --no_antialias_up",
    (False, True): "--antialias --no_antialias",
    (False, False): "--no_antialias --no_antialias_up",
    (True,): "--antialias",
    (False,): "--no_antialias",
}


def without_wrappers(state: State, wanted: Container[str] = ()) -> State:
    """A state dictionary without the prefixes of `DataParallel` and `torch.compile`.

    A prefix stays if a key that has it is `wanted`.
    """
    for prefix in WRAPPERS:
        if state and all(key.startswith(prefix) and key not in wanted for key in state):
            inner = {key.removeprefix(prefix): value for key, value in state.items()}
            return without_wrappers(inner, wanted)
    return state


def fit_state_dict(state: State, net: nn.Module) -> dict[str, torch.Tensor]:
    """A state dictionary with the keys that this code uses.

    Removes the prefixes of wrappers, and running statistics of instance norms, which PyTorch saved
    before version 0.4.
    """
    state = without_wrappers(state, net.state_dict().keys())
    without_statistics = {
        name
        for name, module in net.named_modules()
        if isinstance(module, nn.InstanceNorm2d) and not module.track_running_stats
    }
    statistics = ("running_mean", "running_var", "num_batches_tracked")

    def is_unused(key: str) -> bool:
        owner, _, leaf = key.rpartition(".")
        return owner in without_statistics and leaf in statistics

    return {key: value for key, value in state.items() if not is_unused(key)}


def _numbers(key: str) -> list[int]:
    return [int(part) for part in key.split(".") if part.isdecimal()]


def describe(state: State) -> dict[str, Any]:
    """The options that a network was built with, as far as the keys and shapes tell."""
    spectral = any(k.endswith(SPECTRAL) for k in state)
    state = {k.replace(SPECTRAL, ".weight"): v for k, v in state.items()}
    weights = {k: v for k, v in state.items() if k.endswith(".weight") and v.dim() == 4}
    if not weights:
        return {}
    if scales := {k.split(".")[1] for k in weights if k.startswith("scales.")}:
        one = {k.removeprefix("scales.0."): v for k, v in state.items() if "scales.0." in k}
        several = {"netD": "multiscale", "num_D": len(scales), "spectral_norm": spectral}
        return {**describe(one), **several}
    first_key, first = next(iter(weights.items()))
    last = weights[max(weights, key=_numbers)]  # files may be sorted by the text of their keys
    norm_weights = any(k.endswith(".weight") and v.dim() == 1 for k, v in state.items())
    biases = sum(k.removesuffix("weight") + "bias" in state for k in weights)
    norm = "batch" if norm_weights else "instance" if biases > 2 else "none"
    width, inputs = first.shape[:2]
    filters = {v.shape[-1] for k, v in state.items() if k.endswith(".filt")}
    if first_key == "model.model.0.weight":
        depth = max(key.count("model.") for key in weights) - 1
        names = {7: "unet_128", 8: "unet_256"}
        netG = names.get(depth, f"a U-Net of {depth} levels")
        return {
            "netG": netG,
            "ngf": width,
            "norm": norm,
            "input_nc": inputs,
            "output_nc": last.shape[1],
            "antialias": ("model.model.0.filt" in state, "model.model.3.filt" in state),
        }
    if first_key == "model.1.weight":
        blocks = {m.group(1) for k in weights if (m := re.match(r"model\.(\d+)\.conv_block", k))}
        dropout = any(".conv_block.6." in k for k in weights)
        return {
            "netG": f"resnet_{len(blocks)}blocks",
            "ngf": width,
            "norm": norm,
            "no_dropout": not dropout,
            "input_nc": inputs,
            "output_nc": last.shape[0],
            "antialias": (3 in filters, 4 in filters),
        }
    if first_key == "model.0.weight":
        return {
            "netD": "n_layers",
            "n_layers_D": len(weights) - 2,
            "ndf": width,
            "norm": norm,
            "antialias": (3 in filters,),
            "spectral_norm": spectral,
        }
    if first_key == "net.0.weight":
        return {"netD": "pixel", "ndf": width, "norm": norm, "spectral_norm": spectral}
    return {}


def _described_as(name: str, state: State) -> dict[str, Any]:
    """`describe`, but nothing for a user's generator whose keys look like a discriminator's."""
    found = describe(state)
    other = {"G": "netD", "D": "netG"}.get(name[:1])
    return {} if other in found else found


def explain_mismatch(name: str, state: State, net: nn.Module) -> str | None:
    """Why `state` does not fit `net`, with the options to set; None if it fits."""
    own = net.state_dict()
    # batch norm had no counter before PyTorch 0.4.1
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    surplus = [k for k in state if k not in own]
    pairs = {k: (state[k], own[k]) for k in state if k in own}
    wrong = [k for k, (x, y) in pairs.items() if x.shape != y.shape]
    if rounded := [
        k for k, (x, y) in pairs.items() if x.is_floating_point() < y.is_floating_point()
    ]:
        what = f"{rounded[0]} of {state[rounded[0]].dtype}"
        return f"net{name} was saved with {what}, and it needs floats: save it unquantized"
    if not (missing or surplus or wrong):
        return None
    saved, wanted = (_described_as(name, keys) for keys in (state, own))
    if not saved.get("spectral_norm") and not wanted.get("spectral_norm"):
        for found in (saved, wanted):
            found.pop("spectral_norm", None)
    differing = {k: v for k, v in saved.items() if v != wanted.get(k)}
    if saved.keys() == wanted.keys() and differing:
        flags = " ".join(_flag(k, v) for k, v in differing.items())
        given = " ".join(_flag(k, wanted[k]) for k in differing)
        return f"net{name} was saved with {flags}, the options say {given}; set {flags}"
    if differing and wanted:
        if "antialias" not in wanted and not any(saved.get("antialias", ())):
            saved.pop("antialias", None)  # --no_antialias is the default
        flags = " ".join(_flag(k, v) for k, v in saved.items())
        return f"net{name} was saved with {flags}; set these flags"
    kinds = {"missing": missing, "unknown": surplus, "of another shape": wrong}
    faults = [f"{len(keys)} {kind} ({keys[0]})" for kind, keys in kinds.items() if keys]
    return (
        f"net{name} has {len(own)} weights, from which the file differs: "
        f"{', '.join(faults)}; it was saved from another network, or is incomplete"
    )


def _flag(name: str, value: Any) -> str:
    if name == "antialias":
        return ANTIALIAS_FLAGS[value]
    if name == "no_dropout":
        return "--no_dropout" if value else "--dropout"
    if name == "spectral_norm":
        return "--spectral_norm" if value else "no --spectral_norm"
    return f"--{name} {value}"


def other_model(opt: argparse.Namespace, folder: Path) -> str:
    """A hint for errors about weights: --name or --model was probably different."""
    if opt.name == DEFAULT_NAME and not folder.is_dir():
        return " (--name was not given)"
    trained = read_saved_options(folder).get("model", opt.model)
    if opt.isTrain or opt.model in (trained, "test"):
        return ""
    return f" ({opt.name} was trained with --model {trained})"


def other_options(opt: argparse.Namespace, folder: Path) -> str:
    """A hint for weights that do not fit: options that differ from the training's."""
    saved = read_saved_options(folder)
    other = [n for n in NETWORK_OPTIONS if n in saved and saved[n] != str(getattr(opt, n))]
    if opt.isTrain or not other:
        return ""
    flags = ", ".join("--" + name for name in other)
    were = " ".join(f"--{name} {saved[name]}" for name in other)
    return f", or leave out {flags}: it was trained with {were}"
