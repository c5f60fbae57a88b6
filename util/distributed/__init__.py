"""Everything that knows about devices and ranks: who takes part, what they exchange, how they end.

A program started by torchrun runs within `process_group()`. In any other program there is one
process, and every function here does what that one needs: nothing, mostly. Gradients travel over
NCCL between GPUs; all else, and everything on CPUs, goes over gloo, which never waits for a GPU and
notices at once when a process has died.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from util.errors import UserError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# the others wait this long while the first process scores pictures or writes a page
TIMEOUT = timedelta(hours=12)
JOIN_TIMEOUT = timedelta(minutes=10)  # from the start of a process to that of the last one
NCCL_TIMEOUT = timedelta(minutes=30)  # compiling takes some processes longer than others
LOOK_EVERY = 1.0  # seconds between two looks at whether the others are still there
GRACE = 15.0  # seconds to end by oneself after another process has failed
SAME_SIGNAL = 5.0  # seconds within which a signal that comes again is the same one


# ------------------------------------------------------------------------------------------- who
@dataclass(frozen=True)
class Place:
    """Which of the processes this one is, of all and of those on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


_place = Place()
_control: dist.ProcessGroup | None = None  # for what is exchanged while gradients travel
_device_groups: dict[torch.device, dist.ProcessGroup] = {}
_no_sync = False
_source = 0
_job_store: Any = None  # keys and values that outlive a restart by torchrun: those of its agent
_shared_store: Any = None  # of this attempt


class PeerLost(RuntimeError):
    """Another process has ended, so nothing can be exchanged any more."""


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, has started this process."""
    return all(name in os.environ for name in NEEDED)


def rank() -> int:
    """The number of this process, from 0."""
    return _place.rank


def world_size() -> int:
    """The number of processes on all machines."""
    return _place.world_size


def is_main() -> bool:
    """Whether this process is the one that prints, saves and shows."""
    return _place.rank == 0


def source_rank() -> int:
    """The rank that reads what training goes on from, for all: see `choose_source`."""
    return _source


def is_source() -> bool:
    """Whether this process is that one."""
    return _place.rank == _source


@contextlib.contextmanager
def no_sync() -> Iterator[None]:
    """Within, norms take no part of their statistics from other processes: those do not run."""
    global _no_sync
    before, _no_sync = _no_sync, True
    try:
        yield
    finally:
        _no_sync = before


def sync_disabled() -> bool:
    """Whether there are no other processes, or they do something else at the moment."""
    return _no_sync or _place.world_size == 1


# --------------------------------------------------------------------------------------- together
@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Within, the processes that torchrun started know each other; a plain program goes through.

    Only the first process prints; warnings and errors of the others show, with their rank in
    front, unless the first one says the same. An error in any process ends all of them, and is
    told once.
    """
    global _place
    if not launched() or dist.is_initialized():
        yield
        return
    try:
        with _interrupted_at_once():
            _place = Place(*(int(os.environ[name]) for name in NEEDED[:4]))
            _join()
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        print(f"error: the processes could not meet: {reason}", file=sys.stderr, flush=True)
        sys.exit(1)
    with _voices(_Said(_shared_store)), _watch():
        try:
            yield
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if 0 < code < 128:  # the others may know nothing of it; a signal is agreed upon
                _end_failed(code)
            raise
        except KeyboardInterrupt:
            _end_failed(130)
        except PeerLost as lost:
            _tell_of_loss(lost)
            _end_failed(1)
        except BaseException as error:
            if _place.world_size == 1:
                raise
            traceback.print_exc()
            with contextlib.suppress(Exception):
                # for the summary that torchrun prints at the end
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                get_error_handler().record_exception(error)
            _end_failed(1)
        finally:
            _leave()


