"""WGAN-GP of its own: a critic with the penalty written out."""

import torch

from . import networks
from .base_model import BaseModel


class CriticModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["G", "D", "penalty"]
        self.visual_names = ["real_A", "fake_B"]
        self.model_names = ["G", "D"] if self.isTrain else ["G"]
        self.netG = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        if self.isTrain:
            self.netD = networks.define_D(3, opt.ndf, "basic", norm="none")
            self.optimizer_G = torch.optim.Adam(self.netG.parameters(), opt.lr, betas=(0.0, 0.9))
            self.optimizer_D = torch.optim.Adam(self.netD.parameters(), opt.lr, betas=(0.0, 0.9))
            self.optimizers = [self.optimizer_G, self.optimizer_D]

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        self.image_paths = input["A_paths"]

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def gradient_penalty(self):
        middle = (0.3 * self.real_B + 0.7 * self.fake_B.detach()).requires_grad_(True)
        scores = self.netD(middle)
        grads = torch.autograd.grad(scores.sum(), middle, create_graph=True)[0]
        return ((grads.flatten(1).norm(2, dim=1) - 1) ** 2).mean()

    def optimize_parameters(self):
        self.forward()
        self.optimizer_D.zero_grad()
        self.loss_D = self.netD(self.fake_B.detach()).mean() - self.netD(self.real_B).mean()
        self.loss_D.backward()
        self.loss_penalty = 10 * self.gradient_penalty()
        self.loss_penalty.backward()
        self.optimizer_D.step()
        self.optimizer_G.zero_grad()
        self.loss_G = -self.netD(self.fake_B).mean()
        self.loss_G.backward()
        self.optimizer_G.step()
