"""Two time scales: D learns at another rate than G, and groups of G at two rates."""

import torch

from . import networks
from .base_model import BaseModel


class TturModel(BaseModel):
    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        parser.add_argument("--lr_D", type=float, default=0.0008)
        return parser

    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["G_GAN", "G_L1", "D"]
        self.visual_names = ["real_A", "fake_B", "real_B"]
        self.model_names = ["G", "D"] if self.isTrain else ["G"]
        self.netG = networks.define_G(
            opt.input_nc,
            opt.output_nc,
            opt.ngf,
            opt.netG,
            opt.norm,
            not opt.no_dropout,
            opt.init_type,
            opt.init_gain,
            self.gpu_ids,
        )
        if self.isTrain:
            self.netD = networks.define_D(
                opt.input_nc + opt.output_nc,
                opt.ndf,
                opt.netD,
                opt.n_layers_D,
                opt.norm,
                opt.init_type,
                opt.init_gain,
                self.gpu_ids,
            )
            self.criterionGAN = networks.GANLoss("lsgan").to(self.device)
            self.criterionL1 = torch.nn.L1Loss()
            layers = list(self.netG.model)
            first = [p for layer in layers[:4] for p in layer.parameters()]
            rest = [p for layer in layers[4:] for p in layer.parameters()]
            self.optimizer_G = torch.optim.Adam(
                [{"params": first, "lr": opt.lr * 0.5}, {"params": rest}],
                lr=opt.lr,
                betas=(opt.beta1, 0.999),
            )
            self.optimizer_D = torch.optim.RMSprop(self.netD.parameters(), lr=opt.lr_D)
            self.optimizers += [self.optimizer_G, self.optimizer_D]

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        self.image_paths = input["A_paths"]

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def optimize_parameters(self):
        self.forward()
        # D is not frozen while G learns: what reaches it is cleared before its own turn
        self.optimizer_G.zero_grad()
        fake_AB = torch.cat((self.real_A, self.fake_B), 1)
        self.loss_G_GAN = self.criterionGAN(self.netD(fake_AB), True)
        self.loss_G_L1 = self.criterionL1(self.fake_B, self.real_B) * 10
        (self.loss_G_GAN + self.loss_G_L1).backward()
        self.optimizer_G.step()
        self.optimizer_D.zero_grad()
        real_AB = torch.cat((self.real_A, self.real_B), 1)
        self.loss_D = 0.5 * (
            self.criterionGAN(self.netD(real_AB), True)
            + self.criterionGAN(self.netD(fake_AB.detach()), False)
        )
        self.loss_D.backward()
        self.optimizer_D.step()
