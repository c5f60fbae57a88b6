#!/usr/bin/env python3
"""Compare the speed of settings: training, loading, and translating a folder.

    python scripts/benchmark.py                              plain, defaults and --fast, 256x256
    python scripts/benchmark.py --batch_sizes 1,16 --json speed.json
    python scripts/benchmark.py --settings plain,default,bf16 --model pix2pix
    python scripts/benchmark.py --set "mine=--precision bf16 --channels_last" --profile traces
    python scripts/benchmark.py --dataroot ./datasets/maps   with its pictures, loading included
    python scripts/benchmark.py --translate 2000             a folder of that many pictures
    python scripts/benchmark.py --loader --dataroot ./datasets/maps
    python scripts/benchmark.py --distributed 1,2,4          processes, a GPU each

All other options are those of train.py and hold for every setting. Each setting lives in a process
of its own; they take turns, one at a time, so that what changes on the machine meets all of them.
Pictures are random and in memory unless --dataroot is given.

The setting `plain` computes as the original does: eager, float32 with the TF32 that cuDNN takes by
default, NCHW, each pass by itself, ReLUs in place, an optimizer that is not fused, no cache, an
ordinary loader.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # in front of the imports that take seconds

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import runpy
import shlex
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from data import create_dataset
from data.loader import Batch
from models import create_model
from models.base_model import BaseModel, parameters_of
from options.base_options import whole_number
from options.test_options import TestOptions
from options.train_options import TrainOptions
from util import distributed
from util.distributed.launch import launch
from util.errors import OneLineParser, UserError, one_line_errors
from util.html import HTML
from util.randomness import seed_everything
from util.visualizer import save_images

SETTINGS = {
    "plain": "--precision tf32 --batch_passes off --cache_images off",
    "default": "",
    "passes": "--batch_passes on",
    "channels_last": "--batch_passes on --channels_last",
    "bf16": "--batch_passes on --precision bf16",
    "bf16_last": "--batch_passes on --precision bf16 --channels_last",
    "compile": "--batch_passes on --compile",
    "fast": "--fast",
}
PARTS = ("data", "forward/backward", "optimizer", "other")


# ------------------------------------------------------------------------------------ what is timed
def ordinary_loader(dataset: Any, opt: argparse.Namespace) -> DataLoader:
    """As in the original: processes that start anew in each epoch, and no pinned memory."""
    workers = int(opt.num_threads)
    return DataLoader(dataset.dataset, opt.batch_size, shuffle=True, num_workers=workers)


class Training:
    """A model of one setting, and the batches that it is fed."""

    def __init__(self, words: list[str], plain: bool, real: bool):
        self.opt = opt = TrainOptions(words).parse(save=False)
        seed_everything(opt.seed)
        self.plain, self.device = plain, opt.device
        self.dataset = create_dataset(opt) if real else None
        self.model: BaseModel = create_model(opt)
        if plain:
            self._as_original()
        self.model.setup(opt)
        if plain and self.device.type == "cuda":
            # convolutions only, which is what PyTorch does if not told otherwise
            torch.backends.cuda.matmul.allow_tf32 = False
        self.batches = self._real() if self.dataset else self._random()

    def _as_original(self) -> None:
        model = self.model
        for net in model.networks().values():
            for module in net.modules():
                if isinstance(module, (torch.nn.ReLU, torch.nn.LeakyReLU)):
                    module.inplace = True
        for name, value in list(vars(model).items()):
            if isinstance(value, torch.optim.Adam):
                betas = (self.opt.beta1, 0.999)
                ordinary = torch.optim.Adam(parameters_of(value), lr=self.opt.lr, betas=betas)
                model.optimizers = [ordinary if o is value else o for o in model.optimizers]
                setattr(model, name, ordinary)

    def _random(self) -> Iterator[dict[str, Any]]:
        opt = self.opt
        generator = torch.Generator().manual_seed(0)
        n, size = opt.batch_size, opt.crop_size
        pinned = self.device.type == "cuda"

        def pictures(channels: int) -> torch.Tensor:
            values = torch.rand(n, channels, size, size, generator=generator) * 2 - 1
            return values.pin_memory() if pinned else values

        channels = (opt.input_nc, opt.output_nc)
        A, B = channels if opt.direction == "AtoB" else channels[::-1]
        names = [""] * n
        several = [
            {"A": pictures(A), "B": pictures(B), "A_paths": names, "B_paths": names}
            for _ in range(4)
        ]
        while True:
            yield from several

    def _real(self) -> Iterator[dict[str, Any]]:
        assert self.dataset is not None
        loader = self.dataset
        if self.plain:
            loader = ordinary_loader(self.dataset, self.opt)
        while True:
            for batch in loader:
                yield Batch(batch)

    def step(self) -> None:
        """One iteration, as in train.py."""
        self.model.set_input(next(self.batches))
        self.model.optimize_parameters()

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def warm_up(self, steps: int) -> dict[str, Any]:
        """The first steps, with compiling; seconds, and FLOPs of one iteration of a batch."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.wait()
        seconds = time.perf_counter() - start
        flops = 0
        if self.plain:
            with FlopCounterMode(display=False) as counter:
                self.step()
            flops = counter.get_total_flops()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return {"seconds": seconds, "flops": flops}

    def rate(self, seconds: float, least: int) -> float:
        """Images/s, over `seconds` and at least so many iterations."""
        self.step()  # after others have had their turn
        self.wait()
        start, steps = time.perf_counter(), 0
        while True:
            self.step()
            steps += 1
            if steps >= least and time.perf_counter() - start >= seconds:
                break
            if steps % 8 == 0:  # the clock is of no use where a GPU runs behind
                self.wait()
        self.wait()
        rate = steps * self.opt.batch_size / (time.perf_counter() - start)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # leaves the others room
        return rate

    def split(self, steps: int) -> dict[str, float]:
        """Seconds an iteration by part. Waits for the device after each, so the sum is larger."""
        times: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        model = self.model

        def timed(part: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
            self.wait()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.wait()
            times[part] += time.perf_counter() - start
            return result

        original = [optimizer.step for optimizer in model.optimizers]
        for optimizer, step in zip(model.optimizers, original, strict=True):
            optimizer.step = lambda *a, step=step, **k: timed("optimizer", step, *a, **k)
        try:
            for _ in range(steps):
                batch = timed("data", next, self.batches)
                timed("other", model.set_input, batch)
                timed("forward/backward", model.optimize_parameters)
        finally:
            for optimizer, step in zip(model.optimizers, original, strict=True):
                optimizer.step = step
        times["forward/backward"] -= times["optimizer"]
        return {part: seconds / steps for part, seconds in times.items()}

    def memory(self) -> int:
        """Peak bytes: on a GPU what tensors took, else all that the process did."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def profile(self, path: str) -> str:
        """Write a Chrome trace of one iteration; return a table of the ten heaviest operators."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.step()
        self.wait()
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            self.step()
            self.wait()
        profiler.export_chrome_trace(path)
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        return profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60)

    def matmul(self) -> float:
        """TFLOP/s of a large product of bf16 matrices, the median of ten."""
        n = 8192 if self.device.type == "cuda" else 1024
        a = torch.randn(n, n, device=self.device).bfloat16()
        times = []
        for _ in range(12):
            self.wait()
            start = time.perf_counter()
            torch.mm(a, a)
            self.wait()
            times.append(time.perf_counter() - start)
        return 2 * n**3 / statistics.median(times[2:]) / 1e12

    def close(self) -> None:
        """End the loading processes."""
        if self.dataset is not None:
            self.dataset.close()


