"""Stopping a run in good order: signals, a time limit, and one run an experiment."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from .util import UserError

# Slurm sends SIGUSR1 some time before a job's limit if asked to
SIGNALS = [s for s in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, s)]
LINGER = 60  # seconds for which a process that loads data outlives SIGTERM at most


class StopRequest:
    """Remembers that the run should stop; the loop asks after each iteration.

    The first signal is only noted. A second one ends the process at once.
    """

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self.exit_code = 0
        self.deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self.max_hours = max_hours

    def install(self) -> None:
        """Take over the signals; only possible on the main thread."""
        for name in SIGNALS:
            signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            os._exit(128 + number)
        self.exit_code = 128 + number
        self.reason = f"got {signal.Signals(number).name}"
        # os.write: print is not safe in a handler that interrupts a print
        message = f"\n{self.reason}: finishing this iteration and saving; once more ends at once\n"
        os.write(2, message.encode())

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = f"--max_hours {self.max_hours:g} have gone by"
        return self.reason is not None


def leave_signals_to_parent() -> None:
    """For processes that load data: when a whole job is signalled, the main process decides.

    It still needs them for the iteration at hand, and ends them when it has saved.
    """
    for name in SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        # a main process that dies without ending its workers must not wait for them for ever
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(LINGER))


class ExperimentLock:
    """Keeps a second training out of the same experiment; a dead process holds nothing."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.file = None

    def acquire(self) -> None:
        """Raises UserError where another process trains this experiment."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+")  # noqa: SIM115 - held open for as long as we train
        except OSError as e:
            raise UserError(f"can't write to {self.path.parent}: {e.strerror}") from e
        try:
            # not flock: the processes that load data would inherit that, and outlive us a little
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(
                f"{self.path.parent} is being trained by {owner}: stop that one, or choose "
                "another --name"
            ) from None
        except OSError:
            # some network file systems have no locks: train without
            print(f"warning: {self.path} can't be locked on this file system", file=sys.stderr)
            return
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self.file.flush()

    def release(self) -> None:
        """Let go, and remove the file."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            self.file = None
