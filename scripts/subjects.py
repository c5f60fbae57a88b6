"""Settings in processes of their own, which the benchmark has take turns."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shlex
import traceback
from collections.abc import Mapping
from typing import Any

from util.errors import UserError


def serve(kind: type, words: list[str], plain: bool, real: bool, pipe: Any) -> None:
    """Do in a process what comes through a pipe: (method, arguments); answer (ok, result)."""
    # this process was spawned, and so would be what it starts: loading processes, in seconds
    multiprocessing.set_start_method(None, force=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        subject = None
        try:
            while True:
                name, *args = pipe.recv()
                if name == "start":
                    subject = kind(words, plain, real)
                    # what --fast chose, and what is off; not the list of options
                    lines = output.getvalue().splitlines()
                    pipe.send((True, [s for s in lines if s.startswith(("--fast", "--compile"))]))
                    continue
                pipe.send((True, getattr(subject, name)(*args)))
                if name == "close":
                    return
        except EOFError:
            return  # nobody asks any more
        except BaseException as e:
            said = [line for line in output.getvalue().splitlines() if "error: " in line]
            if isinstance(e, SystemExit) and said:
                reason = said[-1].split("error: ", 1)[1]
            else:
                reason = str(e) if isinstance(e, UserError) else traceback.format_exc()
            pipe.send((False, reason))


class Subject:
    """A setting in a process of its own. One that fails says why in `failed`, and is left out."""

    def __init__(
        self, kind: type, name: str, words: list[str], real: bool, environment: Mapping[str, str]
    ):
        self.name, self.failed = name, ""
        os.environ.update(environment)
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        args = (kind, words, name == "plain", real, other)
        self.process = context.Process(target=serve, args=args)
        self.process.start()
        other.close()
        self.rates: list[float] = []
        self.result: dict[str, Any] = {"setting": name, "options": shlex.join(words)}
        self.said: list[str] = self.call("start") or []

    def call(self, *message: Any) -> Any:
        """Have it do something; None where it fails, now or before."""
        if self.failed:
            return None
        try:
            self.pipe.send(message)
            ok, result = self.pipe.recv()
        except (EOFError, OSError):
            ok, result = False, "the process ended (out of memory?)"
        if not ok:
            self.failed = str(result).strip()
            self.pipe.close()
            return None
        return result

    def close(self) -> None:
        """End the process."""
        self.call("close")
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
