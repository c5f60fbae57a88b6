"""--diffaug: closed forms, what goes along with it, and that a resumed run draws the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models import create_model, discriminators, networks
from models.diffaug import KINDS, DiffAugment
from models.speed.passes import share_pass
from models.speed.prepared import prepared
from options.train_options import TrainOptions
from tests.helpers import SHORT, TINY, aligned, run, seed_all, succeed, unaligned
from util.errors import UserError

ALL = ",".join(KINDS)


@pytest.fixture(autouse=True)
def _seed():
    seed_all(1)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, dtype=dtype) * 2 - 1


def draws(augment: DiffAugment) -> np.ndarray:
    assert augment._draws is not None
    return augment._draws.double().numpy()


# ----------------------------------------------------------------------------------- closed forms
def test_color_of_one_picture():
    augment = DiffAugment("color", 3, 3)
    x = noise(4, 3, 10, 12)
    y = augment(x)
    for picture, got, u in zip(x.double().numpy(), y, draws(augment), strict=True):
        # Zhao et al., published settings: + U(-1/2, 1/2), times U(0, 2), times U(1/2, 3/2)
        wanted = picture + u[0] - 0.5
        gray = wanted.mean(0)
        wanted = gray + (wanted - gray) * (2 * u[1])
        wanted = wanted.mean() + (wanted - wanted.mean()) * (0.5 + u[2])
        np.testing.assert_allclose(got, wanted, atol=1e-6)


def moved(picture: np.ndarray, down: int, right: int) -> np.ndarray:
    """An image (C, H, W), moved, with zeros from outside."""
    result = np.zeros_like(picture)
    height, width = picture.shape[1:]
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                result[:, i, j] = picture[:, i - down, j - right]
    return result


def test_translation_moves_by_up_to_an_eighth():
    x = noise(300, 2, 16, 24)
    y = DiffAugment("translation", 3, 2)(x).numpy()
    found = set()
    for before, after in zip(x.numpy(), y, strict=True):
        fits = [
            (down, right)
            for down in range(-4, 5)
            for right in range(-5, 6)
            if np.array_equal(moved(before, down, right), after)
        ]
        assert len(fits) == 1
        found.update(fits)
    assert found == {(down, right) for down in range(-2, 3) for right in range(-3, 4)}


def test_cutout_is_a_square_of_half_the_size_centred_anywhere():
    x = torch.ones(3000, 1, 8, 12)
    y = DiffAugment("cutout", 3, 1)(x)[:, 0].numpy()
    corners = set()
    for picture in y:
        rows, columns = (picture == 0).nonzero()
        box = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert not box.any()
        assert picture.sum() == picture.size - box.size
        height, width = box.shape
        # smaller only where it ends at the border
        assert height == 4 or rows.min() == 0 or rows.max() == 7
        assert width == 6 or columns.min() == 0 or columns.max() == 11
        corners.add((rows.min() + rows.max() + 1, columns.min() + columns.max() + 1))
    assert len(corners) == 9 * 13  # a centre between any two pixels, the borders too
    # the share that is cut: the mean over centres c of the overlap of [c - l/2, c + l/2] with it
    share = [
        np.mean([min(c + n // 4, n) - max(c - n // 4, 0) for c in range(n + 1)]) / n
        for n in (8, 12)
    ]
    assert (y == 0).mean() == pytest.approx(share[0] * share[1], rel=0.02)


def test_each_picture_has_numbers_of_its_own():
    x = noise(1, 3, 16, 16).expand(50, -1, -1, -1)
    for policy in KINDS:
        y = DiffAugment(policy, 3, 3)(x)
        assert len({picture.numpy().tobytes() for picture in y}) > 15


# ---------------------------------------------------------------------------- gradients, condition
@pytest.mark.parametrize("policy", [*KINDS, ALL])
def test_gradients_and_second_gradients_flow(policy):
    augment = DiffAugment(policy, 2, 2)
    augment(noise(2, 4, 8, 8))
    x = noise(2, 4, 8, 8, dtype=torch.float64).requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        with augment.repeated():
            return augment(x)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(lambda x: function(x).square(), x)


def test_a_condition_moves_along_and_keeps_its_colours():
    picture = noise(20, 3, 16, 16)
    x = torch.cat((picture, picture), 1)
    y = DiffAugment("translation,cutout", 3, 3)(x)
    assert torch.equal(y[:, :3], y[:, 3:])
    assert not torch.equal(y, x)
    y = DiffAugment("color", 3, 3)(x)
    assert torch.equal(y[:, :3], picture)
    assert (y[:, 3:] != picture).any(3).any(2).any(1).all()
    # saturation is about the image's own gray
    torch.manual_seed(4)
    conditional = DiffAugment("color", 3, 3)(x)
    torch.manual_seed(4)
    alone = DiffAugment("color", 3, 3)(picture)
    torch.testing.assert_close(conditional[:, 3:], alone, rtol=0, atol=0)


# ----------------------------------------------------------------------------- in front of networks
def build(tmp_path, words: str):
    argv = f"--dataroot {tmp_path} --checkpoints_dir {tmp_path} --name x {' '.join(TINY)} {words}"
    opt = TrainOptions(argv).parse(save=False)
    model = create_model(opt)
    model.setup(opt)
    return model


def batch(n: int = 1) -> dict:
    return {"A": noise(n, 3, 32, 32), "B": noise(n, 3, 32, 32), "A_paths": ["a"], "B_paths": ["b"]}


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix", "cut", "dcl"])
@pytest.mark.parametrize("passes", ["on", "off"])
def test_every_call_of_a_discriminator_is_augmented(model, passes, tmp_path):
    """Real, generated, and generated in the generator's step, each with numbers of its own."""
    words = f"--diffaug {ALL} --batch_passes {passes} --norm instance"
    model = build(tmp_path, f"--model {model} {words}")
    seen = []
    for net in discriminators.find(model).values():
        inner = net.prepared_augment
        net.prepared_augment = lambda x, inner=inner: seen.append((x, inner(x))) or seen[-1][1]
    model.set_input(batch())
    model.optimize_parameters()
    assert sum(len(x) for x, _ in seen) == 3 * len(discriminators.find(model))
    assert all(x.shape == y.shape and not torch.equal(x, y) for x, y in seen)
    assert any(x.requires_grad and y.requires_grad for x, y in seen)  # the generator's step
    for net in discriminators.find(model).values():
        assert not [key for key in net.state_dict() if "augment" in key]


