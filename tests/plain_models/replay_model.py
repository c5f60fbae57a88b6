"""State in plain values: a replay buffer and a warm-up by hand, running means that start empty."""

from collections import deque

import torch

from . import networks
from .base_model import BaseModel


class ReplayBuffer:
    def __init__(self, size):
        self.size, self.data = size, []

    def exchange(self, picture):
        """The oldest image, for a newer one."""
        self.data.append(picture)
        return self.data.pop(0) if len(self.data) > self.size else picture


class WarmUp:
    def __init__(self, optimizer, steps):
        self.optimizer, self.steps, self.count = optimizer, steps, 0
        self.rate = optimizer.param_groups[0]["lr"]

    def step(self):
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = self.rate * min(1, self.count / self.steps)


class ReplayModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["G", "D"]
        self.visual_names = ["real_A", "fake_B"]
        self.model_names = ["G", "D"] if self.isTrain else ["G"]
        self.netG = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        if self.isTrain:
            self.netD = networks.define_D(3, opt.ndf, "basic", norm="none")
            self.optimizer_G = torch.optim.Adam(self.netG.parameters(), lr=opt.lr)
            self.optimizer_D = torch.optim.RMSprop(self.netD.parameters(), lr=opt.lr)
            self.optimizers = [self.optimizer_G, self.optimizer_D]
            self.buffers = {"B": ReplayBuffer(2)}
            self.warm_up = WarmUp(self.optimizer_G, 10)
            self.mean, self.lowest, self.recent = 0, None, deque(maxlen=2)
            self.highest, self.last = {}, torch.zeros(())

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        self.image_paths = input["A_paths"]

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def optimize_parameters(self):
        self.warm_up.step()
        self.optimizer_G.zero_grad()
        self.forward()
        loss = (self.fake_B - self.real_B).abs().mean()
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        self.lowest = loss.item() if self.lowest is None else min(self.lowest, loss.item())
        self.recent.append(loss.item())
        weight = float(self.last)
        self.last = loss.item()
        self.highest["L1"] = max(self.highest.get("L1", 0.0), loss.item())
        weight += self.mean + self.lowest + sum(self.recent) + self.highest["L1"]
        self.loss_G = weight * loss + (self.netD(self.fake_B) - 1).square().mean()
        self.loss_G.backward()
        self.optimizer_G.step()
        self.optimizer_D.zero_grad()
        fake = self.netD(self.buffers["B"].exchange(self.fake_B.detach()))
        self.loss_D = (self.netD(self.real_B) - 1).square().mean() + fake.square().mean()
        self.loss_D.backward()
        self.optimizer_D.step()
