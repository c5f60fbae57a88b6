"""Models and datasets as people wrote them for the original, put in as one file each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import aligned, copy_of_code, files_below, picture, run_process, unaligned

pytestmark = pytest.mark.slow

# a conditional GAN in the manner of 2024: devices from gpu_ids, and gpu_ids handed on
MODEL_2024 = """
import torch
import util.util as util
from util.image_pool import ImagePool
from .base_model import BaseModel
from . import networks


class DuoModel(BaseModel):
    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        parser.set_defaults(norm='batch', netG='resnet_6blocks', dataset_mode='aligned')
        if is_train:
            parser.set_defaults(pool_size=0, gan_mode='vanilla')
            parser.add_argument('--weight_L1', type=float, default=100.0, help='weight of L1')
        return parser

    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        cuda = len(self.gpu_ids) > 0
        self.device = torch.device('cuda:%d' % self.gpu_ids[0]) if cuda else torch.device('cpu')
        self.loss_names = ['G_GAN', 'G_L1', 'D_real', 'D_fake', 'nothing']
        self.visual_names = ['real_A', 'fake_B', 'real_B']
        if self.isTrain:
            self.model_names = ['G', 'D']
        else:
            self.model_names = ['G']
        self.netG = networks.define_G(opt.input_nc, opt.output_nc, opt.ngf, opt.netG, opt.norm,
                                      not opt.no_dropout, opt.init_type, opt.init_gain,
                                      self.gpu_ids)
        if self.isTrain:
            self.netD = networks.define_D(opt.input_nc + opt.output_nc, opt.ndf, opt.netD,
                                          opt.n_layers_D, opt.norm, opt.init_type, opt.init_gain,
                                          self.gpu_ids)
            self.pool = ImagePool(opt.pool_size)
            self.criterionGAN = networks.GANLoss(opt.gan_mode).to(self.device)
            self.criterionL1 = torch.nn.L1Loss()
            self.optimizer_G = torch.optim.Adam(self.netG.parameters(), lr=opt.lr,
                                                betas=(opt.beta1, 0.999))
            self.optimizer_D = torch.optim.Adam(self.netD.parameters(), lr=opt.lr,
                                                betas=(opt.beta1, 0.999))
            self.optimizers.append(self.optimizer_G)
            self.optimizers.append(self.optimizer_D)
            self.loss_nothing = 0

    def set_input(self, input):
        AtoB = self.opt.direction == 'AtoB'
        self.real_A = input['A' if AtoB else 'B'].to(self.device)
        self.real_B = input['B' if AtoB else 'A'].to(self.device)
        self.image_paths = input['A_paths' if AtoB else 'B_paths']

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def backward_D(self):
        fake_AB = self.pool.query(torch.cat((self.real_A, self.fake_B), 1))
        self.loss_D_fake = self.criterionGAN(self.netD(fake_AB.detach()), False)
        real_AB = torch.cat((self.real_A, self.real_B), 1)
        self.loss_D_real = self.criterionGAN(self.netD(real_AB), True)
        self.loss_D = (self.loss_D_fake + self.loss_D_real) * 0.5
        self.loss_D.backward()

    def backward_G(self):
        fake_AB = torch.cat((self.real_A, self.fake_B), 1)
        self.loss_G_GAN = self.criterionGAN(self.netD(fake_AB), True)
        self.loss_G_L1 = self.criterionL1(self.fake_B, self.real_B) * self.opt.weight_L1
        self.loss_G = self.loss_G_GAN + self.loss_G_L1
        self.loss_G.backward()

    def optimize_parameters(self):
        self.forward()
        self.set_requires_grad(self.netD, True)
        self.optimizer_D.zero_grad()
        self.backward_D()
        self.optimizer_D.step()
        self.set_requires_grad(self.netD, False)
        self.optimizer_G.zero_grad()
        self.backward_G()
        self.optimizer_G.step()

    def compute_visuals(self):
        if self.isTrain:
            util.diagnose_network(self.netG, 'G')
        assert util.tensor2im(self.fake_B).shape[2] == 3
