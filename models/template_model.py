"""A model to start your own from: a generator that learns pairs by an L1 loss alone.

Copy this file to `models/<name>_model.py`, name the class `<Name>Model`, and train with
`--model <name>`. Nothing has to be registered: file and class are found by the name.
Then change one thing. The loop in `train.py` calls, for each batch,

    model.set_input(data)           # take the batch
    model.optimize_parameters()     # forward, losses, gradients, one step

and now and then `get_current_losses` and `get_current_visuals`, which look at the names below.
"""

from __future__ import annotations

import torch

from . import networks
from .base_model import BaseModel


class TemplateModel(BaseModel):
    """Minimizes lambda * |B - G(A)|."""

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        """Add options that only this model has, or change the defaults of others.

        This runs before the final parse, so what is added shows in --help and in the saved options.
        """
        parser.set_defaults(dataset_mode="aligned")
        if is_train:
            parser.add_argument(
                "--lambda_regression", type=float, default=1.0, help="weight of the regression loss"
            )
        return parser

    def __init__(self, opt):
        """Name what is shown and saved; build networks, losses and optimizers."""
        super().__init__(opt)  # sets self.opt, self.isTrain, self.device, self.gpu_ids
        # "G" stands for the attribute self.loss_G: printed, logged and drawn
        self.loss_names = ["G"]
        # attributes with images (N, C, H, W) in [-1, 1]: shown and saved
        self.visual_names = ["data_A", "data_B", "output"]
        # "G" stands for the attribute self.netG: saved as <epoch>_net_G.pth, and loaded
        self.model_names = ["G"]
        # Batch norm and no dropout whatever the options say, as in the original code;
        # `norm=opt.norm, use_dropout=not opt.no_dropout` takes both from the command line.
        self.netG = networks.define_G(
            opt.input_nc,
            opt.output_nc,
            opt.ngf,
            opt.netG,
            init_type=opt.init_type,
            init_gain=opt.init_gain,
            gpu_ids=self.gpu_ids,
        )
        if self.isTrain:
            self.criterionLoss = torch.nn.L1Loss()
            # any torch optimizer will do
            self.optimizer = torch.optim.Adam(
                self.netG.parameters(), lr=opt.lr, betas=(opt.beta1, 0.999)
            )
            # each optimizer in this list gets a learning rate schedule, and is saved
            self.optimizers = [self.optimizer]

    def set_input(self, input):
        """Take what the dataset's `__getitem__` returned, collated into a batch."""
        A, B = ("A", "B") if self.opt.direction == "AtoB" else ("B", "A")
        self.data_A = input[A].to(self.device)
        self.data_B = input[B].to(self.device)
        self.image_paths = input[A + "_paths"]

    def forward(self):
        """Compute the output; testing calls this too."""
        self.output = self.netG(self.data_A)

    def backward(self):
        """Compute the loss and its gradients."""
        self.loss_G = self.criterionLoss(self.output, self.data_B) * self.opt.lambda_regression
        self.loss_G.backward()

    def optimize_parameters(self):
        """One iteration."""
        self.forward()
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()