@contextlib.contextmanager
def _interrupted_at_once() -> Iterator[None]:
    """Within, Ctrl-C ends the process: one that waits for a connection runs no Python for it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _join() -> None:
    """Connect all the processes of this attempt, and none of an earlier one."""
    global _job_store, _shared_store, _control
    rank, size = _place.rank, _place.world_size
    _job_store, _, _ = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
    # after a restart the store still has the addresses of processes that are gone
    name = uuid.uuid4().hex
    if size > 1 and rank == 0:
        name = _welcome(name)
    elif size > 1:
        _job_store.set(f"hello/{rank}", name)
        attempt = _job_store.get(f"attempt/{name}").decode()
        _job_store.set(f"here/{attempt}/{rank}", "1")
        name = attempt
    _shared_store = dist.PrefixStore(name, _job_store)
    dist.init_process_group(
        "gloo", store=_shared_store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    if size > 1:
        # now, when all are there: making it would wait very long for one that has failed
        _control = dist.new_group(backend="gloo", timeout=TIMEOUT)


def _welcome(attempt: str) -> str:
    """Tell each of the other processes the name of this attempt, and wait until all know it.

    What lies in the store as the greeting of a process can be that of one that is gone. So answers
    are given by the names in greetings, again and again until the present ones have come.
    """
    end = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    missing = set(range(1, _place.world_size))
    while missing:
        for other in sorted(missing):
            if _job_store.check([f"hello/{other}"]):
                greeting = _job_store.get(f"hello/{other}").decode()
                _job_store.set(f"attempt/{greeting}", attempt)
            if _job_store.check([f"here/{attempt}/{other}"]):
                missing.discard(other)
        if time.monotonic() > end:
            raise UserError(f"no word from process {min(missing)} of {_place.world_size}")
        time.sleep(0.01)
    return attempt


def _leave() -> None:
    global _place, _control, _source
    _place, _control, _source = Place(), None, 0
    _device_groups.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_failed(code: int) -> None:
    """End this process, and let the others know why theirs can't go on."""
    if _place.world_size == 1:
        sys.exit(code)
    with contextlib.suppress(Exception):
        _shared_store.set(_FAILED, "1")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    # tearing the connections down in order could wait for a process that is gone
    os._exit(code)


def _tell_of_loss(lost: PeerLost) -> None:
    with contextlib.suppress(Exception):
        # one that fails in order says why, and leaves word before its connections are closed
        if _shared_store.check([_FAILED]) or _shared_store.add("lost", 1) > 1:
            return
    print(
        "error: another process of this training has ended, so this one ends too; what torchrun "
        f"says below names it\n  ({lost})",
        file=sys.stderr,
        flush=True,
    )


_FAILED = "failed"


def _note_key() -> str:
    return f"image-translation/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/run"


def save_run_id(text: str) -> None:
    """Leave a note for the processes that torchrun may start in place of these."""
    if launched() and dist.is_initialized():
        _job_store.set(_note_key(), text)


def saved_run_id() -> str | None:
    """The note that processes left which torchrun had started before these; None for no such."""
    if not launched() or not dist.is_initialized() or not _job_store.check([_note_key()]):
        return None
    return _job_store.get(_note_key()).decode()


def restarted() -> bool:
    """Whether torchrun has started any of these processes in place of one that had failed.

    To be called by all processes. A machine that comes back has an agent that does not know.
    """
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if launched() else 0
    return any_rank(count > 0) or broadcast_object(saved_run_id()) is not None


# ------------------------------------------------------------------------------------------ voices
class _Said:
    """Which lines have been told by one of the processes."""

    def __init__(self, store: Any):
        self.store, self.process = store, os.getpid()
        self.times: dict[str, int] = {}

    def first(self, line: str) -> bool:
        """Whether no other process has told this line so often as this one now does."""
        if os.getpid() != self.process:
            return True  # a process that loads data must not talk to the store of its parent
        self.times[line] = times = self.times.get(line, 0) + 1
        try:
            digest = hashlib.sha1(line.encode(errors="replace")).hexdigest()
            return self.store.add(f"said/{times}/{digest}", 1) == 1
        except Exception:
            return True


