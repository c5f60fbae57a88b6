"""The one place where randomness is seeded, saved and restored."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; `deterministic` also selects deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        # some GPU operators have no deterministic kernel: warn, do not stop
        torch.use_deterministic_algorithms(True, warn_only=True)


def new_seed() -> int:
    """A seed from the operating system."""
    return int.from_bytes(os.urandom(4), "little")


def derived_seed(*parts: int) -> int:
    """A 63-bit hash of numbers such as (seed, epoch, index), for independent random streams."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def get_state() -> dict[str, Any]:
    """The state of every random number generator, as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
    }


def set_state(state: dict[str, Any]) -> None:
    """Restore what `get_state` returned; skips GPUs that no longer exist."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for i, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state.cpu(), i)
    for mps_state in state["mps"] if torch.backends.mps.is_available() else []:
        torch.mps.set_rng_state(mps_state.cpu())


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Context manager: at its end every generator has the state that it had before."""
    state = get_state()
    try:
        yield
    finally:
        set_state(state)


def fingerprint() -> tuple:
    """A value that changes whenever a CPU generator is used: Python's, NumPy's or torch's."""
    _, keys, position, *gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    torchs = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), np.asarray(keys).tobytes(), position, gauss, torchs


def seed_cpu(seed: int) -> None:
    """Seed the CPU generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # not torch.manual_seed: that would seed the GPUs as well
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context manager: seeds the CPU generators, and restores their states at its end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_cpu(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
