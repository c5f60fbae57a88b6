"""Errors and warnings in one line for the user, and a quiet end on Ctrl-C.

Imports nothing but the standard library, so that a program can begin with it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TextIO


class UserError(ValueError):
    """A user's mistake, in one line: what is wrong, was given, is allowed, and what to do.

    An error from a DataLoader worker has the traceback in its text: only the last line is kept.
    """

    def __init__(self, message: str):
        last = message.strip().splitlines()[-1] if message.strip() else "unknown error"
        super().__init__(last.split("UserError: ", 1)[-1])


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints errors as one line on stderr, without the usage; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


class RaisingParser(OneLineParser):
    """A parser for options that Python code passes to a function: errors raise `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(" ".join(message.split()))

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise UserError("--help is for the command line")


def say(message: str, file: TextIO | None = None) -> None:
    """Print a line; if the terminal is gone, carry on without it."""
    try:
        print(message, file=file, flush=True)
    except BrokenPipeError:  # as after `| head`: this ends the program
        raise
    except OSError:
        pass


def warn(message: str) -> None:
    """Print a warning as one line on stderr."""
    say(f"warning: {message}", sys.stderr)


def first_line(e: BaseException) -> str:
    """The first line of an error's text, escaped if it is not printable."""
    text = str(e).strip()
    line = text.splitlines()[0] if text else type(e).__name__
    return line if line.isprintable() else ascii(line)[1:-1]


def in_one_line(e: BaseException, limit: int | None = None) -> str:
    """The first `limit` characters of an error's text, without line breaks."""
    return " ".join(str(e).split())[:limit] or type(e).__name__


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn errors that users can do something about into one line and exit code 1.

    Ctrl-C becomes one line and exit code 130. When nobody reads the output any more, as after
    `| head`, the program ends silently. All other errors are bugs, and keep their traceback.
    """
    ignore_warnings()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    try:
        if signal.getsignal(signal.SIGINT) is _end:  # until now; from here on cleanup has to run
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # discard what is left in the buffer, or Python would complain about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as if killed by SIGPIPE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as e:
        if is_out_of_memory(e):
            reason = (
                "out of memory: choose a smaller --batch_size, --crop_size or --ngf, or free "
                "memory that other programs use"
            )
        elif re.search(
            r"DataLoader worker .* (killed by signal|exited unexpectedly)|Pin memory thread exited",
            str(e),
        ):
            reason = (
                "a process that loads images was killed, most likely for a lack of memory: "
                "choose a smaller --num_threads"
            )
        elif re.search(r"torch\.compile .* double backward", str(e)):
            reason = (
                "the model takes gradients of gradients (a gradient penalty), which compiled "
                "networks do not have: leave out --compile or --fast"
            )
        elif "view size is not compatible" in str(e):
            at = traceback.extract_tb(e.__traceback__)[-1]
            reason = (
                f"{at.filename}:{at.lineno}: view() needs the usual memory layout, and "
                "--channels_last and --fast use another one: put reshape() in its place"
            )
        else:
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(1)


def unwind_on_sigterm() -> None:
    """Have SIGTERM unwind the stack, as Ctrl-C does, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def run_tool(main: Callable[[], None]) -> None:
    """Run a command line tool; an error becomes one line on stderr and exit code 1."""
    unwind_on_sigterm()
    with one_line_errors():
        try:
            main()
        except BrokenPipeError:  # `one_line_errors` ends silently
            raise
        except OSError as e:
            # a file name may hold a line break
            raise UserError(in_one_line(e)) from e


def ignore_warnings() -> None:
    """Ignore warnings that do not help users of the programs."""
    # oddities of an image (EXIF data, size); broken images raise errors
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # more workers (--num_threads) than cores can be right, if they wait for the disk
    warnings.filterwarnings("ignore", message="This DataLoader will create")


def is_out_of_memory(e: Exception) -> bool:
    """Whether an error of Python or torch says that there was too little memory."""
    # compared by name, since this file does not import torch; CPU and MPS have no such class
    words = "out of memory|allocate memory|not enough memory|size calculation overflow"
    named = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"
    return named or re.search(words, str(e)) is not None


def end_quietly_on_interrupt() -> None:
    """Make Ctrl-C end this process at once with exit code 130, until `one_line_errors` begins.

    Belongs in the first lines of a program, since importing PyTorch takes seconds. A spawned
    loading process runs them too: it ignores Ctrl-C, as it does later (`leave_signals_to_parent`).
    """
    if threading.current_thread() is threading.main_thread():
        spawned = "--multiprocessing-fork" in sys.orig_argv
        signal.signal(signal.SIGINT, signal.SIG_IGN if spawned else _end)


def _end(number: int, frame: FrameType | None) -> None:
    # not an exception, which some packages report as a failed import
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
