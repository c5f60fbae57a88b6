"""Turn an unaligned dataset whose images do correspond into an aligned one for pix2pix.

    python datasets/make_dataset_aligned.py --dataset-path ./datasets/mine

The images of trainA and trainB, paired in the order of their names, become train/0000.jpg, ...;
those of testA and testB become test/0000.jpg, ...
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.errors import end_quietly_on_interrupt

if __name__ == "__main__":
    end_quietly_on_interrupt()  # before the imports, which take a second

from combine_A_and_B import Pair, combine_all

from util.errors import OneLineParser, UserError, run_tool
from util.files import must_be_free, staged
from util.picture_files import IMG_EXTENSIONS, is_image_file


def picture_tree(folder: Path) -> list[Path]:
    """All images below a folder, sorted by their paths; raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: trainA, trainB, testA and testB are needed")
    found = [p for p in folder.rglob("*") if is_image_file(p) and p.is_file()]
    if not found:
        raise UserError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return sorted(found)


def find_pairs(dataset: Path, phase: str, output: Path) -> list[Pair]:
    """Pair `<phase>A` with `<phase>B` in sorted order; the results go to `output`/0000.jpg, ...

    Raises UserError if one is missing or empty, or they hold different numbers of images.
    """
    left = picture_tree(dataset / f"{phase}A")
    right = picture_tree(dataset / f"{phase}B")
    if len(left) != len(right):
        raise UserError(
            f"{dataset / f'{phase}A'} holds {len(left)} images and {phase}B {len(right)}: "
            "each needs its partner"
        )
    return [
        (a, b, output / f"{i:04d}.jpg") for i, (a, b) in enumerate(zip(left, right, strict=True))
    ]


def main() -> None:
    """Read the command line and write train/ and test/ into the dataset."""
    parser = OneLineParser(
        description="Pair trainA with trainB and testA with testB, in name order."
    )
    parser.add_argument(
        "--dataset-path",
        "--dataset_path",
        required=True,
        type=Path,
        help="folder with trainA, trainB, testA and testB",
    )
    dataset = parser.parse_args().dataset_path
    if not dataset.is_dir():
        parser.error(f"--dataset-path {dataset}: there is no such folder")
    phases = ("test", "train")
    for phase in phases:
        must_be_free(dataset / phase)
    with staged(dataset) as folder:
        jobs = {phase: find_pairs(dataset, phase, folder / phase) for phase in phases}
        for phase in phases:
            (folder / phase).mkdir()
        combine_all([pair for pairs in jobs.values() for pair in pairs])
    for phase, pairs in jobs.items():
        print(f"{phase}: {len(pairs)} pairs in {dataset / phase}")


if __name__ == "__main__":
    run_tool(main)
