"""What `--fast` selects on this machine, and whether `--compile` and `--cuda_graphs` work."""

from __future__ import annotations

import argparse
import os

import torch

import models
from models.speed.iterations import why_not_recorded
from util import distributed
from util.errors import first_line

# The number of images, by `isTrain`, from which compiling saves more time than it takes: it takes
# about a minute, and saves 20 to 50 ms per iteration.
COMPILING_PAYS = {True: 3000, False: 20000}
# The same where iterations are recorded anyway: there it saves 15 ms per CycleGAN iteration.
PAYS_WHERE_RECORDED = 10000


def choose_fast(opt: argparse.Namespace, device: torch.device, explicit: set[str]) -> list[str]:
    """Set the options that `--fast` stands for, unless given; returns them as text for the user."""
    chosen = {}
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        chosen["precision"] = "bf16" if bf16 else "fp16"
        chosen["compile"], chosen["channels_last"] = True, "on"
        # not yet tried with fp16 or several processes, and not possible with --accumulate
        alone = distributed.world_size() == 1 and getattr(opt, "accumulate", 1) == 1
        if opt.isTrain and bf16 and alone:
            chosen["cuda_graphs"] = "on"
    elif device.type == "cpu":
        # without hardware support bf16 is emulated, and slower
        if has_fast_bf16():
            chosen["precision"] = "bf16"
        chosen["compile"] = True
    chosen["batch_passes"] = "on"
    for name, value in chosen.items():
        if name not in explicit:
            setattr(opt, name, value)
    flags = ("compile", "channels_last", "cuda_graphs")
    turned_on = [f"--{name}" for name in flags if getattr(opt, name) in (True, "on")]
    return [f"--precision {opt.precision}", *turned_on, f"--batch_passes {opt.batch_passes}"]


def too_few_to_compile(opt: argparse.Namespace, pictures: int) -> str | None:
    """Why `--fast` should not compile for this number of images; None if it should."""
    recorded = opt.cuda_graphs and why_not_graphs(opt, opt.device, networks=False) is None
    minimum = PAYS_WHERE_RECORDED if recorded else COMPILING_PAYS[opt.isTrain]
    if pictures >= minimum:
        return None
    return (
        f"it pays off from {minimum} images on, and there are {pictures} in all (--compile "
        "forces it)"
    )


def hint_for_busy_cores() -> str | None:
    """A hint for a CPU that other programs use as well; None if there is no need for one.

    Threads that wait for each other spin, which is fastest if they have all cores to themselves.
    Otherwise they take cores that the thread they wait for needs.
    """
    cores = os.cpu_count() or 1  # of the whole machine, as is the load
    known = hasattr(os, "getloadavg") and "OMP_WAIT_POLICY" not in os.environ
    if not known or torch.get_num_threads() == 1 or os.getloadavg()[0] < 0.75 * cores:
        return None
    return (
        f"this machine is busy (a load of {os.getloadavg()[0]:.1f} on {cores} cores): with "
        "OMP_WAIT_POLICY=PASSIVE in front of the command it is two to three times faster while "
        "that lasts, and slower afterwards"
    )


def has_fast_bf16() -> bool:
    """Whether the CPU has bf16 instructions."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = file.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def why_not_compile(opt: argparse.Namespace, device: torch.device) -> str | None:
    """Why `--compile` does not work here; None if it does. Tries to compile a small function."""
    if opt.preprocess in ("scale_width", "none"):
        return f"--preprocess {opt.preprocess} gives images of many sizes"
    try:
        torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(8, device=device))
    except Exception as e:  # the compiler, and the tools that it calls, may raise anything
        return f"the compiler does not work here ({first_line(e)[:120]})"
    return None


def why_not_graphs(
    opt: argparse.Namespace, device: torch.device, networks: bool = True
) -> str | None:
    """Why `--cuda_graphs` does not work here; None if it does.

    With `networks`, graphs of compiled networks will do where iterations can't be recorded.
    """
    if device.type != "cuda":
        return "it needs a CUDA device"
    reason = why_not_recorded(models.find_model_using_name(opt.model), opt)
    if reason and networks:
        return None if opt.compile else f"{reason}, and recording networks needs --compile"
    return reason
