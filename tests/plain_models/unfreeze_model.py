"""A part is unfrozen while it trains, a layer changes, and an average is kept by hand."""

import torch
from torch import nn

from .base_model import BaseModel


class UnfreezeModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["L1", "average"]
        self.visual_names = ["real_A", "fake_B"]
        self.model_names = ["G"]
        self.netG = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(1.0), nn.Conv2d(4, 3, 1), nn.Tanh()
        )
        if self.isTrain:
            self.set_requires_grad(self.netG[0], False)
            self.optimizer = torch.optim.Adam(self.netG.parameters(), lr=opt.lr)
            self.optimizers = [self.optimizer]
            self.iteration, self.weight = 0, 1.0
            self.shadow = {k: p.detach().clone() for k, p in self.netG.named_parameters()}

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        self.image_paths = input["A_paths"]

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def optimize_parameters(self):
        self.iteration += 1
        self.weight *= 0.9
        self.netG[1].negative_slope = max(0.2, self.netG[1].negative_slope - 0.3)
        if self.iteration == 2:
            self.set_requires_grad(self.netG[0], True)
        self.forward()
        self.optimizer.zero_grad()
        self.loss_L1 = (self.fake_B - self.real_B).abs().mean()
        pairs = [(p, self.shadow[k]) for k, p in self.netG.named_parameters()]
        self.loss_average = self.weight * sum((p - mean).square().sum() for p, mean in pairs)
        (self.loss_L1 + self.loss_average).backward()
        self.optimizer.step()
        for k, p in self.netG.named_parameters():
            self.shadow[k] = 0.9 * self.shadow[k] + 0.1 * p.detach()
