"""Networks that take keywords and give lists, tuples and dictionaries."""

import itertools

import torch
from torch import nn

from . import networks
from .base_model import BaseModel


class Pyramid(nn.Module):
    """A discriminator that judges three sizes, and gives its features along."""

    def __init__(self, nc, ndf):
        super().__init__()
        self.scales = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(nc, ndf, 3, 2, 1), nn.Conv2d(ndf, 1, 3, 1, 1)])
            for _ in range(3)
        )

    def forward(self, input, want_features=False):
        scores, features = [], {}
        for i, (first, last) in enumerate(self.scales):
            features[i] = nn.functional.leaky_relu(first(input), 0.2)
            scores.append(last(features[i]))
            input = nn.functional.avg_pool2d(input, 2)
        return (scores, features) if want_features else scores


class PyramidModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["G", "features", "D"]
        self.visual_names = ["real_A", "fake_B", "real_B"]
        self.model_names = ["G", "D"] if self.isTrain else ["G"]
        self.netG = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        if self.isTrain:
            self.netD = networks.init_net(Pyramid(3, opt.ndf), opt.init_type, opt.init_gain)
            self.criterionGAN = networks.GANLoss("lsgan").to(self.device)
            self.optimizer_G = torch.optim.Adam(itertools.chain(self.netG.parameters()), lr=opt.lr)
            self.optimizer_D = torch.optim.Adam(self.netD.parameters(), lr=opt.lr)
            self.optimizers = [self.optimizer_G, self.optimizer_D]

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        self.image_paths = input["A_paths"]

    def forward(self):
        self.fake_B = self.netG(input=self.real_A)

    def optimize_parameters(self):
        self.forward()
        self.set_requires_grad([self.netD], False)
        self.optimizer_G.zero_grad()
        scores, features = self.netD(input=self.fake_B, want_features=True)
        _, wanted = self.netD(self.real_B, want_features=True)
        assert all(f.dtype == self.real_A.dtype for f in features.values())
        self.loss_G = sum(self.criterionGAN(s, True) for s in scores)
        self.loss_features = sum((f - wanted[i]).abs().mean() for i, f in features.items())
        (self.loss_G + 10 * self.loss_features).backward()
        self.optimizer_G.step()
        self.set_requires_grad([self.netD], True)
        self.optimizer_D.zero_grad()
        self.loss_D = 0
        for picture, is_real in ((self.real_B, True), (self.fake_B.detach(), False)):
            for score in self.netD(picture):
                self.loss_D = self.loss_D + self.criterionGAN(score, is_real)
        self.loss_D.backward()
        self.optimizer_D.step()
