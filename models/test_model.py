"""One generator, one way: for translating a folder of images."""

from __future__ import annotations

import io
from pathlib import Path

from torch import nn

from util.errors import UserError, first_line, warn
from util.run.saved_options import NETWORK_OPTIONS, read_saved_options

from . import adversarial
from .base_model import BaseModel
from .inference.loading import generator_of_model, unchanged_process
from .inference.sizes import one_tensor


class TestModel(BaseModel):
    """Loads `<epoch>_net_G.pth`, or, of two generators, the one for `--direction`."""

    __test__ = False  # not a test class for pytest
    recordable = True  # there is nothing to record, but its images may have any layout

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
        suffix = opt.model_suffix or self._find_suffix(saved)
        self.model_names = ["G" + suffix]
        self.visual_names = ["real", "fake"]
        self.netG = self._generator(saved, "G" + suffix)
        # load_networks uses the attribute of that name
        setattr(self, "netG" + suffix, self.netG)

    def _generator(self, saved: dict[str, str], name: str) -> nn.Module:
        """The network as the model of the training builds it, or, if that fails, as options say."""
        opt = self.opt
        now = {option: str(value) for option, value in vars(opt).items()}
        given = {option: now[option] for option in NETWORK_OPTIONS} | {"normG": now["norm"]}
        if name == "G_B":  # the given options describe this generator, the model's G_A
            given |= {"input_nc": now["output_nc"], "output_nc": now["input_nc"]}
        if saved.get("model", "test") != "test":
            try:
                with unchanged_process(io.StringIO()):
                    return generator_of_model(now | saved | given, Path(self.save_dir), name)[0]
            except (Exception, SystemExit) as e:  # the code may have changed, or be gone
                warn(
                    f"the generator is --netG {opt.netG} as the options say, which may be another "
                    f"network with these weights: --model {saved['model']} fails: {first_line(e)}"
                )
        return adversarial.generator(opt, opt.input_nc, opt.output_nc)

    def _find_suffix(self, saved: dict[str, str]) -> str:
        """The suffix of the generator for `--direction`: none, `_A` or `_B`.

        In CycleGAN and DCLGAN, G_A translates in the direction of training, and G_B back.
        """
        trained = saved.get("direction", "AtoB")
        suffix = "_A" if self.opt.direction == trained else "_B"
        names = ("", suffix) if suffix == "_A" else (suffix, "")  # G may be a copy of G_A
        there = [n for n in names if self.weights_file(self.load_suffix(), "G" + n).exists()]
        found = there[0] if there else ""
        if there and not found and "direction" in saved and trained != self.opt.direction:
            warn(
                f"{self.opt.name} was trained {trained} and has one generator: --direction "
                f"{self.opt.direction} has no effect"
            )
        return found

    def set_input(self, input):
        """Take a batch: `A` (N, C, H, W) in [-1, 1] and its paths."""
        self.real = self.to_device(input["A"])
        self.image_paths = input["A_paths"]

    def forward(self):
        """Translate. Raises UserError where the network wants or gives more than an image."""
        try:
            self.fake = one_tensor(self.netG, self.real)
        except (TypeError, UserError) as e:
            if isinstance(e, TypeError) and "forward() missing" not in str(e):
                raise
            trained = read_saved_options(self.save_dir).get("model", "")
            raise UserError(
                f"{first_line(e)}: --model test is for networks that take and give one image; "
                f"test with the model of the training{trained and f', --model {trained}'}"
            ) from e

    def optimize_parameters(self):
        """Does nothing: this model is for testing only."""