"""

# a regression in the manner of 2025: the device from opt, no gpu_ids, save_dir a Path
MODEL_2025 = '''
import os
import torch
import torch.nn as nn
from pathlib import Path
from util import util
from .base_model import BaseModel
from . import networks
from .networks import ResnetBlock, UnetSkipConnectionBlock, get_norm_layer, init_net


class Refine(nn.Module):
    def __init__(self, nc, ngf, norm_layer):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(nc, ngf, 3, padding=1),
            ResnetBlock(ngf, padding_type='reflect', norm_layer=norm_layer, use_dropout=False,
                        use_bias=True),
            UnetSkipConnectionBlock(ngf, ngf, innermost=True, norm_layer=norm_layer),
            nn.Conv2d(2 * ngf, nc, 3, padding=1), nn.Tanh())

    def forward(self, x):
        return self.model(x)


class SoloModel(BaseModel):
    """name: solo."""

    @staticmethod
    def modify_commandline_options(parser, is_train=True):
        parser.set_defaults(dataset_mode='halves', no_dropout=True, norm='instance')
        return parser

    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.device = opt.device
        assert isinstance(self.save_dir, Path)
        self.loss_names = ['L1', 'TV']
        self.visual_names = ['data_A', 'output', 'refined']
        self.model_names = ['G', 'R']
        self.netG = networks.define_G(opt.input_nc, opt.output_nc, opt.ngf, opt.netG, opt.norm,
                                      not opt.no_dropout, opt.init_type, opt.init_gain)
        self.netR = init_net(Refine(opt.output_nc, 4, get_norm_layer(norm_type=opt.norm)),
                             opt.init_type, opt.init_gain)
        if self.isTrain:
            util.mkdirs([os.path.join(self.save_dir, 'notes'), str(self.save_dir / 'more')])
            parameters = list(self.netG.parameters()) + list(self.netR.parameters())
            self.optimizer = torch.optim.SGD(parameters, lr=opt.lr)
            self.optimizers = [self.optimizer]

    def set_input(self, input):
        self.data_A = input['A'].to(self.device)
        self.data_B = input['B'].to(self.device)
        self.weight = input['weight'].to(self.device)
        self.image_paths = input['A_paths']

    def forward(self):
        self.output = self.netG(self.data_A)
        self.refined = self.netR(self.output)

    def optimize_parameters(self):
        self.forward()
        self.optimizer.zero_grad()
        self.loss_L1 = (self.weight * (self.refined - self.data_B).abs().mean((1, 2, 3))).mean()
        self.loss_TV = (self.refined[..., 1:] - self.refined[..., :-1]).abs().mean().item()
        self.loss_L1.backward()
        self.optimizer.step()
'''

# in the form of CUT: layers of a network, and their optimizer, follow from the first batch
MODEL_LAZY = """
import torch
import torch.nn as nn
from .base_model import BaseModel
from . import networks


class LateModel(BaseModel):
    def __init__(self, opt):
        BaseModel.__init__(self, opt)
        self.loss_names = ['G']
        self.visual_names = ['real_A', 'fake_B']
        self.model_names = ['G', 'F'] if self.isTrain else ['G']
        self.netG = networks.init_net(nn.Conv2d(3, 3, 3, padding=1))
        if self.isTrain:
            self.netF = nn.Sequential()
            self.optimizer_G = torch.optim.Adam(self.netG.parameters(), lr=opt.lr)
            self.optimizers.append(self.optimizer_G)

    def data_dependent_initialize(self, data):
        self.set_input(data)
        self.forward()
        if self.opt.isTrain:
            self.compute_G_loss().backward()
            self.optimizer_F = torch.optim.Adam(self.netF.parameters(), lr=self.opt.lr)
            self.optimizers.append(self.optimizer_F)

    def set_input(self, input):
        self.real_A, self.image_paths = input['A'].to(self.device), input['A_paths']

    def forward(self):
        self.fake_B = self.netG(self.real_A)

    def compute_G_loss(self):
        features = self.fake_B.flatten(2).mean(2)
        if not len(self.netF):
            self.netF.add_module('mlp', networks.init_net(nn.Linear(features.shape[1], 2)))
        self.loss_G = (self.netF(features) - 1).square().mean()
        return self.loss_G

    def optimize_parameters(self):
        self.forward()
        self.optimizer_G.zero_grad()
        self.optimizer_F.zero_grad()
        self.compute_G_loss().backward()
        self.optimizer_G.step()
        self.optimizer_F.step()
