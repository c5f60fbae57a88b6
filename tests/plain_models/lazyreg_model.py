"""R1 (Mescheder et al. 2018, eq. 9) in every second iteration: its loss is not there at first."""

import torch

from . import networks
from .base_model import BaseModel


class LazyregModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["G", "D", "R1"]
        self.visual_names = ["real_A", "fake_B"]
        self.model_names = ["G", "D"] if self.isTrain else ["G"]
        self.netG = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        self.count = 0
        if self.isTrain:
            self.netD = networks.define_D(3, opt.ndf, "basic", norm="none")
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
        self.count += 1
        self.forward()
        self.optimizer_D.zero_grad()
        softplus = torch.nn.functional.softplus
        fake, real = self.netD(self.fake_B.detach()), self.netD(self.real_B)
        self.loss_D = softplus(fake).mean() + softplus(-real).mean()
        if self.count % 2 == 0:
            real_B = self.real_B.detach().clone().requires_grad_(True)
            score = self.netD(real_B)
            (grad,) = torch.autograd.grad(score.sum(), real_B, create_graph=True)
            self.loss_R1 = 5 * grad.square().sum((1, 2, 3)).mean()
            self.loss_D = self.loss_D + self.loss_R1
        self.loss_D.backward()
        self.optimizer_D.step()
        self.optimizer_G.zero_grad()
        self.loss_G = softplus(-self.netD(self.fake_B)).mean()
        self.loss_G.backward()
        self.optimizer_G.step()