class Loading:
    """Batches of a data set, with no model behind them."""

    def __init__(self, words: list[str], plain: bool, real: bool):
        self.opt = opt = TrainOptions(words).parse(save=False)
        seed_everything(opt.seed)
        self.dataset = create_dataset(opt)
        loader: Any = self.dataset
        if plain:
            loader = ordinary_loader(self.dataset, opt)
        self.loader = loader

    def warm_up(self, steps: int) -> dict[str, Any]:
        """A whole epoch, which fills the cache."""
        start = time.perf_counter()
        for _ in self.loader:
            pass
        return {"seconds": time.perf_counter() - start, "flops": 0}

    def rate(self, seconds: float, least: int) -> float:
        """Samples/s over whole epochs, the start of an epoch included."""
        start, samples = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or not samples:
            for _ in self.loader:
                pass
            samples += len(self.dataset)
        return samples / (time.perf_counter() - start)

    def close(self) -> None:
        """End the loading processes."""
        self.dataset.close()


class Translating:
    """test.py on a folder; `plain` is a loop of one picture after the other."""

    def __init__(self, words: list[str], plain: bool, real: bool):
        self.words, self.plain = words, plain
        self.count = len(list(Path(words[words.index("--dataroot") + 1]).iterdir()))

    def warm_up(self, steps: int) -> dict[str, Any]:
        """Nothing: starting, loading and compiling are part of the time."""
        return {"seconds": 0.0, "flops": 0}

    def rate(self, seconds: float, least: int) -> float:
        """Pictures/s from the parsing of the command line to the finished page."""
        start = time.perf_counter()
        if self.plain:
            self._loop()
        else:
            before, sys.argv = sys.argv, ["test.py", *self.words]
            try:
                runpy.run_path(str(ROOT / "test.py"), run_name="__main__")
            finally:
                sys.argv = before
        return self.count / (time.perf_counter() - start)

    def _loop(self) -> None:
        opt = TestOptions(self.words).parse(save=False)
        opt.serial_batches = opt.no_flip = True
        opt.num_threads = 0
        dataset = create_dataset(opt, batch_size=1)
        model = create_model(opt)
        model.setup(opt)
        page = HTML(str(Path(opt.results_dir) / opt.name), "plain")
        for data in dataset:
            model.set_input(data)
            model.test()
            save_images(page, model.get_current_visuals(), model.get_image_paths())
        page.save()

    def close(self) -> None:
        """Nothing is left."""


