"""How a program speaks to its user: one line for a mistake, one for a warning, quiet on Ctrl-C.

Imports nothing but the standard library, so that a program can begin with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what is wrong, given, allowed, to do.

    A DataLoader worker re-raises it in the main process with its own traceback put in front; only
    the last line is kept, so that the user still reads one sentence.
    """

    def __init__(self, message: str):
        last = message.strip().splitlines()[-1] if message.strip() else "unknown error"
        super().__init__(last.split("UserError: ", 1)[-1])


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr, without the usage in front; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


class RaisingParser(OneLineParser):
    """A parser for options that a program gives to a function: errors are raised as `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(" ".join(message.split()))


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def first_line(e: BaseException) -> str:
    """What an error says, on one line that can be printed."""
    text = str(e).strip()
    line = text.splitlines()[0] if text else type(e).__name__
    return line if line.isprintable() else ascii(line)[1:-1]


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 1, and so a lack of memory.

    Ctrl-C is one line and exit code 130. Where nobody reads the output any more, as after `| head`,
    the program ends without a word. The rest are bugs and show.
    """
    leave_out_warnings()
    try:
        _raise_on_interrupt()
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # what is left in the buffer goes nowhere, or Python would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a program that SIGPIPE ends
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as e:
        if not _is_lack_of_memory(e):
            raise
        print(
            "error: out of memory: choose a smaller --batch_size, --crop_size or --ngf, or leave "
            "memory to this process",
            file=sys.stderr,
        )
        sys.exit(1)


def leave_out_warnings() -> None:
    """In a program: no warnings about what is only odd, or meant so by the user."""
    # what is only odd about a picture (its EXIF data, its size); what is broken is an error
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # more processes than cores can be right, where they wait for a disk: --num_threads
    warnings.filterwarnings("ignore", message="This DataLoader will create")


def _is_lack_of_memory(e: Exception) -> bool:
    # by its name, since this file does not import torch; on the CPU torch has no class for it
    words = "allocate memory|not enough memory|size calculation overflow"
    named = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"
    return named or re.search(words, str(e)) is not None


def end_quietly_on_interrupt() -> None:
    """Make Ctrl-C end this process at once with exit code 130; `one_line_errors` takes over.

    For a program's first line: importing PyTorch takes seconds, in which nothing is at stake.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def _raise_on_interrupt() -> None:
    """Undo that: Ctrl-C raises KeyboardInterrupt, so that files can be put in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    # not an exception, which some packages take for a failed import of theirs
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