class _Voice:
    """Standard error of a process: with its rank in front of each line, but for the first one.

    What all of them have to say, such as that a folder is missing, is said once.
    """

    def __init__(self, stream: Any, said: _Said):
        self.stream, self.said, self.rest = stream, said, ""
        self.prefix = f"[rank {_place.rank}] " if _place.rank else ""

    def write(self, text: str) -> int:
        if not self.prefix and not self.rest and "\r" in text:
            return self.stream.write(text)  # a progress bar
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            self._say(line)
        return len(text)

    def _say(self, line: str) -> None:
        error = line.startswith("error: ") or ": error: " in line
        if error and self.prefix:
            time.sleep(1)  # the first process may be about to say it, without a rank in front
        if (error or line.startswith("warning: ")) and not self.said.first(line):
            return
        self.stream.write(f"{self.prefix}{line}\n" if line else "\n")
        self.stream.flush()

    def flush(self) -> None:
        if self.rest and not self.prefix:
            self.stream.write(self.rest)
            self.rest = ""
        self.stream.flush()

    def isatty(self) -> bool:
        return not self.prefix and self.stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _voices(said: _Said) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if _place.world_size > 1:
            stack.enter_context(contextlib.redirect_stderr(_Voice(sys.stderr, said)))
        if not is_main():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        yield


def print_on_all_ranks(*lines: object, sep: str = "\n") -> None:
    """Print what each process has to say for itself; those that are silent use standard error."""
    print(*lines, sep=sep, file=sys.stdout if is_main() else sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------- watch
@contextlib.contextmanager
def _watch() -> Iterator[None]:
    """Within, a thread sees to it that no process waits for one that has failed.

    Gloo says at once that a connection is closed. But the main thread may be waiting for a GPU,
    that for another GPU, and that for a process that is gone: nothing would ever come of it.
    """
    over = threading.Event()
    parent = os.getppid()
    store: Any = _shared_store
    if hasattr(store, "clone"):
        store = store.clone()  # a connection of its own: the main thread may be using the other

    def failed(ask_store: bool) -> bool:
        try:
            return (ask_store and store.check([_FAILED])) or async_max.broken()
        except Exception:
            return True  # the store went with the process that had it

    def look() -> None:
        launcher = True
        while not over.wait(LOOK_EVERY):
            lost = failed(launcher)
            # a launcher that is killed takes the store along, a moment before this can be seen
            if lost and over.wait(LOOK_EVERY):
                return
            if launcher and os.getppid() != parent:
                # nobody else would end this process: save and stop, without the store
                launcher = False
                os.kill(os.getpid(), signal.SIGTERM)
            elif lost:
                if over.wait(GRACE):
                    return
                os.write(2, b"error: another process has ended, and this one could not go on\n")
                os._exit(1)

    if _place.world_size > 1:
        threading.Thread(target=look, name="watch", daemon=True).start()
    try:
        yield
    finally:
        over.set()


# ---------------------------------------------------------------------------------------- exchange
# a fault of the GPU shows in whatever comes next; torch 2.8 and newer tell it apart
_DEVICE_ERROR: type[Exception] = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)


@contextlib.contextmanager
def _exchange() -> Iterator[None]:
    """Turn what a collective raises where a process is gone into PeerLost."""
    try:
        yield
    except (torch.OutOfMemoryError, _DEVICE_ERROR):
        raise
    except RuntimeError as e:
        text = str(e).strip().splitlines()
        raise PeerLost(text[0][:200] if text else type(e).__name__) from e


@dataclass
class Traffic:
    """How often numbers were added up over all processes, and how many bytes of each process.

    Gradients, and apart from them the statistics of synchronized norms. What is not counted is
    small and not in the way: flags, and what saving collects.
    """

    reductions: int = 0
    bytes: int = 0
    norm_reductions: int = 0
    norm_bytes: int = 0

    def reset(self) -> None:
        """Start again from zero."""
        for field in fields(self):
            setattr(self, field.name, 0)


