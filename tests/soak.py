#!/usr/bin/env python3
"""Try to lose a training: random faults at random moments, and no difference at the end.

    python tests/soak.py --hours 3 [--seed N]
    python tests/soak.py --repeat SEED

Each case is a small training with random options. One run of it is left alone. Another one is
killed, filled up and damaged, goes on with --continue_train after each fault, and must
end with the same weights, optimizers, schedules and random state to the bit, and the same losses;
after a change of the number of processes, with the same number of epochs and images.
The first difference, hang or traceback ends the program with the seed that repeats the case; its
folder is kept. A full disk needs root, for a file system of its own; it is left out otherwise.
Linux only. Faults that need no random moment are in tests/test_checkpoint_faults.py.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image

from util.errors import OneLineParser, one_line_errors
from util.run.checkpoint import UNFINISHED
from util.run.weight_files import load_file

PICTURES = 6
PATIENCE = 60.0  # seconds without a sign of life that are a hang
DAMAGED = "file of a save that is damaged, missing or swapped"
FULL = "full disk"  # needs one of its own
RESHARD = "another number of processes"  # in some cases only
processes = multiprocessing.get_context("forkserver")
counts: Counter[str] = Counter()  # what was done, and how many seconds the longest took


class Difference(Exception):
    """A fault had a consequence that it must not have."""


def longest(what: str, begin: float) -> None:
    """Count the seconds since `begin`, if they are the most so far."""
    name = f"longest {what}, in seconds"
    counts[name] = max(counts[name], round(time.monotonic() - begin))


# -------------------------------------------------------------------------------------- set-ups
VALIDATE = "--val_freq 1 --val_phase train --best_by".split()
MODELS = {  # what fits the model, besides the options that fit all of them
    "cycle_gan": [["--pool_size", "3"], ["--lambda_identity", "0"], [*VALIDATE, "cycle"]],
    "pix2pix": [[*VALIDATE, "L1"], ["--gan_mode", "wgangp"], ["--netG", "unet_128"]],
    "colorization": [[], ["--netD", "pixel"]],
    "cut": [[], ["--gan_mode", "vanilla"]],
    "dcl": [[]],
    "template": [["--dataset_mode", "aligned"]],
}
ANY = [
    ["--batch_size", "2"],
    ["--accumulate", "2"],
    ["--norm", "batch"],
    ["--precision", "bf16"],
    ["--num_threads", "2"],
    ["--cache_images", "off"],
    ["--lr_policy", "plateau"],
    ["--lr_policy", "cosine"],
    ["--dropout"],
    ["--on_nan", "skip"],
    ["--save_by_iter"],
    ["--ema", "0.9"],
]
ADVERSARIAL = [  # for models with a discriminator
    ["--diffaug", "color,translation,cutout"],
    ["--spectral_norm", "--normD", "none"],
    ["--gp", "r1", "--gp_every", "3"],
    "--netD multiscale --n_layers_D 2 --lambda_feat 10".split(),
]


def random_setup(rng: random.Random) -> tuple[list[str], int]:
    """Options of a small training, and its number of processes."""
    model = rng.choice([m for m in MODELS if (ROOT / "models" / f"{m}_model.py").exists()])
    words = (
        f"--model {model} --gpu_ids -1 --netG resnet_6blocks --ngf 4 --ndf 4 --load_size 40 "
        f"--crop_size 32 --num_threads 0 --seed {rng.randrange(1000)} --n_epochs 5 "
        f"--n_epochs_decay {rng.randint(0, 1)} --print_freq 1 --no_html --display_id 0 "
        f"--save_latest_freq {rng.randint(1, 4)} --save_epoch_freq {rng.randint(1, 2)} "
        f"--keep_states {rng.randint(0, 2)}"
    ).split()
    words += rng.choice(MODELS[model])
    fitting = ANY if model == "template" else ANY + ADVERSARIAL
    for more in rng.sample(fitting, rng.randint(0, 4)):
        of_two_names = model in ("cut", "dcl") and "--norm" in more
        words += ["--normG", "batch"] if of_two_names else more
    if "unet_128" in words:
        words += ["--load_size", "128", "--crop_size", "128"]
    return words, rng.choice([1, 1, 1, 1, 1, 1, 2, 3])


# ------------------------------------------------------------------------------------- processes
def train(argv: list[str], log: str, slow: float) -> None:
    """Entry of a forked training, on a disk that takes `slow` seconds to flush."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["train.py", *argv]
    multiprocessing.set_start_method("fork", force=True)
    import train as program

    torch.set_num_threads(1)
    fsync = os.fsync
    os.fsync = lambda file: (time.sleep(slow), fsync(file))[1]
    with one_line_errors(), contextlib.suppress(KeyboardInterrupt):
        program.main()


