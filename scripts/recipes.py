#!/usr/bin/env python3
"""Which options make better images in the same time: trains each recipe, and scores it.

    python scripts/recipes.py --dataroot ./datasets/worldmaps_mini [--minutes 2] [--seeds 1,2,3]
    python scripts/recipes.py --page docs/recipes.md

Each training takes the same time: processor time without a GPU, wall-clock time with one. Two short
trainings first measure how long an image takes, which gives the number of epochs to schedule; a
training whose time is up in its last epoch is stopped, and scored as it is then. The dataroot holds
`unaligned/` and `aligned/`, as datasets/prepare_worldmaps_dataset.py makes them. Results are
appended to --results, one JSON object per line; those already there are not computed again, so a
command that was stopped can be repeated. --page writes the tables of that file into a page.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from util.argument_types import number, numbers
from util.errors import OneLineParser, UserError, one_line_errors
from util.files import write_whole

COMMON = (
    "--load_size 128 --crop_size 128 --ngf 16 --ndf 32 --num_threads 0 --display_id 0 --no_html"
)
UNET = "--model cycle_gan --netG unet_128"
# ResNets take any size: with crops of 64x64 they see four times as many in the same time
CROPS = "--netG resnet_6blocks --preprocess crop --crop_size 64"
PIX = "--model pix2pix --netG unet_128 --norm instance --load_size 143"
# --no_antialias turns off the anti-aliasing of downsampling again
SMOOTH = f"{UNET} --antialias --no_antialias --ema 0.99 --diffaug translation,cutout"
SMOOTH += " --lambda_identity 1"
# as in scripts/quickstart.sh, which splits each batch of two over two processes; where nothing is
# compiled, its --fast amounts to bf16
BEST = f"{SMOOTH} --ema 0.995 --lambda_A 7 --lambda_B 5 --lr 0.001 --batch_size 2"
BEST += " --precision bf16"
BEST_PIX = f"{PIX} --antialias --no_antialias --ema 0.99 --no_dropout --lr 0.0005"
BEST_PIX += " --precision bf16"
# name: (layout of the data, options); the first recipe of each layout follows the paper
RECIPES: dict[str, tuple[str, str]] = {
    "cycle_gan": ("unaligned", UNET),
    "+ antialias": ("unaligned", f"{UNET} --antialias"),
    "+ ema": ("unaligned", f"{UNET} --ema 0.99"),
    "+ hinge": ("unaligned", f"{UNET} --gan_mode hinge"),
    "+ spectral norm": ("unaligned", f"{UNET} --spectral_norm --normD none"),
    "+ R1": ("unaligned", f"{UNET} --gp r1 --lambda_gp 0.1 --gp_every 4"),
    "+ diffaug without color": ("unaligned", f"{UNET} --diffaug translation,cutout"),
    "+ diffaug": ("unaligned", f"{UNET} --diffaug color,translation,cutout"),
    "+ multiscale": ("unaligned", f"{UNET} --netD multiscale --n_layers_D 2"),
    "all of these that help": ("unaligned", f"{SMOOTH} --lr 0.0007 --lambda_A 5 --lambda_B 5"),
    "the quick start": ("unaligned", BEST),
    "cycle_gan with a ResNet": ("unaligned", f"--model cycle_gan {CROPS}"),
    "cut with a ResNet": ("unaligned", f"--model cut {CROPS}"),
    "FastCUT with a ResNet": ("unaligned", f"--model cut --CUT_mode FastCUT {CROPS}"),
    "dcl with a ResNet": ("unaligned", f"--model dcl {CROPS}"),
    "pix2pix": ("aligned", PIX),
    "pix2pix + ema": ("aligned", f"{PIX} --ema 0.99"),
    "pix2pix + antialias + ema": ("aligned", f"{PIX} --antialias --no_antialias --ema 0.99"),
    "pix2pix + multiscale + features": ("aligned", f"{PIX} --netD multiscale --lambda_feat 10"),
    "pix2pix with a ResNet": ("aligned", PIX.replace("unet_128", "resnet_6blocks")),
    "pix2pix with all that helps": ("aligned", BEST_PIX),
}
SAVES = 4  # epochs that are scored, including the last
# runs a script that gets SIGTERM, as a user would send it, when a timer of the process expires
TIMED = """
import runpy, signal, sys
timer, number, seconds, *sys.argv = sys.argv[1:]
signal.signal(int(number), lambda *_: signal.raise_signal(signal.SIGTERM))
signal.setitimer(int(timer), float(seconds))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(words: Iterable[str], gpu: bool, limit: float = 0) -> float:
    """Run train.py, and stop it after `limit` seconds (0: never); returns the seconds it took.

    Seconds are processor time, or wall-clock time with a GPU.
    """

    def now() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic() if gpu else used.ru_utime + used.ru_stime

    begin = now()
    if gpu:
        timer = (signal.ITIMER_REAL, int(signal.SIGALRM))
    else:
        timer = (signal.ITIMER_PROF, int(signal.SIGPROF))
    command = [sys.executable, "-c", TIMED, *map(str, (*timer, limit)), str(ROOT / "train.py")]
    command += words
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode not in (0, 128 + signal.SIGTERM):
        why = result.stderr.strip().rpartition("\n")[2]
        raise UserError(f"{' '.join(command)} failed: {why}")
    return now() - begin


