"""Runs training in forked processes: the imports are paid for once, and any child can be killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["train", "tests.forked", "tests.ranks", "matplotlib.figure"])


def start(
    argv: list[str],
    log: Path,
    crash_at: int | None = None,
    prepare: Callable[[], None] | None = None,
) -> Any:
    """Start `train.py` with these arguments; output is appended to `log`.

    With `crash_at` the process kills itself before the so many-th operation of the file system
    that saving makes (opening, flushing, renaming, deleting files). `prepare`, a function of a
    module, is called in the process before training.
    """
    process = _context.Process(target=_child, args=(argv, str(log), crash_at, prepare))
    process.start()
    return process


def run(
    argv: list[str],
    log: Path,
    crash_at: int | None = None,
    seconds: float = 120,
    prepare: Callable[[], None] | None = None,
) -> int:
    """Like `start`, and waits for the end; returns the exit code (negative: the signal)."""
    process = start(argv, log, crash_at, prepare)
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running after {seconds} s: {Path(log).read_text()[-2000:]}")
    return process.exitcode


def call(function: Callable[..., None], *args: Any) -> Any:
    """Start a function of a module in a process of its own."""
    process = _context.Process(target=function, args=args)
    process.start()
    return process


def write_to(log: str) -> None:
    """Append all that this process prints from now on to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _child(
    argv: list[str], log: str, crash_at: int | None, prepare: Callable[[], None] | None
) -> None:
    write_to(log)
    sys.argv = ["train.py", *argv]
    # loading processes are forked too, as in a program that is started by hand
    multiprocessing.set_start_method("fork", force=True)
    import torch

    import train
    from util.errors import one_line_errors

    torch.set_num_threads(1)
    if crash_at is not None:
        _crash_in_save(crash_at)
    if prepare is not None:
        prepare()
    with one_line_errors(), contextlib.suppress(KeyboardInterrupt):
        train.main()


def _crash_in_save(crash_at: int) -> None:
    from util import files
    from util.run import weight_files

    count = 0

    def counted(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == crash_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    class CountedOs:
        """`os` as the module sees it, with the calls that change files counted."""

        replace = staticmethod(counted(os.replace))
        fsync = staticmethod(counted(os.fsync))

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

    files.os = CountedOs()  # type: ignore[assignment]
    weight_files.DiskWriter.write = counted(weight_files.DiskWriter.write)  # type: ignore
