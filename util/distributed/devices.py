"""The device of a process, from `--gpu_ids`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from util.errors import UserError

from .ranks import launched, local_rank, local_world_size, world_size

_device: torch.device | None = None


def parse_gpu_ids(text: str) -> list[int]:
    """Numbers of GPUs from `0`, `0,1,2` or `-1` (none)."""
    try:
        ids = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(
            f"--gpu_ids '{text}' is not a list of numbers: say 0, or 0,1,2, or -1 for the CPU"
        ) from None
    return [i for i in ids if i >= 0]


def gpu_count() -> int:
    """How many GPUs this machine has."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_gpus(gpu_ids: str, ids: Sequence[int]) -> None:
    """Raise UserError for a GPU that this machine does not have."""
    count = gpu_count()
    missing = [i for i in ids if i >= count]
    if missing:
        there = f"GPUs 0 to {count - 1}" if count > 1 else "GPU 0 only" if count else "no GPU"
        raise UserError(
            f"--gpu_ids {gpu_ids}: there is no GPU {missing[0]}, this machine has {there}; "
            "choose among those, or -1 for the CPU"
        )


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device, asynchronously on CUDA only.

    An asynchronous copy to MPS may read the memory when it already holds the next batch.
    """
    return x.to(device, non_blocking=device.type == "cuda")


def device() -> torch.device:
    """The device that `select_device` chose last; by default a GPU if there is one."""
    return _device or select_device("0")[1]


def select_device(gpu_ids: str) -> tuple[list[int], torch.device]:
    """The GPUs to use (may be empty) and the device of this process.

    With several processes on a machine, each takes the GPU of `gpu_ids` at its local rank; the
    default `0` stands for GPUs 0, 1, ... Without a GPU the default falls back to Apple's MPS or to
    the CPU, with a message. Raises UserError for a GPU that the machine does not have.
    """
    global _device
    ids, _device = _select_device(gpu_ids)
    return ids, _device


def _select_device(gpu_ids: str) -> tuple[list[int], torch.device]:
    ids = parse_gpu_ids(gpu_ids)
    if not ids:
        return [], torch.device("cpu")
    if not gpu_count() and ids == [0]:
        if torch.backends.mps.is_available() and world_size() == 1:
            print("no CUDA GPU found: using Apple's MPS (--gpu_ids -1 uses the CPU)")
            return [], torch.device("mps")
        print("no GPU found: using the CPU (--gpu_ids -1 asks for it and drops this line)")
        return [], torch.device("cpu")
    processes = local_world_size()
    if processes > 1 and ids == [0]:
        if gpu_count() < processes:
            raise UserError(
                f"{processes} processes on this machine, which has {gpu_count()} GPUs: start at "
                "most one process for each GPU, or --gpu_ids -1 for the CPU"
            )
        ids = list(range(processes))
    check_gpus(gpu_ids, ids)
    if len(ids) < processes:
        raise UserError(
            f"--gpu_ids {gpu_ids} names {len(ids)} for {processes} processes on this machine: "
            f"name {processes}, or leave it out to use GPUs 0 to {processes - 1}"
        )
    if len(ids) > 1 and not launched():
        print(f"this program uses one GPU: {ids[0]} (torchrun starts it once for each)")
    if processes > 1:
        ids = [ids[local_rank()]]
    torch.cuda.set_device(ids[0])
    return ids, torch.device("cuda", ids[0])
