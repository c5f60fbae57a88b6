"""Ctrl-C before a program has begun: importing PyTorch takes seconds, in which nothing is at stake.

Imports nothing that takes time.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


def end_quietly_on_interrupt() -> None:
    """Make Ctrl-C end this process at once with exit code 130; `one_line_errors` takes over."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Undo that: Ctrl-C raises KeyboardInterrupt, so that files can be put in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    # not an exception, which some packages take for a failed import of theirs
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
