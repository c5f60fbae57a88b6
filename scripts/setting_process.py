"""Runs each setting of the benchmark in a process of its own; they take turns."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shlex
import traceback
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from util.errors import UserError

measured: Any = None  # set in the process of each setting


def start(kind: type, words: list[str], plain: bool, real: bool) -> list[str]:
    """Set up what is measured in this process; returns the lines about --fast and --compile."""
    global measured
    # undo this process's start method, spawn, with which loading workers take seconds to start
    multiprocessing.set_start_method(None, force=True)
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            measured = kind(words, plain, real)
    except SystemExit as e:
        said = output.getvalue().rpartition("error: ")[2]
        raise UserError(said.partition("\n")[0] or f"exit code {e.code}") from e
    return [s for s in output.getvalue().splitlines() if s.startswith(("--fast", "--compile"))]


def call_measured(name: str, *args: Any) -> Any:
    """Call a method of what is measured in this process, and discard what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        return getattr(measured, name)(*args)


class SettingProcess:
    """A setting in a process of its own; once it fails, `failed` says why, and calls do nothing."""

    def __init__(self, name: str, words: list[str], environment: Mapping[str, str]):
        self.name, self.words, self.failed = name, words, ""
        os.environ.update(environment)
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.pool.submit(int)  # begins the imports, in all processes at the same time
        self.rates: list[float] = []
        self.result: dict[str, Any] = {"setting": name, "options": shlex.join(words)}

    def start(self, kind: type, real: bool) -> list[str]:
        """Set up what is measured; returns the lines about --fast and --compile."""
        return self._run(start, kind, self.words, self.name == "plain", real) or []

    def call(self, name: str, *args: Any) -> Any:
        """Call a method of what is measured; None if this or an earlier call failed."""
        return None if self.failed else self._run(call_measured, name, *args)

    def _run(self, function: Any, *args: Any) -> Any:
        try:
            return self.pool.submit(function, *args).result()
        except BrokenProcessPool:
            self.failed = "the process ended (out of memory?)"
        except UserError as e:
            self.failed = str(e)
        except Exception as e:
            self.failed = "".join(traceback.format_exception(e)).strip()
        return None

    def close(self) -> None:
        """End the process."""
        self.call("close")
        self.pool.shutdown()
