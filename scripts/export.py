#!/usr/bin/env python3
"""Write a trained generator to one file that other programs can run.

    python scripts/export.py --name maps_cyclegan --direction AtoB --format onnx
    python scripts/run_onnx.py checkpoints/maps_cyclegan/latest_AtoB.onnx PICTURES TRANSLATED

The file takes any height, width and batch. It is run on the CPU before this program ends, and its
output compared with PyTorch's; a file that differs is not left behind. See docs/export.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # in front of the imports that take seconds

import torch

from models import load_generator
from models.inference.export import (
    ENDINGS,
    TOLERANCE,
    export,
    frozen,
    largest_difference,
    need_packages,
    reader,
)
from options.base_options import experiment_name
from util.errors import OneLineParser, UserError, one_line_errors
from util.files import make_writable, replacing, sha256


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="Write a generator to one file.")
    add = parser.add_argument
    add("--name", required=True, type=experiment_name, help="name of the experiment")
    add("--checkpoints_dir", default="./checkpoints", help="where experiments are kept")
    add("--format", default="onnx", choices=ENDINGS, help="kind of file [onnx]")
    add("--direction", choices=("AtoB", "BtoA"), help="which way [as it was trained]")
    add("--epoch", default="latest", help="which epoch: a number, latest, best [latest]")
    add("--output", type=Path, help="file to write [<experiment>/<epoch>_<direction>.<ending>]")
    add(
        "--eval",
        action="store_true",
        help="batch norms use stored statistics instead of each picture's own, as in test.py",
    )
    return parser.parse_args(argv)


def channels(options: dict[str, Any]) -> str:
    """What the channels of input and output are, for the metadata."""
    if options.get("model") == "colorization":
        return "CIE Lab: from L / 50 - 1 to a / 110 and b / 110"
    kinds = {1: "grey", 3: "channels RGB"}
    counts = [int(options[name]) for name in ("input_nc", "output_nc")]
    source, result = (kinds.get(n, f"{n} channels as trained") for n in counts)
    return source if source == result else f"from {source} to {result}"


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.format == "onnx":
        need_packages("--format onnx", ("onnx", "onnxscript", "onnxruntime"))
    folder = Path(args.checkpoints_dir) / args.name
    G = load_generator(folder, direction=args.direction, epoch=args.epoch, device="cpu")
    net = frozen(G.net, args.eval)
    options = {k: G.options[k] for k in ("netG", "norm", "ngf", "no_dropout") if k in G.options}
    direction = str(G.options["direction"])
    metadata = {
        "name": args.name,
        "direction": direction,
        "epoch": str(args.epoch),
        "weights": G.weights.name,
        "weights_sha256": sha256(G.weights),
        **{key: str(value) for key, value in options.items()},
        "input_nc": str(G.input_nc),
        "output_nc": str(G.output_nc),
        "layout": f"NCHW float32, {channels(G.options)}",
        "value_range": "-1 1",
        "sizes": "any batch, height and width; the output has those of the input",
        "batch_norm": "stored statistics" if args.eval else "statistics of each picture",
        "dropout": "off",
        "torch": torch.__version__,
    }
    path = args.output or folder / f"{args.epoch}_{direction}{ENDINGS[args.format]}"
    if path.suffix != ENDINGS[args.format]:
        raise UserError(f"--output {path} must end in {ENDINGS[args.format]} for {args.format}")
    make_writable(path.parent, "--output")
    with replacing(path) as unchecked:
        export(net, G.input_nc, args.format, unchecked, metadata)
        differences = largest_difference(net, reader(args.format, unchecked), G.input_nc)
        worst = max(differences.values())
        each = ", ".join(f"{size}: {value:.2g}" for size, value in differences.items())
        if not worst < TOLERANCE:
            raise UserError(
                f"the {args.format} file differs from PyTorch by {worst:.3g} ({each}), more than "
                f"{TOLERANCE:g}, and was not kept"
            )
    print(f"largest difference from PyTorch, of values in [-1, 1]: {worst:.2g} ({each})")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    with one_line_errors():
        main()
