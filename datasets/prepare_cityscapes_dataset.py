"""Make the Cityscapes dataset for pix2pix and CycleGAN from the files of its publisher.

Get gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip from https://cityscapes-dataset.com,
unzip them, and then

    python datasets/prepare_cityscapes_dataset.py --gtFine_dir gtFine --leftImg8bit_dir \\
        leftImg8bit --output_dir ./datasets/cityscapes

train/ and test/ get the pairs photograph|labels as 0.jpg, ... (512x256), trainA/ and testA/ the
photographs as 0_A.jpg, trainB/ and testB/ the labels as 0_B.jpg (256x256). As in the papers, what
the publisher calls val is the test set, since the labels of its own test set are secret.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.errors import end_quietly_on_interrupt

if __name__ == "__main__":
    end_quietly_on_interrupt()  # before the imports, which take a second

import numpy as np
from PIL import Image

from util.errors import OneLineParser, UserError, run_tool
from util.files import must_be_free, staged
from util.picture_files import open_image

SIZE = (256, 256)
PHASES = {"val": "test", "train": "train"}  # the publisher's -> ours
LABEL_END, PHOTO_END = "_gtFine_color.png", "_leftImg8bit.png"


def find_pairs(labels_dir: Path, photos_dir: Path, phase: str) -> list[tuple[Path, Path]]:
    """The photographs of a phase, each with its labels, sorted by city and name.

    Raises UserError if there are none, or one has no partner.
    """
    photos, labels = (
        {(p.parent.name, p.name.removesuffix(end)): p for p in (root / phase).glob(f"*/*{end}")}
        for root, end in ((photos_dir, PHOTO_END), (labels_dir, LABEL_END))
    )
    for found, root, end in ((photos, photos_dir, PHOTO_END), (labels, labels_dir, LABEL_END)):
        if not found:
            raise UserError(f"{root / phase} holds no <city>/*{end}: give the unzipped folder")
    if alone := sorted(photos.keys() ^ labels.keys()):
        path = photos.get(alone[0]) or labels[alone[0]]
        raise UserError(
            f"{path} has no partner, like {len(alone) - 1} others: unzip the archives again"
        )
    return [(photos[key], labels[key]) for key in sorted(photos)]


def convert(pairs: list[tuple[Path, Path]], output: Path, phase: str) -> None:
    """Write pair number i to `output` as <phase>/i.jpg, <phase>A/i_A.jpg and <phase>B/i_B.jpg."""
    for end in ("", "A", "B"):
        (output / f"{phase}{end}").mkdir()
    for i, (photo_path, label_path) in enumerate(pairs):
        photo = open_image(photo_path).resize(SIZE, Image.Resampling.BICUBIC)
        # mixing two classes' colours at their border would make a third class
        label = open_image(label_path).resize(SIZE, Image.Resampling.NEAREST)
        for image, name in (
            (Image.fromarray(np.hstack([photo, label])), f"{phase}/{i}.jpg"),
            (photo, f"{phase}A/{i}_A.jpg"),
            (label, f"{phase}B/{i}_B.jpg"),
        ):
            image.save(output / name, quality=100, subsampling=0)
        if (i + 1) % 500 == 0:
            print(f"{phase}: {i + 1} of {len(pairs)}", flush=True)


def main() -> None:
    """Read the command line and convert both phases."""
    parser = OneLineParser(description="Make the Cityscapes dataset for pix2pix and CycleGAN.")
    parser.add_argument("--gtFine_dir", required=True, type=Path, help="unzipped label maps")
    parser.add_argument("--leftImg8bit_dir", required=True, type=Path, help="unzipped photographs")
    parser.add_argument("--output_dir", type=Path, default=Path("./datasets/cityscapes"))
    args = parser.parse_args()
    for flag in ("gtFine_dir", "leftImg8bit_dir"):
        if not getattr(args, flag).is_dir():
            parser.error(f"--{flag} {getattr(args, flag)}: there is no such folder")
    jobs = {
        ours: find_pairs(args.gtFine_dir, args.leftImg8bit_dir, theirs)
        for theirs, ours in PHASES.items()
    }
    for phase in jobs:
        for end in ("", "A", "B"):
            must_be_free(args.output_dir / f"{phase}{end}")
    with staged(args.output_dir) as folder:
        for phase, pairs in jobs.items():
            convert(pairs, folder, phase)
    for phase, pairs in jobs.items():
        print(f"{phase}: {len(pairs)} pairs in {args.output_dir / phase}")


if __name__ == "__main__":
    run_tool(main)
