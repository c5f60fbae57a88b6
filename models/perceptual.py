"""The perceptual loss: how alike two images look to VGG19, a classifier of photographs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from util.errors import UserError
from util.scores.extractors import Weights, WeightsUnavailable

# torchvision's indices of the convolutions between poolings, up to relu5_1, and their channels
BLOCKS = ((0, 2), (5, 7), (10, 12, 14, 16), (19, 21, 23, 25), (28,))
CHANNELS = (64, 128, 256, 512, 512)
LAYER_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)


class VGGLoss(nn.Module):
    """The weighted sum of mean |F_i(x) - F_i(y)| over five layers F_i of VGG19.

    Johnson et al. 2016, section 3.2, in the form of pix2pixHD (Wang et al. 2018, section 3.3): the
    layers are relu1_1 to relu5_1, weighted by 1/32, 1/16, 1/8, 1/4 and 1. Images are normalized
    as in the training of VGG19. Its weights are saved neither with a model nor in a training state.

    `weights` is a file with torchvision's VGG19; without it, the file is downloaded. Raises
    UserError if it can't be had.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        from torchvision.models import VGG19_Weights  # takes a second

        try:
            file = Weights(weights, VGG19_Weights.IMAGENET1K_V1.url, "--vgg_weights")
        except WeightsUnavailable as e:
            raise UserError(f"--lambda_vgg needs VGG19: {e}") from None
        print(f"perceptual loss: VGG19 of {file.path.name}, SHA-256 {file.sha256}")
        constants = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        for name, values in constants.items():
            tensor = torch.tensor(values).view(1, 3, 1, 1)
            self.register_buffer(name, tensor, persistent=False)
        before = 3
        for numbers, channels in zip(BLOCKS, CHANNELS, strict=True):
            for number in numbers:
                for kind, shape in (("weight", (channels, before, 3, 3)), ("bias", (channels,))):
                    tensor = file.state.get(f"features.{number}.{kind}")
                    if tensor is None or tensor.shape != shape:
                        raise UserError(
                            f"--vgg_weights {file.path}: these are no weights of torchvision's "
                            f"VGG19 (features.{number}.{kind} is missing or of another shape)"
                        )
                    # buffers that are not saved: nothing trains them
                    self.register_buffer(f"{kind}{number}", tensor.float(), persistent=False)
                before = channels

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The five feature maps of images (N, 3, H, W) in [-1, 1]; at least 16x16 pixels."""
        x = ((x + 1) / 2 - self.mean) / self.std
        found = []
        for block, numbers in enumerate(BLOCKS):
            x = F.max_pool2d(x, 2) if block else x
            for number in numbers:
                weight, bias = self.get_buffer(f"weight{number}"), self.get_buffer(f"bias{number}")
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
                if number == numbers[0]:
                    found.append(x)
        return found

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of images (N, 3, H, W) in [-1, 1]; `real` gets no gradients."""
        pairs = zip(LAYER_WEIGHTS, self.features(fake), self.features(real.detach()), strict=True)
        losses = [share * F.l1_loss(x.float(), y.float()) for share, x, y in pairs]
        return torch.stack(losses).sum()
