"""The faults of scripts/soak.py: each starts a training, disturbs it, and judges how it ended."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from util.run.checkpoint import UNFINISHED, load_file

if TYPE_CHECKING:
    from soak import Case, Running

DAMAGED = "file of a save that is damaged, missing or swapped"
RESHARD = "another number of processes"  # in some cases only


class Difference(Exception):
    """A fault had a consequence that it must not have."""


# ----------------------------------------------------------------------------- faults: processes
def moment(case: Case, run: Running) -> bool:
    """Wait for a random moment: of the start, of an iteration, or of a save."""
    kind = case.rng.choice(["start", "iteration", "save", "save"])
    if case.ranks > 1:  # torchrun is there, and signals are no longer for Python's imports
        run.wait(lambda: "End ---" in run.text())
    if kind == "start":
        time.sleep(case.rng.random())
    elif kind == "iteration":
        lines = case.rng.randint(1, 8)
        run.wait(lambda: run.text().count("(epoch") >= lines)
    else:
        folder = case.experiment
        saves, skip = ("*.tmp.pth", UNFINISHED), case.rng.randint(0, 3)
        run.wait(lambda: run.text().count("saving the") > skip)
        run.wait(lambda: any(next(folder.glob(f"{s}"), None) for s in saves))
    time.sleep(case.rng.choice([0, 0.01, 0.05]) * case.rng.random())
    return run.alive()


def sent(number: int, whom: str) -> Callable[[Case], bool]:
    """A fault that sends a signal to one of the processes, or to all."""

    def fault(case: Case) -> bool:
        run = case.start()
        if moment(case, run):
            children = run.children()
            begin = time.monotonic()
            if whom == "all":
                run.end()
            elif whom == "child" and children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(case.rng.choice(children), number)
            elif whom == "child":
                run.end()
            elif whom == "main":
                os.kill(run.process.pid, number)
            run.wait()
            if run.ranks > 1:
                wait_for(children, begin)
                case.table.others = max(case.table.others, time.monotonic() - begin)
        run.wait()
        return case.judge(run)

    return fault


def wait_for(ranks: list[int], begin: float) -> None:
    """Wait for ranks to end, whose launcher has; Difference where they take a minute."""
    for pid in ranks:
        status = Path(f"/proc/{pid}/status")
        with contextlib.suppress(OSError):  # there is none when it has ended
            while "State:\tZ" not in status.read_text():
                if time.monotonic() - begin > 60:
                    raise Difference("a rank goes on without its launcher")
                time.sleep(0.01)


def second_training(case: Case) -> bool:
    run = case.start()
    if run.wait(lambda: "(epoch" in run.text()):
        other = case.start()
        other.wait()
        case.judge(other)
        if run.alive() and other.code() == 0:
            raise Difference("two trainings of one name")
        run.end()
    run.wait()
    return case.judge(run)


def hostile_dashboard(case: Case) -> bool:
    """A server that does not answer, or with nonsense, or without an end."""
    answer = case.rng.choice([b"", b"HTTP/1.1 200 OK\r\n\r\nwhat?", b"x" * 65536])

    def serve(listener: socket.socket) -> None:
        kept = []
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                with contextlib.suppress(OSError):
                    connection.settimeout(1)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        port = str(listener.getsockname()[1])
        run = case.start("--display_id", "1", "--display_port", port, "--display_freq", "1")
        if moment(case, run):
            run.end()
        run.wait()
        return case.judge(run)


# ---------------------------------------------------------------------------------- faults: disks
def full_disk(case: Case) -> bool:
    run = case.start()
    if not moment(case, run):
        return case.judge(run)
    case.record_counts = False
    filler = case.disk / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    lines = run.text().count("(epoch")
    run.wait(lambda: run.text().count("(epoch") > lines + 2)
    if case.rng.random() < 0.5:
        run.end()
    run.wait()
    filler.unlink(missing_ok=True)
    return case.judge(run)


def read_only_disk(case: Case) -> bool:
    run = case.start()
    if not moment(case, run):
        return case.judge(run)
    case.record_counts = False
    remount = ["mount", "-o", "remount,ro", str(case.disk)]
    # refused while a file is open for writing: then this is a training like any other
    subprocess.run(remount, capture_output=True)
    lines = run.text().count("(epoch")
    run.wait(lambda: run.text().count("(epoch") > lines + 2)
    run.end()
    run.wait()
    remount[2] = "remount,rw"
    subprocess.run(remount, capture_output=True, check=True)
    return case.judge(run)


# ---------------------------------------------------------------------------------- faults: files
def damage(path: Path, rng: random.Random) -> str:
    """Flip bits, cut, delete, zero, or swap with the same file of another save."""
    kind = rng.choice(["flip", "cut", "missing", "zeros", "swap"])
    data = path.read_bytes()
    others = [p for p in path.parent.glob("*_*" + path.name.partition("_")[2]) if p != path]
    if kind == "swap" and others and "_" in path.name:
        shutil.copy(rng.choice(others), path)
    elif kind == "flip" and data:
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif kind == "zeros":
        start = rng.randrange(len(data) + 1)
        path.write_bytes(data[:start] + bytes(len(data) - start))
    elif kind == "missing":
        path.unlink()
    else:
        os.truncate(path, rng.choice([0, rng.randrange(len(data) + 1)]))
    return kind


def damaged_files(case: Case) -> bool:
    """Damage files between two runs: the newest whole checkpoint is taken, or one line says why."""
    backup = case.folder / "backup"
    shutil.rmtree(backup, ignore_errors=True)
    if not case.experiment.exists():
        return False
    shutil.copytree(case.experiment, backup)
    found = {p: images(p) for p in backup.glob("*_train_state.pth")}
    before = {p.read_bytes(): n for p, n in found.items() if n is not None}
    files = [p for p in case.experiment.iterdir() if p.suffix in (".pth", ".jsonl", ".txt")]
    states = [p for p in files if p.name.endswith("_train_state.pth")]
    files = [p for p in files if not p.name.startswith(".")] + states
    flipped, case.damaged = False, True
    for path in {case.rng.choice(files) for _ in range(case.rng.randint(1, 4))}:
        kind = damage(path, case.rng)
        flipped |= kind == "flip" and path in states
        case.table.files += 1
        if path.suffix == ".jsonl":
            case.record_counts = False
        print(f"    {path.name}: {kind}", flush=True)
    now = [p.read_bytes() for p in case.experiment.glob("*_train_state.pth")]
    whole = [before[content] for content in now if content in before]
    run = case.start("--max_hours", "1e-9")
    case.resumed_after(run)
    run.wait()
    done = case.judge(run)
    taken = re.search(r"^resuming from '.*?': .* (\d+) in all", run.text(), re.M)
    # a flipped bit may be one that carries nothing
    fine = {max(whole, default=None), *(before.values() if flipped else [])}
    if whole and (taken is None or int(taken[1]) not in fine):
        if run.code() == 1 and "train_opt.txt" in run.text():
            pass  # its options are unreadable: one line
        else:
            raise Difference(f"the newest whole save has {max(whole)} images; {run.text()[-500:]}")
    if taken is None:
        shutil.rmtree(case.experiment)
        shutil.copytree(backup, case.experiment)
        return False
    return done


def images(path: Path) -> int | None:
    """The position of a checkpoint; None where an earlier fault has damaged it."""
    with contextlib.suppress(Exception):
        return load_file(path)["total_iters"]
    return None


def damaged_picture(case: Case) -> bool:
    path = case.rng.choice(sorted(case.pictures.rglob("*.png")))
    content = path.read_bytes()
    damage_kind = case.rng.choice(["cut", "garbage"])
    path.write_bytes(content[:50] if damage_kind == "cut" else b"no picture")
    run = case.start()
    run.wait()
    path.write_bytes(content)
    return case.judge(run)


def other_order(case: Case) -> bool:
    """The same pictures, in another order on the disk; dates of saves that are wrong."""
    case.make_pictures()
    for path in case.experiment.glob("*.pth"):
        date = case.rng.randrange(2 * 10**9)
        os.utime(path, (date, date))
    return False


def other_number(case: Case) -> bool:
    """Go on with another number of processes: not the same to the bit, but nothing is lost."""
    case.ranks = case.rng.choice([n for n in (1, 2, 3) if n != case.ranks])
    case.resharded = True
    run = case.start()
    if moment(case, run):
        run.end()
    run.wait()
    return case.judge(run)


# how often each is drawn is the second number
FAULTS: dict[str, tuple[Callable[[Case], bool], int]] = {
    "SIGKILL": (sent(signal.SIGKILL, "main"), 4),
    "power cut: SIGKILL to all processes": (sent(signal.SIGKILL, "all"), 4),
    "SIGKILL to a rank or a loading process": (sent(signal.SIGKILL, "child"), 2),
    "SIGTERM": (sent(signal.SIGTERM, "main"), 2),
    "SIGINT": (sent(signal.SIGINT, "main"), 2),
    "second training of one name": (second_training, 1),
    "dashboard that hangs, lies or floods": (hostile_dashboard, 1),
    "full disk": (full_disk, 3),
    "read-only disk": (read_only_disk, 1),
    DAMAGED: (damaged_files, 6),
    "damaged picture": (damaged_picture, 1),
    "other order of pictures, other dates": (other_order, 1),
    RESHARD: (other_number, 4),
}
NEED_DISK = ("full disk", "read-only disk")  # one of their own