traffic = Traffic()


def device_group(device: torch.device) -> dist.ProcessGroup | None:
    """Over which tensors of this device travel: NCCL for GPUs, gloo (None) for the rest.

    To be called by all processes, the first time: the connections are made then.
    """
    if device.type != "cuda":
        return None
    if device not in _device_groups:
        # over gloo, which notices one that has failed: NCCL would wait for it
        barrier()
        with _exchange():
            _device_groups[device] = dist.new_group(
                backend="nccl", timeout=NCCL_TIMEOUT, device_id=device
            )
    return _device_groups[device]


def all_reduce(x: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, in place and not seen by autograd; for norms."""
    traffic.norm_reductions += 1
    traffic.norm_bytes += x.numel() * x.element_size()
    with _exchange():
        dist.all_reduce(x, group=device_group(x.device))
    return x


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes: one reduction for all of them.

    A gradient that is None everywhere stays so; one that is None here and not elsewhere counts as
    zero. (Parameters of several types or devices take a reduction for each of those.)
    """
    if _place.world_size == 1:
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    for (device, dtype), same in kinds.items():
        absent = [i for i, p in enumerate(same) if p.grad is None]
        there = torch.ones(len(same), device=device, dtype=dtype)
        if absent:
            there[absent] = 0
        # of one layout everywhere, so that no process has to ask the others what they have
        parts = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in same]
        flat = torch.cat([*parts, there])
        del parts
        traffic.reductions += 1
        traffic.bytes += flat.numel() * flat.element_size()
        with _exchange():
            dist.all_reduce(flat, group=device_group(device))
        flat /= _place.world_size
        *means, there = flat.split([p.numel() for p in same] + [len(same)])
        for i in absent:
            if there[i] > 0:
                same[i].grad = torch.zeros_like(same[i])
        pairs = [(p.grad, m.view(p.shape)) for p, m in zip(same, means, strict=True)]
        kept = [(grad, mean) for grad, mean in pairs if grad is not None]
        if kept:
            torch._foreach_copy_([grad for grad, _ in kept], [mean for _, mean in kept])


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Overwrite tensors by those of rank `src`."""
    if _place.world_size == 1:
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for x in tensors:
        kinds.setdefault((x.device, x.dtype), []).append(x)
    for (device, _), same in kinds.items():
        flat = torch.cat([x.reshape(-1) for x in same])
        with _exchange():
            dist.broadcast(flat, src, group=device_group(device))
        for x, value in zip(same, flat.split([x.numel() for x in same]), strict=True):
            x.copy_(value.view(x.shape))


def broadcast_object(value: Any, src: int = 0) -> Any:
    """The value of rank `src`, on all ranks."""
    if _place.world_size == 1:
        return value
    box = [value]
    with _exchange():
        dist.broadcast_object_list(box, src=src)
    return box[0]


def choose_source(newest: Any) -> None:
    """Let the process with the largest value read what training goes on from.

    None stands for having nothing. It is the first process, unless that has come to a machine
    whose folder lacks what another one has.
    """
    global _source
    if _place.world_size > 1:
        values = all_gather_object(newest)
        there = [(value, -rank) for rank, value in enumerate(values) if value is not None]
        _source = -max(there)[1] if there else 0


def local_world_size() -> int:
    """The number of processes on this machine."""
    return _place.local_world_size


def cores() -> int:
    """The processor cores that this process has: its share of those of the machine."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (there or 1) // local_world_size())


def is_local_main() -> bool:
    """Whether this is the first of the processes on its machine."""
    return _place.local_rank == 0


