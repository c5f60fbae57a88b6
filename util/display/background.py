"""A sink that does its work on a thread of its own, so that the training loop never waits."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from typing import Any

import numpy as np

from .base import Sink

Pictures = tuple[dict[str, np.ndarray], dict[str, Any]]  # label to picture, and the step


class BackgroundSink(Sink):
    """Takes the newest state on the loop's thread; a subclass does the rest in `_run`.

    The loop's thread only appends to a deque and sets a flag: no lock is held while anything is
    converted, encoded or sent. The arrays of pictures are kept as they are, not copied, so the
    caller must not change them afterwards.
    """

    picture_backlog = 1  # sets of pictures that may wait; older ones are dropped
    close_seconds = 4.5  # how long `close` waits for what is still to be done

    def __init__(self) -> None:
        self._records: deque[dict[str, Any]] = deque()
        self._pictures: deque[Pictures] = deque(maxlen=self.picture_backlog)
        self._wake = threading.Event()  # something is new, or it is time to stop
        self._stop = threading.Event()
        self._off = False
        # A daemon, so that one stuck on a disk or a server can't keep the process alive.
        self._thread = threading.Thread(target=self._guarded, name=self.name, daemon=True)

    def log_losses(self, record: dict[str, Any]) -> None:
        """Keep one record for the thread; see `Sink.log_losses`."""
        if not self._off:
            self._records.append({**record, "losses": dict(record["losses"])})
            self._wake.set()

    def log_scores(self, record: dict[str, Any]) -> None:
        """Keep one set of scores for the thread, as a record without losses."""
        if not self._off:
            self._records.append({**record, "losses": {}, "scores": dict(record["scores"])})
            self._wake.set()

    def show_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        """Keep the newest pictures for the thread; see `Sink.show_pictures`."""
        if not self._off:
            self._pictures.append((dict(pictures), dict(step)))
            self._wake.set()

    def switch_off(self) -> None:
        """Let the thread end without waiting for it; see `Sink.switch_off`."""
        self._off = True
        self._records.clear()
        self._pictures.clear()
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """Let the thread finish, for a few seconds at most; closing twice is fine."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self.close_seconds)
        self._off = True

    def _run(self) -> None:
        """What the thread does until `_stop` is set and nothing is left."""
        raise NotImplementedError

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as e:  # a view that breaks must not take training with it
            self._turn_off(f"{type(e).__name__}: {e}")

    def _turn_off(self, reason: str) -> None:
        """Say in one line why this view of the run ends, and drop what waits for it."""
        self._off = True
        self._records.clear()
        self._pictures.clear()
        self._say(f"{reason}; {self.name} is off, training goes on")

    def _say(self, message: str) -> None:
        # One write, so that a line of the loop's thread can't get into the middle of it. A closed
        # terminal is no reason to stop.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(f"{self.name}: {' '.join(message.split())}\n")
            sys.stdout.flush()
