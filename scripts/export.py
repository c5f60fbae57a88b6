#!/usr/bin/env python3
"""Write a trained generator to one file that other programs can run.

    python scripts/export.py --name maps_cyclegan --direction AtoB --format onnx
    python scripts/run_onnx.py checkpoints/maps_cyclegan/latest_AtoB.onnx PICTURES TRANSLATED

The file takes any height, width and batch size. Before this program ends, it runs the file on the
CPU and compares the output with PyTorch's; a file that differs is not kept. See docs/export.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before the imports, which take seconds

from models.ema import WEIGHTS
from models.inference.export import ENDINGS, export_generator
from util.argument_types import experiment_name
from util.errors import OneLineParser, run_tool
from util.run.saved_options import experiment_folder


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="Write a generator to one file.")
    add = parser.add_argument
    add("--name", required=True, type=experiment_name, help="name of the experiment")
    add("--checkpoints_dir", default="./checkpoints", help="where experiments are kept")
    add("--format", default="onnx", choices=ENDINGS, help="kind of file [onnx]")
    add("--direction", choices=("AtoB", "BtoA"), help="which way [as it was trained]")
    add("--epoch", default="latest", help="which epoch: a number, latest, best [latest]")
    add("--weights", default="auto", choices=WEIGHTS, help="averaged (--ema) or raw [auto]")
    add("--output", type=Path, help="file to write [<experiment>/<epoch>_<direction>.<ending>]")
    add(
        "--eval",
        action="store_true",
        help="batch norms use stored statistics instead of each image's own, as in test.py",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    folder = experiment_folder(args)
    exported = export_generator(
        folder, args.format, args.output, args.direction, args.epoch, args.eval, args.weights
    )
    each = ", ".join(f"{size}: {value:.2g}" for size, value in exported.differences.items())
    worst = max(exported.differences.values())
    print(f"largest difference from PyTorch, of values in [-1, 1]: {worst:.2g} ({each})")
    print(f"wrote {exported.path} ({exported.path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_tool(main)