# --------------------------------------------------------------------------------------- processes
def serve(kind: type, words: list[str], plain: bool, real: bool, pipe: Any) -> None:
    """Do in a process what comes through a pipe: (method, arguments); answer (ok, result)."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        subject = None
        while True:
            try:
                name, *args = pipe.recv()
            except EOFError:
                return
            try:
                if name == "close":
                    if subject is not None:
                        subject.close()
                    pipe.send((True, None))
                    return
                if name == "start":
                    subject = kind(words, plain, real)
                    # what --fast chose, and what is off; not the list of options
                    lines = output.getvalue().splitlines()
                    pipe.send((True, [s for s in lines if s.startswith(("--fast", "--compile"))]))
                else:
                    pipe.send((True, getattr(subject, name)(*args)))
            except BaseException as e:
                said = [line for line in output.getvalue().splitlines() if "error: " in line]
                if isinstance(e, SystemExit) and said:
                    reason = said[-1].split("error: ", 1)[1]
                elif isinstance(e, UserError):
                    reason = str(e)
                else:
                    reason = traceback.format_exc()
                pipe.send((False, reason))
                return


class Subject:
    """A setting in a process of its own."""

    def __init__(self, kind: type, name: str, words: list[str], plain: bool, real: bool):
        self.name, self.failed = name, ""
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(kind, words, plain, real, other))
        self.process.start()
        other.close()
        self.rates: list[float] = []
        self.result: dict[str, Any] = {"setting": name, "options": shlex.join(words)}
        self.said = self.call("start") or []

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


# ------------------------------------------------------------------------------------------ reports
def compare(
    given: argparse.Namespace, kind: type, settings: dict[str, str], words: list[str], batch: int
) -> dict[str, Any]:
    """Measure all settings in turns; return what was found, and print it as a table."""
    subjects = []
    for name, flags in settings.items():
        own = [*words, "--batch_size", str(batch), *shlex.split(flags)]
        print(f"{name}: {flags or 'nothing added'}", file=sys.stderr, flush=True)
        subject = Subject(kind, name, own, name == "plain", bool(given.dataroot))
        subjects.append(subject)
        for line in subject.said:
            print(f"  {line}", file=sys.stderr)
        warm = subject.call("warm_up", given.warm_up)
        if warm:
            subject.result |= {"warm_up_s": warm["seconds"], "flops": warm["flops"]}
            print(f"  warm after {warm['seconds']:.1f} s", file=sys.stderr, flush=True)
        else:
            print(f"  failed: {subject.failed}", file=sys.stderr)
    try:
        for i in range(given.rounds):
            turn = i % len(subjects)
            for subject in subjects[turn:] + subjects[:turn]:
                rate = subject.call("rate", given.seconds, 3)
                if rate:
                    subject.rates.append(rate)
        if kind is Training:
            for subject in subjects:
                subject.result["split_s"] = subject.call("split", 4)
                subject.result["peak_bytes"] = subject.call("memory")
                if given.profile:
                    Path(given.profile).mkdir(parents=True, exist_ok=True)
                    path = Path(given.profile, f"{subject.name}_batch{batch}.json")
                    print(
                        f"\n{subject.name}, trace in {path}\n{subject.call('profile', str(path))}"
                    )
            peak = subjects[0].call("matmul")
        else:
            peak = None
    finally:
        for subject in subjects:
            subject.close()
    found = {"batch_size": batch, "bf16_matmul_tflops": peak, "settings": []}
    base = subjects[0]
    flops = base.result.get("flops", 0) / batch
    for subject in subjects:
        result, rates = subject.result, subject.rates
        result["tflop_an_image"] = result.pop("flops", 0) / batch / 1e12
        result["failed"] = subject.failed
        result["rates"] = rates
        if rates and not subject.failed:
            result["median"] = median = statistics.median(rates)
            pairs = [a / b for a, b in zip(rates, base.rates, strict=False)]
            result["ratio"] = statistics.median(pairs)
            if flops:
                result["tflops"] = median * flops / 1e12
                result["share_of_matmul"] = result["tflops"] / peak if peak else None
        found["settings"].append(result)
    print_table(found, kind)
    return found


def print_table(found: dict[str, Any], kind: type) -> None:
    """One line a setting, as a table of Markdown."""
    unit = {Training: "images/s", Loading: "samples/s", Translating: "pictures/s"}[kind]
    peak = found["bf16_matmul_tflops"]
    columns = ["setting", unit, "from - to", f"ratio to {found['settings'][0]['setting']}"]
    if kind is Training:
        columns += ["peak memory", "/".join(PARTS).replace("forward/backward", "networks")]
        columns += ["TFLOP/s", "of matmul", "warm-up"]
        product = f"; a product of bf16 matrices: {peak:.2f} TFLOP/s" if peak else ""
        print(f"\nbatch {found['batch_size']}{product}\n")
    else:
        print(f"\nbatch {found['batch_size']}\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for result in found["settings"]:
        if "median" not in result:
            reason = result["failed"].splitlines()[-1:] or ["not measured"]
            print(f"| {result['setting']} | {reason[0]} |{' |' * (len(columns) - 2)}")
            continue
        low, high = min(result["rates"]), max(result["rates"])
        cells = [result["setting"], f"{result['median']:.4g}", f"{low:.4g} - {high:.4g}"]
        cells.append(f"{result['ratio']:.2f}")
        if kind is Training:
            split = result["split_s"]
            total = sum(split.values())
            cells.append(f"{result['peak_bytes'] / 2**20:.0f} MiB")
            cells.append(" / ".join(f"{split[part] / total:.0%}" for part in PARTS))
            cells.append(f"{result.get('tflops', 0):.3g}")
            cells.append(f"{result.get('share_of_matmul') or 0:.0%}")
            cells.append(f"{result['warm_up_s']:.0f} s")
        print(f"| {' | '.join(cells)} |")


# ------------------------------------------------------------------------------- several processes
def one_rank(words: list[str], file: str, real: bool, given: argparse.Namespace) -> None:
    """Train in one of several processes; the first one writes how fast, and what was exchanged."""
    with distributed.process_group(), contextlib.redirect_stdout(io.StringIO()):
        training = Training(words, False, real)
        seconds = training.warm_up(given.warm_up)["seconds"] / given.warm_up
        # as many for all of them: they wait for each other in each iteration
        steps = distributed.broadcast_object(max(3, int(given.seconds / seconds)))
        distributed.traffic.reset()
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            training.step()
        training.wait()
        distributed.barrier()
        images = steps * training.opt.batch_size * distributed.world_size()
        found = {
            "rate": images / (time.perf_counter() - start),
            "reductions": distributed.traffic.reductions / steps,
            "bytes": distributed.traffic.bytes / steps,
        }
        training.close()
        if distributed.is_main():
            Path(file).write_text(json.dumps(found))


def scale(given: argparse.Namespace, words: list[str], batch: int, folder: Path) -> dict[str, Any]:
    """Train with each number of processes in turns, a batch for each; print a table."""
    counts = [int(n) for n in given.distributed.split(",")]
    found: dict[int, list[dict[str, float]]] = {n: [] for n in counts}
    mode = ["--as_rank", str(folder / "found.json"), "--warm_up", str(given.warm_up)]
    mode += ["--seconds", str(given.seconds), "--dataroot", given.dataroot]
    for _ in range(given.rounds):
        for n in counts:
            argv = [str(Path(__file__).resolve()), *mode, *words, "--batch_size", str(batch)]
            code = launch(n, argv)
            if code:
                raise UserError(f"training with {n} processes failed, exit code {code}")
            found[n].append(json.loads((folder / "found.json").read_text()))
    print(f"\nbatch {batch} in each process\n")
    columns = ["processes", "images/s in all", "of each", "efficiency", "reductions an iteration"]
    columns += ["MB reduced", "MB sent by each (ring)"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    rows = []
    for n, results in found.items():
        rate = statistics.median(r["rate"] for r in results)
        pairs = zip(results, found[counts[0]], strict=True)
        efficiency = statistics.median(a["rate"] / n / (b["rate"] / counts[0]) for a, b in pairs)
        reductions, size = results[0]["reductions"], results[0]["bytes"] / 1e6
        cells = [n, f"{rate:.4g}", f"{rate / n:.4g}", f"{efficiency:.0%}", f"{reductions:g}"]
        cells += [f"{size:.1f}", f"{2 * (n - 1) / n * size:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |")
        rows.append({"processes": n, "efficiency": efficiency, "turns": results})
    return {"batch_size": batch, "processes": rows}


def machine() -> dict[str, Any]:
    """What this was measured on."""
    about = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
    }
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        about["cpu"] = name.split(":", 1)[1].strip()
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        about["cuda"] = torch.version.cuda
        with contextlib.suppress(OSError):
            version = Path("/proc/driver/nvidia/version").read_text()
            about["driver"] = version.split("Module", 1)[-1].split()[0]
    return about


def synthetic_folder(folder: Path, count: int, size: int) -> Path:
    """Smooth random pictures, which compress about as photographs do."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        small = random.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size)).save(folder / f"{i:05d}.png")
    return folder


