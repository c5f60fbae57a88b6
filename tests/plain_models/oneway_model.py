"""A subclass of CycleGAN: its own forward, and a D that is trained through backward_D_basic."""

from .cycle_gan_model import CycleGANModel


class OnewayModel(CycleGANModel):
    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        CycleGANModel.modify_commandline_options(parser, is_train)
        if is_train:
            parser.add_argument("--lambda_mean", type=float, default=2.0)
        return parser

    def __init__(self, opt):
        CycleGANModel.__init__(self, opt)
        self.loss_names += ["mean"]

    def forward(self):
        self.fake_B = self.netG_A(self.real_A)
        self.rec_A = self.netG_B(self.fake_B)
        self.fake_A = self.netG_B(self.real_B)
        self.rec_B = self.netG_A(self.fake_A)

    def backward_G(self):
        self.loss_mean = (self.fake_B.mean((1, 2, 3)) - self.real_A.mean((1, 2, 3))).abs().mean()
        (self.loss_mean * self.opt.lambda_mean).backward(retain_graph=True)
        CycleGANModel.backward_G(self)

    def backward_D_A(self):
        fake_B = self.fake_B_pool.query(self.fake_B)
        self.loss_D_A = self.backward_D_basic(self.netD_A, self.real_B, fake_B)
        assert self.loss_D_A.shape == ()
