"""CUT and FastCUT: translation one way, learned by comparing patches of input and output.

Park, Efros, Zhang, Zhu: Contrastive Learning for Unpaired Image-to-Image Translation, ECCV 2020,
https://arxiv.org/abs/2007.15651. Equation and section numbers are that paper's.
"""

from __future__ import annotations

import argparse
import random

import torch

from util.errors import UserError
from util.image_pool import ImagePool

from . import adversarial, networks, patch_nce
from .base_model import BaseModel

MODES = {
    "CUT": {"nce_idt": True, "lambda_NCE": 1.0},
    "FastCUT": {
        "nce_idt": False,
        "lambda_NCE": 10.0,
        "flip_equivariance": True,
        "n_epochs": 150,
        "n_epochs_decay": 50,
    },
}


class SetMode(argparse.Action):
    """Sets the defaults of a mode, which take effect in the next parse."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.set_defaults(**MODES[str(values)])
        setattr(namespace, self.dest, values)


def mode_of(text: str) -> str:
    """The mode of that name, ignoring case."""
    return next((mode for mode in MODES if mode.lower() == text.lower()), text)


class CUTModel(BaseModel):
    """A generator, a discriminator, and F, which embeds features of the generator's encoder."""

    recordable = True  # each iteration does the same: see BaseModel

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        """Add options of the two modes (section 4.1): FastCUT is lighter, CUT a little better."""
        patch_nce.add_options(parser, is_train, "CUT")
        if is_train:
            parser.add_argument(
                "--CUT_mode",
                type=mode_of,
                default="CUT",
                choices=MODES,
                action=SetMode,
                help="CUT | FastCUT",
            )
            parser.set_defaults(**MODES["CUT"])
        return parser

    @staticmethod
    def check_options(opt):
        """Refuse generators without the layers to compare, and input_nc other than output_nc."""
        if opt.isTrain and opt.lambda_NCE > 0 and opt.input_nc != opt.output_nc:
            raise UserError(
                "--model cut compares features that its generator finds in inputs and outputs, "
                f"so --input_nc {opt.input_nc} and --output_nc {opt.output_nc} must be equal: "
                "choose --model dcl --nce_idt False if they differ"
            )
        patch_nce.check_options(opt)

    def __init__(self, opt):
        super().__init__(opt)
        self.loss_names = ["G_GAN", "D_real", "D_fake", "G", "NCE"]
        self.visual_names = ["real_A", "fake_B", "real_B"]
        self.model_names = ["G", "F", "D"] if self.isTrain else ["G"]
        self.netG = adversarial.generator(opt, opt.input_nc, opt.output_nc)
        if not self.isTrain:
            return
        if opt.nce_idt:
            self.loss_names.append("NCE_Y")
            self.visual_names.append("idt_B")
        self.penalty = networks.GradientPenalty(opt.gan_mode, opt.gp, opt.lambda_gp, opt.gp_every)
        if self.penalty.kind:
            self.loss_names.append("D_gp")
        if opt.lambda_feat > 0:
            self.loss_names.append("G_feat")
        self.nce_layers = patch_nce.layers_of(opt, self.netG)
        channels = self.netG.channels_of(self.nce_layers)
        drawn = (opt.init_type, opt.init_gain, opt.gpu_ids)
        self.netF = patch_nce.define_F(channels, opt.netF, opt.netF_nc, *drawn)
        self.netD = adversarial.discriminator(opt, opt.output_nc)
        self.fake_B_pool = ImagePool(opt.pool_size)
        self.criterionGAN = networks.GANLoss(opt.gan_mode).to(self.device)
        self.criterionNCE = patch_nce.PatchNCELoss(
            opt.nce_T, opt.nce_includes_all_negatives_from_minibatch
        )
        betas = (opt.beta1, opt.beta2)
        self.optimizer_G = torch.optim.Adam(self.netG.parameters(), lr=opt.lr, betas=betas)
        self.optimizer_D = torch.optim.Adam(self.netD.parameters(), lr=opt.lr, betas=betas)
        self.optimizers = [self.optimizer_G, self.optimizer_D]
        if opt.netF != "sample":  # which has no weights
            self.optimizer_F = torch.optim.Adam(self.netF.parameters(), lr=opt.lr, betas=betas)
            self.optimizers.append(self.optimizer_F)

    def set_input(self, input):
        """Take a batch: `A`, `B` (N, C, H, W) in [-1, 1], and paths; BtoA swaps A and B."""
        A, B = ("A", "B") if self.opt.direction == "AtoB" else ("B", "A")
        self.real_A = self.to_device(input[A])
        self.real_B = self.to_device(input[B])
        self.image_paths = input[A + "_paths"]

    def forward(self):
        """Translate A; in training CUT also translates B, which should not change (eq. 6).

        FastCUT flips the input with probability 1/2, and flips features back to compare them.
        """
        if not self.isTrain:
            self.fake_B = self.netG(self.real_A)
            return
        real, layers = [self.real_A, self.real_B], self.nce_layers
        if not self.opt.nce_idt:
            real = real[:1]
        self.flipped = self.opt.flip_equivariance and random.random() < 0.5
        if self.flipped:
            real, layers = [x.flip(3) for x in real], []
        fake, self.features = patch_nce.translate(self.netG, real, layers)
        self.fake_B, self.idt_B = fake[0], fake[-1]  # the same one without --nce_idt

    def backward_D(self):
        """Gradients of the discriminator (eq. 1), halved."""
        fake_B = self.fake_B_pool.query(self.fake_B.detach())
        self.batch_passes(self.netD, fake_B, self.real_B)
        self.loss_D_fake = self.criterionGAN(self.netD(fake_B), False)
        self.loss_D_real = self.criterionGAN(self.netD(self.real_B), True)
        penalty = self.penalty(self.netD, self.real_B, fake_B)
        self.loss_D_gp = self.penalty.latest(self.netD)
        self.loss_D = (self.loss_D_fake + self.loss_D_real) * 0.5 + penalty
        self.loss_D.backward()

    def compute_G_loss(self):
        """The loss of the generator and of F (eq. 5)."""
        opt = self.opt
        self.loss_G_GAN = self.loss_NCE = self.loss_NCE_Y = torch.zeros((), device=self.device)
        if opt.lambda_GAN > 0:
            pred_fake = self.netD(self.fake_B)
            self.loss_G_GAN = self.criterionGAN(pred_fake, True, False) * opt.lambda_GAN
        if opt.lambda_NCE > 0:
            features = self.features[0]
            self.loss_NCE = self.calculate_NCE_loss(self.real_A, features, self.fake_B)
        loss_NCE = self.loss_NCE
        if opt.nce_idt and opt.lambda_NCE > 0:
            features = self.features[1]
            self.loss_NCE_Y = self.calculate_NCE_loss(self.real_B, features, self.idt_B)
            loss_NCE = (self.loss_NCE + self.loss_NCE_Y) * 0.5
        loss = self.loss_G_GAN + loss_NCE
        if opt.lambda_feat > 0:  # for the identity image, whose target is known
            real = self.real_B.flip(3) if self.flipped else self.real_B
            features = networks.feature_matching(self.netD, self.idt_B, real)
            self.loss_G_feat = features * opt.lambda_feat
            loss = loss + self.loss_G_feat
        return loss

    def backward_G(self):
        """Gradients of the generator and of F."""
        self.loss_G = self.compute_G_loss()
        self.loss_G.backward()

    def calculate_NCE_loss(self, source, features, target):
        """The contrastive loss (eq. 4) between patches of `target` and of its `source`, a scalar.

        `features` are those of `source`, or None to compute them.
        """
        queries = self.netG(target, self.nce_layers, encode_only=True)
        if self.flipped:
            queries = [q.flip(3) for q in queries]
        if features is None:
            with torch.no_grad():
                features = self.netG(source, self.nce_layers, encode_only=True)
        loss = patch_nce.contrast(
            self.criterionNCE, queries, features, self.netF, self.netF, self.opt.num_patches
        )
        return loss * self.opt.lambda_NCE

    def optimize_parameters(self):
        """One step of the discriminator, then one of the generator and F."""
        self.forward()
        self.set_requires_grad(self.netD, True)
        self.optimizer_D.zero_grad()
        self.backward_D()
        self.optimizer_D.step()
        self.set_requires_grad(self.netD, False)
        self.optimizer_G.zero_grad()
        if self.opt.netF != "sample":
            self.optimizer_F.zero_grad()
        self.backward_G()
        self.optimizer_G.step()
        if self.opt.netF != "sample":
            self.optimizer_F.step()
