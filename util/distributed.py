"""Everything that knows about devices and ranks."""

from __future__ import annotations

import torch

from .util import UserError


def parse_gpu_ids(text: str) -> list[int]:
    """Numbers of GPUs from `0`, `0,1,2` or `-1` (none)."""
    try:
        ids = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"--gpu_ids '{text}' is not a list of numbers: say 0, or 0,1,2, or -1 for the CPU"
        ) from None
    return [i for i in ids if i >= 0]


def select_device(gpu_ids: str) -> tuple[list[int], torch.device]:
    """The GPUs to use (none: another device) and the device on which this process computes.

    Without any GPU the default of `0` falls back to Apple's MPS or to the CPU and says so.
    Raises UserError for a GPU that the machine does not have.
    """
    ids = parse_gpu_ids(gpu_ids)
    if not ids:
        return [], torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = [i for i in ids if i >= count]
    if count and not missing:
        torch.cuda.set_device(ids[0])
        if len(ids) > 1:
            print(f"training on several GPUs is not there yet: only GPU {ids[0]} is used")
        return ids, torch.device("cuda", ids[0])
    if count or ids != [0]:
        there = f"GPUs 0 to {count - 1}" if count > 1 else "GPU 0 only" if count else "no GPU"
        raise UserError(
            f"--gpu_ids {gpu_ids}: there is no GPU {missing[0]}, this machine has {there}; "
            "choose among those, or -1 for the CPU"
        )
    if torch.backends.mps.is_available():
        print("no CUDA GPU found: using Apple's MPS (--gpu_ids -1 uses the CPU)")
        return [], torch.device("mps")
    print("no GPU found: using the CPU (--gpu_ids -1 asks for it and drops this line)")
    return [], torch.device("cpu")
