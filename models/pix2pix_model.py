"""pix2pix: translation learned from pairs.

Isola, Zhu, Zhou, Efros: Image-to-Image Translation with Conditional Adversarial Networks,
CVPR 2017, https://arxiv.org/abs/1611.07004. Equation and section numbers are that paper's.
"""

from __future__ import annotations

import torch

from util.argument_types import number
from util.errors import UserError

from . import adversarial, networks
from .base_model import BaseModel
from .perceptual import VGGLoss


class Pix2PixModel(BaseModel):
    """A generator, and a discriminator that sees input and output together."""

    recordable = True  # each iteration does the same: see BaseModel

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        """Default to a U-Net, batch norm, dropout, pairs, cross-entropy and no image pool.

        Full objective (eq. 4): adversarial + lambda_L1 * |B - G(A)|.
        """
        parser.set_defaults(norm="batch", netG="unet_256", dataset_mode="aligned")
        if is_train:
            parser.set_defaults(pool_size=0, gan_mode="vanilla")
            adversarial.add_options(parser)
            add = parser.add_argument_group("pix2pix").add_argument
            add("--lambda_L1", type=number(), default=100.0, help="weight of the L1 loss")
            add("--lambda_vgg", type=number(), default=0.0, help="weight of the VGG19 loss")
            add(
                "--vgg_weights",
                metavar="FILE",
                help="torchvision's weights of VGG19, for --lambda_vgg [downloaded]",
            )
        return parser

    @staticmethod
    def check_options(opt):
        """Refuse a perceptual loss on anything but colour images."""
        if opt.isTrain:
            adversarial.check_options(opt)
        if opt.isTrain and opt.lambda_vgg > 0 and opt.output_nc != 3:
            raise UserError(
                f"--lambda_vgg compares images of 3 channels, and --output_nc is {opt.output_nc}:"
                " leave it out"
            )
        if opt.isTrain and opt.vgg_weights and opt.lambda_vgg <= 0:
            raise UserError("--vgg_weights has no effect without --lambda_vgg: add that weight")

    def __init__(self, opt):
        super().__init__(opt)
        self.loss_names = ["G_GAN", "G_L1", "D_real", "D_fake"]
        self.visual_names = ["real_A", "fake_B", "real_B"]
        self.model_names = ["G", "D"] if self.isTrain else ["G"]
        self.netG = adversarial.generator(opt, opt.input_nc, opt.output_nc)
        if not self.isTrain:
            return
        self.netD = adversarial.discriminator(opt, opt.input_nc + opt.output_nc)
        self.criterionGAN = networks.GANLoss(opt.gan_mode).to(self.device)
        self.criterionL1 = torch.nn.L1Loss()
        self.penalty = networks.GradientPenalty(opt.gan_mode, opt.gp, opt.lambda_gp, opt.gp_every)
        if self.penalty.kind:
            self.loss_names.append("D_gp")
        if opt.lambda_feat > 0:
            self.loss_names.append("G_feat")
        if opt.lambda_vgg > 0:
            self.loss_names.append("G_VGG")
            self.criterionVGG = VGGLoss(opt.vgg_weights).to(self.device)
            self.prepare_network(self.criterionVGG)
        betas = (opt.beta1, 0.999)
        self.optimizer_G = torch.optim.Adam(self.netG.parameters(), lr=opt.lr, betas=betas)
        self.optimizer_D = torch.optim.Adam(self.netD.parameters(), lr=opt.lr, betas=betas)
        self.optimizers = [self.optimizer_G, self.optimizer_D]

    def set_input(self, input):
        """Take a batch of pairs: `A`, `B` (N, C, H, W) in [-1, 1]; BtoA swaps A and B."""
        A, B = ("A", "B") if self.opt.direction == "AtoB" else ("B", "A")
        self.real_A = self.to_device(input[A])
        self.real_B = self.to_device(input[B])
        self.image_paths = input[A + "_paths"]

    def forward(self):
        """Translate."""
        self.fake_B = self.netG(self.real_A)  # G(A)

    def backward_D(self):
        """Gradients of the discriminator (eq. 1), halved (section 3.3)."""
        fake_AB = torch.cat((self.real_A, self.fake_B), 1).detach()
        real_AB = torch.cat((self.real_A, self.real_B), 1)
        self.batch_passes(self.netD, fake_AB, real_AB)  # may share a pass
        self.loss_D_fake = self.criterionGAN(self.netD(fake_AB), False)
        self.loss_D_real = self.criterionGAN(self.netD(real_AB), True)
        penalty = self.penalty(self.netD, real_AB, fake_AB)
        self.loss_D_gp = self.penalty.latest(self.netD)
        self.loss_D = (self.loss_D_fake + self.loss_D_real) * 0.5 + penalty
        self.loss_D.backward()

    def compute_G_loss(self):
        """The generator's loss: adversarial, L1 (eq. 4), features of D and of VGG19 (pix2pixHD)."""
        pred_fake = self.netD(torch.cat((self.real_A, self.fake_B), 1))
        self.loss_G_GAN = self.criterionGAN(pred_fake, True, False)
        self.loss_G_L1 = self.criterionL1(self.fake_B, self.real_B) * self.opt.lambda_L1
        loss = self.loss_G_GAN + self.loss_G_L1
        if self.opt.lambda_feat > 0:
            real_AB = torch.cat((self.real_A, self.real_B), 1)
            features = networks.feature_matching(self.netD, pred_fake, real_AB)
            self.loss_G_feat = features * self.opt.lambda_feat
            loss = loss + self.loss_G_feat
        if self.opt.lambda_vgg > 0:
            self.loss_G_VGG = self.criterionVGG(self.fake_B, self.real_B) * self.opt.lambda_vgg
            loss = loss + self.loss_G_VGG
        return loss

    def backward_G(self):
        """Gradients of the generator."""
        self.loss_G = self.compute_G_loss()
        self.loss_G.backward()

    def optimize_parameters(self):
        """One step of the discriminator, then one of the generator."""
        self.forward()
        self.set_requires_grad(self.netD, True)
        self.optimizer_D.zero_grad()
        self.backward_D()
        self.optimizer_D.step()
        self.set_requires_grad(self.netD, False)
        self.optimizer_G.zero_grad()
        self.backward_G()
        self.optimizer_G.step()
