"""What is known of a network: the origin of its layers, whether it mixes a batch, and its hooks."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .layout import contiguous_gradient

_PACKAGE = __name__.removesuffix(".speed.inspection")
# by name: a class that somebody adds to one of these files may mix the images of a batch
_KNOWN = {
    f"{_PACKAGE}.networks": "ResnetGenerator ResnetBlock UnetGenerator UnetSkipConnectionBlock "
    "NLayerDiscriminator MultiscaleDiscriminator PixelDiscriminator",
    f"{_PACKAGE}.antialias": "Downsample Upsample BlurredConv2d BlurredConvTranspose2d",
    f"{_PACKAGE}.patch_nce": "PatchSampleMLP",
    f"{_PACKAGE}.speed.channels_last": "LayoutKeepingInstanceNorm LayoutKeepingReflectionPad2d "
    "FusingSequential",
    f"{_PACKAGE}.speed.instance_norm": "InstanceNorm2d GroupedInstanceNorm2d",
    f"{_PACKAGE}.speed.nnpack": "NnpackConv2d NnpackRowConv2d",
    f"{_PACKAGE}.speed.row_convolution": "RowConv2d",
    f"{_PACKAGE}.speed.sync_norm": "SyncBatchNorm2d",
}
# Results of `has_hooks`, and the count of hooks then: looking at every layer each time takes long.
_hooked: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()


def independent_of_batch(net: nn.Module) -> bool:
    """Whether the output for an image depends on neither the rest of the batch nor dropout."""
    mixing = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)
    # a batch norm without stored statistics takes those of the batch in evaluation too
    return not any(
        isinstance(module, mixing)
        and (module.training or getattr(module, "running_mean", module) is None)
        for module in net.modules()
    )


def is_traced() -> bool:
    """Whether a compiler or an export is recording this code, for inputs other than this one."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_dense(layer: nn.Conv2d) -> bool:
    """Whether a convolution has no stride, dilation or groups."""
    return (layer.stride, layer.dilation, layer.groups) == ((1, 1), (1, 1), 1)


def has_known_layers(net: nn.Module) -> bool:
    """Whether all layers are PyTorch's or from this package, so that it is known what they do."""

    def known(layer: type) -> bool:
        file = layer.__module__
        return file.startswith("torch.nn.") or layer.__name__ in _KNOWN.get(file, "").split()

    return all(known(type(module)) for module in net.modules())


def has_hooks(net: nn.Module) -> bool:
    """Whether a network has hooks of a model's own, which see what goes on inside."""
    # increases with every hook on anything; after a removal the old answer stays until the next one
    registered = RemovableHandle.next_id
    known = _hooked.get(net)
    if known is None or known[0] != registered:
        kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        hooks = (h for m in net.modules() for kind in kinds for h in getattr(m, kind).values())
        # torch's own compute weights: spectral norm and the like
        others = (h for h in hooks if not type(h).__module__.startswith("torch.nn.utils"))
        _hooked[net] = known = registered, any(h is not contiguous_gradient for h in others)
    return known[1]
