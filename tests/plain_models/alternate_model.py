"""G learns in every second iteration only; a measure is infinite, and one is not there at first."""

import torch

from . import networks
from .base_model import BaseModel


class AlternateModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["G", "D", "psnr", "never"]
        self.visual_names = ["real_A", "fake_B"]
        self.model_names = ["G", "D"] if self.isTrain else ["G"]
        self.netG = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        self.iteration = 0
        if self.isTrain:
            self.netD = networks.define_D(3, opt.ndf, "pixel", norm=opt.norm)
            self.optimizer_G = torch.optim.Adam(self.netG.parameters(), lr=opt.lr)
            self.optimizer_D = torch.optim.Adam(self.netD.parameters(), lr=opt.lr)
            self.optimizers = [self.optimizer_G, self.optimizer_D]

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        self.image_paths = input["A_paths"]

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def optimize_parameters(self):
        self.iteration += 1
        self.forward()
        self.optimizer_D.zero_grad()
        real, fake = self.netD(self.real_B), self.netD(self.fake_B.detach())
        self.loss_D = torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()
        self.loss_D.backward()
        self.optimizer_D.step()
        self.loss_psnr = -10 * torch.log10((self.real_A - self.real_A).square().mean())
        if self.iteration % 2 == 0:
            self.optimizer_G.zero_grad()
            self.loss_G = -self.netD(self.fake_B).mean()
            self.loss_G.backward()
            self.optimizer_G.step()