def test_shared_passes_draw_as_passes_of_their_own_do(tmp_path):
    net = prepared(networks.define_D(3, 4, "basic", norm="instance"))
    net.prepared_augment = DiffAugment(ALL, 3, 3)
    a, b = noise(1, 3, 32, 32), noise(1, 3, 32, 32)
    torch.manual_seed(2)
    wanted = net(a), net(b)
    torch.manual_seed(2)
    share_pass(net, [a, b])
    torch.testing.assert_close((net(a), net(b)), wanted)


def test_a_gradient_penalty_is_that_of_the_picture_before_it(tmp_path):
    net = prepared(networks.define_D(3, 4, "pixel", norm="none"))
    net.prepared_autocast = "cpu", torch.bfloat16
    augment = net.prepared_augment = DiffAugment("color", 3, 3)
    x = noise(2, 3, 8, 8)
    _, gradients = networks.cal_gradient_penalty(net, x, x, torch.device("cpu"), "real")
    points = x.clone().requires_grad_()
    with augment.repeated():
        scores = net.net(augment(points))
    (wanted,) = torch.autograd.grad(scores.sum(), points)
    torch.testing.assert_close(gradients, wanted.flatten(1), rtol=1e-5, atol=1e-8)  # in float32


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([noise(1, 3, 8, 8)] * 2, "2 inputs"),
        ([[noise(1, 3, 8, 8)]], "a list"),
        ([noise(2, 8)], r"a Tensor of shape \(2, 8\)"),
        ([noise(1, 3, 4, 8, 8)], r"a Tensor of shape \(1, 3, 4, 8, 8\)"),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(inputs, said):
    with pytest.raises(UserError, match=rf"called with {said}: leave --diffaug out"):
        DiffAugment(ALL, 3, 3)(*inputs)


# ---------------------------------------------------------------------------------- whole trainings
@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    return aligned(unaligned(root, 4), 4)


def train(pictures, folder, words: str):
    where = ["--dataroot", pictures, "--checkpoints_dir", folder, "--name", "x", "--no_html"]
    succeed("train.py", *where, *TINY, *SHORT, *words.split())
    files = sorted((folder / "x").glob("latest_net_*.pth"))
    return {
        f"{path.name}.{key}": value
        for path in files
        for key, value in torch.load(path, weights_only=True).items()
    }


@pytest.mark.parametrize(
    "words",
    [
        "--model cycle_gan --precision bf16 --pool_size 2",
        "--model pix2pix --accumulate 2",
        "--model cut --batch_passes on",
    ],
)
def test_a_resumed_run_goes_on_as_if_nothing_had_been(words, pictures, tmp_path):
    words += f" --diffaug {ALL}"
    whole = train(pictures, tmp_path / "a", f"{words} --n_epochs 2")
    train(pictures, tmp_path / "b", words)
    parts = train(pictures, tmp_path / "b", f"{words} --n_epochs 2 --continue_train")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    plain = train(pictures, tmp_path / "c", words.replace(f"--diffaug {ALL}", "--n_epochs 2"))
    assert whole.keys() == plain.keys()
    assert not all(torch.equal(whole[key], plain[key]) for key in whole)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--diffaug color,blur", 2, "'blur' is no augmentation: choose from color, translation"),
        ("--diffaug color --model template", 1, "--model template has no discriminator"),
    ],
)
def test_mistakes(words, code, said, pictures, tmp_path):
    where = ["--dataroot", pictures, "--checkpoints_dir", tmp_path, "--name", "x"]
    result = run("train.py", *where, *TINY, *SHORT, *words.split())
    assert result.code == code
    assert said in result.err.strip().splitlines()[-1]
