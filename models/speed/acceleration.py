"""Mixed precision, compilation and memory layout, without changes to the code of models.

`prepare` changes how a network computes. Names, shapes and files of its weights stay the same.
Losses and optimizers see float32, whatever precision the network uses inside.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

from models.antialias import BlurredConv2d, BlurredConvTranspose2d, Downsample, Upsample
from util import distributed
from util.errors import UserError
from util.temporarily import temporarily

from .channels_last import keep_layout, working_kernels
from .gradient_scale import GradientScale
from .inspection import has_known_layers
from .instance_norm import normalize_without_views
from .layout import contiguous_gradients
from .prepared import prepared
from .row_convolution import convolve_by_rows
from .sync_norm import exclude_from_compiling

PRECISIONS = ("tf32", "fp32", "bf16", "fp16")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BLURS = (Downsample, Upsample, BlurredConv2d, BlurredConvTranspose2d)
VARIANTS = 8  # compiled versions of a network, for different inputs and for what learns
_computing = threading.RLock()


def set_backends(precision: str, fixed_size: bool, deterministic: bool) -> None:
    """Set the flags of cuDNN and cuBLAS.

    `tf32` is PyTorch's default for convolutions: products with a mantissa of 10 bits, sums in
    float32. `fp32` turns it off. `fixed_size` lets cuDNN search for the fastest kernels.
    """
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    # a new size means a new search
    torch.backends.cudnn.benchmark = fixed_size and not deterministic


@contextlib.contextmanager
def precision_context(precision: str, kind: str) -> Iterator[None]:
    """Context manager: networks on devices of type `kind` compute with this `--precision`.

    Overrides an enclosing autocast. The flag that makes `fp32` exact is global to the process, so
    threads take turns.
    """
    half = precision in _DTYPES
    with contextlib.ExitStack() as stack:
        if half or torch.amp.is_autocast_available(kind):
            stack.enter_context(torch.autocast(kind, _DTYPES.get(precision), half))
        if precision == "fp32":
            stack.enter_context(_computing)
            stack.enter_context(temporarily(torch.backends.cudnn, allow_tf32=False))
        yield


def prepare(
    net: nn.Module,
    device: torch.device,
    precision: str = "tf32",
    channels_last: bool = False,
    compiled: bool = False,
    recompute: bool = False,
    graphs: bool = False,
    scale: GradientScale | None = None,
) -> None:
    """Prepare a network in place for these modes; its weights keep their names.

    `graphs` uses CUDA graphs: outputs are overwritten after the next `BaseModel.begin_iteration`.
    `recompute` is gradient checkpointing of residual blocks: less memory, more time.
    `scale` is the loss scaling for training in fp16.

    Raises UserError where a model has compiled the network itself, which hides it from autocast.
    """
    if hasattr(net, "_orig_mod") and precision in _DTYPES:
        raise UserError(
            f"--precision {precision} does not reach a {type(net._orig_mod).__name__} that the "
            "model has compiled: say --compile in place of its torch.compile, or leave it out"
        )
    convolve_by_rows(net)
    normalize_without_views(net)
    if channels_last:
        for weight in net.parameters():
            if weight.dim() == 4:  # `net.to` would fail for the weights of Conv3d
                # not `contiguous`, which keeps the strides of sizes of 1: gradients have others,
                # and the fused Adam of PyTorch 2.4 refuses that (pytorch/pytorch#106951)
                weight.data = weight.data.clone(memory_format=torch.channels_last)
        contiguous_gradients([net])
        if not compiled and working_kernels(device):
            keep_layout(net, compiled)
    for module in net.modules():
        if isinstance(getattr(module, "recompute", None), bool):
            module.recompute = recompute  # type: ignore[assignment]
    if scale is not None and not _can_be_scaled(net):
        print(
            f"--precision fp16: a {type(net).__name__} has layers that are not known here, so it "
            "trains in float32 (--precision bf16 does not need to know them)"
        )
    elif precision in _DTYPES:
        prepared(net)
        net.prepared_autocast = device.type, _DTYPES[precision]  # type: ignore[assignment]
        net.prepared_scale = scale  # type: ignore[assignment]
    if compiled and (reason := _why_not_compiled(net)):
        print(f"--compile: a {type(net).__name__} is not compiled: {reason}")
    elif compiled:
        _compile(net, device.type == "cuda", graphs)


def _compile(net: nn.Module, on_gpu: bool, graphs: bool) -> None:
    exclude_from_compiling()
    if on_gpu:
        keep_layout(net, compiled=True)
    # Inductor by itself stays with (N, C, H, W) if a convolution has few output channels, like
    # the last one of each generator; cuDNN then spends a quarter of the time on converting.
    options = {"triton.cudagraphs": graphs, "force_layout_optimization": on_gpu}
    # all networks share the code of `Prepared.forward`, and the limit is per code object
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, limit, getattr(config, limit) + VARIANTS)  # the second in PyTorch 2.4
    prepared(net).compile(dynamic=False, options=options)


def prefers_channels_last(net: nn.Module, device: torch.device, precision: str) -> bool:
    """Whether a network is faster in channels-last layout, and computes the same.

    On NVIDIA GPUs since Ampere, with their matrix units. Layers that are not known here may need
    the usual layout; and blurs are depthwise convolutions, for which PyTorch's own kernel needs it.
    """
    if device.type != "cuda" or torch.version.cuda is None or precision == "fp32":
        return False
    modern = torch.cuda.get_device_capability(device) >= (8, 0)
    fits = has_known_layers(net) and not any(isinstance(m, BLURS) for m in net.modules())
    return modern and fits and working_kernels(device) is not None


def _why_not_compiled(net: nn.Module) -> str | None:
    """Why compiling would change what a network computes; None if it would not."""
    if any(key.endswith("weight_u") for key in net.state_dict()):
        return (
            "it has spectral norm of the older kind, for which PyTorch compiles wrong gradients; "
            "torch.nn.utils.parametrizations has one that works"
        )
    norm, several = nn.modules.batchnorm._BatchNorm, distributed.world_size() > 1
    blocks = [m for m in net.modules() if getattr(m, "recompute", None) is True]
    if several and any(isinstance(m, norm) for block in blocks for m in block.modules()):
        return "with --grad_checkpoint its synchronized batch norms would count each batch twice"
    return None


def _can_be_scaled(net: nn.Module) -> bool:
    """Whether `GradientScale` reaches every tensor that a network computes with."""
    # recurrent layers hold flattened copies of their weights
    others = (isinstance(m, nn.RNNBase) or "forward" in vars(m) for m in net.modules())
    return has_known_layers(net) and not any(others)


def use_fused_step(optimizer: torch.optim.Optimizer, device: torch.device, fast: bool) -> None:
    """Make Adam and AdamW update all weights in one kernel, on a GPU, or on a CPU with `--fast`.

    On a CPU the fused kernel rounds differently. A weight that is listed twice is stepped twice,
    and the fused kernel counts both steps before the first.
    """
    fits = device.type == "cuda" or (fast and device.type == "cpu")
    listed = [p for g in optimizer.param_groups for p in g["params"]]
    fits &= all(p.is_floating_point() for p in listed) and len(set(listed)) == len(listed)
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and fits:
        for group in [optimizer.defaults, *optimizer.param_groups]:
            if group["fused"] is None and not group["foreach"]:
                group["fused"] = True