def epochs_that_fit(words: list[str], pictures: int, seconds: float, gpu: bool) -> int:
    """The number of epochs that take at least `seconds`, estimated from two short trainings."""
    few, more, size = 1, 4, 20
    short = [*words, "--max_dataset_size", str(size), "--n_epochs_decay", "0", "--name", "trial"]
    begin, end = (run([*short, "--n_epochs", str(n)], gpu) for n in (few, more))
    image = (end - begin) / (more - few) / size
    return max(2, math.ceil((seconds - begin + few * size * image) / (image * pictures)))


def scores(folder: Path, dataroot: Path, phase: str, epoch: str, gpu: str) -> dict[str, float]:
    """Scores of one checkpoint on the pairs of a phase, by image and score: `fake_B PSNR`."""
    import image_translation

    with contextlib.redirect_stderr(io.StringIO()):  # hides its messages about loading
        report = image_translation.evaluate(
            dataroot=str(dataroot / "aligned"),
            dataset_mode="aligned",
            checkpoints_dir=str(folder),
            name="x",
            phase=phase,
            epoch=epoch,
            load_size=128,
            crop_size=128,
            gpu_ids=gpu,
            seed=1,
            scores="L1,PSNR,SSIM,grid",
        )
    return {
        f"{picture} {name}": score["value"]
        for picture, values in report["scores"].items()
        if picture.startswith("fake")
        for name, score in values.items()
    }