class Running:
    """A training that goes on, of one process or of several under torchrun."""

    def __init__(self, argv: list[str], log: Path, ranks: int, slow: float = 0):
        self.log, self.ranks, self.begin = log, ranks, time.monotonic()
        log.unlink(missing_ok=True)
        if ranks == 1:
            self.process: Any = processes.Process(target=train, args=(argv, str(log), slow))
            self.process.start()
        else:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command = [*torchrun, f"--nproc_per_node={ranks}", str(ROOT / "train.py"), *argv]
            with open(log, "ab") as out:
                self.process = subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def alive(self) -> bool:
        return self.process.is_alive() if self.ranks == 1 else self.process.poll() is None

    def children(self) -> list[int]:
        with contextlib.suppress(OSError):
            tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
            return [int(pid) for task in tasks for pid in task.read_text().split()]
        return []

    def wait(self, ready: Callable[[], bool] = lambda: False) -> bool:
        """Until it is ready (True) or has ended (False); Difference where nothing moves."""
        size, since = -1, time.monotonic()
        while self.alive():
            if ready():
                return True
            if (now := len(self.text())) != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE * self.ranks:
                self.end()
                raise Difference(f"no sign of life for {PATIENCE * self.ranks:.0f} s")
            time.sleep(0.003)
        return False

    def code(self) -> int:
        if self.ranks == 1:
            self.process.join()
            return self.process.exitcode
        return self.process.wait()

    def end(self) -> None:
        """Kill all of it, as a power cut does."""
        groups = [self.process.pid, *(self.children() if self.ranks > 1 else [])]
        for pid in groups:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


# ------------------------------------------------------------------------------------------ cases
class Case:
    """One training, undisturbed and disturbed."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.folder = Path(tempfile.mkdtemp(prefix=f"soak-{seed}-"))
        self.words, self.ranks = random_setup(self.rng)
        self.damaged = False  # whether checkpoint files were, so that some are skipped
        self.record_counts = True  # until losses could not be written, or were damaged
        self.may_reshard = self.rng.random() < 0.15
        self.resharded = False  # then random numbers are others than in the undisturbed run
        self.runs = 0
        self.faults = self.rng.randint(6, 12) if self.ranks == 1 else 3
        self.pictures = self.folder / "pictures"
        self.disk = self.folder / "disk"
        self.disk.mkdir()
        self.make_pictures()

    def make_pictures(self) -> None:
        """Write images with and without pairs, the same ones each time, in a random order."""
        shutil.rmtree(self.pictures, ignore_errors=True)
        names = [("trainA", 48), ("trainB", 48), ("train", 96)]
        files = [(name, width, i) for name, width in names for i in range(PICTURES)]
        self.rng.shuffle(files)
        for name, width, i in files:
            (self.pictures / name).mkdir(parents=True, exist_ok=True)
            drawn = np.random.default_rng([i, *name.encode()])
            values = drawn.integers(0, 256, (48, width, 3), dtype=np.uint8)
            Image.fromarray(values).save(self.pictures / name / f"{i}.png")

    def argv(self, folder: Path, *more: str) -> list[str]:
        where = ["--dataroot", str(self.pictures), "--checkpoints_dir", str(folder), "--name", "x"]
        return [*where, *self.words, *more]

    def start(self, *more: str) -> Running:
        self.runs += 1
        argv = self.argv(self.disk, "--continue_train", *more)
        slow = self.rng.choice([0, 0, 0.2])
        return Running(argv, self.folder / f"log{self.runs}", self.ranks, slow)

    def judge(self, run: Running) -> bool:
        """Whether the training came to its end; Difference where its end is not a clean one."""
        code, text = run.code(), run.text()
        going = re.search(r"^(resuming from|--continue_train: nothing)", text, re.M)
        if "Traceback" in text and "torch.distributed.elastic" not in text:
            raise Difference("a traceback")
        if not self.damaged and re.search("skipping a damaged|no intact checkpoint", text):
            raise Difference("a save is not whole, and nobody damaged it")
        if (
            code == 1
            and self.ranks == 1
            and not text.strip().rpartition("\n")[2].startswith("error: ")
        ):
            raise Difference("exit code 1 without a line that says why")
        if code not in (0, 1, 130, 143, -9, -15, -2, 137):
            raise Difference(f"exit code {code}")
        return code == 0 and bool(going) and "stopped:" not in text

    @property
    def experiment(self) -> Path:
        return self.disk / "x"

    def run(self) -> None:
        """Play it; raises Difference."""
        reference = Running(self.argv(self.folder / "wanted"), self.folder / "log0", self.ranks)
        reference.wait()
        if reference.code():
            raise Difference(f"the undisturbed run failed: {reference.text()[-500:]}")
        with own_disk(self.disk) as has_disk:
            if self.rng.random() < 0.9:  # else faults may come before the first save
                first = self.start()
                first.wait(lambda: any(self.experiment.glob("[!.]*_train_state.pth")))
                first.end()
                first.wait()
                self.judge(first)
            left = self.faults
            for _ in range(100):
                done = False
                if left:
                    names = [
                        name
                        for name in FAULTS
                        if (has_disk or name != FULL) and (self.may_reshard or name != RESHARD)
                    ]
                    weights = [FAULTS[name][1] for name in names]
                    name = self.rng.choices(names, weights)[0]
                    print(f"  {name}", flush=True)
                    left -= 1
                    done = FAULTS[name][0](self)
                    counts[name] += 1
                else:
                    run = self.start()
                    self.resumed_after(run)
                    run.wait()
                    done = self.judge(run)
                if done:
                    break
            else:
                raise Difference("it never came to its end")
            self.compare()
        shutil.rmtree(self.folder, ignore_errors=True)

    def resumed_after(self, run: Running) -> None:
        run.wait(lambda: "(epoch" in run.text() or "nothing to do" in run.text())
        longest("from the start to the next iteration", run.begin)

    def compare(self) -> None:
        """Hold what is on the disk against the undisturbed run; raises Difference."""
        wanted, ours = self.folder / "wanted" / "x", self.experiment
        a, b = (torch.load(f / "latest_train_state.pth", weights_only=True) for f in (wanted, ours))
        keys = a.keys() - {"run", "options", "suffixes"}
        if self.resharded:
            keys = {"epoch", "epoch_iter", "total_iters", "seed", "format"}
        for path in different({k: a[k] for k in keys}, {k: b[k] for k in keys}):
            raise Difference(f"{path} is not that of the undisturbed run")
        for name, weights in b["weights"].items():
            exported = torch.load(ours / f"latest_net_{name}.pth", weights_only=True)
            for path in different(weights, exported):
                raise Difference(f"latest_net_{name}.pth: {path} is not that of the state")
            if not all(torch.isfinite(w).all() for w in weights.values()):
                raise Difference(f"{name} is not finite")
        for path in wanted.glob("latest_net_*_ema.pth"):
            a, b = (torch.load(f / path.name, weights_only=True) for f in (wanted, ours))
            for key in different(a, b) if not self.resharded else ():
                raise Difference(f"{path.name}: {key} is not that of the undisturbed run")
        missing = {p.name for p in wanted.glob("[0-9]*_net_*")} - {p.name for p in ours.iterdir()}
        if missing and not self.damaged:
            raise Difference("weights of an epoch are missing")
        if self.record_counts and not self.resharded and record(wanted) != record(ours):
            raise Difference("losses.jsonl is not that of the undisturbed run")


def different(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two nested values differ; tensors are compared to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{path}: {set(a) ^ set(b)}"
        for key in a.keys() & b.keys():
            yield from different(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from different(x, y, f"{path}/{i}")
    elif torch.is_tensor(a) and torch.is_tensor(b):
        if not torch.equal(a, b):
            yield path
    elif a != b:
        yield path


def record(folder: Path) -> list[Any]:
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return [(e["epoch"], e["images"], e["losses"]) for e in lines if "losses" in e]


@contextlib.contextmanager
def own_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system of its own, where this process may."""
    command = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    except BaseException:
        if mounted:
            shutil.copytree(folder, folder.with_name("disk-kept"))
        raise
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


