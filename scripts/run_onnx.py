#!/usr/bin/env python3
"""Translate images with an ONNX file that scripts/export.py has written, without PyTorch.

    python run_onnx.py MODEL.onnx IMAGES TRANSLATED

Needs numpy, Pillow and onnxruntime, and nothing else of this repository: copy it where you like.
Each image is translated at its own size and written as PNG under its own relative path.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import NoReturn

NO_INPUT = ".no_input"  # a file of this name marks a folder of results
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OneLineParser(argparse.ArgumentParser):
    """A parser that prints errors as one line on stderr, with exit code 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="Translate images with ONNX Runtime.")
    parser.add_argument("model", type=Path, help="file of scripts/export.py --format onnx")
    parser.add_argument("images", type=Path, help="image or folder of images to read")
    parser.add_argument("translated", type=Path, help="folder to write")
    parser.add_argument("--device", default="cpu", choices=PROVIDERS, help="where to run [cpu]")
    return parser.parse_args(argv)


def stop(message: str) -> NoReturn:
    """End with one line on stderr and exit code 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def open_model(path: Path, device: str):
    """The session and the file's metadata."""
    try:
        import onnxruntime
    except ImportError:
        stop("this needs the package onnxruntime: pip install onnxruntime")
    if not path.is_file():
        stop(f"no model {path}: write one with scripts/export.py --format onnx")
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        stop(f"--device {device}: this onnxruntime can't; install onnxruntime-gpu, or say cpu")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=[PROVIDERS[device]])
    except Exception as e:
        reason = " ".join(str(e).split())[:200]
        stop(f"can't read the model {path}: {reason}; write one with scripts/export.py")
    return session, session.get_modelmeta().custom_metadata_map


def refuse(e: OSError) -> None:
    stop(f"can't read the folder {e.filename}: {e.strerror}")


def find_pictures(root: Path, translated: Path) -> list[Path]:
    """`root`, or all images below it, except hidden ones and those in folders of results."""
    source = root.parent if root.is_file() else root
    if source.resolve() == translated.resolve():
        stop(f"{translated} is the folder to read: what is written would replace its images")
    if translated.suffix.lower() in ENDINGS and not translated.is_dir():
        stop(f"{translated} is named like an image: give the folder to write to")
    if root.is_file():
        return [root]
    if not root.is_dir():
        stop(f"no folder or image {root}: give an image, or a folder of images")
    paths: list[Path] = []
    seen = {translated.resolve()}
    for folder, below, names in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder)
        if here.resolve() in seen or (here != root and NO_INPUT in names):
            below.clear()
            continue
        seen.add(here.resolve())  # a link may lead back to a folder above it
        below[:] = sorted(name for name in below if not name.startswith("."))
        paths += [here / name for name in names if not name.startswith(".")]
    pictures = sorted(path for path in paths if path.suffix.lower() in ENDINGS)
    if not pictures:
        stop(f"no images in {root}: looked for {' '.join(ENDINGS)}")
    if others := len(paths) - len(pictures):
        print(f"left out: {others} files whose names do not end in {' '.join(ENDINGS)}")
    return pictures


def name_results(root: Path, paths: list[Path], translated: Path) -> list[tuple[Path, Path]]:
    """Each image with the file to write; ends the program if one would replace an image."""
    source = root.parent if root.is_file() else root
    relative = [path.relative_to(source) for path in paths]
    times = Counter([*relative, *(name.with_suffix("") for name in relative)])
    jobs = []
    for path, name in zip(paths, relative, strict=True):
        # a.png and a.jpg become a.png.png and a.jpg.png
        several = times[name.with_suffix("")] > 1
        name = name.with_name((name.name if several else name.stem) + ".png")
        jobs.append((path, translated / name))
    images = set(map(os.path.realpath, paths))  # `resolve` fails for a link to itself
    for path, target in jobs:
        if os.path.realpath(target) in images:
            stop(f"the result of {path} would replace the image {target}: give another folder")
    return jobs


