"""The contract of a logger: one small class for each place where losses and images go."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from typing import Any

import numpy as np


class Logger:
    """One view of a training run.

    The methods run on the training loop's thread, in the main process only, and must return at
    once: what waits for a network belongs in a `BackgroundLogger`. A logger that raises is switched
    off with one warning, and training goes on.
    """

    name = "logger"

    def log_losses(self, record: dict[str, Any]) -> None:
        """Take one line of the record of the run.

        `record` holds `epoch` (from 1), `iters` (images seen in it), `images` (seen in all),
        `progress` (epochs done, as a fraction: 0.5 is the middle of the first), `lr`, `time` and
        `data` (seconds per image of computing and of waiting for data) and `losses` (name: value).
        """

    def show_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        """Take the current images: label to array (H, W, 3) of uint8.

        `step` holds `epoch`, `iters`, `images` as above, and `save`: whether it is also time to
        save the images to files.
        """

    def log_scores(self, record: dict[str, Any]) -> None:
        """Take the scores of a validation (`--val_freq`).

        `record` holds `epoch`, `images` and `progress` as above, `phase` (`val`), `pictures` (how
        many), `scores` (name: value) and `best` (`by` which score, its `value`, of which `epoch`).
        """

    def end_epoch(self, epoch: int) -> None:
        """Called when an epoch is over."""

    def switch_off(self) -> None:
        """Called, in place of `close`, when one of these methods has raised: end all activity."""

    def close(self) -> None:
        """Finish and release everything within a few seconds."""


class BackgroundLogger(Logger):
    """A logger that does its work on a thread of its own.

    The loop's thread only appends to a queue and sets a flag: no lock is held while anything is
    converted, encoded or sent. The arrays of images are kept, not copied, so the caller must not
    change them afterwards. A subclass starts the thread (`self._thread.start()`) when it is ready.
    """

    picture_backlog = 1  # sets of images that may wait; older ones are dropped
    close_seconds = 4.5  # how long `close` waits for what is still to be done

    def __init__(self) -> None:
        self._records: deque[dict[str, Any]] = deque()
        self._pictures: deque[tuple[dict[str, np.ndarray], dict[str, Any]]] = deque(
            maxlen=self.picture_backlog
        )
        self._wake = threading.Event()  # something is new, or it is time to stop
        self._stop = threading.Event()
        self._off = False
        # A daemon, so that one stuck on a disk or a server can't keep the process alive.
        self._thread = threading.Thread(target=self._guarded, name=self.name, daemon=True)

    def log_losses(self, record: dict[str, Any]) -> None:
        """Keep one record for the thread; see `Logger.log_losses`."""
        if not self._off:
            self._records.append({**record, "losses": dict(record["losses"])})
            self._wake.set()

    def log_scores(self, record: dict[str, Any]) -> None:
        """Keep one set of scores for the thread, as a record without losses."""
        if not self._off:
            self._records.append({**record, "losses": {}, "scores": dict(record["scores"])})
            self._wake.set()

    def show_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        """Keep the newest images for the thread; see `Logger.show_pictures`."""
        if not self._off:
            self._pictures.append((dict(pictures), dict(step)))
            self._wake.set()

    def switch_off(self) -> None:
        """Let the thread end without waiting for it; see `Logger.switch_off`."""
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
        while True:
            last = self._stop.is_set()
            while self._records:
                self._write_record(self._records.popleft())
            while self._pictures:
                self._write_pictures(*self._pictures.popleft())
            if last:
                self._finish()
                return
            self._wake.wait()
            self._wake.clear()

    def _write_record(self, record: dict[str, Any]) -> None:
        """Write a record; it has the key `scores` if it comes from a validation."""

    def _write_pictures(self, pictures: dict[str, np.ndarray], step: dict[str, Any]) -> None:
        """Write a set of images."""

    def _finish(self) -> None:
        """Called when everything is written."""

    def _guarded(self) -> None:
        try:
            self._run()
        except Exception as e:  # a view that fails must not end training
            self._turn_off(f"{type(e).__name__}: {e}")

    def _turn_off(self, reason: str) -> None:
        """Say in one line why this view of the run ends, and drop what is queued."""
        self.switch_off()
        self._say(f"{reason}; {self.name} is off, training continues")

    def _say(self, message: str) -> None:
        # One write, so that a line of the loop's thread can't get into the middle of it. A closed
        # terminal is no reason to stop.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(f"{self.name}: {' '.join(message.split())}\n")
            sys.stdout.flush()


def scalars_of(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a record, under names that dashboards group: `loss/G`, `val/PSNR`, `lr`."""
    scalars = {f"loss/{name}": value for name, value in record["losses"].items()}
    scalars |= {f"val/{name}": value for name, value in record.get("scores", {}).items()}
    for tag, key in (("lr", "lr"), ("time/compute", "time"), ("time/data", "data")):
        scalars[tag] = record.get(key)
    return {tag: value for tag, value in scalars.items() if value is not None}
