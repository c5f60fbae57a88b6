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
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn, TextIO


class UserError(ValueError):
    """A mistake of the user, in one line: what is wrong, was given, is allowed, and what to do.

    DataLoader workers re-raise with the traceback as text: only its last line is kept.
    """

    def __init__(self, message: str):
        last = message.strip().splitlines()[-1] if message.strip() else "unknown error"
        super().__init__(last.split("UserError: ", 1)[-1])


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints errors as one line on stderr, without the usage; exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


class RaisingParser(OneLineParser):
    """A parser for options that a program gives to a function: errors are raised as `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(" ".join(message.split()))

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise UserError("--help is for the command line")


def say(message: str, file: TextIO | None = None) -> None:
    """Print a line; where the terminal is gone, work goes on without it."""
    try:
        print(message, file=file, flush=True)
    except BrokenPipeError:  # `| head` ends a program
        raise
    except OSError:
        pass


def warn(message: str) -> None:
    """One line on stderr."""
    say(f"warning: {message}", sys.stderr)


def first_line(e: BaseException) -> str:
    """The first line of an error's text, printable."""
    text = str(e).strip()
    line = text.splitlines()[0] if text else type(e).__name__
    return line if line.isprintable() else ascii(line)[1:-1]


def in_one_line(e: BaseException, limit: int | None = None) -> str:
    """The first `limit` characters of an error's text, without line breaks."""
    return " ".join(str(e).split())[:limit] or type(e).__name__


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn mistakes and limits that users can do something about into one line and exit code 1.

    Ctrl-C is one line and exit code 130. Where nobody reads the output any more, as after `| head`,
    the program ends without a word. The rest are bugs and show.
    """
    ignore_warnings()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
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
        if is_out_of_memory(e):
            reason = (
                "out of memory: choose a smaller --batch_size, --crop_size or --ngf, or leave "
                "memory to this process"
            )
        elif re.search(r"DataLoader worker .* (killed by signal|exited unexpectedly)", str(e)):
            reason = (
                "a process that loads pictures was killed, most likely for a lack of memory: "
                "choose a smaller --num_threads"
            )
        elif re.search(r"torch\.compile .* double backward", str(e)):
            reason = (
                "the model takes gradients of gradients (a gradient penalty), which compiled "
                "networks do not have: leave out --compile or --fast"
            )
        else:
            raise
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(1)


def run_tool(main: Callable[[], None]) -> None:
    """Run a command line tool: what goes wrong is one line on stderr and exit code 1.

    A terminated tool unwinds as an interrupted one does, so that its temporary folder goes too.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with one_line_errors():
        try:
            main()
        except OSError as e:
            # a file name may hold a line break
            raise UserError(in_one_line(e)) from e


def ignore_warnings() -> None:
    """Ignore warnings that do not help users of the programs."""
    # oddities of a picture (EXIF data, size); broken pictures raise errors
    warnings.filterwarnings("ignore", module=r"PIL\.")
    # more workers than cores can be right, if they wait for a disk: --num_threads
    warnings.filterwarnings("ignore", message="This DataLoader will create")


def is_out_of_memory(e: Exception) -> bool:
    """Whether an error of Python or torch says that there was too little memory."""
    # by its name, since this file does not import torch; on the CPU torch has no class for it
    words = "allocate memory|not enough memory|size calculation overflow"
    named = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"
    return named or re.search(words, str(e)) is not None


def end_quietly_on_interrupt() -> None:
    """Make Ctrl-C end this process at once with exit code 130, until `one_line_errors` begins.

    For the first line of a program: importing PyTorch takes seconds.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def _raise_on_interrupt() -> None:
    """Undo `end_quietly_on_interrupt`: Ctrl-C raises KeyboardInterrupt, for cleaning up."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    # not an exception, which some packages report as a failed import
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
