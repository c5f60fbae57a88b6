"""Several optimizers, one of them not in `optimizers`, and weights that are in no network."""

import torch

from . import networks
from .base_model import BaseModel


class SeveralModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ["there", "back", "Depth"]
        self.visual_names = ["real_A", "fake_B", "rec_A"]
        self.model_names = ["there", "back"]
        self.netthere = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        self.netback = networks.define_G(3, 3, opt.ngf, opt.netG, opt.norm, False)
        if self.isTrain:
            # learned weights of the losses (Kendall et al. 2018, eq. 7)
            self.log_sigma = torch.nn.Parameter(torch.zeros(2, device=self.device))
            self.opts = {
                "there": torch.optim.Adam(self.netthere.parameters(), lr=opt.lr),
                "back": torch.optim.SGD(
                    self.netback.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1
                ),
            }
            self.opt_sigma = torch.optim.AdamW([self.log_sigma], lr=0.01)
            self.optimizers = [self.opts["there"], self.opts["back"]]

    def set_input(self, input):
        self.real_A = input["A"].to(self.device)
        self.real_B = input["B"].to(self.device)
        self.image_paths = input["A_paths"]

    def forward(self):
        self.fake_B = self.netthere(self.real_A)
        self.rec_A = self.netback(self.fake_B)

    def optimize_parameters(self):
        self.forward()
        self.loss_there = (self.fake_B - self.real_B).abs().mean()
        self.loss_back = (self.rec_A - self.real_A).abs().mean()
        # also a loss of the weights themselves, which goes through no network
        self.loss_Depth = 1e-3 * sum(p.square().sum() for p in self.netback.parameters())
        losses = torch.stack([self.loss_there, self.loss_back])
        total = (losses * torch.exp(-self.log_sigma) + self.log_sigma).sum() + self.loss_Depth
        total.backward()
        for optimizer in [*self.opts.values(), self.opt_sigma]:
            optimizer.step()
            optimizer.zero_grad()
