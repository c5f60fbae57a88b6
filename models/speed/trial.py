"""Whether compiling makes an iteration faster, by a short trial.

That depends on the machine, the model and the size: on a CPU a compiled pix2pix in bf16 is slower.
The answer is kept in the user's cache folder, so that the next training starts at once, and a
resumed one computes as before.
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
from util.files import write_whole

WARM_UP, STEPS = 3, 5  # iterations; the first ones compile
# options that decide how long an iteration takes
NAMES = (
    *("model", "netG", "netD", "ngf", "ndf", "n_layers_D", "norm", "input_nc", "output_nc"),
    *("batch_size", "preprocess", "load_size", "crop_size", "precision", "channels_last"),
    *("gan_mode", "batch_passes", "accumulate", "grad_checkpoint", "lambda_identity"),
)


def compiling_costs(
    opt: argparse.Namespace,
    make_model: Callable[[argparse.Namespace], Any],
    load_batch: Callable[[], dict[str, Any]],
) -> str | None:
    """Why not to compile: what an iteration takes with and without; None if compiling pays."""
    answers, key = _read(), _key(opt)
    times = distributed.broadcast_object(answers.get(key))
    if times is None:
        print("--fast: trying whether compiling pays, a minute or two; the answer is kept")
        state = randomness.get_state()
        batch = load_batch()
        times = [seconds(opt, make_model, batch, compiled) for compiled in (False, True)]
        times = distributed.broadcast_object(times)
        randomness.set_state(state)
        if distributed.is_main():
            with contextlib.suppress(OSError):
                write_whole(cache_file(), json.dumps({**_read(), key: times}, indent=1))
    eager, compiled = times
    if compiled < eager:
        return None
    return (
        f"in a trial an iteration took {1000 * compiled:.0f} ms with it and {1000 * eager:.0f} ms "
        f"without (kept in {cache_file()})"
    )


def seconds(
    opt: argparse.Namespace,
    make_model: Callable[[argparse.Namespace], Any],
    batch: dict[str, Any],
    compiled: bool,
) -> float:
    """The median time of an iteration of a new model."""
    own = argparse.Namespace(**{**vars(opt), "compile": compiled, "continue_train": False})
    with contextlib.redirect_stdout(io.StringIO()):
        model = make_model(own)
        model.setup(own)
    times = []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        model.begin_iteration()
        model.set_input(batch)
        model.optimize_parameters()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    del model
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return statistics.median(times[WARM_UP:])


def cache_file() -> Path:
    """The file of answers: `image_translation/trials.json` in the user's cache folder."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder, "image_translation", "trials.json")


def _read() -> dict[str, list[float]]:
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