# ----------------------------------------------------------------------------------------- faults
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
            if whom == "main":
                os.kill(run.process.pid, number)
            elif whom == "child" and children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(case.rng.choice(children), number)
            else:
                run.end()
            run.wait()
            if run.ranks > 1:
                wait_for(children, begin)
                longest("end of the other ranks", begin)
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
        counts["files damaged in all"] += 1
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


def other_order(case: Case) -> bool:
    """The same images, in another order on the disk."""
    case.make_pictures()
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
    FULL: (full_disk, 3),
    DAMAGED: (damaged_files, 6),
    "other order of images": (other_order, 1),
    RESHARD: (other_number, 4),
}


def main() -> None:
    parser = OneLineParser(description="Try to lose a training.")
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first case")
    parser.add_argument("--repeat", type=int, metavar="SEED", help="one case only")
    given = parser.parse_args()
    processes.set_forkserver_preload(["train"])
    end = time.monotonic() + given.hours * 3600
    seed = given.seed if given.repeat is None else given.repeat
    try:
        while True:
            case = Case(seed)
            print(f"seed {seed}: {case.ranks} x {' '.join(case.words)}", flush=True)
            case.run()
            counts["trainings compared, without a difference"] += 1
            seed += 1
            if given.repeat is not None or time.monotonic() > end:
                break
    except Difference as difference:
        print(f"DIFFERENCE: {difference}\n  repeat it with --repeat {seed}; {case.folder}")
        sys.exit(1)
    finally:
        print("| fault | times |\n|---|---|")
        print(*(f"| {what} | {n} |" for what, n in counts.items()), sep="\n", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
