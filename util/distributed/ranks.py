"""Rank and world size; the start, the output and the end of the process group.

A process that fails exits, and torchrun ends or restarts the others.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from util.errors import first_line
from util.temporarily import temporarily

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOIN_TIMEOUT = timedelta(minutes=10)  # for all processes to connect
TIMEOUT = timedelta(hours=2)  # of a collective: the other ranks wait while rank 0 validates
AGENT_SECONDS = 3.0  # torchrun polls its processes: if one fails, it ends this one in that time

_local_norms = False
_until_the_end = contextlib.ExitStack()


# ------------------------------------------------------------------------------------------ ranks
def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, has started this process."""
    return all(name in os.environ for name in NEEDED)


def restart_count() -> int:
    """How often torchrun on this machine has restarted its processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process among those on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def local_world_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that prints, saves and shows: rank 0."""
    return rank() == 0


def is_local_main() -> bool:
    """Whether this process is the first one on its machine."""
    return local_rank() == 0


def shard(items: Sequence[Any]) -> Any:
    """The items of this rank: every N-th one, where N is the world size."""
    return items[rank() :: world_size()]


def cores() -> int:
    """CPU cores for this process: those of the machine divided by its number of processes."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (there or 1) // local_world_size())


def local_norms() -> contextlib.AbstractContextManager[None]:
    """Context manager: batch norm is not synchronized, for what one rank computes alone."""
    return temporarily(sys.modules[__name__], _local_norms=True)


def norms_are_local() -> bool:
    """Whether batch norm must not synchronize: in `local_norms`, or with a world size of 1."""
    return _local_norms or world_size() == 1


# ---------------------------------------------------------------------------------- start and end
@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Context manager: connects the processes of torchrun; does nothing without torchrun.

    Only rank 0 prints to stdout; lines of other ranks on stderr begin with the rank. An exception
    ends the process at once. Exits with code 1 and one line if the processes can't connect.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    # tensors on a GPU are reduced by NCCL, all others and objects by gloo
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    # Functions of this module have as a default argument the group that exists at its import. If
    # the compiler imported it later, with the first optimizer, they would keep the group alive past
    # `_disconnect`.
    from torch.distributed import nn  # noqa: F401

    try:
        store, number, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # this store survives a restart, and still has the addresses of the ended processes
            store = dist.PrefixStore(f"restart_{restart_count()}", store)
        place = {"store": store, "rank": number, "world_size": size}
        dist.init_process_group(backend, timeout=TIMEOUT, **place)
    except (ValueError, RuntimeError) as e:
        print(f"error: the processes could not connect: {first_line(e)}", file=sys.stderr)
        sys.exit(1)
    # if the launcher is killed, this process saves and stops
    signal_on_parent_death(signal.SIGTERM)
    with _output():
        try:
            yield
        except BaseException as error:
            if world_size() > 1 and (code := _report(error)):
                sys.stdout.flush()
                sys.stderr.flush()
                # a normal exit would wait for collectives that never complete
                os._exit(code)
            raise
        finally:
            _disconnect()


def _disconnect() -> None:
    """Destroy the process group and end its threads.

    Before Python 3.14 a gloo thread that releases its last tensor while Python shuts down aborts
    the process. Destroying the group ends these threads, so drop every reference to it. Before
    PyTorch 2.8 that deadlocks on the GIL unless gloo's backend is released last.
    """
    last = None
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        last = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    dist.destroy_process_group()
    del last


def init_process_group() -> None:
    """Enter `process_group()` for the rest of the program, or until `destroy_process_group`."""
    if launched() and not dist.is_initialized():
        _until_the_end.enter_context(process_group())
        atexit.register(destroy_process_group)


def destroy_process_group() -> None:
    """Undo `init_process_group`; does nothing if that did nothing."""
    _until_the_end.close()


def _report(error: BaseException) -> int:
    """Print an exception, unless it is a SystemExit; returns the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if lost_another(error):
        time.sleep(AGENT_SECONDS)  # torchrun ends this one first: only the failed one is reported
        print(
            "error: another process of this run has exited, so this one exits too\n"
            f"  ({first_line(error)[:200]})",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    return 1


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process has gone."""
    return isinstance(error, dist.DistError) or "gloo" in first_line(error)


def signal_on_parent_death(number: int) -> None:
    """Have the system send this process a signal when its parent ends; on Linux only."""
    if sys.platform == "linux":
        set_signal = 1  # PR_SET_PDEATHSIG in sys/prctl.h
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(set_signal, number)


# ----------------------------------------------------------------------------------------- output
class _RankStderr:
    """stderr of a rank above 0: each line begins with the rank.

    Warnings are dropped, since rank 0 prints them too. An error is printed some seconds late: if
    rank 0 has the same error, torchrun ends this process before that, and it is printed only once.
    """

    def __init__(self, stream: Any):
        self.stream, self.rest = stream, ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.startswith("warning: "):
                continue
            if "error: " in line and not is_local_main():
                time.sleep(AGENT_SECONDS)
            self.stream.write(f"[rank {rank()}] {line}\n" if line else "\n")
            self.stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _output() -> Iterator[None]:
    if is_main():
        yield
        return
    with (
        open(os.devnull, "w") as silence,
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(_RankStderr(sys.stderr)),  # type: ignore[type-var]
    ):
        yield


def print_on_all_ranks(text: str) -> None:
    """Print on every rank; ranks above 0 use stderr."""
    print(text, file=sys.stdout if is_main() else sys.stderr, flush=True)
