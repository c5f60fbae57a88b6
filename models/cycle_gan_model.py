"""CycleGAN: translation learned from unpaired images.

Zhu, Park, Isola, Efros: Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial
Networks, ICCV 2017, https://arxiv.org/abs/1703.10593. Equation and section numbers are that
paper's: G is `netG_A` (A -> B), F is `netG_B` (B -> A), D_Y is `netD_A`, which judges B, and D_X is
`netD_B`.
"""

from __future__ import annotations

import itertools

import torch

from util.argument_types import number
from util.errors import UserError
from util.image_pool import ImagePool

from . import adversarial, networks
from .base_model import BaseModel


class CycleGANModel(BaseModel):
    """Two generators and two discriminators; going there and back must be the identity."""

    recordable = True  # each iteration does the same: see BaseModel

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        """Turn dropout off by default, and add the weights of the losses.

        lambda_A and lambda_B weight the two cycles (eq. 3). The identity loss (section 5.2), which
        keeps colours, is weighted by lambda_identity times these: 0.5 is half as strong as a cycle.
        """
        parser.set_defaults(no_dropout=True)
        if is_train:
            adversarial.add_options(parser)
            add = parser.add_argument_group("CycleGAN").add_argument
            add("--lambda_A", type=number(), default=10.0, help="weight of A -> B -> A")
            add("--lambda_B", type=number(), default=10.0, help="weight of B -> A -> B")
            add(
                "--lambda_identity",
                type=number(),
                default=0.5,
                help="weight of the identity loss, relative to lambda_A and lambda_B",
            )
        return parser

    @staticmethod
    def check_options(opt):
        """Refuse an identity loss between images with different numbers of channels."""
        if not opt.isTrain:
            return
        adversarial.check_options(opt)
        if opt.lambda_identity > 0 and opt.input_nc != opt.output_nc:
            raise UserError(
                f"--lambda_identity {opt.lambda_identity:g} needs --input_nc and --output_nc to be "
                f"equal, got {opt.input_nc} and {opt.output_nc}: say --lambda_identity 0"
            )

    def __init__(self, opt):
        super().__init__(opt)
        self.loss_names = ["D_A", "G_A", "cycle_A", "idt_A", "D_B", "G_B", "cycle_B", "idt_B"]
        self.model_names = ["G_A", "G_B", "D_A", "D_B"] if self.isTrain else ["G_A", "G_B"]
        visuals_A = ["real_A", "fake_B", "rec_A"]
        visuals_B = ["real_B", "fake_A", "rec_B"]
        if self.isTrain and opt.lambda_identity > 0:
            visuals_A.append("idt_B")
            visuals_B.append("idt_A")
        self.visual_names = visuals_A + visuals_B

        self.netG_A = adversarial.generator(opt, opt.input_nc, opt.output_nc)
        self.netG_B = adversarial.generator(opt, opt.output_nc, opt.input_nc)
        if not self.isTrain:
            return

        if opt.lambda_feat > 0:
            self.loss_names += ["feat_A", "feat_B"]
        self.netD_A = adversarial.discriminator(opt, opt.output_nc)
        self.netD_B = adversarial.discriminator(opt, opt.input_nc)
        self.fake_A_pool = ImagePool(opt.pool_size)
        self.fake_B_pool = ImagePool(opt.pool_size)
        self.criterionGAN = networks.GANLoss(opt.gan_mode).to(self.device)
        self.criterionCycle = torch.nn.L1Loss()
        self.criterionIdt = torch.nn.L1Loss()
        self.penalty = networks.GradientPenalty(opt.gan_mode, opt.gp, opt.lambda_gp, opt.gp_every)
        if self.penalty.kind:
            self.loss_names += ["gp_A", "gp_B"]
        weights_G = itertools.chain(self.netG_A.parameters(), self.netG_B.parameters())
        weights_D = itertools.chain(self.netD_A.parameters(), self.netD_B.parameters())
        betas = (opt.beta1, 0.999)
        self.optimizer_G = torch.optim.Adam(weights_G, lr=opt.lr, betas=betas)
        self.optimizer_D = torch.optim.Adam(weights_D, lr=opt.lr, betas=betas)
        self.optimizers = [self.optimizer_G, self.optimizer_D]

    def set_input(self, input):
        """Take a batch of the dataset: `A`, `B` (N, C, H, W) in [-1, 1], and their paths.

        With `--direction BtoA` the two are swapped: A is always where translation starts.
        """
        A, B = ("A", "B") if self.opt.direction == "AtoB" else ("B", "A")
        self.real_A = self.to_device(input[A])
        self.real_B = self.to_device(input[B])
        self.image_paths = input[A + "_paths"]

    def forward(self):
        """Translate both ways, and back."""
        as_here = type(self).backward_G is CycleGANModel.backward_G  # one backward() for all losses
        if self.isTrain and self.opt.lambda_identity > 0 and as_here:
            # the inputs that backward_G will give to the same networks can share a pass
            self.batch_passes(self.netG_A, self.real_A, self.real_B)
            self.batch_passes(self.netG_B, self.real_B, self.real_A)
        self.fake_B = self.netG_A(self.real_A)  # G(A)
        self.rec_A = self.netG_B(self.fake_B)  # F(G(A))
        self.fake_A = self.netG_B(self.real_B)  # F(B)
        self.rec_B = self.netG_A(self.fake_A)  # G(F(B))

    def compute_G_loss(self):
        """The loss of both generators: adversarial (eq. 1), cycle (eq. 2), identity (5.2)."""
        lambda_A, lambda_B = self.opt.lambda_A, self.opt.lambda_B
        lambda_idt = self.opt.lambda_identity
        if lambda_idt > 0:
            # G makes B, so it should leave a B unchanged
            self.idt_A = self.netG_A(self.real_B)
            self.loss_idt_A = self.criterionIdt(self.idt_A, self.real_B) * lambda_B * lambda_idt
            self.idt_B = self.netG_B(self.real_A)
            self.loss_idt_B = self.criterionIdt(self.idt_B, self.real_A) * lambda_A * lambda_idt
        else:
            self.loss_idt_A = self.loss_idt_B = 0
        self.loss_G_A = self.criterionGAN(self.netD_A(self.fake_B), True, False)
        self.loss_G_B = self.criterionGAN(self.netD_B(self.fake_A), True, False)
        self.loss_cycle_A = self.criterionCycle(self.rec_A, self.real_A) * lambda_A
        self.loss_cycle_B = self.criterionCycle(self.rec_B, self.real_B) * lambda_B
        loss = self.loss_G_A + self.loss_G_B + self.loss_cycle_A + self.loss_cycle_B
        if self.opt.lambda_feat > 0:
            # the pairs to match are reconstructions and originals (Wang and Lin, arXiv:2408.15374)
            features_A = networks.feature_matching(self.netD_B, self.rec_A, self.real_A)
            features_B = networks.feature_matching(self.netD_A, self.rec_B, self.real_B)
            self.loss_feat_A = features_A * self.opt.lambda_feat
            self.loss_feat_B = features_B * self.opt.lambda_feat
            loss = loss + self.loss_feat_A + self.loss_feat_B
        return loss + self.loss_idt_A + self.loss_idt_B

    def backward_G(self):
        """Gradients of both generators."""
        self.loss_G = self.compute_G_loss()
        self.loss_G.backward()

    def backward_D_basic(self, netD, real, fake):
        """Gradients of one discriminator; returns its loss.

        Halved, so that it learns more slowly than the generators (section 4).
        """
        fake = fake.detach()
        self.batch_passes(netD, real, fake)
        loss_D_real = self.criterionGAN(netD(real), True)
        loss_D_fake = self.criterionGAN(netD(fake), False)
        loss_D = (loss_D_real + loss_D_fake) * 0.5 + self.penalty(netD, real, fake)
        loss_D.backward()
        return loss_D

    def backward_D_A(self):
        """D_A tells real B from generated B, some of which come from earlier iterations."""
        fake_B = self.fake_B_pool.query(self.fake_B)
        self.loss_D_A = self.backward_D_basic(self.netD_A, self.real_B, fake_B)
        self.loss_gp_A = self.penalty.latest(self.netD_A)

    def backward_D_B(self):
        """D_B tells real A from generated A."""
        fake_A = self.fake_A_pool.query(self.fake_A)
        self.loss_D_B = self.backward_D_basic(self.netD_B, self.real_A, fake_A)
        self.loss_gp_B = self.penalty.latest(self.netD_B)

    def optimize_parameters(self):
        """One step of both generators, then one of both discriminators."""
        self.forward()
        self.set_requires_grad([self.netD_A, self.netD_B], False)
        self.optimizer_G.zero_grad()
        self.backward_G()
        self.optimizer_G.step()
        self.set_requires_grad([self.netD_A, self.netD_B], True)
        self.optimizer_D.zero_grad()
        self.backward_D_A()
        self.backward_D_B()
        self.optimizer_D.step()
