#!/usr/bin/env python3
"""Compare the speed of settings: training, loading, and translating a folder.

    python scripts/benchmark.py                              plain, defaults and --fast, 256x256
    python scripts/benchmark.py --batch_sizes 1,16 --json speed.json
    python scripts/benchmark.py --settings plain,default,bf16 --model pix2pix
    python scripts/benchmark.py --set "mine=--precision bf16 --channels_last" --profile traces
    python scripts/benchmark.py --dataroot ./datasets/maps   with its images, loading included
    python scripts/benchmark.py --translate 2000             a folder of that many images
    python scripts/benchmark.py --loader --dataroot ./datasets/maps
    python scripts/benchmark.py --distributed 1,2,4          processes, one GPU each

All other options are those of train.py and apply to every setting. Each setting has a process of
its own; they take turns, one at a time, so that changes on the machine affect all settings alike.
Images are random and in memory unless --dataroot is given.

The setting `plain` computes as the original does: eager, float32 with cuDNN's default TF32, NCHW,
passes not merged, ReLUs in place, an optimizer that is not fused, no guard against NaN, no cache of
images, an ordinary DataLoader. scripts/measurements.py defines what is timed, and how.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before the imports, which take seconds

import argparse
import contextlib
import io
import json
import os
import platform
import re
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from datetime import date
from typing import Any

import numpy as np
import torch
from PIL import Image

from models import create_model
from options.test_options import TestOptions
from options.train_options import TrainOptions
from scripts.measurements import PARTS, Loading, Training, Translating, train_as_rank
from scripts.setting_process import SettingProcess
from util.argument_types import numbers, whole_number
from util.distributed.launch import launch
from util.errors import OneLineParser, UserError, one_line_errors, say

SETTINGS = {
    "plain": "--precision tf32 --channels_last off --batch_passes off --cache_images off "
    "--cuda_graphs off",
    "default": "",
    "unrecorded": "--cuda_graphs off",
    "passes": "--batch_passes on",
    "channels_last": "--batch_passes on --channels_last",
    "bf16": "--batch_passes on --precision bf16",
    "bf16_last": "--batch_passes on --precision bf16 --channels_last",
    "compile": "--batch_passes on --compile",
    "fast": "--fast",
}


# ------------------------------------------------------------------------------------ command line
def setting_names(text: str) -> list[str]:
    """An argparse type: names of `SETTINGS`."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in SETTINGS:
            raise argparse.ArgumentTypeError(
                f"there is no '{name}', only {', '.join(SETTINGS)}; or say --set {name}=..."
            )
    return names


