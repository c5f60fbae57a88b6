"""Contrastive learning of patches (Park et al., ECCV 2020, sections 3 and C.1).

A patch of the output should resemble the patch of the input at the same position more than other
patches of that input. Patches are compared by features from layers of the generator.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from util.argument_types import boolean, count, number
from util.errors import UserError

from .adversarial import add_options as add_discriminator_options
from .adversarial import check_options as check_discriminator_options
from .init import init_net
from .networks import GENERATORS, NORMS, ResnetGenerator
from .speed.inspection import independent_of_batch

FEATURE_NETWORKS = ("sample", "mlp_sample")
Features = list[torch.Tensor]


def add_options(parser: argparse.ArgumentParser, is_train: bool, title: str) -> None:
    """Add the options that CUT and DCLGAN share, and set their defaults."""
    add = parser.add_argument_group(title).add_argument
    add("--normG", default="instance", choices=NORMS, help="norm in G")
    parser.set_defaults(no_dropout=True, no_antialias=False, no_antialias_up=False)
    if not is_train:
        return
    add_discriminator_options(parser)
    parser.set_defaults(normD="instance", init_type="xavier", pool_size=0)
    parser.set_defaults(n_epochs=200, n_epochs_decay=200)

    def add_switch(name: str, help: str, default: bool = False) -> None:
        add(name, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=help)

    add("--lambda_GAN", type=number(), default=1.0, help="weight of the adversarial loss")
    add("--lambda_NCE", type=number(), default=1.0, help="weight of the contrastive loss")
    add_switch("--nce_idt", "contrastive identity loss: G(B) should keep the patches of B")
    add(
        "--nce_layers",
        type=layer_numbers,
        default="0,4,8,12,16",
        help="indices of the layers of G to compare; --no_antialias shifts the indices",
    )
    add_switch(
        "--nce_includes_all_negatives_from_minibatch",
        "negatives from all images of the batch, not only from the same image",
    )
    add("--netF", default="mlp_sample", choices=FEATURE_NETWORKS, help="projection of features (F)")
    add("--netF_nc", type=count, default=256, help="channels of --netF mlp_sample")
    add("--nce_T", type=number(positive=True), default=0.07, help="contrastive temperature")
    add("--num_patches", type=count, default=256, help="patches per layer")
    add_switch("--flip_equivariance", "flip the input at random, and expect a flipped output")
    add_switch(
        "--decay_at_crop_size",
        "scale to --crop_size, not --load_size, in the epochs of --n_epochs_decay",
        default=True,
    )
    add("--beta2", type=number(below=1), default=0.999, help="beta2 of Adam")


def layer_numbers(text: str) -> str:
    """An argparse type: layer indices in ascending order such as 0,4,8; returns the text."""
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 0 or numbers != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"'{text}': numbers in rising order are needed, as 0,4,8")
    return text


def check_options(opt: argparse.Namespace) -> None:
    """Raise UserError if these options do not allow comparing features."""
    if "resnet" not in opt.netG:
        resnets = ", ".join(name for name in GENERATORS if "resnet" in name)
        raise UserError(
            f"--model {opt.model} compares layers of a ResNet, which --netG {opt.netG} is not: "
            f"choose from {resnets}"
        )
    if opt.norm not in ("instance", opt.normG):  # saved options have G's norm here
        raise UserError(
            f"--model {opt.model} has --normG and --normD in place of --norm: say --normG "
            f"{opt.norm} --normD {opt.norm}"
        )
    if not opt.isTrain:
        return
    check_discriminator_options(opt)
    if opt.lambda_feat > 0 and not opt.nce_idt:
        raise UserError(
            "--lambda_feat compares the identity images with the images they should be, and "
            "--nce_idt is off: say --nce_idt True, or leave --lambda_feat out"
        )
    if opt.nce_idt and opt.input_nc != opt.output_nc:
        raise UserError(
            "--nce_idt needs --input_nc and --output_nc to be equal, got "
            f"{opt.input_nc} and {opt.output_nc}: say --nce_idt False"
        )
    identity = opt.nce_idt and getattr(opt, "lambda_IDT", 0) > 0
    if not (opt.lambda_GAN or opt.lambda_NCE or identity):
        raise UserError("--lambda_GAN 0 and --lambda_NCE 0 leave no loss to train with: raise one")
    if opt.flip_equivariance and opt.crop_size % 4 and "crop" in opt.preprocess:
        raise UserError(
            f"--flip_equivariance, which is on with FastCUT, compares positions of features, which "
            f"--crop_size {opt.crop_size} shifts: choose a multiple of 4"
        )
    sampling = {n: True for n in ("antialias", "antialias_up") if not getattr(opt, "no_" + n)}
    channels = (opt.input_nc, opt.output_nc, opt.ngf)
    with torch.device("meta"):  # takes neither memory nor random numbers
        net = GENERATORS[opt.netG](*channels, norm_layer=nn.InstanceNorm2d, **sampling)
    layers_of(opt, net)  # type: ignore[arg-type]


def layers_of(opt: argparse.Namespace, net: ResnetGenerator) -> list[int]:
    """The indices in `--nce_layers`; raises UserError for one that `net` does not have."""
    layers = [int(number) for number in opt.nce_layers.split(",")]
    last = len(net.model) - 1
    if layers[-1] > last:
        raise UserError(
            f"--nce_layers {opt.nce_layers}: --netG {opt.netG} has layers 0 to {last}, and no "
            f"{layers[-1]}"
        )
    return layers


class PatchSampleMLP(nn.Module):
    """F: samples patches of feature maps, and embeds each as a unit vector of `nc` channels.

    `channels` lists the channels of the feature maps. Without `use_mlp` the embedding is the
    normalized feature vector itself.
    """

    def __init__(self, channels: Sequence[int], nc: int = 256, use_mlp: bool = True):
        super().__init__()
        self.use_mlp = use_mlp
        if use_mlp:
            for i, c in enumerate(channels):
                mlp = nn.Sequential(nn.Linear(c, nc), nn.ReLU(), nn.Linear(nc, nc))
                self.add_module(f"mlp_{i}", mlp)

    def forward(self, features: Features, positions: Features) -> Features:
        """Unit vectors (N, P, nc) for each feature map (N, C, H, W) and its positions (N, P)."""
        embedded = []
        for i, (feature, position) in enumerate(zip(features, positions, strict=True)):
            rows = feature.permute(0, 2, 3, 1).flatten(1, 2)  # (N, H*W, C)
            patches = rows.gather(1, position[..., None].expand(-1, -1, rows.shape[2]))
            if self.use_mlp:
                patches = self.get_submodule(f"mlp_{i}")(patches)
            # in half precision the squares of small values would be lost
            patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
            embedded.append(patches / (patches.norm(dim=2, keepdim=True) + 1e-7))
        return embedded


def define_F(
    channels: Sequence[int],
    netF: str = "mlp_sample",
    nc: int = 256,
    init_type: str = "normal",
    init_gain: float = 0.02,
    gpu_ids: list[int] = [],
) -> nn.Module:
    """Build and initialize F for feature maps with these numbers of channels."""
    net = PatchSampleMLP(channels, nc, use_mlp=netF == "mlp_sample")
    return init_net(net, init_type, init_gain, gpu_ids)


def translate(
    net: nn.Module, pictures: Sequence[torch.Tensor], layers: Sequence[int] = ()
) -> tuple[list[torch.Tensor], list[Features | None]]:
    """Run `net` on each of `pictures` (N, C, H, W); also returns features of `layers`, detached.

    Images of the same size are run as one batch. The features come from the same pass. They are
    None without `layers`, and if a separate pass would give different ones: with batch norm, which
    depends on the batch, with dropout, or where a ReLU changes the last of `layers` in place.
    """
    if any(x.shape[1:] != pictures[0].shape[1:] for x in pictures):
        each = [translate(net, [x], layers) for x in pictures]
        return [output for (output,), _ in each], [features for _, (features,) in each]
    sizes, batch = [len(x) for x in pictures], torch.cat(list(pictures))
    changed = layers and isinstance((*net.model, None)[layers[-1] + 1], nn.ReLU)  # type: ignore
    if not layers or changed or not independent_of_batch(net):
        return list(net(batch).split(sizes)), [None] * len(pictures)
    output, features = net(batch, layers)
    parts = zip(*(feature.detach().split(sizes) for feature in features), strict=True)
    return list(output.split(sizes)), [list(part) for part in parts]


def sample_positions(features: Features, num_patches: int) -> Features:
    """Sample positions for each feature map (N, C, H, W): (N, P) in [0, H*W - 1].

    P is `num_patches`, or H*W if that is less. Positions do not repeat within an image.
    """
    return [
        torch.stack(
            [torch.randperm(f[0, 0].numel(), device=f.device)[:num_patches] for _ in range(len(f))]
        )
        for f in features
    ]


class PatchNCELoss(nn.Module):
    """InfoNCE between patches (Park et al. 2020, eq. 2 and 3).

    The mean of -log(exp(q.k+ / T) / (exp(q.k+ / T) + sum of exp(q.k- / T))); k+ is the key at the
    same position. Negatives k- are the patches of the same image, or with `all_negatives` of the
    whole batch; among them, the similarity to k+ is masked by -10. `cosine` normalizes queries and
    keys again, so that only the angle counts.
    """

    def __init__(
        self, temperature: float = 0.07, all_negatives: bool = False, cosine: bool = False
    ):
        super().__init__()
        self.temperature, self.all_negatives = temperature, all_negatives
        self.cosine = cosine

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of unit vectors (N, P, C); `key` gets no gradients."""
        if self.cosine:
            query, key = F.normalize(query, dim=2), F.normalize(key, dim=2)
        if self.all_negatives:
            query, key = query.flatten(0, 1)[None], key.flatten(0, 1)[None]
        similarity = query @ key.detach().transpose(1, 2)  # (N, P, P)
        positive = similarity.diagonal(dim1=1, dim2=2)[..., None]
        same = torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
        logits = torch.cat((positive, similarity.masked_fill(same, -10.0)), 2) / self.temperature
        logits = logits.flatten(0, 1)
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def contrast(
    criterion: PatchNCELoss,
    queries: Features,
    keys: Features,
    netF_query: nn.Module,
    netF_key: nn.Module,
    num_patches: int,
) -> torch.Tensor:
    """The mean over layers of the contrastive loss of feature maps (N, C, H, W), a scalar.

    Queries and keys are sampled at the same positions. Keys get no gradients.
    """
    positions = sample_positions(keys, num_patches)
    with torch.no_grad():
        embedded_keys = netF_key(keys, positions)
    pairs = zip(netF_query(queries, positions), embedded_keys, strict=True)
    return torch.stack([criterion(query, key) for query, key in pairs]).mean()
