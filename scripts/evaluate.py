#!/usr/bin/env python3
"""Score a trained model on the images of a dataset.

    python scripts/evaluate.py --dataroot ./datasets/facades --name facades_pix2pix
    python scripts/evaluate.py --dataroot ./datasets/maps --name maps_cyclegan --phase val

Takes the options of test.py. Writes `<results_dir>/<name>/<phase>_<epoch>/scores.json` and, beside
it, the printed table as `scores.txt`. docs/scores.md explains each score.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before the imports, which take seconds

from data import create_dataset
from models.inference.testing import model_for_testing
from options.evaluate_options import EvaluateOptions
from util.errors import run_tool
from util.files import make_writable, write_whole
from util.result_names import results_folder
from util.scores.evaluation import evaluate
from util.scores.report import table, warn_of_replaced


def main() -> None:
    options = EvaluateOptions()
    opt = options.parse(save=False)
    dataset = create_dataset(opt)
    options.decide_compile(opt, int(min(opt.num_test, len(dataset))))
    model = model_for_testing(opt)
    folder = results_folder(opt)
    make_writable(folder, "--results_dir")  # fails now, not after the work
    facts = evaluate(opt, model, dataset)
    text = table(facts)
    print(text)
    warn_of_replaced(folder / "scores.json", facts)
    write_whole(folder / "scores.json", json.dumps(facts, indent=2, allow_nan=False) + "\n")
    write_whole(folder / "scores.txt", text + "\n")
    print(f"wrote {os.path.join(folder, 'scores.json')} and scores.txt")


if __name__ == "__main__":
    run_tool(main)