def refuse_rare_tiff(stored) -> None:
    """Raise ValueError for kinds of TIFF, told by their tags, that Pillow reads wrongly."""
    bits, kinds, ends_white, planes = (stored.tag_v2.get(n, (1,)) for n in (258, 339, 262, 284))
    deep = max(bits) > 8
    if deep and (2 in kinds or ends_white == 0 or planes == 2 or (max(bits) > 16 and 1 in kinds)):
        raise ValueError("a rare kind of TIFF: convert it to unsigned 16 bits")


def read_picture(path: Path, channels: int, low: float, high: float, known: list[float]):
    """An image as an array (1, C, H, W) of float32 from `low` to `high`, and its transparency.

    `known` are the pixel values mapped to these, if the model was trained with --value_range.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as stored:
        if stored.format == "TIFF":
            refuse_rare_tiff(stored)
        image = ImageOps.exif_transpose(stored)  # upright, as viewers show it
        deep = image.mode[0] in "IF"
        transparent = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        transparent = transparent and not deep
        alpha = image.convert("RGBA").getchannel("A") if transparent else None
        first, last = known or (0, 255)
        if deep:  # 16-bit grey, or floats in [0, 1]: not reduced to 8 bits
            levels = np.asarray(image).astype(np.float32)
            if not known and image.mode == "F":
                last = 1
                if not (levels.min() >= 0 and levels.max() <= 1):
                    raise ValueError("floats must be in [0, 1]")
            elif not known:
                last = 65535
            levels = np.repeat(levels[..., None], channels, axis=2)
        else:
            levels = np.asarray(image.convert("L" if channels == 1 else "RGB"), np.float32)
            levels = levels.reshape(*levels.shape[:2], channels)
    unit = (levels - first) / (last - first)
    values = (unit * (high - low) + low).transpose(2, 0, 1)[None].astype(np.float32)
    return values, alpha


def write_picture(values, alpha, path: Path, low: float, high: float) -> None:
    """Write an array (1, C, H, W) with values from `low` to `high` as 8-bit PNG."""
    import numpy as np
    from PIL import Image

    levels = ((values[0] - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)
    levels = levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)
    image = Image.fromarray(levels)
    if alpha is not None:
        image.putalpha(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    # moved into place when complete: Ctrl-C or a full disk leave no partial image
    # the name of an image may be as long as names can be
    temporary = path.with_name(f".{path.stem[:48]}.{secrets.token_hex(4)}.tmp")
    try:
        image.save(temporary, "PNG")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    session, metadata = open_model(args.model, args.device)
    given = session.get_inputs()[0]
    inputs, outputs = given.shape[1], session.get_outputs()[0].shape[1]
    if inputs not in (1, 3) or outputs not in (1, 3):
        stop(f"{args.model} takes {inputs} channels and gives {outputs}: images have 1 or 3")
    low, high = map(float, metadata.get("value_range", "-1 1").split())
    known = [float(word) for word in metadata.get("pictures", "").split()]
    print(", ".join(f"{key}: {value}" for key, value in sorted(metadata.items())))

    paths = find_pictures(args.images, args.translated)
    jobs = name_results(args.images, paths, args.translated)
    try:
        args.translated.mkdir(parents=True, exist_ok=True)
        (args.translated / NO_INPUT).touch()
    except OSError as e:
        stop(f"can't write to {args.translated}: {e.strerror}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes what is half-written
    failed: list[str] = []
    for path, target in jobs:
        try:
            picture, alpha = read_picture(path, inputs, low, high, known)
            values = session.run(None, {given.name: picture})[0]
            write_picture(values, alpha, target, low, high)
        except Exception as e:
            failed.append(f"{path}: {' '.join(str(e).split())[:200] or type(e).__name__}")
    print(f"translated {len(paths) - len(failed)} of {len(paths)} images to {args.translated}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module=r"PIL\.")  # oddities of an image
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
