"""A trained generator as a function of pictures.

from models import load_generator

G = load_generator("checkpoints/maps_cyclegan", "AtoB")
out = G(Image.open("photo.jpg"))
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import models
from data.pictures.picture_io import (
    Picture,
    Range,
    change_depth,
    fit_channels,
    from_pil,
    from_unit,
    naming,
    read_picture,
    to_unit,
)
from models.ema import WEIGHTS, choose_weights
from models.networks import GENERATORS
from models.norms import NORMS, get_norm_layer
from models.padding import apply_padded
from models.speed.acceleration import PRECISIONS, independent_of_batch, prepare
from models.weights import State, describe, explain_mismatch, fit_state_dict
from util import randomness
from util.errors import UserError, first_line, warn
from util.find_class import names
from util.run import checkpoint
from util.run.saved_options import parse_range, read_saved_options

from .sizes import size_rule
from .tiles import ArrayRows, TileOptions, autocast_of, translate_in_tiles

FARTHEST = 2.0  # magnitude up to which values of a tensor pass for some in [-1, 1]
_reading = threading.Lock()
_computing = threading.Lock()


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Within, `fp32` is exact on a GPU too: by a flag of the process, so one thread at a time."""
    if precision != "fp32" or not torch.backends.cudnn.allow_tf32:
        yield
        return
    with _computing:
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = True


def load_generator(
    folder: str | os.PathLike,
    direction: str | None = None,
    epoch: str | int = "latest",
    device: str | torch.device | None = None,
    precision: str = "tf32",
    eval: bool = False,
    value_range: Range | None = None,
    weights: str = "auto",
) -> Translator:
    """The generator of an experiment, ready to be called with pictures.

    Args:
        folder: the experiment's folder, such as `checkpoints/maps_cyclegan`.
        direction: `AtoB` or `BtoA`; None is the way that was trained.
        epoch: which save: `latest`, a number, or `iter_5000`.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; None takes a GPU if there is one.
        precision: `tf32`, `fp32`, `bf16` or `fp16`, as `--precision`.
        eval: as `--eval`: batch norms use the statistics of training and dropout is off. Without
            it they are as in training, which is what the papers and `test.py` do: each picture has
            its own statistics, and dropout draws from torch's random source. For the usual CycleGAN
            (instance norm, no dropout) this makes no difference.
        value_range: which values of pictures and arrays become -1 and 1, as `--value_range`; None
            is as it was trained, without which integers map from all of their type and floats
            from [0, 1].
        weights: `ema` (of a training with `--ema`), `raw`, or `auto`: averaged if there are any.

    The architecture comes from `train_opt.txt` in the folder, or without that file from the weights
    themselves. Raises UserError (a ValueError) that says what is missing or does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        there = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
        raise UserError(f"no folder {folder}: {folder.parent} has {', '.join(there[:8]) or 'none'}")
    if direction not in ("AtoB", "BtoA", None):
        raise UserError(f"direction '{direction}': choose AtoB, BtoA or None")
    if precision not in PRECISIONS:
        raise UserError(f"precision '{precision}': choose from {', '.join(PRECISIONS)}")
    if weights not in WEIGHTS:
        raise UserError(f"weights '{weights}': choose from {', '.join(WEIGHTS)}")
    if value_range is not None:
        try:
            low, high = map(float, value_range)
        except (TypeError, ValueError):
            raise UserError(f"value_range {value_range}: give two numbers, (LOW, HIGH)") from None
        if not low < high:
            raise UserError(f"value_range {value_range}: the first must be the lower one")
    chosen = _device(device)
    saved = read_saved_options(folder)
    trained = saved.get("direction")
    name = "G"
    path = choose_weights(folder, str(epoch), name, weights)
    if path.exists():
        if direction and trained and direction != trained:
            raise UserError(
                f"{folder} was trained {trained} and has one generator: it can't go {direction}"
            )
    elif any(folder.glob("[!.]*_net_G_[AB]*.pth")):
        side = "A" if direction in (trained or "AtoB", None) else "B"
        name = f"G_{side}"
        path = choose_weights(folder, str(epoch), name, weights)
    state = checkpoint.load_weights(path, "cpu")
    with unchanged_process():
        net, built = _rebuild(state, saved, path, name)
    options = {**saved, **built}
    options.update(direction=direction or trained or "AtoB", epoch=str(epoch), eval=eval)
    net.to(chosen).train(not eval)
    prepare(net, chosen, precision)
    value_range = value_range or parse_range(saved.get("value_range"))
    return Translator(net, chosen, options, path, value_range, precision)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device '{device}' can't be used: {str(e).splitlines()[0]}") from e
    return chosen


def _rebuild(
    state: State, saved: dict[str, str], path: Path, name: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The network that these weights belong to, with them, and the options that it was built with.

    It is what the saved options say, else what the weights look like, else the generator that the
    saved model makes for itself.
    """
    problems: list[str] = []
    looks = _as_it_looks(state, saved)
    sampling = looks.pop("antialias", ())  # weights tell
    for built in (_as_saved(state, saved), looks):
        if built.get("netG") not in GENERATORS:
            continue
        down, up = (*sampling, False, False)[:2]
        net = GENERATORS[built["netG"]](
            built["input_nc"],
            built["output_nc"],
            built["ngf"],
            norm_layer=get_norm_layer(built["norm"]),
            use_dropout=not built["no_dropout"],
            **({"antialias": down, "antialias_up": up} if down or up else {}),
        )
        problem = _load(net, state)
        if problem is None:
            return net, built
        problems.append(problem)
    named, unknown = saved.get("model"), ""
    if named in names(models.__name__, "model") and named != "test":
        try:
            net, built = _of_model(path, saved, name)
        except Exception as e:  # of other options than were saved, or a file that has changed
            unknown = f"; --model {named} can't be made from the saved options: {first_line(e)}"
        else:
            problem = _load(net, state)
            if problem is None:
                return net, built
            problems.append(problem)
    looks = describe({key.removeprefix("module."): value for key, value in state.items()})
    if problems and looks:
        raise UserError(f"the weights in {path} do not fit: {problems[-1]}")
    what = looks.get("netG") or looks.get("netD") or "no network of this code"
    raise UserError(f"{path} holds {what}, not one of {', '.join(GENERATORS)}{unknown}")


