"""Export a generator to a file that needs none of this code: ONNX, TorchScript or PyTorch's pt2.

Such a file takes float32 images (N, C, H, W) in [-1, 1] of any N, H and W, and keeps their size:
it contains the padding of `padding.apply_padded`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from models.padding import pad_to_fit
from models.speed.instance_norm import INSTANCE_NORMS
from models.speed.sync_norm import SyncBatchNorm2d
from util.errors import UserError, first_line, is_out_of_memory
from util.files import make_writable, replacing, sha256, wrap_write_errors

from .loading import load_generator
from .sizes import SELF_PADDING, KeepsSize, size_rule
from .translator import Translator

INPUT, OUTPUT = "picture", "translated"
METADATA = "metadata.json"
ENDINGS = {"onnx": ".onnx", "torchscript": ".pt", "pt2": ".pt2"}
TOLERANCE = 1e-3  # for values in [-1, 1]
PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d, *INSTANCE_NORMS)

# (batch, height, width) of the comparison: a usual size, one that every network pads, and one with
# a side below the minimum of a U-Net
SIZES = ((1, 256, 256), (2, 75, 109), (1, 90, 300))

_LARGEST = 2**20  # the exporter may assume that a side is at most this many multiples


class Exported(NamedTuple):
    """A written file, and its largest difference from PyTorch for each image size."""

    path: Path
    differences: dict[str, float]


def export_generator(
    folder: str | os.PathLike,
    form: str = "onnx",
    path: str | os.PathLike | None = None,
    direction: str | None = None,
    epoch: str | int = "latest",
    eval: bool = False,
    weights: str = "auto",
) -> Exported:
    """Write the generator of an experiment to one file, and compare it with PyTorch on the CPU.

    Args:
        folder, direction, epoch, eval, weights: as for `load_generator`.
        form: `onnx`, `torchscript` or `pt2`.
        path: file to write, in a folder that exists; None: `<epoch>_<direction>` in `folder`.

    Raises UserError if a package is missing, if PyTorch is too old for the format, or if the
    results differ; the file is then deleted.
    """
    if form not in tuple(ENDINGS):
        raise UserError(f"format '{form}': choose from {', '.join(ENDINGS)}")
    if form != "torchscript" and not has_free_sizes():
        raise UserError(
            f"--format {form} needs a newer PyTorch than {torch.__version__}: update it, or take "
            "--format torchscript"
        )
    if form == "onnx":
        need_packages("--format onnx", ("onnx", "onnxscript", "onnxruntime"))
    G = load_generator(folder, direction, epoch, device="cpu", weights=weights)
    net = frozen(G.net, eval)
    path = Path(path or Path(folder) / f"{epoch}_{G.options['direction']}{ENDINGS[form]}")
    if path.suffix != ENDINGS[form]:
        raise UserError(f"--output {path} must end in {ENDINGS[form]} for {form}")
    if not path.parent.is_dir():  # a typo must not create a tree of folders
        raise UserError(
            f"can't write to {path.parent}: no such folder; make it, or choose another --output"
        )
    make_writable(path.parent, "--output")
    metadata = metadata_of(G, Path(folder).name, eval)
    with wrap_write_errors(path), replacing(path) as unchecked:
        try:
            export(net, G.input_nc, form, unchecked, metadata)
            wanted = as_tested(G.net, eval)
            differences = largest_difference(wanted, reader(form, unchecked), G.input_nc)
        except (UserError, OSError):
            raise
        except Exception as e:  # exporters raise anything for code that they can't follow
            if is_out_of_memory(e):
                raise
            other = "; --format torchscript records one run of the network instead"
            reason = f"{type(e).__name__}: {first_line(e)[:200]}"
            raise UserError(
                f"{type(net).__name__} can't be exported as {form}: {reason}"
                f"{'' if form == 'torchscript' else other}"
            ) from e
        worst = max(differences.values())
        if not worst < TOLERANCE:
            each = ", ".join(f"{size}: {value:.2g}" for size, value in differences.items())
            raise UserError(
                f"the {form} file differs from PyTorch by {worst:.3g} ({each}), more than "
                f"{TOLERANCE:g}, and was not kept"
            )
    return Exported(path, differences)


def has_free_sizes() -> bool:
    """Whether `torch.export` can leave image sizes dynamic; in PyTorch 2.4 it can't."""
    return hasattr(torch.export.Dim, "DYNAMIC")


