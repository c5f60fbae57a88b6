"""Generators and discriminators, and the two functions that build them by name.

The nesting of the `nn.Sequential`s determines the names of the weights on disk: change it, and no
released checkpoint loads. Norms, losses, schedules and initialization have files of their own, but
can be imported from here as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from util.errors import UserError

from .antialias import BlurredConv2d, BlurredConvTranspose2d, Downsample, Upsample
from .init import INIT_TYPES, init_net, init_weights  # noqa: F401
from .losses import (  # noqa: F401
    GAN_MODES,
    GANLoss,
    GradientPenalty,
    MultiscaleOutput,
    cal_gradient_penalty,
    feature_matching,
)
from .norms import NORMS, NormLayer, get_norm_layer, needs_bias  # noqa: F401
from .padding import apply_padded, pad_to_fit
from .schedulers import LR_POLICIES, get_scheduler  # noqa: F401
from .speed.recompute import recomputed

Identity = nn.Identity


# ------------------------------------------------------------------------------------- generators
class ResnetGenerator(nn.Module):
    """The generator of CycleGAN (Johnson et al. 2016): residual blocks at a quarter of the size.

    (N, input_nc, H, W) -> (N, output_nc, H, W), both in [-1, 1]; any H and W (see `apply_padded`).
    `antialias` and `antialias_up` switch to the downsampling and upsampling of `antialias.py`.
    """

    # multiple and minimum of a side; 8 pixels become 2 in the residual blocks, the smallest size
    # that reflection padding takes
    fits = 4, 8

    def __init__(
        self,
        input_nc: int,
        output_nc: int,
        ngf: int = 64,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_dropout: bool = False,
        n_blocks: int = 6,
        padding_type: str = "reflect",
        antialias: bool = False,
        antialias_up: bool = False,
    ):
        if n_blocks < 0:
            raise ValueError(f"n_blocks must not be negative, got {n_blocks}")
        super().__init__()
        bias = needs_bias(norm_layer)

        def down(cin: int, cout: int) -> list[nn.Module]:
            stride = 1 if antialias else 2
            conv = nn.Conv2d(cin, cout, kernel_size=3, stride=stride, padding=1, bias=bias)
            subsample = [Downsample(cout)] if antialias else []
            return [conv, norm_layer(cout), nn.ReLU(True), *subsample]

        def up(cin: int, cout: int) -> list[nn.Module]:
            if antialias_up:
                conv = nn.Conv2d(cin, cout, kernel_size=3, padding=1, bias=bias)
                return [Upsample(cin), conv, norm_layer(cout), nn.ReLU(True)]
            conv = nn.ConvTranspose2d(
                cin, cout, kernel_size=3, stride=2, padding=1, output_padding=1, bias=bias
            )
            return [conv, norm_layer(cout), nn.ReLU(True)]

        self.input_nc = input_nc
        self.model = nn.Sequential(
            nn.ReflectionPad2d(3),
            nn.Conv2d(input_nc, ngf, kernel_size=7, bias=bias),
            norm_layer(ngf),
            nn.ReLU(True),
            *down(ngf, ngf * 2),
            *down(ngf * 2, ngf * 4),
            *(
                ResnetBlock(ngf * 4, padding_type, norm_layer, use_dropout, bias)
                for _ in range(n_blocks)
            ),
            *up(ngf * 4, ngf * 2),
            *up(ngf * 2, ngf),
            nn.ReflectionPad2d(3),
            nn.Conv2d(ngf, output_nc, kernel_size=7),
            nn.Tanh(),
        )

    def forward(
        self, input: torch.Tensor, layers: Sequence[int] = (), encode_only: bool = False
    ) -> Any:
        """The output (N, output_nc, H, W) for an input (N, input_nc, H, W).

        With `layers`, indices into `model` in ascending order, returns (output, features), with one
        feature map (N, C, h, w) per layer. With `encode_only`, returns only the features, and runs
        no layer after the last of them. The ReLU after a norm works in place, so it changes the
        feature map of the norm too, as in the published code, if it runs.
        """
        if not layers:
            return apply_padded(self.model, input, *self.fits)
        x = pad_to_fit(input, *self.fits)
        features = []
        for number, layer in enumerate(self.model):
            x = layer(x)
            if number in layers:
                features.append(x)
            if encode_only and number == layers[-1]:
                return features
        return x[..., : input.shape[-2], : input.shape[-1]], features

    def channels_of(self, layers: Sequence[int]) -> list[int]:
        """The number of channels of each feature map of `layers`."""
        channels, of_layer = self.input_nc, []
        for layer in self.model:
            channels = getattr(layer, "out_channels", channels)  # only convolutions change it
            of_layer.append(channels)
        return [of_layer[number] for number in layers]


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with a skip connection (He et al. 2016); no ReLU after the sum.

    (N, dim, H, W) -> (N, dim, H, W).
    """

    PADDINGS = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "zero": None}

    def __init__(
        self, dim: int, padding_type: str, norm_layer: NormLayer, use_dropout: bool, use_bias: bool
    ):
        super().__init__()
        self.recompute = False  # whether to recompute activations (--grad_checkpoint)
        self.conv_block = self.build_conv_block(
            dim, padding_type, norm_layer, use_dropout, use_bias
        )

    def build_conv_block(
        self, dim: int, padding_type: str, norm_layer: NormLayer, use_dropout: bool, use_bias: bool
    ) -> nn.Sequential:
        """Pad, convolve, normalize, ReLU, (drop out), pad, convolve, normalize."""
        if padding_type not in self.PADDINGS:
            raise UserError(
                f"unknown padding_type '{padding_type}': choose from {', '.join(self.PADDINGS)}"
            )
        pad = self.PADDINGS[padding_type]

        def conv() -> list[nn.Module]:
            layer = nn.Conv2d(dim, dim, kernel_size=3, padding=0 if pad else 1, bias=use_bias)
            return [*([pad(1)] if pad else []), layer, norm_layer(dim)]

        dropout = [nn.Dropout(0.5)] if use_dropout else []
        return nn.Sequential(*conv(), nn.ReLU(True), *dropout, *conv())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.recompute and torch.is_grad_enabled():
            return x + recomputed(self.conv_block, x)
        return x + self.conv_block(x)