def main() -> None:
    parser = OneLineParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="All other options are those of train.py (with --translate: test.py).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    names = ", ".join(SETTINGS)
    add("--settings", default="plain,default,fast", help=f"of {names} [%(default)s]")
    add("--set", action="append", default=[], metavar="NAME=FLAGS", help="a setting of your own")
    add("--batch_sizes", default="1", help="one after the other, as 1,16 [%(default)s]")
    add(
        "--size",
        type=whole_number(1),
        default=256,
        help="width and height of the pictures [%(default)s]",
    )
    add("--dataroot", default="", help="a data set; random pictures in memory if not given")
    add("--rounds", type=whole_number(1), default=5, help="turns of each setting [%(default)s]")
    add("--seconds", type=float, default=5.0, help="length of a turn [%(default)s]")
    add(
        "--warm_up",
        type=whole_number(1),
        default=3,
        help="iterations before the first turn [%(default)s]",
    )
    add("--loader", action="store_true", help="load pictures and do nothing with them")
    add(
        "--translate",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="test.py on a folder of N pictures; its start counts, so hundreds of them",
    )
    add("--distributed", default="", metavar="1,2,...", help="train with so many processes")
    add("--as_rank", default="", help=argparse.SUPPRESS)
    add("--profile", default="", metavar="FOLDER", help="traces, and the heaviest operators")
    add("--json", default="", metavar="FILE", help="write all figures there")
    given, words = parser.parse_known_args()
    if given.as_rank:
        words += ["--dataroot", given.dataroot or "."]
        one_rank(words, given.as_rank, bool(given.dataroot), given)
        return
    settings = {}
    for name in filter(None, given.settings.split(",")):
        if name not in SETTINGS:
            parser.error(f"--settings: there is no '{name}', only {names}; or say --set {name}=...")
        settings[name] = SETTINGS[name]
    for text in given.set:
        name, equal, flags = text.partition("=")
        if not equal:
            parser.error(f"--set '{text}': say NAME=FLAGS")
        settings[name] = flags
    if not settings:
        parser.error("--settings names none")
    try:
        batches = [int(n) for n in given.batch_sizes.split(",")]
    except ValueError:
        parser.error(f"--batch_sizes '{given.batch_sizes}': say numbers, as 1,16")
    counts = given.distributed.split(",") if given.distributed else []
    if not all(n.isdecimal() and int(n) for n in counts):
        parser.error(f"--distributed '{given.distributed}': say numbers of processes, as 1,2")
    if given.loader and not given.dataroot:
        parser.error("--loader needs --dataroot, a data set to load")
    if min(batches) < 1:
        parser.error(f"--batch_sizes {given.batch_sizes}: at least 1")
    modes = ("loader", "translate", "distributed")
    chosen = [f"--{name}" for name in modes if getattr(given, name)]
    if len(chosen) > 1:
        parser.error(f"{' and '.join(chosen)} are two things to measure: choose one")
    if given.json and not Path(given.json).resolve().parent.is_dir():
        parser.error(f"--json {given.json}: there is no such folder")

    about = machine()
    print(" | ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    print("options:", shlex.join(sys.argv[1:]), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        common = ["--name", "benchmark", "--checkpoints_dir", temporary, "--seed", "1"]
        kind: type = Loading if given.loader else Training
        if given.translate:
            kind = Translating
            pictures = synthetic_folder(Path(temporary, "pictures"), given.translate, given.size)
            common += ["--dataroot", str(pictures), "--model", "test", "--num_test", "all"]
            common += ["--results_dir", str(Path(temporary, "results"))]
            settings = {k: v.replace("--cache_images off", "") for k, v in settings.items()}
            with contextlib.redirect_stdout(io.StringIO()):
                trained = TestOptions([*common, *words]).parse(save=False)
                trained.isTrain = False
                create_model(trained).save_networks("latest")
        else:
            common += ["--display_id", "0"]
            if not given.distributed:  # the processes are given it by itself
                common += ["--dataroot", given.dataroot or "."]
            if not given.dataroot:
                common += ["--load_size", str(given.size)]
        common += ["--crop_size", str(given.size)] if not given.dataroot else []
        if given.distributed:
            tables = [scale(given, [*common, *words], n, Path(temporary)) for n in batches]
        else:
            tables = [compare(given, kind, settings, [*common, *words], n) for n in batches]
    if given.json:
        Path(given.json).write_text(
            json.dumps({"machine": about, "tables": tables}, indent=1) + "\n"
        )
    failed = [s["setting"] for table in tables for s in table.get("settings", []) if s["failed"]]
    if failed:
        raise UserError(f"not measured: {', '.join(dict.fromkeys(failed))}; the table says why")


if __name__ == "__main__":
    with one_line_errors():
        main()