def gather_object(value: Any) -> list[Any]:
    """The values of all processes in order of their ranks, for the first; no values for others."""
    if _place.world_size == 1:
        return [value]
    values = [None] * _place.world_size if is_main() else None
    with _exchange():
        dist.gather_object(_on_cpu(value), values)
    return values or []


def scatter_object(values: Sequence[Any], src: int = 0) -> Any:
    """One of the values of rank `src` to each rank, in their order."""
    if _place.world_size == 1:
        return values[0]
    box = [None]
    with _exchange():
        dist.scatter_object_list(box, list(values) if _place.rank == src else None, src=src)
    return box[0]


def shard(items: Sequence[Any]) -> Any:
    """The items of this rank: each N-th one, N being the world size."""
    return items[_place.rank :: _place.world_size]


def all_gather_object(value: Any) -> list[Any]:
    """The values of all ranks, in their order, on all ranks."""
    if _place.world_size == 1:
        return [value]
    values: list[Any] = [None] * _place.world_size
    with _exchange():
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Whether this holds in any process."""
    if _place.world_size == 1:
        return flag
    flags = torch.tensor([int(flag)])
    with _exchange():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def sum_over_ranks(*numbers: float) -> list[float]:
    """The sums of these numbers over all processes."""
    if _place.world_size == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64)
    with _exchange():
        dist.all_reduce(sums)
    return sums.tolist()


def barrier() -> None:
    """Go on when all processes have come here."""
    if _place.world_size > 1:
        with _exchange():
            dist.barrier()


def _on_cpu(value: Any) -> Any:
    """A tree of plain values and tensors with all tensors on the CPU, where others can read it."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(v) for v in value)
    return value


class AsyncMax:
    """A number that each process gives in each iteration, of which all learn the largest.

    They learn it one iteration later: so none waits for another, nor for a GPU, and all of them
    act on it at the same iteration.
    """

    def __init__(self) -> None:
        self.work: Any = None
        self.future: Any = None
        self.number = torch.zeros(1, dtype=torch.int64)

    def __call__(self, number: int) -> int:
        """Give a number (0: nothing to say), and get the largest that was given the last time."""
        if _place.world_size == 1:
            return number
        with _exchange():
            largest = self.wait()
            self.number = torch.tensor([number])
            self.work = dist.all_reduce(
                self.number, dist.ReduceOp.MAX, group=_control, async_op=True
            )
            self.future = self.work.get_future()
        return largest

    def wait(self) -> int:
        """What was given the last time, 0 if nothing was."""
        work, self.work, self.future = self.work, None, None
        if work is None:
            return 0
        with _exchange():
            work.wait()
        return int(self.number.item())

    def broken(self) -> bool:
        """Whether the exchange under way has failed."""
        future = self.future
        if future is None or not future.done():
            return False
        try:
            future.wait()
        except RuntimeError:
            return True
        return False


async_max = AsyncMax()


# ----------------------------------------------------------------------------------------- devices
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


def select_device(gpu_ids: str) -> tuple[list[int], torch.device]:
    """The GPUs to use (none: another device) and the device on which this process computes.

    Of several processes on a machine each takes the GPU of its place in `gpu_ids`, or with the
    default of `0` that of its number. Without any GPU that default falls back to Apple's MPS or to
    the CPU and says so. Raises UserError for a GPU that the machine does not have.
    """
    ids = parse_gpu_ids(gpu_ids)
    if not ids:
        return [], torch.device("cpu")
    if not gpu_count() and ids == [0]:
        if torch.backends.mps.is_available() and world_size() == 1:
            print("no CUDA GPU found: using Apple's MPS (--gpu_ids -1 uses the CPU)")
            return [], torch.device("mps")
        print("no GPU found: using the CPU (--gpu_ids -1 asks for it and drops this line)")
        return [], torch.device("cpu")
    processes = _place.local_world_size
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
        ids = [ids[_place.local_rank]]
    torch.cuda.set_device(ids[0])
    return ids, torch.device("cuda", ids[0])
