"""Faster arithmetic for networks, without a word of it in the models.

`prepare` changes how a network computes, not what it is: names, shapes and files of its weights
stay the same. Losses and optimizers see float32 whatever the networks use inside.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from .gradient_scale import GradientScale
from .layout import contiguous_gradients
from .prepared import forget_passes, has_hooks, prepared
from .sync_norm import leave_out_of_compiling

PRECISIONS = ("tf32", "fp32", "bf16", "fp16")
_PACKAGE = __name__.removesuffix(".speed.acceleration")
_KNOWN = tuple(f"{_PACKAGE}.{name}" for name in ("networks", "norms", "antialias", "speed."))
_KNOWN += ("torch.nn.",)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PAYS_ON_CPU = 96 * 96  # pixels of a picture from which on shared passes save time
# Pictures from which on compiling saves more time than it takes, in training and in testing: about
# a minute for an iteration that becomes 20 to 50 ms shorter.
PAYS_TO_COMPILE = {True: 3000, False: 20000}


def set_backends(precision: str, fixed_size: bool, deterministic: bool) -> None:
    """Tell cuDNN and cuBLAS what they may do.

    `tf32` is what PyTorch does by default for convolutions: 10 bits of mantissa in products, sums
    in float32. `fp32` turns that off.
    """
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    # worth it only where the size of the pictures does not change all the time
    torch.backends.cudnn.benchmark = fixed_size and not deterministic


def choose_fast(opt: argparse.Namespace, device: torch.device, explicit: set[str]) -> list[str]:
    """Set what `--fast` stands for on this device, except for what was given; say what it is."""
    chosen = {}
    if device.type == "cuda":
        chosen["precision"] = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        chosen["compile"] = True
    elif device.type == "cpu":
        # without instructions for it bf16 is emulated, and slower
        if has_fast_bf16():
            chosen["precision"] = "bf16"
        chosen["compile"] = True
    chosen["batch_passes"] = "on"
    for name, value in chosen.items():
        if name not in explicit:
            setattr(opt, name, value)
    return [f"--precision {opt.precision}"] + (["--compile"] if opt.compile else [])


def too_few_to_compile(opt: argparse.Namespace, pictures: int, explicit: set[str]) -> str | None:
    """Why `--fast` leaves `--compile` off for so many pictures in all; None if it does not."""
    least = PAYS_TO_COMPILE[opt.isTrain]
    if not (opt.fast and opt.compile) or "compile" in explicit or pictures >= least:
        return None
    return (
        f"{pictures} pictures in all are too few for the time that it takes, {least} would do "
        "(--compile asks for it in any case)"
    )


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bf16 numbers in hardware."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = file.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def why_not_compile(opt: argparse.Namespace, device: torch.device) -> str | None:
    """Why `--compile` can't be had here, None if it can. Tries the compiler on a small function."""
    if opt.preprocess in ("scale_width", "none"):
        return f"--preprocess {opt.preprocess} gives pictures of many sizes"
    try:
        torch.compile(lambda x: (x * 2 + 1).relu())(torch.ones(8, device=device))
    except Exception as e:
        first = str(e).strip().splitlines()
        return f"the compiler does not work here ({first[0][:120] if first else type(e).__name__})"
    return None


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
    """Make a network compute as asked; in place, its weights keep their names.

    `graphs` records what a compiled network does on a GPU, and plays that back as a whole. What it
    returns is then overwritten after the next `begin_iteration`.
    `recompute` trades time for memory: residual blocks forget their activations and compute them
    again in the backward pass.
    `scale` is for training in fp16.
    """
    if channels_last:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        contiguous_gradients([net])
    for module in net.modules():
        if hasattr(module, "recompute"):
            module.recompute = recompute  # type: ignore[assignment]
    # recurrent layers keep their weights in a second place, where no scale reaches them
    scalable = not any(isinstance(module, nn.RNNBase) for module in net.modules())
    if precision in _DTYPES and (precision != "fp16" or scalable):
        prepared(net)
        net.autocast_to = device.type, _DTYPES[precision]  # type: ignore[assignment]
        net.gradient_scale = scale  # type: ignore[assignment]
    if compiled:
        leave_out_of_compiling()
        prepared(net).compile(dynamic=False, mode="reduce-overhead" if graphs else None)


def use_fused_step(optimizer: torch.optim.Optimizer, device: torch.device, fast: bool) -> None:
    """Make Adam and AdamW update all weights in one kernel: on a GPU, or on a CPU with `--fast`.

    On a CPU the fused kernel rounds differently.
    """
    fits = device.type == "cuda" or (fast and device.type == "cpu")
    if type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and fits:
        for group in [optimizer.defaults, *optimizer.param_groups]:
            if group["fused"] is None and not group["foreach"]:
                group["fused"] = True


def begin_iteration(graphs: bool = False) -> None:
    """What networks returned so far is not needed any more; with `graphs` it is overwritten."""
    forget_passes()
    if graphs:  # the call imports the compiler
        torch.compiler.cudagraph_mark_step_begin()


def why_not_graphs(opt: argparse.Namespace, device: torch.device) -> str | None:
    """Why `--cuda_graphs` can't be had here, None if it can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    return None if opt.compile else "it needs --compile"


def batches_freely(net: nn.Module) -> bool:
    """Whether a picture's result does not depend on the others in its batch, nor on chance."""
    mixing = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)
    return not any(isinstance(module, mixing) and module.training for module in net.modules())


def wants_one_pass(opt: argparse.Namespace, pictures: torch.Tensor) -> bool:
    """Whether passes over pictures (N, C, H, W) should be shared, by `--batch_passes`.

    `auto` does so on a GPU, which one picture leaves idle, and on a CPU for ResNets if pictures are
    not small. The innermost maps of a U-Net have so few pixels that instance norm there makes
    rounding grow: after a few steps the numbers would be other ones than with separate passes.
    """
    if opt.batch_passes != "auto":
        return opt.batch_passes == "on"
    pays = "resnet" in opt.netG and pictures.shape[-2:].numel() >= PAYS_ON_CPU
    return pays or pictures.device.type == "cuda"


def fits_one_pass(net: nn.Module, *inputs: torch.Tensor) -> bool:
    """Whether one pass over all the inputs (N, C, H, W) gives what a pass each gives.

    A layer written elsewhere may mix the pictures of a batch. And where there are hooks, or weights
    made anew in each pass (spectral norm), it counts how often a network is called.
    """
    known = all(type(m).__module__.startswith(_KNOWN) for m in net.modules())
    own_weights = any(m._forward_pre_hooks or hasattr(m, "parametrizations") for m in net.modules())
    alike = all(x.shape[1:] == inputs[0].shape[1:] for x in inputs)
    return known and alike and batches_freely(net) and not (own_weights or has_hooks(net))
