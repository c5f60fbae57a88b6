#!/usr/bin/env python3
"""A local page to try a trained model: drop an image, see what becomes of it.

    python scripts/demo.py --name maps_cyclegan

Listens on 127.0.0.1 unless --host says otherwise, and requests nothing from other machines. Needs
the package gradio, which nothing else here needs: `bash scripts/setup.sh --demo` installs it into
.venv/demo, where it is found.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from util.errors import end_quietly_on_interrupt

end_quietly_on_interrupt()  # before the imports, which take seconds

import numpy as np
import torch
from PIL import Image

from data.pictures.reading import read_picture
from data.pictures.values import Range, change_depth, denormalize, normalize, opaque_value
from models import load_generator
from models.ema import WEIGHTS
from models.inference.translator import Translator, to_pil
from util.argument_types import experiment_name, whole_number
from util.errors import OneLineParser, UserError, one_line_errors
from util.picture_files import HOW_RANGE
from util.run.saved_options import experiment_folder, read_saved_options
from util.run.weight_files import load_weights

HEIGHT = 340  # pixels of input and output on the page
PHONE = 320  # least width of input and output, which are stacked on narrow screens
# small images are enlarged, which gradio does not do; and the output gets the size of the input,
# which has a row of buttons below it
CSS = """
#input img, #output img { width: 100%; height: 100%; object-fit: contain; }
#output img { height: calc(100% - 40px); margin-bottom: 40px; }
"""
_GENERATOR = re.compile(r"(.+)_net_G(_A|_B)?(?:_ema)?\.pth")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description="Serve a page to try a model.")
    add = parser.add_argument
    add("--name", required=True, type=experiment_name, help="name of the experiment")
    add("--checkpoints_dir", default="./checkpoints", help="where experiments are kept")
    add("--weights", default="auto", choices=WEIGHTS, help="averaged (--ema) or raw [auto]")
    add("--device", help="cpu, cuda, cuda:1, ... [the GPU if there is one]")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all [127.0.0.1]")
    port = whole_number(0, 65535)
    add("--port", type=port, default=7860, help="port to listen on; 0: any that is free [7860]")
    largest = "shrink images to this longest side [2048]"
    add("--largest", type=whole_number(1), default=2048, help=largest)
    return parser.parse_args(argv)


def choices(folder: Path) -> tuple[list[str], list[str]]:
    """Epochs that have a generator, newest first, and the directions that have one."""
    found: dict[str, set[str]] = {}
    for path in folder.glob("[!.]*_net_G*.pth"):
        if match := _GENERATOR.fullmatch(path.name):
            found.setdefault(match.group(1), set()).add(match.group(2) or "")
    if not found:
        load_weights(folder / "latest_net_G.pth")  # raises, and says what is there instead
    named = [epoch for epoch in ("latest", "best") if epoch in found]
    numbers = sorted((e for e in found if e.isdigit()), key=int, reverse=True)
    others = sorted(found.keys() - {*named, *numbers})
    trained = read_saved_options(folder).get("direction", "AtoB")
    both = any({"_A", "_B"} <= kinds for kinds in found.values())
    back = "BtoA" if trained == "AtoB" else "AtoB"
    return [*named, *numbers, *others], [trained, back] if both else [trained]


def shrink(pixels: np.ndarray, largest: int) -> np.ndarray:
    """Pixels (H, W, C) of any type, scaled down where a side is longer than `largest`."""
    height, width = pixels.shape[:2]
    scale = largest / max(height, width)
    if scale >= 1:
        return pixels
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(x, size, mode="bicubic", antialias=True)
    values = x[0].permute(1, 2, 0).numpy()
    values = values.clip(pixels.min(), pixels.max())  # bicubic weights overshoot at edges
    return (values.round() if pixels.dtype.kind in "ui" else values).astype(pixels.dtype)


def to_8_bits(pixels: np.ndarray, alpha: np.ndarray | None, known: Range | None) -> Image.Image:
    """Pixels (H, W, C) as a browser can show them: 8 bits, with transparency if there is any.

    `known` are the values that become black and white; None: the limits of the dtype.
    """
    parts = [denormalize(normalize(pixels, known), np.uint8)]
    if alpha is not None:
        parts.append(change_depth(alpha, np.uint8, opaque_value(alpha, known)))
    return to_pil(np.concatenate(parts, axis=2))


def error_message(error: Exception, given: str) -> str:
    """The message of an error about the image `given`, adapted to the page."""
    # the page has no --value_range, and must not show the folder of uploads on this machine
    here = "save 8 or 16 bits, or floats in [0, 1], or give --value_range to test.py"
    return str(error).replace(given, Path(given).name).replace(HOW_RANGE, here)


def translated(G: Translator, given: str, largest: int) -> tuple[Any, Any, str]:
    """An uploaded image and its translation, in 8 bits for the page, and what to say of them."""
    read = read_picture(given, upright=True)
    pixels = shrink(read.pixels, largest)
    alpha = None if read.alpha is None else shrink(read.alpha[..., None], largest)
    start = time.perf_counter()
    result = G(pixels)
    seconds = time.perf_counter() - start
    before, after = (to_8_bits(x, alpha, G.value_range) for x in (pixels, result))
    size = f"{before.width}x{before.height}"
    return before, after, f"{size} in {seconds:.2f} s, {G.weights.name} on {G.device}"


def build(args: argparse.Namespace, gradio: Any) -> Any:
    """The gradio page for an experiment."""
    folder = experiment_folder(args)
    epochs, directions = choices(folder)

    @functools.lru_cache(maxsize=4)
    def generator(direction: str, epoch: str) -> Any:
        return load_generator(folder, direction, epoch, args.device, weights=args.weights)

    first = generator(directions[0], epochs[0])  # fails before the page is served
    if not {first.input_nc, first.output_nc} <= {1, 3}:
        raise UserError(
            f"the page takes and shows grey or RGB, {args.name} goes from {first.input_nc} to "
            f"{first.output_nc} channels: use test.py"
        )

    def translate(given: str | None, direction: str, epoch: str) -> tuple[Any, Any, str]:
        if given is None:
            return None, None, "drop an image first"
        try:
            before, after, said = translated(generator(direction, epoch), given, args.largest)
        except UserError as e:
            # not gradio.Error, which vanishes and leaves what was said of an earlier image
            return None, None, error_message(e, given)
        except Exception as e:
            raise gradio.Error("this can't be done, see the terminal") from e
        return after, (before, after), said

    theme = gradio.themes.Default(
        # system fonts only, none from the net
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    # every 10 minutes, delete uploads older than an hour
    forget = (600, 3600)
    title = f"{args.name}: try it"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=forget) as page:
        gradio.Markdown(f"## {args.name}")
        with gradio.Row():
            direction = gradio.Radio(directions, value=directions[0], label="direction")
            epoch = gradio.Dropdown(epochs, value=epochs[0], label="epoch")
        with gradio.Row():
            source = gradio.Image(
                type="filepath",
                label="input",
                min_width=PHONE,
                sources=["upload", "clipboard"],
                height=HEIGHT,
                elem_id="input",
            )
            output = gradio.Image(
                type="pil",
                image_mode=None,
                label="output",
                min_width=PHONE,
                format="png",
                buttons=["download", "fullscreen"],  # not "share", which uploads
                height=HEIGHT,
                elem_id="output",
            )
        # gradio would convert uploads to 8 bits, and show their folder in its errors
        source.preprocess = lambda upload: upload and upload.path
        said = gradio.Markdown(elem_id="said")
        slider = gradio.ImageSlider(
            type="pil", label="drag to compare", format="png", elem_id="compare"
        )
        # not source.change, which fires twice for a second image: gradio would write the result
        # again while the browser reads it, and show a broken image
        for change in (source.upload, source.clear, direction.change, epoch.change):
            change(translate, [source, direction, epoch], [output, slider, said], api_name=False)
    page.chosen_theme = theme
    return page


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0; raises UserError if it can't be used."""
    with socket.socket() as s:
        # without this, the port of a page that has just ended counts as taken for a minute
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise UserError(
                f"can't listen on --host {host} --port {port}: {e.strerror or e}; choose another "
                "one, --port 0 takes any that is free"
            ) from e
        return s.getsockname()[1]


def go_where_gradio_is() -> None:
    """Restart this program with the Python of `scripts/setup.sh --demo`, if there is one."""
    place = ROOT / ".venv" / "demo"
    python = place / "bin" / "python"
    if python.exists() and not Path(sys.prefix).samefile(place):
        os.execv(python, [str(python), *sys.argv])


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # before the import, which reads them
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio
    except ImportError:
        go_where_gradio_is()
        raise UserError(
            "the page needs the package gradio: bash scripts/setup.sh --demo, or pip install gradio"
        ) from None
    page = build(args, gradio)
    _, url, _ = page.launch(
        server_name=args.host,
        server_port=free_port(args.host, args.port),
        share=False,
        theme=page.chosen_theme,
        css=CSS,
        ssr_mode=False,
        show_error=True,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"try it at {url} (Ctrl-C ends this)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    with one_line_errors():
        main()
