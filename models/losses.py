"""Adversarial losses, feature matching and gradient penalties."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from util.errors import UserError

GRADIENT_PENALTIES = ("wgangp", "r1")
GAN_MODES = ("lsgan", "vanilla", "wgangp", "hinge", "nonsaturating")


class MultiscaleOutput(NamedTuple):
    """The output of a discriminator at several scales, the finest first."""

    predictions: list[torch.Tensor]  # (N, 1, h, w) each
    features: list[list[torch.Tensor]]  # per scale: (N, C, h, w) of each layer but the last


class GANLoss(nn.Module):
    """The adversarial loss; the target has the shape of the prediction.

    - `lsgan`: least squares, (D(x) - label)^2 (Mao et al. 2017, eq. 9)
    - `vanilla`: cross-entropy on logits (Goodfellow et al. 2014, eq. 1, the non-saturating form)
    - `wgangp`: -D(x) for real and D(x) for fake (Gulrajani et al. 2017); add the penalty of
      `cal_gradient_penalty` to the loss of the discriminator
    - `hinge`: max(0, 1 - D(x)) for real and max(0, 1 + D(x)) for fake; the generator minimizes
      -D(x) (Lim and Ye 2017; Miyato et al. 2018, eq. 16 and 17)
    - `nonsaturating`: softplus(-D(x)) for real and softplus(D(x)) for fake, which is `vanilla`
      where labels are 1 and 0 (Goodfellow et al. 2014, section 3)

    The discriminator must not end in a sigmoid: `vanilla` and `nonsaturating` take logits.
    """

    def __init__(
        self, gan_mode: str, target_real_label: float = 1.0, target_fake_label: float = 0.0
    ):
        super().__init__()
        self.register_buffer("real_label", torch.tensor(target_real_label))
        self.register_buffer("fake_label", torch.tensor(target_fake_label))
        self.gan_mode = gan_mode
        if gan_mode == "lsgan":
            self.loss = nn.MSELoss()
        elif gan_mode == "vanilla":
            self.loss = nn.BCEWithLogitsLoss()
        elif gan_mode in GAN_MODES:
            self.loss = None
        else:
            raise UserError(f"unknown gan_mode '{gan_mode}': choose from {', '.join(GAN_MODES)}")

    def get_target_tensor(self, prediction: torch.Tensor, target_is_real: bool) -> torch.Tensor:
        """The label, expanded to the shape of the prediction without a copy."""
        label = self.real_label if target_is_real else self.fake_label
        return label.expand_as(prediction)

    def forward(
        self,
        prediction: torch.Tensor | MultiscaleOutput,
        target_is_real: bool,
        for_discriminator: bool = True,
    ) -> torch.Tensor:
        """The mean loss, a scalar, of a map of predictions (N, 1, H, W).

        For a `MultiscaleOutput` it is summed over the scales (Wang et al. 2018, eq. 3).
        `for_discriminator` matters only for `hinge`: without it nothing is clipped.
        """
        if isinstance(prediction, MultiscaleOutput):
            scales = prediction.predictions
            return sum(self(scale, target_is_real, for_discriminator) for scale in scales)
        if self.loss is not None:
            return self.loss(prediction, self.get_target_tensor(prediction, target_is_real))
        wanted = -prediction if target_is_real else prediction  # the value to minimize
        if self.gan_mode == "nonsaturating":
            return F.softplus(wanted).mean()
        if self.gan_mode == "hinge" and for_discriminator:
            return F.relu(1 + wanted).mean()
        return wanted.mean()


def feature_matching(
    netD: nn.Module, fake: torch.Tensor | MultiscaleOutput, real: torch.Tensor
) -> torch.Tensor:
    """The feature matching loss of pix2pixHD (Wang et al. 2018, eq. 4), summed over scales.

    The sum over layers of mean |D(real) - D(fake)|, where `fake` should match `real` (N, C, H, W).
    `fake` may also be what `netD` has just returned for it. Both are augmented alike. `real` gets
    no gradients.
    """
    fake = fake if isinstance(fake, MultiscaleOutput) else netD(fake)
    augment = getattr(netD, "prepared_augment", None)
    with augment.repeated() if augment else contextlib.nullcontext():
        target = netD(real)
    loss = 0
    for fake_scale, real_scale in zip(fake.features, target.features, strict=True):
        for fake_layer, real_layer in zip(fake_scale, real_scale, strict=True):
            loss = loss + F.l1_loss(fake_layer, real_layer.detach())
    return loss


def cal_gradient_penalty(
    netD: nn.Module,
    real_data: torch.Tensor,
    fake_data: torch.Tensor,
    device: torch.device,
    type: str = "mixed",
    constant: float = 1.0,
    lambda_gp: float = 10.0,
) -> tuple[torch.Tensor | float, torch.Tensor | None]:
    """The gradient penalty of WGAN-GP (Gulrajani et al. 2017, eq. 3).

    lambda_gp * mean((|grad_x D(x)| - constant)^2), with x of shape (N, C, H, W) taken from
    `real_data`, `fake_data`, or (`mixed`) a random point between each pair of them.

    Returns the penalty and the gradients (N, C*H*W), or (0.0, None) if `lambda_gp` is not positive.
    """
    if lambda_gp <= 0.0:
        return 0.0, None
    if type == "real":
        points = real_data
    elif type == "fake":
        points = fake_data
    elif type == "mixed":
        if real_data.shape != fake_data.shape:
            raise UserError(
                "wgangp mixes real and generated images, which have different sizes here, "
                f"{tuple(real_data.shape)} and {tuple(fake_data.shape)}: choose --gp r1, or crop"
            )
        alpha = torch.rand(real_data.shape[0], 1, 1, 1, device=device)
        points = alpha * real_data + (1 - alpha) * fake_data
    else:
        raise UserError(f"unknown type '{type}' of gradient penalty: real, fake or mixed")
    points = points.detach().requires_grad_(True)
    scores = netD(points)
    scores = scores.predictions if isinstance(scores, MultiscaleOutput) else [scores]
    ones = [torch.ones_like(score) for score in scores]
    (gradients,) = torch.autograd.grad(scores, points, grad_outputs=ones, create_graph=True)
    gradients = gradients.reshape(real_data.size(0), -1)
    # 1e-16 keeps the derivative of the norm finite at 0
    norms = (gradients + 1e-16).norm(2, dim=1)
    return ((norms - constant) ** 2).mean() * lambda_gp, gradients


class GradientPenalty:
    """The gradient penalty of a model's discriminators; has a state to save with the training.

    - `wgangp`: lambda * mean((|grad D(x)| - 1)^2) at points between real and generated images
      (Gulrajani et al. 2017, eq. 3); also the default with `gan_mode` wgangp
    - `r1`: gamma / 2 * mean(|grad D(x)|^2) at real images (Mescheder et al. 2018, eq. 9)

    With `every` > 1 it is computed in one of `every` calls for a discriminator, from the first on,
    and multiplied by `every` (lazy regularization, Karras et al. 2020, appendix B).
    """

    def __init__(self, gan_mode: str, kind: str | None, weight: float, every: int = 1):
        self.kind = kind or ("wgangp" if gan_mode == "wgangp" else None)
        self.weight, self.every = weight, every
        # number of calls and latest value of each discriminator, in the order of the first calls
        self._calls: dict[nn.Module, tuple[int, torch.Tensor | float]] = {}
        self._loaded: list[tuple[int, torch.Tensor | float]] = []  # not taken by a call yet

    def __call__(
        self, netD: nn.Module, real: torch.Tensor, fake: torch.Tensor
    ) -> torch.Tensor | float:
        """The penalty to add to the loss of `netD` for images (N, C, H, W); 0 if none is due."""
        if self.kind is None:
            return 0.0
        penalty: torch.Tensor | float = 0.0
        if netD not in self._calls:
            self._calls[netD] = self._loaded.pop(0) if self._loaded else (0, 0.0)
        calls, latest = self._calls[netD]
        if calls % self.every == 0:
            kind, constant, weight = "mixed", 1.0, self.weight * self.every
            if self.kind == "r1":
                kind, constant, weight = "real", 0.0, weight / 2
            penalty, _ = cal_gradient_penalty(netD, real, fake, real.device, kind, constant, weight)
            latest = torch.as_tensor(penalty).detach()
        self._calls[netD] = calls + 1, latest
        return penalty

    def latest(self, netD: nn.Module) -> torch.Tensor | float:
        """The latest penalty of `netD`, for display."""
        return self._calls.get(netD, (0, 0.0))[1]

    def snapshot(self) -> Callable[[], None]:
        """Snapshot calls and values; returns a function that restores them."""
        return functools.partial(
            vars(self).update, _calls=dict(self._calls), _loaded=list(self._loaded)
        )

    def state_dict(self) -> dict[str, Any]:
        """Numbers of calls and latest values, in the order of the first calls."""
        return {"of": [*self._calls.values(), *self._loaded]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self._calls, self._loaded = {}, [(calls, latest) for calls, latest in state["of"]]
