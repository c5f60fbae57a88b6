"""DCLGAN: translation both ways, each learned by comparing patches of input and output.

Han, Shoeiby, Petersson, Armin: Dual Contrastive Learning for Unsupervised Image-to-Image
Translation, CVPR Workshops 2021, https://arxiv.org/abs/2104.07689. Equation and section numbers are
that paper's: G is `netG_A` (A -> B), F is `netG_B` (B -> A), H_X is `netF1`, H_Y is `netF2`, D_Y is
`netD_A`, which judges B, and D_X is `netD_B`.
"""

from __future__ import annotations

import itertools
import random

import torch

from util.argument_types import number
from util.image_pool import ImagePool

from . import adversarial, networks, patch_nce
from .base_model import BaseModel


class DCLModel(BaseModel):
    """Two generators whose encoders each judge the other's output, and two discriminators."""

    recordable = True  # each iteration does the same: see BaseModel

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        """Set the hinge loss by default, and add the weights of the losses (eq. 5)."""
        patch_nce.add_options(parser, is_train, "DCLGAN")
        if is_train:
            parser.add_argument(
                "--lambda_IDT", type=number(), default=1.0, help="weight of the identity loss"
            )
            parser.set_defaults(
                nce_idt=True, lambda_NCE=2.0, nce_layers="4,8,12,16", gan_mode="hinge"
            )
        return parser

    @staticmethod
    def check_options(opt):
        """Refuse generators without the layers to compare."""
        patch_nce.check_options(opt)

    def __init__(self, opt):
        super().__init__(opt)
        self.loss_names = ["D_A", "G_A", "NCE1", "D_B", "G_B", "NCE2", "G"]
        visuals_A, visuals_B = ["real_A", "fake_B"], ["real_B", "fake_A"]
        if self.isTrain and opt.nce_idt:
            self.loss_names += ["idt_B", "idt_A"]
            visuals_A.append("idt_B")
            visuals_B.append("idt_A")
        self.visual_names = visuals_A + visuals_B
        self.model_names = ["G_A", "G_B"]

        self.netG_A = adversarial.generator(opt, opt.input_nc, opt.output_nc)
        self.netG_B = adversarial.generator(opt, opt.output_nc, opt.input_nc)
        if not self.isTrain:
            return

        self.model_names = ["G_A", "F1", "D_A", "G_B", "F2", "D_B"]
        self.nce_layers = patch_nce.layers_of(opt, self.netG_A)
        build_F = (opt.netF, opt.netF_nc, opt.init_type, opt.init_gain, opt.gpu_ids)
        self.netF1 = patch_nce.define_F(self.netG_A.channels_of(self.nce_layers), *build_F)
        self.netF2 = patch_nce.define_F(self.netG_B.channels_of(self.nce_layers), *build_F)
        self.netD_A = adversarial.discriminator(opt, opt.output_nc)
        self.netD_B = adversarial.discriminator(opt, opt.input_nc)
        self.fake_A_pool = ImagePool(opt.pool_size)
        self.fake_B_pool = ImagePool(opt.pool_size)
        self.criterionGAN = networks.GANLoss(opt.gan_mode).to(self.device)
        self.criterionNCE = patch_nce.PatchNCELoss(
            opt.nce_T, opt.nce_includes_all_negatives_from_minibatch, cosine=True
        )
        self.criterionIdt = torch.nn.L1Loss()
        self.penalty = networks.GradientPenalty(opt.gan_mode, opt.gp, opt.lambda_gp, opt.gp_every)
        if self.penalty.kind:
            self.loss_names += ["gp_A", "gp_B"]
        if opt.lambda_feat > 0:
            self.loss_names += ["feat_A", "feat_B"]
        betas = (opt.beta1, opt.beta2)
        weights_G = itertools.chain(self.netG_A.parameters(), self.netG_B.parameters())
        weights_D = itertools.chain(self.netD_A.parameters(), self.netD_B.parameters())
        self.optimizer_G = torch.optim.Adam(weights_G, lr=opt.lr, betas=betas)
        self.optimizer_D = torch.optim.Adam(weights_D, lr=opt.lr, betas=betas)
        self.optimizers = [self.optimizer_G, self.optimizer_D]
        if opt.netF != "sample":  # which has no weights
            weights_F = itertools.chain(self.netF1.parameters(), self.netF2.parameters())
            # fixed, not --lr and --beta1, as for the published results
            self.optimizer_F = torch.optim.Adam(weights_F, lr=0.001, betas=(0.9, 0.999))
            self.optimizers.append(self.optimizer_F)

    def set_input(self, input):
        """Take a batch: `A`, `B` (N, C, H, W) in [-1, 1], and paths; BtoA swaps A and B."""
        A, B = ("A", "B") if self.opt.direction == "AtoB" else ("B", "A")
        self.real_A = self.to_device(input[A])
        self.real_B = self.to_device(input[B])
        self.image_paths = input[A + "_paths"]

    def forward(self):
        """Translate both ways; in training also compute the identity images (eq. 4).

        --flip_equivariance flips the input with probability 1/2, and flips features back to
        compare them.
        """
        if not self.isTrain:
            self.fake_B, self.fake_A = self.netG_A(self.real_A), self.netG_B(self.real_B)
            return
        A, B = self.real_A, self.real_B
        self.flipped = self.opt.flip_equivariance and random.random() < 0.5
        if self.flipped:
            A, B = A.flip(3), B.flip(3)
        self.fake_B, self.idt_A, self.features_A = self.translate(self.netG_A, A, self.real_B)
        self.fake_A, self.idt_B, self.features_B = self.translate(self.netG_B, B, self.real_A)

    def translate(self, netG, source, target):
        """Run `netG` on `source` and, for the identity loss, on `target`; also returns features.

        `--batch_passes` may run both in one pass. The features are those of `source`, or None if
        they have to be computed separately.
        """
        layers = [] if self.flipped else self.nce_layers
        if self.opt.nce_idt and self.shares_pass(netG, source, target):
            (fake, same), (features, _) = patch_nce.translate(netG, [source, target], layers)
        else:
            (fake,), (features,) = patch_nce.translate(netG, [source], layers)
            same = netG(target) if self.opt.nce_idt else None
        return fake, same, features

    def backward_D_basic(self, netD, real, fake):
        """Gradients of one discriminator (eq. 1), halved; returns its loss."""
        fake = fake.detach()
        self.batch_passes(netD, real, fake)
        loss_real = self.criterionGAN(netD(real), True)
        loss_fake = self.criterionGAN(netD(fake), False)
        loss = (loss_real + loss_fake) * 0.5 + self.penalty(netD, real, fake)
        loss.backward()
        return loss

    def backward_D_A(self):
        """D_A tells real B from generated B."""
        fake_B = self.fake_B_pool.query(self.fake_B)
        loss = self.backward_D_basic(self.netD_A, self.real_B, fake_B)
        self.loss_gp_A = self.penalty.latest(self.netD_A)
        self.loss_D_A = loss * self.opt.lambda_GAN

    def backward_D_B(self):
        """D_B tells real A from generated A."""
        fake_A = self.fake_A_pool.query(self.fake_A)
        loss = self.backward_D_basic(self.netD_B, self.real_A, fake_A)
        self.loss_gp_B = self.penalty.latest(self.netD_B)
        self.loss_D_B = loss * self.opt.lambda_GAN

    def compute_G_loss(self):
        """The loss of the generators and of both F (eq. 5), each part halved."""
        opt = self.opt
        zero = torch.zeros((), device=self.device)
        self.loss_G_A = self.loss_G_B = self.loss_NCE1 = self.loss_NCE2 = zero
        self.loss_idt_A = self.loss_idt_B = zero
        if opt.lambda_GAN > 0:
            # as in the published code, hinge uses max(0, 1 - D(x)) here, not -D(x)
            self.loss_G_A = self.criterionGAN(self.netD_A(self.fake_B), True) * opt.lambda_GAN
            self.loss_G_B = self.criterionGAN(self.netD_B(self.fake_A), True) * opt.lambda_GAN
        if opt.lambda_NCE > 0:
            A = (self.netG_A, self.netF1, self.real_A, self.features_A)
            B = (self.netG_B, self.netF2, self.real_B, self.features_B)
            self.loss_NCE1 = self.calculate_NCE_loss(*A, self.netG_B, self.netF2, self.fake_B)
            self.loss_NCE2 = self.calculate_NCE_loss(*B, self.netG_A, self.netF1, self.fake_A)
        if opt.nce_idt:
            self.loss_idt_A = self.criterionIdt(self.idt_A, self.real_B) * opt.lambda_IDT
            self.loss_idt_B = self.criterionIdt(self.idt_B, self.real_A) * opt.lambda_IDT
        loss = (self.loss_G_A + self.loss_G_B) * 0.5
        loss = loss + (self.loss_NCE1 + self.loss_NCE2) * 0.5
        loss = loss + (self.loss_idt_A + self.loss_idt_B) * 0.5
        if opt.lambda_feat > 0:  # for the identity images, whose targets are known
            features_A = networks.feature_matching(self.netD_A, self.idt_A, self.real_B)
            features_B = networks.feature_matching(self.netD_B, self.idt_B, self.real_A)
            self.loss_feat_A = features_A * opt.lambda_feat
            self.loss_feat_B = features_B * opt.lambda_feat
            loss = loss + (self.loss_feat_A + self.loss_feat_B) * 0.5
        return loss

    def backward_G(self):
        """Gradients of the generators and of both F."""
        self.loss_G = self.compute_G_loss()
        self.loss_G.backward()

    def calculate_NCE_loss(self, netG, netF, source, features, other_G, other_F, target):
        """The contrastive loss (eq. 3) of `target` = `netG(source)`, a scalar.

        `netG` and `netF` embed `source`; `other_G` and `other_F`, of the other direction, embed
        `target`. `features` are those of `source`, or None to compute them.
        """
        queries = other_G(target, self.nce_layers, encode_only=True)
        if self.flipped:
            queries = [q.flip(3) for q in queries]
        if features is None:
            with torch.no_grad():
                features = netG(source, self.nce_layers, encode_only=True)
        loss = patch_nce.contrast(
            self.criterionNCE, queries, features, other_F, netF, self.opt.num_patches
        )
        return loss * self.opt.lambda_NCE

    def optimize_parameters(self):
        """One step of both discriminators, then one of both generators and both F."""
        self.forward()
        self.set_requires_grad([self.netD_A, self.netD_B], True)
        self.optimizer_D.zero_grad()
        self.backward_D_A()
        self.backward_D_B()
        self.optimizer_D.step()
        self.set_requires_grad([self.netD_A, self.netD_B], False)
        self.optimizer_G.zero_grad()
        if self.opt.netF != "sample":
            self.optimizer_F.zero_grad()
        self.backward_G()
        self.optimizer_G.step()
        if self.opt.netF != "sample":
            self.optimizer_F.step()
