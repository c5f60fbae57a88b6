"""Stopping a run after a signal or a time limit; a lock that allows one run per experiment."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from util import distributed
from util.errors import UserError, warn

# SIGHUP: the terminal was closed; Slurm can send SIGUSR1 some time before a job's time limit
SIGNALS = [s for s in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, s)]
TIME_IS_UP = 1  # what ranks exchange after --max_hours; after a signal, they exchange exit codes
SAME_SIGNAL = 5.0  # seconds within which torchrun may send a signal again
LINGER = 60  # seconds after SIGTERM until a DataLoader worker ends


class StopRequest:
    """Whether the run should stop: after a signal, or when `--max_hours` are over.

    The loop asks after each iteration. A second signal ends the process at once; but under
    torchrun, which may send the same signal twice, not in the first few seconds after the first.
    """

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self.exit_code = 0
        self.deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self.max_hours = max_hours
        self.before: dict[int, Any] = {}
        self.since: float | None = None  # time of the first signal in this process

    def install(self) -> None:
        """Handle the signals; does nothing outside the main thread, where Python can't."""
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = getattr(signal, name)
                if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    self.before[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Restore the signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = SAME_SIGNAL if distributed.launched() else 0.0
        # not `self.reason`: --max_hours, or another rank's signal, may have set that
        if self.since is not None:
            if time.monotonic() - self.since >= again:
                with contextlib.suppress(OSError):
                    os.write(2, b"\nquit without saving: the checkpoint before counts\n")
                os._exit(128 + number)
            return
        self.since = time.monotonic()
        self.exit_code = 128 + number
        self.reason = f"got {signal.Signals(number).name}"
        # os.write: print is not safe in a handler that interrupts a print
        # torchrun sends SIGTERM too if another process has failed, and then none can save
        able = ", if all processes can" if distributed.world_size() > 1 else ""
        then = f"finishing this iteration and saving{able}; once more quits at once"
        message = f"\n{self.reason}: {then}\n"
        if distributed.is_main():
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, message.encode())

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = f"--max_hours {self.max_hours:g} reached"
        return self.reason is not None

    def is_urgent(self, progressed: bool) -> bool:
        """Whether to stop in the middle of something long: always after a signal.

        After `--max_hours`, only if this run has `progressed` in its epoch: otherwise each resumed
        run could stop at the same place again.
        """
        return bool(self) and (self.exit_code != 0 or progressed)

    def on_any_rank(self) -> bool:
        """Whether any rank should stop: the same answer on all ranks, which all have to call it."""
        own = (self.exit_code or TIME_IS_UP) if self else 0
        code = int(distributed.max_over_ranks(own))
        if not code:
            return False
        self.exit_code = 0 if code == TIME_IS_UP else code
        if code == TIME_IS_UP:
            self.reason = f"--max_hours {self.max_hours:g} reached"
        else:
            self.reason = f"got {signal.Signals(code - 128).name}"
        return True


def leave_signals_to_parent() -> None:
    """Ignore the signals in a DataLoader worker: the main process needs it until it has saved."""
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        # if the main process has died without ending its workers, they end by themselves
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LINGER))


class ExperimentLock:
    """Refuses a second training of the same experiment; the end of the process releases it."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; raises UserError if another process trains this experiment."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # somebody else's folder may have a link here to a file that matters
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as e:
            folder = self.path.parent
            other = "--name" if folder.is_file() else "--checkpoints_dir"
            raise UserError(f"can't write to {folder}: {e.strerror}; choose another {other}") from e
        try:
            # not flock: DataLoader workers would inherit that lock, and can outlive this process
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{self.path.parent} is being trained by {owner or 'another process'}: stop "
                "that one, or choose another --name"
            ) from None
        except OSError:
            # some network file systems have no locks: train without
            os.close(descriptor)
            warn(f"{self.path} can't be locked on this file system")
            return
        self.descriptor = descriptor
        with contextlib.suppress(OSError):  # only for the message above; the disk may be full
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())

    def release(self) -> None:
        """Release the lock. Its file stays, which blocks nobody, unless it is alone."""
        if self.descriptor is None:
            return
        with contextlib.suppress(OSError):
            if os.listdir(self.path.parent) == [self.path.name]:  # the start failed
                self.path.unlink()
                self.path.parent.rmdir()
        os.close(self.descriptor)
        self.descriptor = None