def _load(net: nn.Module, state: State) -> str | None:
    """Load weights into a network; returns why they do not fit, or None."""
    fitting = fit_state_dict(state, net)
    problem = explain_mismatch("G", fitting, net)
    if problem is None:
        net.load_state_dict(fitting)
    return problem


def _as_saved(state: State, saved: dict[str, str]) -> dict[str, Any]:
    """What `train_opt.txt` says of the generator; empty if it says too little."""
    try:
        counts = {name: int(saved[name]) for name in ("ngf", "input_nc", "output_nc")}
    except (KeyError, ValueError):
        return {}
    if not {"netG", "norm"} <= saved.keys() or saved["norm"] not in NORMS:
        return {}
    # the second generator of a CycleGAN takes what the first one gives
    first = next((w for w in state.values() if w.dim() == 4), None)
    if first is not None and first.shape[1] == counts["output_nc"] != counts["input_nc"]:
        counts["input_nc"], counts["output_nc"] = counts["output_nc"], counts["input_nc"]
    no_dropout = saved.get("no_dropout") == "True"
    return {"netG": saved["netG"], "norm": saved["norm"], "no_dropout": no_dropout, **counts}


def _as_it_looks(state: State, saved: dict[str, str]) -> dict[str, Any]:
    """What weights say of a generator of this code, and where they can't tell what was saved."""
    found = describe({key.removeprefix("module."): value for key, value in state.items()})
    if saved.get("norm") in NORMS:
        found["norm"] = saved["norm"]
    if "no_dropout" not in found:
        # without the file: as test.py, which has dropout unless told otherwise
        found["no_dropout"] = saved.get("no_dropout") == "True"
    return found


