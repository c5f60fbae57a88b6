"""Weight initialization."""

from __future__ import annotations

from torch import nn
from torch.nn import init

from util.errors import UserError

INIT_TYPES = ("normal", "xavier", "kaiming", "orthogonal")


def init_weights(net: nn.Module, init_type: str = "normal", init_gain: float = 0.02) -> None:
    """Initialize a network in place: convolutions and linear layers by `init_type`, biases to 0.

    Batch norm scales, also of synchronized batch norm, are drawn from N(1, init_gain) as in DCGAN.
    `init_gain` is the standard deviation of `normal` and the gain of `xavier` and `orthogonal`;
    `kaiming` does not use it. The papers use `normal` with 0.02.

    Raises UserError for an unknown `init_type`.
    """
    fillers = {
        "normal": lambda w: init.normal_(w, 0.0, init_gain),
        "xavier": lambda w: init.xavier_normal_(w, gain=init_gain),
        "kaiming": lambda w: init.kaiming_normal_(w, a=0, mode="fan_in"),
        "orthogonal": lambda w: init.orthogonal_(w, gain=init_gain),
    }
    if init_type not in fillers:
        raise UserError(f"unknown init_type '{init_type}': choose from {', '.join(INIT_TYPES)}")

    def init_module(module: nn.Module) -> None:
        # by name, so that users' own layers (`EqualConv2d`) are initialized too
        name = type(module).__name__
        if hasattr(module, "weight") and ("Conv" in name or "Linear" in name):
            fillers[init_type](module.weight.data)
            if getattr(module, "bias", None) is not None:
                init.constant_(module.bias.data, 0.0)
        elif isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and module.affine:
            init.normal_(module.weight.data, 1.0, init_gain)
            init.constant_(module.bias.data, 0.0)

    net.apply(init_module)


def init_net(
    net: nn.Module, init_type: str = "normal", init_gain: float = 0.02, gpu_ids: list[int] = []
) -> nn.Module:
    """Move a network to the first of `gpu_ids` (the CPU if there is none) and initialize it."""
    if gpu_ids:
        net.to(f"cuda:{gpu_ids[0]}")
    init_weights(net, init_type, init_gain=init_gain)
    return net