def custom_setting(text: str) -> tuple[str, str]:
    """An argparse type: NAME=FLAGS."""
    name, equal, flags = text.partition("=")
    if not equal:
        raise argparse.ArgumentTypeError(f"'{text}': say NAME=FLAGS")
    return name, flags


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, with `settings` as flags by name, and the options for train.py or test.py."""
    parser = OneLineParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="All other options are those of train.py (with --translate: test.py).",
        allow_abbrev=False,
    )
    add, count = parser.add_argument, whole_number(1)
    names = ", ".join(SETTINGS)
    asked = "plain,default,fast"
    add("--settings", type=setting_names, default=asked, help=f"of {names} [%(default)s]")
    own = {"action": "append", "default": [], "type": custom_setting, "metavar": "NAME=FLAGS"}
    add("--set", **own, help="a setting of your own")
    sizes = {"type": numbers(""), "default": "1"}
    add("--batch_sizes", **sizes, help="one after the other, such as 1,16 [%(default)s]")
    add("--size", type=count, default=256, help="width and height of images [%(default)s]")
    add("--dataroot", default="", help="a dataset; random images in memory if not given")
    add("--rounds", type=count, default=5, help="turns of each setting [%(default)s]")
    add("--seconds", type=float, default=5.0, help="length of a turn [%(default)s]")
    add("--warm_up", type=count, default=8, help="iterations before the first turn [%(default)s]")
    add("--loader", action="store_true", help="load images and do nothing with them")
    folder = {"type": whole_number(0), "default": 0, "metavar": "N"}
    add("--translate", **folder, help="test.py on a folder of N images; its start counts too")
    processes = {"type": numbers(" of processes"), "default": [], "metavar": "1,2,..."}
    add("--distributed", **processes, help="train with these numbers of processes")
    add("--as_rank", default="", help=argparse.SUPPRESS)
    add("--profile", default="", metavar="FOLDER", help="traces, heaviest operators, launches")
    add("--json", default="", metavar="FILE", help="write all figures there")
    args, words = parser.parse_known_args()
    args.settings = {name: SETTINGS[name] for name in args.settings} | dict(args.set)
    modes = [f"--{n}" for n in ("loader", "translate", "distributed") if getattr(args, n)]
    if not args.settings:
        parser.error("--settings names none")
    if args.loader and not args.dataroot:
        parser.error("--loader needs --dataroot, a dataset to load")
    if len(modes) > 1:
        parser.error(f"{' and '.join(modes)} are two things to measure: choose one")
    if args.json and not Path(args.json).resolve().parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    return args, words


# ------------------------------------------------------------------------------------- comparisons
def compare(args: argparse.Namespace, kind: type, words: list[str], batch: int) -> dict[str, Any]:
    """Measure all settings in turn; print a table, and return the figures."""
    # fused CPU kernels appear in a profile only if compiled with this
    environment = {"TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE": "1"} if args.profile else {}
    common = [*words, "--batch_size", str(batch)]
    processes = [
        SettingProcess(name, [*common, *shlex.split(flags)], environment)
        for name, flags in args.settings.items()
    ]
    peak = None
    try:
        for process in processes:
            say(f"{process.name}: {args.settings[process.name] or 'nothing added'}", sys.stderr)
            said = process.start(kind, bool(args.dataroot))
            process.result |= process.call("warm_up", args.warm_up) or {}
            took = process.result.get("warm_up_s", 0)
            news = f"failed: {process.failed}" if process.failed else f"warm after {took:.1f} s"
            for line in (*said, news):
                say(f"  {line}", sys.stderr)
        for i in range(args.rounds):
            turn = i % len(processes)
            for process in processes[turn:] + processes[:turn]:
                if rate := process.call("rate", args.seconds):
                    process.rates.append(rate)
            # what has been measured so far, should this program be stopped
            last = [f"{p.name} {p.rates[-1]:.4g}" for p in processes if p.rates and not p.failed]
            if last:
                say(f"round {i + 1} of {args.rounds}, {kind.unit}: {', '.join(last)}", sys.stderr)
        if kind is Training:
            for process in processes:
                trace = trace_file(args.profile, process.name, batch)
                process.result |= process.call("details", trace) or {}
                if trace and not process.failed:
                    print_profile(process, trace)
            peak = processes[0].call("matmul")
    finally:
        for process in processes:
            process.close()
    flops = processes[0].result.get("flops", 0) / batch
    settings = [summary(process, processes[0].rates, flops, peak, batch) for process in processes]
    found = {"batch_size": batch, "bf16_matmul_tflops": peak, "settings": settings}
    print_comparison(found, kind)
    return found


def summary(
    process: SettingProcess, base: list[float], flops: float, peak: float | None, batch: int
) -> dict[str, Any]:
    """The figures of one setting; `flops` are per image, `base` are the rates to compare with."""
    result, rates = process.result, process.rates
    result["tflop_an_image"] = result.pop("flops", 0) / batch / 1e12
    result |= {"failed": process.failed, "rates": rates}
    if rates and not process.failed:
        result["median"] = median = statistics.median(rates)
        ratios = [a / b for a, b in zip(rates, base, strict=False)]
        result["ratio"] = statistics.median(ratios) if ratios else None
        if flops:
            result["tflops"] = median * flops / 1e12
            result["share_of_matmul"] = result["tflops"] / peak if peak else None
    return result


def scale(args: argparse.Namespace, words: list[str], batch: int, folder: Path) -> dict[str, Any]:
    """Train with each number of processes in turn, with a batch per process; print a table."""
    found: dict[int, list[dict[str, float]]] = {n: [] for n in args.distributed}
    file = folder / "found.json"
    mode = ["--as_rank", str(file), "--warm_up", str(args.warm_up)]
    mode += ["--seconds", str(args.seconds), "--dataroot", args.dataroot]
    argv = [str(Path(__file__).resolve()), *mode, *words, "--batch_size", str(batch)]
    for _ in range(args.rounds):
        for n in found:
            if code := launch(n, argv):
                raise UserError(f"training with {n} processes failed, exit code {code}")
            found[n].append(json.loads(file.read_text()))
    first = args.distributed[0]
    columns = ["processes", "images/s in all", "of each", "efficiency", "reductions an iteration"]
    columns += ["MB reduced", "MB sent by each (ring)"]
    rows, table = [], []
    for n, results in found.items():
        rate = statistics.median(r["rate"] for r in results)
        pairs = zip(results, found[first], strict=True)
        efficiency = statistics.median(a["rate"] / n / (b["rate"] / first) for a, b in pairs)
        reductions, size = results[0]["reductions"], results[0]["bytes"] / 1e6
        cells = [str(n), f"{rate:.4g}", f"{rate / n:.4g}", f"{efficiency:.0%}", f"{reductions:g}"]
        table.append([*cells, f"{size:.1f}", f"{2 * (n - 1) / n * size:.1f}"])
        rows.append({"processes": n, "efficiency": efficiency, "turns": results})
    print_table(f"batch {batch} in each process", columns, table)
    return {"batch_size": batch, "processes": rows}


# ------------------------------------------------------------------------------------------ reports
def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_comparison(found: dict[str, Any], kind: type) -> None:
    """Print a table with a row per setting."""
    title, peak = f"batch {found['batch_size']}", found["bf16_matmul_tflops"]
    first = found["settings"][0]["setting"]
    columns = ["setting", kind.unit, "from - to", f"ratio to {first}"]
    if kind is Training:
        columns += ["peak memory", "/".join(PARTS).replace("forward/backward", "networks")]
        columns += ["TFLOP/s", "of matmul", "warm-up"]
        title += f"; a product of bf16 matrices: {peak:.2f} TFLOP/s" if peak else ""
    rows = []
    for result in found["settings"]:
        if "median" not in result:
            reason = result["failed"].splitlines()[-1:] or ["not measured"]
            rows.append([result["setting"], reason[0], *[""] * (len(columns) - 2)])
            continue
        low, high = min(result["rates"]), max(result["rates"])
        cells = [result["setting"], f"{result['median']:.4g}", f"{low:.4g} - {high:.4g}"]
        cells.append("-" if result["ratio"] is None else f"{result['ratio']:.2f}")
        if kind is Training:
            split = result["split_s"]
            total = sum(split.values())
            cells.append(f"{result['peak_bytes'] / 2**20:.0f} MiB")
            cells.append(" / ".join(f"{split[part] / total:.0%}" for part in PARTS))
            cells.append(f"{result.get('tflops', 0):.3g}")
            cells.append(f"{result.get('share_of_matmul') or 0:.0%}")
            cells.append(f"{result['warm_up_s']:.0f} s")
        rows.append(cells)
    print_table(title, columns, rows)


def trace_file(folder: str, name: str, batch: int) -> str:
    """The file for the trace of a setting; empty if none is wanted."""
    if not folder:
        return ""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return str(Path(folder, f"{name}_batch{batch}.json"))


def print_profile(process: SettingProcess, trace: str) -> None:
    """Print the launches of an iteration, and its slowest operators."""
    counts = [f"{n} {what.replace('_', ' ')}" for what, n in process.result["launched"].items()]
    print(f"\n{process.name}, trace in {trace}; an iteration: {', '.join(counts)}")
    print(process.result.pop("heaviest"))


def machine() -> dict[str, Any]:
    """The machine, the versions and the date of the measurements."""
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
        with contextlib.suppress(OSError, IndexError):
            version = Path("/proc/driver/nvidia/version").read_text()
            about["driver"] = re.findall(r"\d+\.\d+[.\d]*", version)[0]
    return about


# -------------------------------------------------------------------------------------------- main
def folder_to_translate(args: argparse.Namespace, words: list[str], folder: Path) -> list[str]:
    """Make a folder of images and an untrained network; returns the options for test.py."""
    pictures = folder / "pictures"
    pictures.mkdir()
    random = np.random.default_rng(0)
    side = max(1, args.size // 4)
    for i in range(args.translate):
        # smooth, so that they compress about as well as photographs
        small = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        small.resize((args.size, args.size)).save(pictures / f"{i:05d}.png")
    own = ["--dataroot", str(pictures), "--model", "test", "--num_test", "all"]
    own += ["--results_dir", str(folder / "results"), "--crop_size", str(args.size)]
    own += ["--no_dropout"]  # with which results would depend on the batch, and not be batched
    words = [*own, *words]
    with contextlib.redirect_stdout(io.StringIO()):
        trained = TestOptions(words).parse(save=False)
        trained.isTrain = False
        create_model(trained).save_networks("latest")
    return words


def main() -> None:
    args, words = parse()
    if args.as_rank:
        words += ["--dataroot", args.dataroot or "."]
        found = train_as_rank(words, bool(args.dataroot), args.warm_up, args.seconds)
        if found:
            Path(args.as_rank).write_text(json.dumps(found))
        return
    about = machine()
    print(" | ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    print("options:", shlex.join(sys.argv[1:]), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = ["--name", "benchmark", "--checkpoints_dir", temporary, "--seed", "1", *words]
        kind: type = Loading if args.loader else Training
        if args.translate:
            kind, words = Translating, folder_to_translate(args, words, folder)
            # test.py has no cache
            args.settings = {
                name: flags.replace("--cache_images off", "")
                for name, flags in args.settings.items()
            }
        else:
            words = ["--display_id", "0", *words]
            if not args.distributed:  # `scale` adds it
                words += ["--dataroot", args.dataroot or "."]
            if not args.dataroot:
                size = str(args.size)
                words = ["--load_size", size, "--crop_size", size, *words]
            with contextlib.redirect_stdout(io.StringIO()):
                # a mistake ends it here
                TrainOptions(["--dataroot", ".", *words]).parse(save=False)
        if args.distributed:
            tables = [scale(args, words, n, folder) for n in args.batch_sizes]
        else:
            tables = [compare(args, kind, words, n) for n in args.batch_sizes]
    if args.json:
        found = {"machine": about, "tables": tables}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    failed = [s["setting"] for table in tables for s in table.get("settings", []) if s["failed"]]
    if failed:
        raise UserError(f"not measured: {', '.join(dict.fromkeys(failed))}; the table says why")


if __name__ == "__main__":
    with one_line_errors():
        main()