"""

DATASET = """
import os
import random
import torch
from PIL import Image
import torchvision.transforms as transforms
from data.base_dataset import BaseDataset, get_params, get_transform
from data.image_folder import make_dataset


class HalvesDataset(BaseDataset):
    @staticmethod
    def modify_commandline_options(parser, is_train):
        parser.add_argument('--weight', type=float, default=2.0, help='of each image')
        parser.set_defaults(max_dataset_size=5)
        return parser

    def __init__(self, opt):
        BaseDataset.__init__(self, opt)
        self.dir_A = os.path.join(opt.dataroot, opt.phase + 'A')
        self.dir_B = os.path.join(opt.dataroot, opt.phase + 'B')
        self.A_paths = sorted(make_dataset(self.dir_A, opt.max_dataset_size))
        self.B_paths = sorted(make_dataset(self.dir_B, opt.max_dataset_size))
        assert self.root == opt.dataroot
        btoA = self.opt.direction == 'BtoA'
        input_nc = self.opt.output_nc if btoA else self.opt.input_nc
        self.transform_A = get_transform(self.opt, grayscale=(input_nc == 1))
        self.scale = get_transform(self.opt, convert=False)

    def __getitem__(self, index):
        A_path = self.A_paths[index % len(self.A_paths)]
        B_path = self.B_paths[random.randint(0, len(self.B_paths) - 1)]
        A_img = Image.open(A_path).convert('RGB')
        B_img = Image.open(B_path).convert('RGB')
        params = get_params(self.opt, B_img.size)
        B_transform = get_transform(self.opt, params, grayscale=(self.opt.output_nc == 1))
        assert transforms.ToTensor()(self.scale(B_img)).shape[0] == 3
        return {'A': self.transform_A(A_img), 'B': B_transform(B_img), 'A_paths': A_path,
                'B_paths': B_path, 'weight': torch.tensor(self.opt.weight)}

    def __len__(self):
        return max(len(self.A_paths), len(self.B_paths))
