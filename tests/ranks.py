"""Runs functions in several processes that know each other, as torchrun would start them."""

from __future__ import annotations

import contextlib
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests import forked


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_until_listens(port: int, seconds: float = 60) -> None:
    """Wait until somebody listens on a port of 127.0.0.1."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nobody listens on port {port}")


class Group:
    """Processes 0, 1, ... of one program; `log` has what they print, each line by line."""

    def __init__(
        self,
        log: Path,
        processes: int,
        function: Callable[..., None],
        *args: Any,
        machines: bool = False,
        before: Group | None = None,
    ):
        """`function(*args)` runs in each; an argument that is a function gets the rank.

        With `machines` each process is told that it is the only one on its machine. Those of a
        group that was `before` are restarted as torchrun does it, with the same store.
        """
        self.log = log
        # the agent of torchrun has it, so that it outlives each of the processes
        new = {"is_master": True, "wait_for_workers": False}
        self.store = before.store if before else dist.TCPStore("127.0.0.1", 0, **new)
        self.restarts: int = 0
        if before:
            self.restarts = before.restarts = before.restarts + 1
        log.parent.mkdir(parents=True, exist_ok=True)
        self.processes = []
        for rank in range(processes):
            own = [a(rank) if callable(a) else a for a in args]
            place = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": self.store.port}
            place["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            place["TORCHELASTIC_RESTART_COUNT"] = self.restarts
            local = (0, 1) if machines else (rank, processes)
            place |= {"LOCAL_RANK": local[0], "LOCAL_WORLD_SIZE": local[1]}
            place |= {"MASTER_ADDR": "127.0.0.1"}
            self.processes.append(forked.call(_rank, place, str(log), function, own))

    def wait(self, seconds: float = 100) -> int:
        """0, or the exit code of the first that fails; ends the others then, as torchrun does."""
        end = time.monotonic() + seconds
        code = 0
        while not code and time.monotonic() < end:
            codes = [p.exitcode for p in self.processes]
            code = next((c for c in codes if c), 0)
            if all(c is not None for c in codes):
                break
            time.sleep(0.02)
        for process in self.processes if code else []:
            process.terminate()
        self.codes(max(10.0, end - time.monotonic()))
        return code

    def codes(self, seconds: float = 100) -> list[int]:
        """The exit codes, in order of the ranks, of a group that nobody looks after.

        Fails where one does not end.
        """
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [rank for rank, p in enumerate(self.processes) if p.exitcode is None]
        for rank in hung:
            self.processes[rank].kill()
        assert not hung, f"ranks {hung} still run after {seconds} s: {self.text()[-3000:]}"
        return [p.exitcode for p in self.processes]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of them."""
        os.kill(self.processes[rank].pid, number)

    def text(self) -> str:
        """What was printed so far."""
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, times: int = 1, seconds: float = 60) -> None:
        """Wait until something was printed so often, or a process has ended."""
        end = time.monotonic() + seconds
        while self.text().count(text) < times and time.monotonic() < end:
            if any(p.exitcode is not None for p in self.processes):
                return
            time.sleep(0.01)


def _rank(
    place: dict[str, Any], log: str, function: Callable[..., None], args: Sequence[Any]
) -> None:
    forked.write_to(log)
    os.environ.update({k: str(v) for k, v in place.items()})
    import torch

    from util import distributed
    from util.errors import one_line_errors

    torch.set_num_threads(1)
    with distributed.process_group(), one_line_errors():
        function(*args)
    assert not gloo_threads(), "something holds on to the process group"


def train(argv: list[str], prepare: Callable[[], None] | None = None) -> None:
    """`train.py` with these arguments; `prepare` is called before."""
    import train

    sys.argv = ["train.py", *argv]
    if prepare is not None:
        prepare()
    train.main()


def translate(argv: list[str]) -> None:
    """`test.py` with these arguments."""
    sys.argv = ["test.py", *argv]
    runpy.run_path(str(forked.ROOT / "test.py"), run_name="program")["main"]()


def moment(rng: random.Random, longest: float) -> None:
    """Sleep for a random time, in seconds."""
    time.sleep(rng.random() * longest)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gloo_threads() -> list[str]:
    """The threads of gloo in this process, by name."""
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return [name for name in names if "gloo" in name]


class Torchrun:
    """torchrun as a user starts it; the processes that it starts are those of a machine."""

    def __init__(self, log: Path, *argv: object, **more: str):
        """`more` goes into the environment."""
        self.log = log
        self.file = open(log, "ab")  # noqa: SIM115
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, argv)],
            cwd=forked.ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=self.file,
        )

    def text(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace")

    def workers(self) -> list[int]:
        """The processes that it has started and that are there."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return [int(pid) for pid in children.read_text().split()]
        except OSError:
            return []

    def wait_for(self, text: str, times: int = 1, seconds: float = 90) -> None:
        """Wait until something was printed so often; fails where it is not."""
        end = time.monotonic() + seconds
        while self.text().count(text) < times:
            in_time = time.monotonic() < end and self.process.poll() is None
            assert in_time, self.text()[-3000:]
            time.sleep(0.02)

    def end(self, seconds: float = 100) -> int:
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs: {self.text()[-3000:]}") from None
        finally:
            self.close()

    def close(self) -> None:
        """Kill what is still there, the launcher and all that it has started."""
        for pid in [*self.workers(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                if self.process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.file.close()
