"""Saves and loads more than networks, and changes what is shown and when the rate changes."""

import os

import torch

from . import networks
from .base_model import BaseModel


class OwnsaveModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["L1"]
        self.visual_names = ["real_A"]
        self.model_names = ["G"]
        self.netG = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        self.mean = torch.zeros(3, device=self.device)
        self.called = set()
        if self.isTrain:
            self.optimizer = torch.optim.Adam(self.netG.parameters(), lr=opt.lr)
            self.optimizers = [self.optimizer]

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        if self.isTrain:
            self.mean = self.mean + 0.01
        self.image_paths = input["A_paths"]

    def forward(self):
        self.fake_B = self.netG(self.real_A) + self.mean[:, None, None]

    def optimize_parameters(self):
        self.forward()
        self.optimizer.zero_grad()
        self.loss_L1 = (self.fake_B - self.real_B).abs().mean()
        self.loss_L1.backward()
        self.optimizer.step()

    def save_networks(self, epoch):
        BaseModel.save_networks(self, epoch)
        torch.save({"mean": self.mean}, self.save_dir + f"/{epoch}_mean.pth")

    def load_networks(self, epoch):
        BaseModel.load_networks(self, epoch)
        path = os.path.join(self.save_dir, f"{epoch}_mean.pth")
        self.mean = torch.load(path, weights_only=True)["mean"].to(self.device)

    def get_current_visuals(self):
        self.called.add("visuals")
        visuals = BaseModel.get_current_visuals(self)
        visuals["own"] = self.fake_B.clamp(-1, 1)
        return visuals

    def update_learning_rate(self):
        print("own update_learning_rate")
        BaseModel.update_learning_rate(self)

    def test(self):
        print("own test")
        BaseModel.test(self)

    def print_networks(self, verbose):
        print("own print_networks")
        BaseModel.print_networks(self, verbose)