"""

COMMON = "--gpu_ids -1 --name x --num_threads 0 --ngf 4 --load_size 36 --crop_size 32".split()
TRAIN = (
    "--ndf 4 --display_id 0 --n_epochs 1 --n_epochs_decay 1 --seed 3 --print_freq 1 "
    "--display_freq 2 --update_html_freq 2"
).split()


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    folder = copy_of_code(tmp_path_factory.mktemp("foreign") / "code")
    (folder / "models" / "duo_model.py").write_text(MODEL_2024)
    (folder / "models" / "solo_model.py").write_text(MODEL_2025)
    (folder / "models" / "late_model.py").write_text(MODEL_LAZY)
    (folder / "data" / "halves_dataset.py").write_text(DATASET)
    return folder


def program(code: Path, name: str, *words: object) -> str:
    result = run_process(name, *COMMON, *words, cwd=code)
    assert result.code == 0, result.err
    return result.out


def test_a_model_of_2024_trains_like_ours(code, tmp_path):
    """It is pix2pix in other words, so the same seed must lead to the same weights."""
    data = aligned(tmp_path / "data")
    states = {}
    for model in ("duo", "pix2pix"):
        folder = tmp_path / model
        words = ["--dataroot", data, "--checkpoints_dir", folder, "--model", model, *TRAIN]
        if model == "pix2pix":
            words += ["--netG", "resnet_6blocks"]
        out = program(code, "train.py", *words)
        assert f"model [{model.capitalize()}Model] was created".lower() in out.lower()
        states[model] = {
            name: torch.load(folder / "x" / f"latest_net_{name}.pth", weights_only=True)
            for name in ("G", "D")
        }
    for name in ("G", "D"):
        assert list(states["duo"][name]) == list(states["pix2pix"][name])
        for key, value in states["pix2pix"][name].items():
            torch.testing.assert_close(states["duo"][name][key], value, rtol=1e-4, atol=1e-6)

    log = (tmp_path / "duo" / "x" / "loss_log.txt").read_text()
    assert "G_GAN: " in log
    assert "nothing: 0.000" in log
    flags = ["--checkpoints_dir", tmp_path / "duo", "--results_dir", tmp_path / "results"]
    program(code, "test.py", "--dataroot", data, "--model", "duo", *flags)
    images = [f"{i}_{label}.png" for i in range(3) for label in ("fake_B", "real_A", "real_B")]
    assert files_below(tmp_path / "results" / "x" / "test_latest" / "images") == images


def test_a_model_and_a_dataset_of_2025(code, tmp_path):
    data = unaligned(tmp_path / "data", count=6)
    flags = ["--dataroot", data, "--checkpoints_dir", tmp_path / "c", "--model", "solo"]
    flags += ["--netG", "resnet_6blocks"]
    out = program(code, "train.py", *flags, *TRAIN, "--weight", "0.5", "--batch_size", "2")
    assert "dataset [HalvesDataset] was created" in out
    assert "The number of training images = 5" in out  # the dataset's own max_dataset_size
    assert "model [SoloModel] was created" in out
    assert "End of epoch 2 / 2" in out
    folder = tmp_path / "c" / "x"
    assert (folder / "notes").is_dir()
    assert (folder / "more").is_dir()
    weights = {p.name for p in folder.glob("*_net_*.pth")}
    assert weights == {f"{e}_net_{n}.pth" for e in ("latest", "2") for n in ("G", "R")}
    assert "weight: 0.5" in (folder / "train_opt.txt").read_text()

    out = program(code, "train.py", *flags, *TRAIN, "--continue_train", "--n_epochs", "2")
    assert "End of epoch 3 / 3" in out
    assert "End of epoch 2" not in out

    program(code, "test.py", *flags, "--results_dir", tmp_path / "results", "--num_test", "2")
    images = tmp_path / "results" / "x" / "test_latest" / "images"
    assert files_below(images) == [
        f"{i}_{label}.png" for i in range(2) for label in ("data_A", "output", "refined")
    ]
    shown = np.asarray(Image.open(images / "0_data_A.png")).astype(int)
    scaled = Image.open(data / "testA" / "0.png").resize((36, 36), Image.Resampling.BICUBIC)
    middle = np.asarray(scaled)[2:34, 2:34].astype(int)  # --load_size 36 --crop_size 32
    assert abs(shown - middle).max() <= 1


def test_a_model_that_is_made_from_the_first_batch(code, tmp_path):
    data = unaligned(tmp_path / "data", count=4)
    words = ["--dataroot", data, "--model", "late", *TRAIN, "--n_epochs_decay", "0"]

    def trained(name: str, *epochs: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        flags = ["--checkpoints_dir", folder, "--continue_train", "--dataset_mode", "unaligned"]
        for count in epochs:
            program(code, "train.py", *words, *flags, "--n_epochs", count, "--lr_policy", "step")
        files = [torch.load(folder / "x" / f"latest_net_{n}.pth") for n in ("G", "F")]
        return {key: value for file in files for key, value in file.items()}

    whole, parts = trained("whole", "2"), trained("parts", "1", "2")
    assert list(whole) == ["weight", "bias", "mlp.weight", "mlp.bias"]
    assert not [key for key in whole if not torch.equal(whole[key], parts[key])]


def test_help_and_errors_know_of_them(code, tmp_path):
    picture(tmp_path / "trainA" / "0.png")
    result = run_process("train.py", "--model", "solo", "--help", cwd=code)
    assert "--weight WEIGHT" in result.out
    result = run_process("train.py", "--dataroot", tmp_path, "--model", "trio", cwd=code)
    assert result.code == 2
    assert "duo" in result.err
    assert "solo" in result.err
    assert not (code / "checkpoints").exists()


def test_a_class_of_another_name_is_told_its_name(code, tmp_path):
    text = (code / "models" / "solo_model.py").read_text()
    (code / "models" / "my_own_model.py").write_text(text)
    result = run_process("train.py", "--dataroot", tmp_path, "--model", "my_own", cwd=code)
    assert result.code == 2
    assert "models/my_own_model.py must hold `class MyOwnModel(BaseModel)`" in result.err
    assert "and has Refine, SoloModel" in result.err