def measure(
    options: tuple[str, str], seed: int, dataroot: Path, seconds: float, epochs: int, gpu: str
) -> dict[str, Any]:
    """Train once, and score the last epoch and the one that is best on the validation tiles."""
    layout, words = options
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where = ["--dataroot", str(dataroot / layout), "--checkpoints_dir", name, "--name", "x"]
        how = [*COMMON.split(), *words.split(), *where, "--gpu_ids", gpu, "--seed", str(seed)]
        if not epochs:
            # an unpaired epoch is as long as the larger side
            folders = [dataroot / layout / part for part in ("trainA", "trainB", "train")]
            pictures = max(len(list(folder.glob("*"))) for folder in folders)
            epochs = epochs_that_fit(how, pictures, seconds, gpu != "-1")
        decay = epochs // 2
        every = -(-epochs // SAVES)
        how += ["--n_epochs", str(epochs - decay), "--n_epochs_decay", str(decay)]
        taken = run([*how, "--save_epoch_freq", str(every)], gpu != "-1", seconds)
        saved = [str(e) for e in range(every, epochs, every) if any(folder.glob(f"x/{e}_net_*"))]
        saved.append("latest")
        validation = {e: scores(folder, dataroot, "val", e, gpu)["fake_B PSNR"] for e in saved}
        best = max(validation, key=lambda e: validation[e])
        return {
            "epochs": epochs,
            "seconds": round(taken, 1),
            "best_epoch": best,
            "last": scores(folder, dataroot, "test", "latest", gpu),
            "best": scores(folder, dataroot, "test", best, gpu),
        }


def read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as e:
        raise UserError(f"--results {path} holds other lines than results: {e}") from e


def table(rows: list[dict[str, Any]], layout: str) -> str:
    """A Markdown table of the mean and the standard deviation over seeds."""

    def cell(of: list[dict[str, Any]], save: str, score: str) -> str:
        values = [row[save][score] for row in of if score in row[save]]
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{spread}"

    columns = {
        "PSNR there, last": ("last", "fake_B PSNR"),
        "best": ("best", "fake_B PSNR"),
        "SSIM": ("last", "fake_B SSIM"),
        "PSNR back, last": ("last", "fake_A PSNR"),
        "best ": ("best", "fake_A PSNR"),
        "grid 2": ("last", "fake_B grid 2"),
        "grid 4": ("last", "fake_B grid 4"),
    }
    lines = [
        f"| recipe | seeds | epochs | s | {' | '.join(columns)} |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for name, (of_layout, _) in RECIPES.items():
        of = [row for row in rows if row["recipe"] == name]
        if of_layout == layout and of:
            seconds = statistics.mean(row["seconds"] for row in of)
            cells = [cell(of, *column) for column in columns.values()]
            lines.append(
                f"| {name} | {len(of)} | {of[0]['epochs']} | {seconds:.0f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def write_page(page: Path, results: Path) -> None:
    """Put the tables between the markers `<!-- LAYOUT DATA MINUTES -->` and `<!-- end -->`."""
    text = page.read_text()
    rows = read(results)
    for data, minutes in sorted({(row["data"], row["minutes"]) for row in rows}):
        for layout in ("unaligned", "aligned"):
            begin = f"<!-- {layout} {data} {minutes:g} -->\n"
            if begin in text:
                head, _, rest = text.partition(begin)
                tail = rest.partition("<!-- end -->")[2]
                of = [r for r in rows if (r["data"], r["minutes"]) == (data, minutes)]
                text = f"{head}{begin}{table(of, layout)}\n<!-- end -->{tail}"
    write_whole(page, text)


def main() -> None:
    parser = OneLineParser(description="Compare recipes in equal time.")
    parser.add_argument("--dataroot", type=Path, help="has unaligned/ and aligned/")
    parser.add_argument(
        "--minutes", type=number(positive=True), default=2.0, help="for each training"
    )
    parser.add_argument("--seeds", type=numbers(""), default="1,2,3", help="numbers, with commas")
    parser.add_argument("--only", default=",".join(RECIPES), help="recipes, with commas")
    parser.add_argument("--gpu_ids", default="-1", help="-1 for the CPU")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "recipes.jsonl")
    parser.add_argument("--page", type=Path, help="write the tables into this page, and end")
    args = parser.parse_args()
    if args.page and not args.page.is_file():
        parser.error(f"--page {args.page}: there is no such page")
    if args.page:
        write_page(args.page, args.results)
        return
    if args.dataroot is None or not (args.dataroot / "aligned" / "test").is_dir():
        parser.error(f"--dataroot needs unaligned/ and aligned/, got {args.dataroot}")
    names = args.only.split(",")
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"--only: no recipe {unknown[0]!r}; there are {', '.join(RECIPES)}")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in names:
            key = {"recipe": name, "seed": seed, "minutes": args.minutes}
            key["data"] = args.dataroot.resolve().name
            done = read(args.results)
            if any(row.items() >= key.items() for row in done):
                continue
            print(f"{name}, seed {seed}: training", end=" ... ", flush=True)
            alike = [r for r in done if r.items() >= {**key, "seed": r["seed"]}.items()]
            epochs = alike[0]["epochs"] if alike else 0
            facts = measure(
                RECIPES[name], seed, args.dataroot, args.minutes * 60, epochs, args.gpu_ids
            )
            with open(args.results, "a") as file:
                file.write(json.dumps({**key, **facts}) + "\n")
            psnr = facts["last"]["fake_B PSNR"]
            print(f"{facts['seconds']} s, PSNR {psnr:.2f}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
