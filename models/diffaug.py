"""DiffAugment: random changes to all that discriminators see, real and generated images alike.

Zhao, Liu, Lin, Zhu, Han: Differentiable Augmentation for Data-Efficient GAN Training,
NeurIPS 2020, https://arxiv.org/abs/2006.10738.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from util.errors import UserError
from util.temporarily import temporarily

KINDS = ("color", "translation", "cutout")


def kinds(text: str) -> str:
    """An argparse type: kinds of augmentation such as color,cutout; returns the text."""
    if unknown := [kind for kind in text.split(",") if kind not in KINDS]:
        raise argparse.ArgumentTypeError(
            f"'{unknown[0]}' is no augmentation: choose from {', '.join(KINDS)}"
        )
    return text


class DiffAugment:
    """T of the paper (eq. 4 and 5): each image of a batch gets its own random numbers.

    - `color`: brightness, saturation and contrast
    - `translation`: by up to 1/8 of the size, padded with zeros (gray)
    - `cutout`: a square of half the size becomes zero; its centre is anywhere in the image

    If a discriminator sees `condition_nc` + `picture_nc` channels, the condition comes first. Both
    are moved and cut alike, so that they stay aligned. The condition keeps its colours, since in a
    label map they are the meaning.
    """

    def __init__(self, policy: str, condition_nc: int, picture_nc: int):
        self.policy = policy.split(",")
        self.condition_nc, self.picture_nc = condition_nc, picture_nc
        self._draws: torch.Tensor | None = None
        self._again = False
        self.calls = 0

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Augment a batch (N, C, H, W) of values in [-1, 1]; gradients flow through."""
        x = inputs[0]
        if len(inputs) != 1 or not torch.is_tensor(x) or x.dim() != 4:
            found = f"a {type(x).__name__}"
            if len(inputs) != 1:
                found = f"{len(inputs)} inputs"
            elif torch.is_tensor(x):
                found += f" of shape {tuple(x.shape)}"
            raise UserError(
                "--diffaug is for discriminators that are called with one batch of images "
                f"(N, C, H, W), and this one is called with {found}: leave --diffaug out"
            )
        self.calls += 1
        again = self._draws if self._again else None
        draws = torch.rand(len(x), 7, device=x.device) if again is None else again
        self._draws = draws
        color, shift, place = draws.split((3, 2, 2), dim=1)
        if "color" in self.policy:
            conditional = x.shape[1] == self.condition_nc + self.picture_nc
            condition, picture = x.tensor_split([self.condition_nc if conditional else 0], dim=1)
            x = torch.cat((condition, self._color(picture, color)), 1)
        if "translation" in self.policy:
            x = self._translated(x, shift)
        if "cutout" in self.policy:
            x = self._cut(x, place)
        return x

    def repeated(self) -> AbstractContextManager[None]:
        """Context manager: batches reuse the random numbers of the previous one."""
        return temporarily(self, _again=True)

    def _color(self, x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        brightness, saturation, contrast = (draws - 0.5).view(-1, 3, 1, 1, 1).unbind(1)
        x = x + brightness
        gray = x.mean(1, keepdim=True)
        x = gray + (x - gray) * (1 + 2 * saturation)
        mean = x.mean((1, 2, 3), keepdim=True)
        return mean + (x - mean) * (1 + contrast)

    def _translated(self, x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        for dim, share in ((2, draws[:, 0]), (3, draws[:, 1])):
            size = x.shape[dim]
            most = int(size * 0.125 + 0.5)
            # the row (or column) of the padded image that each one of the result comes from
            start = _whole(share, 2 * most + 1)
            source = start[:, None] + torch.arange(size, device=x.device)
            shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
            padded = F.pad(x, (0, 0, most, most) if dim == 2 else (most, most))
            x = padded.gather(dim, source.view(shape).expand_as(x))
        return x

    def _cut(self, x: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        inside = []
        for size, share in ((x.shape[2], draws[:, 0]), (x.shape[3], draws[:, 1])):
            length = int(size * 0.5 + 0.5)
            start = _whole(share, size + 1 - length % 2) - length // 2
            distance = torch.arange(size, device=x.device) - start[:, None]
            inside.append((distance >= 0) & (distance < length))
        rows, columns = inside
        return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _whole(share: torch.Tensor, count: int) -> torch.Tensor:
    """Map numbers in [0, 1) to 0 ... count - 1; clamped, since products may round up to count."""
    return (share * count).long().clamp(max=count - 1)
