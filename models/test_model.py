"""One generator, one way: for translating a folder of pictures."""

from __future__ import annotations

from util.errors import UserError, warn
from util.run.saved_options import read_saved_options

from . import adversarial
from .base_model import BaseModel

# models whose generators are those of the options, as here
AS_HERE = ("cycle_gan", "pix2pix", "cut", "dcl", "colorization", "test")


class TestModel(BaseModel):
    """Loads `<epoch>_net_G.pth`, or of two generators the one for `--direction`."""

    __test__ = False  # not a test class for pytest

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        """Read a single folder by default, and add `--model_suffix`."""
        if is_train:
            raise UserError("--model test can't be trained: use it with test.py")
        parser.set_defaults(dataset_mode="single")
        add = parser.add_argument_group("one generator").add_argument
        add("--model_suffix", default="", help="which one: _A loads <epoch>_net_G_A.pth")
        return parser

    def __init__(self, opt):
        super().__init__(opt)
        saved = read_saved_options(self.save_dir)
        trained = saved.get("model", "test")
        if trained not in AS_HERE:
            warn(
                f"--model test has --netG {opt.netG} as the options say, and {opt.name} was "
                f"trained with --model {trained}, which may make another network of the same "
                f"weights: --model {trained} or load_generator builds that"
            )
        suffix = opt.model_suffix or self._find_suffix(saved)
        self.model_names = ["G" + suffix]
        self.visual_names = ["real", "fake"]
        self.netG = adversarial.generator(opt, opt.input_nc, opt.output_nc)
        # load_networks uses the attribute of that name
        setattr(self, "netG" + suffix, self.netG)

    def _find_suffix(self, saved: dict[str, str]) -> str:
        """The suffix of the generator for `--direction`: none, `_A` or `_B`.

        In CycleGAN and DCLGAN, G_A translates in the direction of training, and G_B back.
        """
        trained = saved.get("direction", "AtoB")
        if self.weights_file(self.load_suffix(), "G").exists():
            if "direction" in saved and trained != self.opt.direction:
                warn(
                    f"{self.opt.name} was trained {trained} and has one generator: --direction "
                    f"{self.opt.direction} has no effect"
                )
            return ""
        suffix = "_A" if self.opt.direction == trained else "_B"
        return suffix if self.weights_file(self.load_suffix(), "G" + suffix).exists() else ""

    def set_input(self, input):
        """Take a batch: `A` (N, C, H, W) in [-1, 1] and its paths."""
        self.real = input["A"].to(self.device, non_blocking=True)
        self.image_paths = input["A_paths"]

    def forward(self):
        """Translate."""
        self.fake = self.netG(self.real)

    def optimize_parameters(self):
        """Does nothing: this model is for testing only."""
