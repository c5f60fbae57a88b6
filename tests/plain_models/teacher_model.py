"""A teacher made in front of setup, and an average made after it; neither is in `model_names`."""

import copy

import torch

from . import networks
from .base_model import BaseModel


class TeacherModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["L1", "teacher"]
        self.visual_names = ["real_A", "fake_B"]
        self.model_names = ["G"]
        self.netG = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        self.ema = None
        if self.isTrain:
            self.teachers = [copy.deepcopy(self.netG).requires_grad_(False)]
            self.optimizer = torch.optim.Adam(self.netG.parameters(), lr=opt.lr)
            self.optimizers = [self.optimizer]

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        self.image_paths = input["A_paths"]

    def setup(self, opt):
        BaseModel.setup(self, opt)
        if self.isTrain:
            self.ema = copy.deepcopy(self.netG).eval().requires_grad_(False)

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def optimize_parameters(self):
        self.forward()
        with torch.no_grad():
            target, average = self.teachers[0](self.real_A), self.ema(self.real_A)
        self.optimizer.zero_grad()
        self.loss_L1 = (self.fake_B - self.real_B).abs().mean()
        self.loss_teacher = (self.fake_B - target).square().mean()
        self.loss_teacher = self.loss_teacher + 0.1 * (self.fake_B - average).square().mean()
        (self.loss_L1 + self.loss_teacher).backward()
        self.optimizer.step()
        with torch.no_grad():
            for mean, p in zip(self.teachers[0].parameters(), self.netG.parameters(), strict=True):
                mean.lerp_(p, 0.1)
            for mean, p in zip(self.ema.parameters(), self.netG.parameters(), strict=True):
                mean.data.mul_(0.9).add_(p.data, alpha=0.1)
