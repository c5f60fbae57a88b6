"""Put images of two folders side by side, as pix2pix's aligned datasets need them.

    python datasets/combine_A_and_B.py --fold_A data/A --fold_B data/B --fold_AB data/AB

`data/A` and `data/B` have the same subfolders (train, val, test) with images of the same names;
`data/AB` gets the subfolders with the pairs A|B. With --use_AB, a pair is x_A.jpg and x_B.jpg, and
the result is x.jpg.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.errors import end_quietly_on_interrupt

if __name__ == "__main__":
    end_quietly_on_interrupt()  # before the imports, which take a second

import numpy as np
from PIL import Image

from data.pictures.reading import TIFF, read_picture
from data.pictures.values import fit_channels
from data.pictures.writing import write_picture
from util.background import map_in_threads
from util.errors import OneLineParser, UserError, run_tool
from util.files import must_be_free, staged
from util.picture_files import is_image_file, open_image

# with 4:2:0 colours would bleed over the seam from one image into the other
JPEG = {"quality": 95, "subsampling": 0}
SHOWN = 5  # of the failures, so that the line stays readable

Pair = tuple[Path, Path, Path]  # A, B and where the combined image goes


def combine(pair: Pair) -> None:
    """Write A|B to a file; JPEG and WebP with quality 95, other formats without loss.

    PNG and TIFF keep more than 8 bits if both images have the same dtype; all others get 8 bits.
    Raises UserError if an image can't be read, or the two differ in size.
    """
    path_a, path_b, path_ab = pair
    ending = path_ab.suffix.lower()
    a, b = read_pair(path_a, path_b, deep=ending in (".png", *TIFF))
    if a.shape[:2] != b.shape[:2]:
        sizes = [f"{x.shape[1]}x{x.shape[0]}" for x in (a, b)]
        raise UserError(
            f"{path_a} is {sizes[0]} but {path_b} is {sizes[1]}: a pair must have one size"
        )
    channels = 3 if a.dtype == np.uint8 else max(a.shape[2], b.shape[2])
    both = np.hstack([fit_channels(pixels, channels) for pixels in (a, b)])
    if a.dtype != np.uint8:
        write_picture(path_ab, both)
        return
    options = {".jpg": JPEG, ".jpeg": JPEG, ".webp": {"quality": 95}}
    Image.fromarray(both).save(path_ab, **options.get(ending, {}))


def read_pair(path_a: Path, path_b: Path, deep: bool) -> list[np.ndarray]:
    """Pixels (H, W, C) of both images, of one dtype: of 8 bits unless `deep` and both have more."""
    if deep:
        with contextlib.suppress(UserError):  # formats that are only read as 8 bits
            a, b = (read_picture(path, upright=True).pixels for path in (path_a, path_b))
            if a.dtype == b.dtype:
                return [a, b]
    return [np.asarray(open_image(path)) for path in (path_a, path_b)]


def attempt(pair: Pair) -> str | None:
    """Combine a pair; returns what went wrong, or None."""
    try:
        combine(pair)
    except (UserError, OSError, ValueError, MemoryError) as e:
        return str(e) if isinstance(e, UserError) else f"{pair[0]}: {e!r}"
    return None


def combine_all(pairs: list[Pair], threads: int | None = None) -> None:
    """Combine all pairs, in threads: Pillow releases the GIL while it decodes and encodes.

    Raises UserError for those that failed, after all the others: one run shows all that is wrong.
    """
    failures = [reason for reason in map_in_threads(attempt, pairs, threads) if reason]
    if failures:
        more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
        shown = "; ".join(failures[:SHOWN])
        raise UserError(f"{len(failures)} of {len(pairs)} pairs failed: {shown}{more}")


def pictures(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if is_image_file(p) and p.is_file())


def target(name: str) -> str:
    """The name of a combined image; PNG for formats that are not written here."""
    written = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp")
    return name if name.lower().endswith(written) else str(Path(name).with_suffix(".png"))


def find_pairs(
    fold_a: Path, fold_b: Path, fold_ab: Path, num_imgs: int, use_ab: bool
) -> tuple[list[Pair], list[Path]]:
    """The pairs of one split, and the images of both sides that have no partner."""
    in_a = [p for p in pictures(fold_a) if not use_ab or "_A." in p.name]
    in_b = [p for p in pictures(fold_b) if not use_ab or "_B." in p.name]
    partners = {a: fold_b / (a.name.replace("_A.", "_B.") if use_ab else a.name) for a in in_a}
    alone = [a for a, b in partners.items() if not b.is_file()]
    alone += sorted({*in_b} - {*partners.values()})
    pairs = [
        (a, partners[a], fold_ab / target(a.name.replace("_A.", ".") if use_ab else a.name))
        for a in in_a[:num_imgs]
        if partners[a].is_file()
    ]
    return pairs, alone


def main() -> None:
    """Read the command line and combine the splits that A and B have."""
    parser = OneLineParser(description="Put the images of two folders side by side.")
    parser.add_argument("--fold_A", required=True, type=Path, help="left: has train, val, test")
    parser.add_argument("--fold_B", required=True, type=Path, help="right: the same names as A")
    parser.add_argument("--fold_AB", required=True, type=Path, help="gets the combined images")
    parser.add_argument("--num_imgs", type=int, default=1000000, help="at most, of each split")
    parser.add_argument("--use_AB", action="store_true", help="pairs are x_A.jpg and x_B.jpg")
    parser.add_argument("--no_multiprocessing", action="store_true", help="only one thread")
    args = parser.parse_args()
    if args.num_imgs < 1:
        parser.error(f"--num_imgs {args.num_imgs}: must be 1 or more")
    for flag in ("fold_A", "fold_B"):
        if not getattr(args, flag).is_dir():
            parser.error(f"--{flag} {getattr(args, flag)}: there is no such folder")

    sides = [{p.name for p in f.iterdir() if p.is_dir()} for f in (args.fold_A, args.fold_B)]
    splits = sorted(sides[0] & sides[1])
    if not splits:
        raise UserError(
            f"{args.fold_A} and {args.fold_B} have no subfolder in common: "
            "the images must be in train, val or test below both"
        )
    if one_sided := sorted(sides[0] ^ sides[1]):
        print(f"left out, since only one side has them: {', '.join(one_sided)}")
    for folder in (args.fold_A, args.fold_B):
        if loose := pictures(folder):
            print(
                f"left out: {len(loose)} images right in {folder}, such as {loose[0].name}: give "
                "the folder above train, val and test"
            )
    for split in splits:
        must_be_free(args.fold_AB / split)
    with staged(args.fold_AB) as folder:
        jobs: dict[str, list[Pair]] = {}
        for split in splits:
            pairs, alone = find_pairs(
                args.fold_A / split, args.fold_B / split, folder / split, args.num_imgs, args.use_AB
            )
            if alone:
                print(f"{split}: {len(alone)} have no partner, such as {alone[0]}")
            below = sum(map(is_image_file, (args.fold_A / split).glob("*/**/*")))
            if below:
                print(f"{split}: {below} images of A in folders below are not read")
            if pairs:
                (folder / split).mkdir()
                jobs[split] = pairs
        if not jobs:
            shape = "x_A.jpg in A and x_B.jpg in B" if args.use_AB else "the same name in A and B"
            raise UserError(
                f"no pair found in {', '.join(splits)} of {args.fold_A} and {args.fold_B}: "
                f"a pair has {shape}"
            )
        everything = list(itertools.chain.from_iterable(jobs.values()))
        combine_all(everything, 1 if args.no_multiprocessing else None)
    for split, pairs in jobs.items():
        print(f"{split}: {len(pairs)} pairs in {args.fold_AB / split}")


if __name__ == "__main__":
    run_tool(main)