def metadata_of(G: Translator, name: str, eval: bool) -> dict[str, str]:
    """The metadata of the generator of an experiment."""
    options = {k: G.options[k] for k in ("netG", "norm", "ngf", "no_dropout") if k in G.options}
    return {
        "name": name,
        "direction": str(G.options["direction"]),
        "epoch": str(G.options["epoch"]),
        "weights": G.weights.name,
        "weights_sha256": sha256(G.weights),
        **{key: str(value) for key, value in options.items()},
        "input_nc": str(G.input_nc),
        "output_nc": str(G.output_nc),
        "layout": f"NCHW float32, {channels(G.options)}",
        "value_range": "-1 1",
        # the pixel values that become -1 and 1; if absent, the full range of their type
        **({"pictures": "{} {}".format(*G.value_range)} if G.value_range else {}),
        "sizes": "any batch, height and width; the output has those of the input",
        "batch_norm": "stored statistics" if eval else "statistics of each image",
        "dropout": "off",
        "torch": torch.__version__,
    }


def channels(options: dict[str, Any]) -> str:
    """The meaning of the channels of input and output, for the metadata."""
    if options.get("model") == "colorization":
        return "CIE Lab: from L / 50 - 1 to a / 110 and b / 110"
    kinds = {1: "grey", 3: "channels RGB"}
    counts = [int(options[name]) for name in ("input_nc", "output_nc")]
    source, result = (kinds.get(n, f"{n} channels as trained") for n in counts)
    return source if source == result else f"from {source} to {result}"


def frozen(net: nn.Module, eval: bool = False) -> nn.Module:
    """A copy of a generator on the CPU, without dropout and without gradients.

    Batch norms use the statistics of each single image, as in `test.py`, or with `eval` those
    stored in training. Without `eval`, raises UserError for batch norms with custom code.
    """
    net = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    for path, parent in list(net.named_modules()):
        for name, child in list(parent.named_children()):
            # a subclass or a hook may compute anything
            own = child._forward_hooks or child._forward_pre_hooks
            if type(child) in PLAIN_NORMS and not own:
                setattr(parent, name, _plain_norm(child, eval))
            elif isinstance(child, nn.modules.batchnorm._BatchNorm) and not eval:
                raise UserError(
                    f"the batch norm {f'{path}.{name}'.lstrip('.')} has code of its own (a "
                    f"{type(child).__name__}{', with hooks' if own else ''}) and can be exported "
                    "with stored statistics only: add --eval (in Python eval=True)"
                )
    return net