def _of_model(path: Path, saved: dict[str, str], name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The generator `name` that a model builds by its own code from its saved options."""
    kind = models.find_model_using_name(saved["model"])
    parser = kind.modify_commandline_options(argparse.ArgumentParser(), False)
    types: dict[str, Any] = {action.dest: action.type for action in parser._actions}
    values = vars(parser.parse_args([]))
    for option, text in saved.items():
        try:
            values[option] = types[option](text) if types.get(option) else ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError):
            values[option] = text
    folder = path.parent
    values.update(isTrain=False, gpu_ids=[], device=torch.device("cpu"), name=folder.name)
    values.update(checkpoints_dir=str(folder.parent), phase="test", model=saved["model"])
    opt = argparse.Namespace(**values)
    with contextlib.redirect_stdout(io.StringIO()):
        model = kind(opt)
    if name not in model.networks():
        raise UserError(f"{path}: --model {opt.model} has no network '{name}' to load it into")
    return model.networks()[name], values


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Within, a model may be made; random sources, warnings and backends are then as before."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    flags = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    sources = randomness.get_state()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = flags
        randomness.set_state(sources)


class Translator:
    """A generator that takes pictures and gives pictures of the same kind.

    Attributes:
        net: the network, (N, input_nc, H, W) to (N, output_nc, H, W), both in [-1, 1].
        device: where it computes.
        options: what it was trained and built with, by the names of the options.
        weights: the file that was loaded.
        input_nc, output_nc: channels of input and output pictures.
        value_range: which values become -1 and 1; None: all of an integer type, [0, 1] of floats.
    """

    def __init__(
        self,
        net: nn.Module,
        device: torch.device,
        options: dict[str, Any],
        weights: Path,
        value_range: Range | None = None,
        precision: str = "tf32",
    ):
        self.net = net
        self.device = device
        self.options = options
        self.weights = weights
        self.input_nc = int(options["input_nc"])
        self.output_nc = int(options["output_nc"])
        self.value_range = value_range
        self._precision = precision
        rule = size_rule(net, self.input_nc, device)
        if rule is None:
            warn(f"{type(net).__name__} gives pictures of other sizes than it takes, and so do we")
        self._size_rule = rule or (1, 1)

    def __repr__(self) -> str:
        kinds = f"{self.input_nc} to {self.output_nc} channels on {self.device}"
        made = f"{self.options.get('netG', type(self.net).__name__)}, {self.options['direction']}"
        return f"Translator({self.weights}: {made}, {kinds})"

    def __call__(
        self, picture: Any, batch_size: int = 8, tile: int | TileOptions | None = None
    ) -> Any:
        """Translate a picture, or a list of pictures.

        Args:
            picture: one of
                - a picture of Pillow: gives one, with its transparency put back;
                - a path: gives a picture of Pillow, or an array where Pillow has no such kind
                  (`.npy`, colour of more than 8 bits);
                - an array (H, W) or (H, W, C) of uint8, uint16 or floats (in [0, 1], or in
                  `value_range`): gives an array of its type;
                - a tensor (C, H, W) or (N, C, H, W) in [-1, 1]: gives a tensor on `device`;
                - a list of these: gives a list; those of equal size are computed together.
            batch_size: how many are computed together at most; one at a time where the results
                depend on each other (batch norm or dropout without `eval`).
            tile: for large pictures: computes in tiles of this many pixels; see `TileOptions`.

        Sizes are kept. Raises UserError where a picture can't be read, or its channels do not fit.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is too small: at least 1")
        if isinstance(picture, (list, tuple)):
            return self._list(picture, batch_size, tile)
        return self._list([picture], 1, tile)[0]

    def _list(
        self, pictures: Sequence[Any], batch_size: int, tile: int | TileOptions | None
    ) -> list[Any]:
        results: list[Any] = [None] * len(pictures)
        waiting: list[tuple[int, Any, Picture, torch.Tensor]] = []
        size = batch_size if independent_of_batch(self.net) else 1

        def flush() -> None:
            if waiting:
                outputs = self.run(torch.stack([x for *_, x in waiting])).cpu()
                for (i, given, read, _), output in zip(waiting, outputs, strict=True):
                    results[i] = self._like(given, read, self.finish(output, read))
                waiting.clear()

        for i, given in enumerate(pictures):
            if isinstance(given, torch.Tensor):
                results[i] = self._tensor(given)
                continue
            read = self._read(given)
            if tile is not None:
                bands = list(self.tiled(read, tile))
                results[i] = self._like(given, read, Picture(np.concatenate(bands), read.alpha))
                continue
            x = self.unit(read)
            if len(waiting) >= size or (waiting and waiting[-1][3].shape != x.shape):
                flush()
            waiting.append((i, given, read, x))
        flush()
        return results

    # ---------------------------------------------------------------------------------- the steps
    def unit(self, picture: Picture) -> torch.Tensor:
        """A picture as the network takes it: (input_nc, H, W) in [-1, 1], on the CPU."""
        return to_unit(fit_channels(picture.pixels, self.input_nc), self.value_range)

    def run(self, batch: torch.Tensor) -> torch.Tensor:
        """The network without gradients: (N, C, H, W) to (N, C', H, W) on `device`."""
        if batch.shape[1] != self.input_nc:
            raise UserError(
                f"a tensor of shape {tuple(batch.shape)}: the network takes {self.input_nc} "
                "channels, (N, C, H, W)"
            )
        with torch.no_grad(), arithmetic(self._precision):
            return apply_padded(
                self.net, batch.to(self.device, non_blocking=True), *self._size_rule
            )

    def finish(
        self, output: torch.Tensor, picture: Picture, dtype: np.dtype | type | None = None
    ) -> Picture:
        """What came of a picture: `output` (C', H, W) with its type (or `dtype`) and its alpha."""
        alpha = picture.alpha
        if alpha is not None and alpha.shape != output.shape[1:]:
            alpha = None
        dtype = np.dtype(dtype or picture.pixels.dtype)
        return Picture(from_unit(output, dtype, self.range_for(picture, dtype)), alpha)

    def range_for(self, picture: Picture, dtype: np.dtype | type) -> Range | None:
        """The range of results: that of the inputs, unless they are of another type."""
        return self.value_range if np.dtype(dtype) == picture.pixels.dtype else None

    def tiled(
        self,
        picture: Picture,
        tile: int | TileOptions,
        dtype: np.dtype | type | None = None,
    ) -> Generator[np.ndarray, None, None]:
        """The result of a large picture in bands (h, W, C'), top to bottom."""
        options = TileOptions(tile) if isinstance(tile, int) else tile
        dtype = np.dtype(dtype or picture.pixels.dtype)
        source = ArrayRows(picture.pixels, self.input_nc, self.value_range)
        autocast = autocast_of(self._precision, self.device)
        for band in translate_in_tiles(self.net, source, options, self.device, autocast):
            yield from_unit(band, dtype, self.range_for(picture, dtype))

    # ------------------------------------------------------------------------------ kinds of input
    def _tensor(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() not in (3, 4) or 0 in x.shape:
            raise UserError(f"a tensor of shape {tuple(x.shape)}: it must be (N, C, H, W)")
        if not x.is_floating_point():
            raise UserError(
                f"a tensor of {x.dtype}: give floats in [-1, 1], of bytes x / 127.5 - 1, or an "
                "array (H, W, C)"
            )
        if not (largest := x.abs().amax().item()) <= FARTHEST:
            raise UserError(
                f"a tensor with values up to {largest:g} in magnitude: they must be in [-1, 1]"
            )
        return self.run(x.float()) if x.dim() == 4 else self.run(x.float()[None])[0]

    def _read(self, given: Any) -> Picture:
        if self.options.get("model") == "colorization":
            raise UserError(
                "this model turns lightness into colour (CIE Lab): use test.py --model "
                "colorization, or give tensors"
            )
        if isinstance(given, Image.Image):
            if 0 in given.size:
                raise UserError(f"a picture of {given.width}x{given.height} pixels is empty")
            try:
                with _reading:  # Pillow decodes when the pixels are asked for, by one thread
                    return from_pil(given, upright=True)
            except UserError:
                raise
            except Exception as e:  # decoders raise nearly anything on damaged pictures
                raise UserError(f"can't read this picture: {first_line(e)}") from e
        if isinstance(given, (str, os.PathLike)):
            picture = read_picture(given, upright=True)
            with naming(given):
                return self._without_alpha(picture)
        if isinstance(given, np.ndarray):
            array = given[..., None] if given.ndim == 2 else given
            if array.ndim != 3 or array.dtype.kind not in "uif" or 0 in array.shape:
                raise UserError(
                    f"an array of shape {given.shape} and type {given.dtype}: it must be "
                    "(H, W, C) of integers or floats"
                )
            return self._without_alpha(Picture(array))
        raise UserError(
            f"can't translate a {type(given).__name__}: give a picture of Pillow, a path, "
            "an array (H, W, C), a tensor, or a list of these"
        )

    def _without_alpha(self, picture: Picture) -> Picture:
        """Set aside a channel more than the network takes, of arrays (H, W, 2) or (H, W, 4)."""
        channels = picture.pixels.shape[2]
        if picture.alpha is None and channels in (2, 4) and channels == self.input_nc + 1:
            return Picture(picture.pixels[..., :-1], picture.pixels[..., -1])
        return picture

    def _like(self, given: Any, read: Picture, result: Picture) -> Any:
        """The result as the same kind of thing that was given."""
        pixels, alpha = result.pixels, result.alpha
        array = isinstance(given, np.ndarray) or str(given).lower().endswith(".npy")
        if not array and pixels.dtype != np.uint8 and pixels.shape[2] == 3:
            array = not isinstance(given, Image.Image)
            if not array:  # from 16-bit grey, and Pillow knows no such colour
                pixels = change_depth(pixels, np.uint8)
        if alpha is not None and (array or pixels.shape[2] in (1, 3)):
            part = change_depth(alpha, pixels.dtype)[..., None]
            pixels = np.concatenate([pixels, part], axis=2)
        if array:
            flat = getattr(given, "ndim", 3) == 2 and pixels.shape[2] == 1
            return pixels[..., 0] if flat else pixels
        return to_pil(pixels)


def to_pil(pixels: np.ndarray) -> Image.Image:
    """Pixels (H, W, C) as a picture of Pillow; raises UserError where it has no such kind."""
    channels = pixels.shape[2]
    if pixels.dtype == np.uint8 and channels in (1, 2, 3, 4):
        mode = ("L", "LA", "RGB", "RGBA")[channels - 1]
        if channels == 2:
            return Image.merge("LA", [Image.fromarray(pixels[..., i]) for i in range(2)])
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        assert image.mode == mode
        return image
    if channels == 1 and pixels.dtype in (np.uint16, np.float32):
        return Image.fromarray(pixels[..., 0])
    raise UserError(
        f"Pillow has no pictures of {channels} channels of {pixels.dtype}: give an array instead"
    )
