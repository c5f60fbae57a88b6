"""A short trial of whether compiling makes an iteration faster, and whether CUDA graphs work.

That depends on the machine, the model and the size: on a CPU a compiled pix2pix in bf16 is slower,
and a model that keeps an output for the next iteration can't have CUDA graphs of its networks. The
result is kept in the user's cache folder, so that the next training starts at once, and a resumed
one computes as before.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from util import distributed, randomness
from util.errors import first_line
from util.files import write_whole

WARM_UP, STEPS = 6, 5  # iterations; compiling and recording take place in the first ones
# options that decide how long an iteration takes
NAMES = (
    *("model", "netG", "netD", "ngf", "ndf", "n_layers_D", "norm", "input_nc", "output_nc"),
    *("batch_size", "preprocess", "load_size", "crop_size", "precision", "channels_last"),
    *("gan_mode", "batch_passes", "accumulate", "grad_checkpoint", "lambda_identity"),
    *("no_antialias", "no_antialias_up", "num_D", "normD", "spectral_norm", "diffaug", "ema"),
    *("gp", "gp_every", "lambda_feat", "lambda_vgg", "nce_layers", "nce_idt", "cuda_graphs"),
    *("no_dropout", "netF", "netF_nc", "num_patches", "flip_equivariance", "normG"),
)


def compiling_costs(
    opt: argparse.Namespace,
    make_model: Callable[[argparse.Namespace], Any],
    load_batch: Callable[[], dict[str, Any]],
) -> str | None:
    """Why not to compile: the time of an iteration with and without it; None if compiling pays.

    Sets `opt.cuda_graphs` to False if the model does not work with them.
    """
    answers, key = _read(), _key(opt)
    found = distributed.broadcast_object(answers.get(key))
    if found is None:
        print("--fast: measuring whether compiling pays off, a minute or two; the result is cached")
        with randomness.preserved():
            found = distributed.broadcast_object(_try(opt, make_model, load_batch()))
        if distributed.is_main() and "error" not in found:
            with contextlib.suppress(OSError):
                write_whole(cache_file(), json.dumps({**_read(), key: found}, indent=1))
    if opt.cuda_graphs and found["failed"]:
        print(f"--cuda_graphs is off: {found['failed']}")
        opt.cuda_graphs = False
    if "error" in found:
        return f"this model can't be compiled ({found['error']})"
    if found["compiled"] < found["eager"]:
        return None
    return (
        f"in a trial an iteration took {1000 * found['compiled']:.0f} ms with it and "
        f"{1000 * found['eager']:.0f} ms without (kept in {cache_file()})"
    )


def _try(
    opt: argparse.Namespace, make_model: Callable[..., Any], batch: dict[str, Any]
) -> dict[str, Any]:
    """Seconds per iteration, `eager` and `compiled`, and why CUDA graphs `failed`, if they did.

    Where compiling fails, an `error` instead.
    """
    # without compiling, CUDA graphs record whole iterations, or nothing
    found = {"eager": seconds(opt, make_model, batch, cuda_graphs=opt.cuda_graphs), "failed": ""}
    if opt.cuda_graphs:
        try:
            found["compiled"] = seconds(opt, make_model, batch, compile=True, cuda_graphs=True)
            return found
        except RuntimeError as e:  # PyTorch's error for outputs that were overwritten
            found["failed"] = first_line(e)
    try:
        found["compiled"] = seconds(opt, make_model, batch, compile=True)
    except Exception as e:  # a compiler may raise anything, and training can do without it
        found["error"] = first_line(e)
    return found


def seconds(
    opt: argparse.Namespace,
    make_model: Callable[[argparse.Namespace], Any],
    batch: dict[str, Any],
    compile: bool = False,
    cuda_graphs: bool = False,
) -> float:
    """The median time of an iteration of a new model."""
    modes = {"compile": compile, "cuda_graphs": cuda_graphs, "continue_train": False}
    own = argparse.Namespace(**{**vars(opt), **modes})
    times, model = [], None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = make_model(own)
            model.data_dependent_initialize(batch)
            model.setup(own)
            for _ in range(WARM_UP + STEPS):
                start = time.perf_counter()
                model.set_input(batch)
                model.optimize_parameters()
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
    finally:  # if CUDA graphs fail, free what they hold before the next try
        del model
        if compile:
            torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return statistics.median(times[WARM_UP:])


def cache_file() -> Path:
    """The file of results: `image_translation/trials.json` in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "image_translation", "trials.json")


def _read() -> dict[str, dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(cache_file().read_text()))
    return {}


def _key(opt: argparse.Namespace) -> str:
    on_gpu = opt.device.type == "cuda"
    device = torch.cuda.get_device_name(opt.device) if on_gpu else platform.processor()
    machine = [platform.node(), device, torch.get_num_threads(), torch.__version__]
    machine.append(distributed.world_size())
    options = [f"{name}={getattr(opt, name)}" for name in NAMES if hasattr(opt, name)]
    return " ".join(map(str, [*machine, *options]))