class UnetGenerator(nn.Module):
    """The generator of pix2pix: a U-Net (Ronneberger et al. 2015) with `num_downs` downsamplings.

    (N, input_nc, H, W) -> (N, output_nc, H, W), both in [-1, 1]. With 7 downsamplings an image of
    128x128 is 1x1 at the bottleneck. Sizes that are not multiples of 2^num_downs are padded, and
    the output is cropped (see `apply_padded`). `antialias` and `antialias_up` blur before each
    halving and after each doubling of the size; the weights keep their shapes.
    """

    def __init__(
        self,
        input_nc: int,
        output_nc: int,
        num_downs: int,
        ngf: int = 64,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_dropout: bool = False,
        antialias: bool = False,
        antialias_up: bool = False,
    ):
        super().__init__()
        self.fits = 2**num_downs, 2**num_downs  # multiple and minimum of a side
        block = functools.partial(
            UnetSkipConnectionBlock,
            norm_layer=norm_layer,
            antialias=antialias,
            antialias_up=antialias_up,
        )
        # from the bottleneck outwards: each block wraps the one before
        net = block(ngf * 8, ngf * 8, innermost=True)
        for _ in range(num_downs - 5):
            net = block(ngf * 8, ngf * 8, submodule=net, use_dropout=use_dropout)
        net = block(ngf * 4, ngf * 8, submodule=net)
        net = block(ngf * 2, ngf * 4, submodule=net)
        net = block(ngf, ngf * 2, submodule=net)
        self.model = block(output_nc, ngf, input_nc=input_nc, submodule=net, outermost=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return apply_padded(self.model, input, *self.fits)


class UnetSkipConnectionBlock(nn.Module):
    """One level of a U-Net: halve the size, run the submodule, double the size, concatenate.

    (N, input_nc, H, W) -> (N, input_nc + outer_nc, H, W); the outermost level returns
    (N, outer_nc, H, W) in [-1, 1], without the skip connection.
    """

    def __init__(
        self,
        outer_nc: int,
        inner_nc: int,
        input_nc: int | None = None,
        submodule: nn.Module | None = None,
        outermost: bool = False,
        innermost: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_dropout: bool = False,
        antialias: bool = False,
        antialias_up: bool = False,
    ):
        super().__init__()
        self.outermost = outermost
        bias = needs_bias(norm_layer)
        half = BlurredConv2d if antialias else nn.Conv2d
        double = BlurredConvTranspose2d if antialias_up else nn.ConvTranspose2d
        conv = functools.partial(half, kernel_size=4, stride=2, padding=1)
        deconv = functools.partial(double, kernel_size=4, stride=2, padding=1)

        down: list[nn.Module] = [conv(input_nc or outer_nc, inner_nc, bias=bias)]
        # a submodule returns its input as well (the skip connection)
        channels = inner_nc if innermost else inner_nc * 2
        if outermost:
            up = [nn.ReLU(True), deconv(channels, outer_nc), nn.Tanh()]
        else:
            down = [nn.LeakyReLU(0.2, True), *down]
            up = [nn.ReLU(True), deconv(channels, outer_nc, bias=bias), norm_layer(outer_nc)]
            if not innermost:
                down.append(norm_layer(inner_nc))
                if use_dropout:
                    up.append(nn.Dropout(0.5))
        inside = [submodule] if submodule is not None else []
        self.model = nn.Sequential(*down, *inside, *up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.outermost:
            return self.model(x)
        # the skip connection starts after the LeakyReLU, the first layer, as released weights need
        layers = iter(self.model)
        skip = inner = next(layers)(x)
        for layer in layers:
            inner = layer(inner)
        return torch.cat([skip, inner], 1)


# --------------------------------------------------------------------------------- discriminators
class NLayerDiscriminator(nn.Module):
    """PatchGAN: each number of the output judges one patch of the input (Isola et al. 2017).

    (N, input_nc, H, W) -> (N, 1, H/2^n - 2, W/2^n - 2) logits for n = `n_layers`. With three layers
    patches have 70x70 pixels, and a 256x256 image has 30x30 of them; with one, two, four and five
    layers the side of a patch is 16, 34, 142 and 286.
    `antialias` downsamples by `antialias.Downsample`, which makes patches a little larger.
    Raises UserError for an image smaller than 3 * 2^n.
    """

    def __init__(
        self,
        input_nc: int,
        ndf: int = 64,
        n_layers: int = 3,
        norm_layer: NormLayer = nn.BatchNorm2d,
        antialias: bool = False,
    ):
        super().__init__()
        self.n_layers = n_layers
        bias = needs_bias(norm_layer)
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        stride = 1 if antialias else 2

        def subsample(channels: int) -> list[nn.Module]:
            return [Downsample(channels)] if antialias else []

        def block(cin: int, cout: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(cin, cout, kernel_size=4, stride=stride, padding=1, bias=bias)
            return [conv, norm_layer(cout), nn.LeakyReLU(0.2, True)]

        layers = [
            nn.Conv2d(input_nc, ndf, kernel_size=4, stride=stride, padding=1),
            nn.LeakyReLU(0.2, True),
            *subsample(ndf),
        ]
        for n in range(1, n_layers):
            layers += [*block(widths[n - 1], widths[n], stride), *subsample(widths[n])]
        layers += block(widths[max(0, n_layers - 1)], widths[-1], stride=1)
        layers += [nn.Conv2d(widths[-1], 1, kernel_size=4, stride=1, padding=1)]
        self.model = nn.Sequential(*layers)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        flags, fewer = f"--n_layers_D {self.n_layers}", "(--netD n_layers --n_layers_D 2)"
        minimum = min_size(self.n_layers)
        _check_size(input, minimum, flags, f"fewer layers {fewer} or --netD pixel")
        return self.model(input)


class MultiscaleDiscriminator(nn.Module):
    """Several PatchGANs, each at half the size of the one before (Wang et al. 2018, section 3.2).

    (N, input_nc, H, W) -> `MultiscaleOutput`, with `num_D` predictions of `NLayerDiscriminator`.
    The features are taken after each LeakyReLU. Raises UserError for an image smaller than
    3 * 2^n at the coarsest scale.
    """

    def __init__(
        self,
        input_nc: int,
        ndf: int = 64,
        n_layers: int = 3,
        num_D: int = 2,
        norm_layer: NormLayer = nn.BatchNorm2d,
        antialias: bool = False,
    ):
        super().__init__()
        self.n_layers = n_layers
        self.scales = nn.ModuleList(
            NLayerDiscriminator(input_nc, ndf, n_layers, norm_layer, antialias)
            for _ in range(num_D)
        )

    def forward(self, input: torch.Tensor) -> MultiscaleOutput:
        num_D = len(self.scales)
        flags = f"--n_layers_D {self.n_layers} --num_D {num_D}"
        minimum = min_size(self.n_layers, num_D)
        _check_size(input, minimum, flags, "fewer layers (--n_layers_D 2) or scales")
        judged = MultiscaleOutput([], [])
        for scale in self.scales:
            x, features = input, []
            for layer in scale.model:  # type: ignore[union-attr]
                x = layer(x)
                if isinstance(layer, nn.LeakyReLU):
                    features.append(x)
            judged.predictions.append(x)
            judged.features.append(features)
            input = F.avg_pool2d(input, 3, stride=2, padding=1, count_include_pad=False)
        return judged


def min_size(n_layers: int, num_D: int = 1) -> int:
    """The smallest side that PatchGANs of `num_D` scales can judge, in pixels."""
    return 3 * 2 ** (n_layers + num_D - 1)


def _check_size(input: torch.Tensor, minimum: int, flags: str, instead: str) -> None:
    height, width = input.shape[-2:]
    if min(height, width) < minimum:
        raise UserError(
            f"the discriminator with {flags} can't judge images of {width}x{height}: it needs at "
            f"least {minimum}x{minimum}; use a larger --crop_size or larger images, {instead}"
        )


class PixelDiscriminator(nn.Module):
    """PixelGAN: judges each pixel by itself, a PatchGAN of 1x1 (Isola et al. 2017).

    (N, input_nc, H, W) -> (N, 1, H, W) logits.
    """

    def __init__(self, input_nc: int, ndf: int = 64, norm_layer: NormLayer = nn.BatchNorm2d):
        super().__init__()
        bias = needs_bias(norm_layer)
        self.net = nn.Sequential(
            nn.Conv2d(input_nc, ndf, kernel_size=1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(ndf, ndf * 2, kernel_size=1, bias=bias),
            norm_layer(ndf * 2),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(ndf * 2, 1, kernel_size=1, bias=bias),
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.net(input)


# -------------------------------------------------------------------------------------- factories
# name: function of (input_nc, output_nc, ngf, norm_layer=, use_dropout=) and, if it takes them,
# antialias= and antialias_up=, that returns a network
GENERATORS: dict[str, Callable[..., nn.Module]] = {
    "resnet_9blocks": functools.partial(ResnetGenerator, n_blocks=9),
    "resnet_6blocks": functools.partial(ResnetGenerator, n_blocks=6),
    "unet_128": lambda cin, cout, ngf, **kw: UnetGenerator(cin, cout, 7, ngf, **kw),
    "unet_256": lambda cin, cout, ngf, **kw: UnetGenerator(cin, cout, 8, ngf, **kw),
}

# name: function of (input_nc, ndf, n_layers_D, norm_layer=) that returns a network; all but `pixel`
# also take antialias=, and `multiscale` takes num_D=
DISCRIMINATORS: dict[str, Callable[..., nn.Module]] = {
    "basic": lambda cin, ndf, n, **kw: NLayerDiscriminator(cin, ndf, 3, **kw),
    "n_layers": lambda cin, ndf, n, **kw: NLayerDiscriminator(cin, ndf, n, **kw),
    "multiscale": lambda cin, ndf, n, **kw: MultiscaleDiscriminator(cin, ndf, n, **kw),
    "pixel": lambda cin, ndf, n, **kw: PixelDiscriminator(cin, ndf, **kw),
}


def define_G(
    input_nc: int,
    output_nc: int,
    ngf: int,
    netG: str,
    norm: str = "batch",
    use_dropout: bool = False,
    init_type: str = "normal",
    init_gain: float = 0.02,
    gpu_ids: list[int] = [],
    *,
    antialias: bool = False,
    antialias_up: bool = False,
) -> nn.Module:
    """Build a generator by its name in `GENERATORS` and initialize it.

    `ngf` is the number of filters of the first convolution. Raises UserError for an unknown name,
    and UserError if a user's generator does not take the `antialias` or `antialias_up` given.
    """
    if netG not in GENERATORS:
        raise UserError(f"unknown netG '{netG}': choose from {', '.join(GENERATORS)}")
    # passed only if they are on, since networks that users have added may not take them
    flags = {"antialias": antialias, "antialias_up": antialias_up}
    sampling = {name: on for name, on in flags.items() if on}
    norm_layer = get_norm_layer(norm)
    try:
        net = GENERATORS[netG](
            input_nc, output_nc, ngf, norm_layer=norm_layer, use_dropout=use_dropout, **sampling
        )
    except TypeError as e:
        if not any(f"'{name}'" in str(e) for name in sampling):
            raise
        raise UserError(
            f"--antialias: --netG {netG} does not take it; choose another --netG, or leave it out"
        ) from e
    return init_net(net, init_type, init_gain, gpu_ids)


def define_D(
    input_nc: int,
    ndf: int,
    netD: str,
    n_layers_D: int = 3,
    norm: str = "batch",
    init_type: str = "normal",
    init_gain: float = 0.02,
    gpu_ids: list[int] = [],
    *,
    antialias: bool = False,
    num_D: int = 2,
) -> nn.Module:
    """Build a discriminator by its name in `DISCRIMINATORS` and initialize it.

    `ndf` is the number of filters of the first convolution. Only `n_layers` and `multiscale` use
    `n_layers_D`, only `multiscale` uses `num_D`, the number of scales, and `pixel` ignores
    `antialias`, since it does not downsample. Raises UserError for an unknown name.
    """
    if netD not in DISCRIMINATORS:
        raise UserError(f"unknown netD '{netD}': choose from {', '.join(DISCRIMINATORS)}")
    norm_layer = get_norm_layer(norm)
    more: dict[str, Any] = {"antialias": True} if antialias and netD != "pixel" else {}
    if netD == "multiscale":
        more["num_D"] = num_D
    net = DISCRIMINATORS[netD](input_nc, ndf, n_layers_D, norm_layer=norm_layer, **more)
    return init_net(net, init_type, init_gain, gpu_ids)