def as_tested(net: nn.Module, eval: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """The generator itself, run as in `test.py`, one image at a time, but without dropout."""
    for module in net.modules():
        norm = isinstance(module, nn.modules.batchnorm._NormBase)
        module.training = norm and not eval  # F.dropout follows the network's flag
    sized = KeepsSize(net)
    return lambda x: torch.cat([sized(picture) for picture in x.split(1)])


def _plain_norm(norm: Any, eval: bool) -> nn.Module:
    # a batch norm over a batch of one image is an instance norm
    stored = eval and norm.running_mean is not None
    kind = nn.BatchNorm2d if stored else nn.InstanceNorm2d
    plain = kind(norm.num_features, eps=norm.eps, affine=norm.affine)
    plain.load_state_dict(norm.state_dict(), strict=stored)
    return plain.eval().requires_grad_(False)


class AnySize(nn.Module):
    """`padding.apply_padded` for the exporters: one graph for all sizes, without branches.

    Pads by indexing rows and columns: reflects them, or repeats the last one if the image is too
    small to reflect.
    """

    def __init__(self, net: nn.Module, multiple: int, least: int):
        super().__init__()
        self.net, self.multiple, self.min_multiples = net, multiple, least // multiple

    def _padded(self, size: int):
        """The length to pad a side of `size` to.

        It is computed in a tensor, so that the exporter treats it as unknown. Otherwise each layer
        would get a guard on whether padded and unpadded sizes are equal.
        """
        steps = (torch.full((), size, dtype=torch.int64) + (self.multiple - 1)) // self.multiple
        count = steps.clamp(min=self.min_multiples).item()  # int() would make it a constant
        torch._check(count >= self.min_multiples)
        torch._check(count <= _LARGEST)
        return self.multiple * count

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        bottom, right = picture.shape[-2] - 1, picture.shape[-1] - 1
        rows = torch.arange(self._padded(bottom + 1), device=picture.device)
        columns = torch.arange(self._padded(right + 1), device=picture.device)
        mirrored_rows = bottom - (rows - bottom).abs()
        mirrored_columns = right - (columns - right).abs()
        mirrors = (mirrored_rows.amin(0) >= 0) & (mirrored_columns.amin(0) >= 0)
        rows = torch.where(mirrors, mirrored_rows, rows.clamp(max=bottom)).clamp(min=0)
        columns = torch.where(mirrors, mirrored_columns, columns.clamp(max=right)).clamp(min=0)
        padded = picture.index_select(2, rows).index_select(3, columns)
        return self.net(padded)[..., : bottom + 1, : right + 1]


class AnySizeScript(nn.Module):
    """`padding.apply_padded` in the subset of Python that TorchScript supports."""

    def __init__(self, net: nn.Module, multiple: int, least: int):
        super().__init__()
        self.net, self.multiple, self.least = net, multiple, least

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        padded = pad_to_fit(picture, self.multiple, self.least)
        return self.net(padded)[:, :, : picture.size(2), : picture.size(3)]


def export(net: nn.Module, input_nc: int, form: str, path: Path, metadata: dict[str, str]) -> None:
    """Write a generator returned by `frozen` to a file, together with `metadata`.

    Raises UserError for a generator that does not keep sizes.
    """
    rule = size_rule(net, input_nc, torch.device("cpu"))
    if isinstance(rule, str):
        raise UserError(f"no export: {rule}")
    # torch prints the whole graph of a network that it can't export
    unread = contextlib.redirect_stderr(io.StringIO())
    with torch.no_grad(), warnings.catch_warnings(), unread:
        warnings.simplefilter("ignore")  # deprecations inside torch
        content = _content(net, input_nc, form, metadata, *rule)
    path.write_bytes(content)  # not by torch, which aborts the process on a full disk


def _content(
    net: nn.Module, input_nc: int, form: str, metadata: dict[str, str], multiple: int, least: int
) -> bytes:
    extra = {METADATA: json.dumps(metadata)}
    inner: Any = net.model if isinstance(net, SELF_PADDING) else net
    content = io.BytesIO()
    if form == "torchscript":
        # no layer depends on the size of its input, so a trace of the layers is right for all sizes
        fitting = torch.zeros(2, input_nc, 2 * least, 3 * least)
        traced = torch.jit.trace(inner, fitting, check_trace=False)
        script = torch.jit.script(AnySizeScript(traced, multiple, least).eval())
        torch.jit.save(script, content, _extra_files=extra)
        return content.getvalue()
    example = (torch.zeros(2, input_nc, 2 * multiple + 3, 3 * multiple + 5),)
    anything = torch.export.Dim.DYNAMIC
    shapes = ({0: anything, 2: anything, 3: anything},)
    any_size = AnySize(inner, multiple, least).eval()
    graph = torch.export.export(any_size, example, dynamic_shapes=shapes, strict=False)
    if form == "pt2":
        torch.export.save(graph, content, extra_files=extra)
        return content.getvalue()
    import onnx

    names = {"input_names": [INPUT], "output_names": [OUTPUT]}
    program: Any = torch.onnx.export(
        graph, example, dynamo=True, external_data=False, verbose=False, **names
    )
    model = program.model_proto
    for value in (model.graph.input[0], model.graph.output[0]):
        dims = value.type.tensor_type.shape.dim
        for i, name in ((0, "batch"), (2, "height"), (3, "width")):
            dims[i].dim_param = name
    onnx.helper.set_model_props(model, metadata)
    return model.SerializeToString()


def reader(form: str, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The exported file as a function of images (N, C, H, W), on the CPU."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])
    if form == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch
            script = torch.jit.load(str(path), map_location="cpu")
        return lambda x: script(x)
    module = torch.export.load(path).module()
    return lambda x: module(x)


def largest_difference(
    net: Callable[[torch.Tensor], torch.Tensor],
    exported: Callable[[torch.Tensor], torch.Tensor],
    input_nc: int,
    sizes: Iterable[tuple[int, int, int]] = SIZES,
) -> dict[str, float]:
    """The largest difference between a network and its exported file, by size `NxHxW`.

    The images are uniform noise in [-1, 1], the same in each call.
    """
    source = torch.Generator().manual_seed(0)
    found = {}
    with torch.inference_mode():
        for batch, height, width in sizes:
            x = torch.rand(batch, input_nc, height, width, generator=source) * 2 - 1
            wanted, got = net(x), exported(x)
            same = wanted.shape == got.shape
            difference = (wanted - got).abs().max().item() if same else float("inf")
            found[f"{batch}x{height}x{width}"] = difference
    return found


def need_packages(what: str, names: Iterable[str]) -> None:
    """Raise UserError with the names of packages that are not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{what} needs {', '.join(missing)}: pip install {' '.join(missing)}")
