"""Scores against independent implementations: scikit-image, torchmetrics, SciPy, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.helpers import pixels
from util.scores import metrics


def tensor(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def noisy(picture: np.ndarray, amount: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, amount, picture.shape)
    return (picture + noise).round().clip(0, 255).astype(np.uint8)


PAIRS = [
    (pixels(64, 48), noisy(pixels(64, 48), 10)),
    (pixels(97, 61, 3), pixels(97, 61, 4)),
    (pixels(40, 40), 255 - pixels(40, 40)),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_pairs_against_scikit_image(a, b):
    x, y = tensor(a), tensor(b)
    assert float(metrics.l1(x, y)) == pytest.approx(np.abs(a / 255 - b / 255).mean(), abs=1e-12)
    assert float(metrics.psnr(x, y)) == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-9)
    wanted = structural_similarity(
        a.astype(np.float64),
        b.astype(np.float64),
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert float(metrics.ssim(x, y)) == pytest.approx(wanted, abs=1e-9)


def test_each_picture_of_a_batch_has_its_own_score():
    a, b = tensor(pixels(32, 32), pixels(32, 32, 1)), tensor(pixels(32, 32), pixels(32, 32, 2))
    for formula in (metrics.l1, metrics.psnr, metrics.ssim):
        both = formula(a, b)
        assert both.shape == (2,)
        assert torch.equal(both, torch.cat([formula(a[:1], b[:1]), formula(a[1:], b[1:])]))
    assert metrics.psnr(a, b)[0] == math.inf
    assert float(metrics.ssim(a, b)[0]) == pytest.approx(1)


def ms_ssim_with_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The definition of Wang et al. with SciPy's Gaussian filter."""

    def blur(x: np.ndarray) -> np.ndarray:
        blurred = scipy.ndimage.gaussian_filter(x, (1.5, 1.5, 0), truncate=3.5)
        return blurred[5:-5, 5:-5]

    a, b = a.astype(np.float64), b.astype(np.float64)
    result = 1.0
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    for scale, weight in enumerate(weights):
        m, n = blur(a), blur(b)
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        both = blur(a * a) + blur(b * b) - m * m - n * n
        value = (2 * (blur(a * b) - m * n) + c2) / (both + c2)
        if scale == len(weights) - 1:
            value = value * (2 * m * n + c1) / (m * m + n * n + c1)
        result *= max(value.mean(), 0) ** weight
        h, w = a.shape[0] // 2 * 2, a.shape[1] // 2 * 2
        a, b = (x[:h, :w].reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3)) for x in (a, b))
    return result


@pytest.mark.parametrize("size", [(176, 176), (201, 190)])
def test_ms_ssim_against_scipy(size):
    a = pixels(*size)
    for b in (noisy(a, 20), pixels(*size, 5)):
        value = float(metrics.ms_ssim(tensor(a), tensor(b)))
        assert value == pytest.approx(ms_ssim_with_scipy(a, b), abs=1e-9)


def test_ms_ssim_near_that_of_torchmetrics():
    """Near, because theirs pads the smallest scale, 16x16 here, by reflection."""
    functional = pytest.importorskip("torchmetrics.functional.image")
    a = pixels(256, 256)
    for b in (noisy(a, 20), pixels(256, 256, 5)):
        x, y = tensor(a), tensor(b)
        theirs = functional.multiscale_structural_similarity_index_measure(
            x.double(), y.double(), data_range=255.0
        )
        assert float(metrics.ms_ssim(x, y)) == pytest.approx(float(theirs), abs=0.01)


def test_pictures_that_are_too_small_are_refused():
    x = tensor(pixels(160, 200))
    for width in (160, 161, 168, 175):  # the smallest scale has 10 or 10.9 pixels
        with pytest.raises(ValueError, match=f"176x176, got {width}x200"):
            metrics.ms_ssim(*2 * [tensor(pixels(width, 200))])
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(x[..., :10], x[..., :10])
    with pytest.raises(ValueError, match="one shape"):
        metrics.l1(x, x[..., :10])


# ---------------------------------------------------------------------------------------- features
def features(count: int, size: int, seed: int) -> np.ndarray:
    """What a small network sees in made-up images: (count, 12) of float64."""
    source = np.random.default_rng(seed)
    kernels = np.random.default_rng(99).normal(size=(12, 3, 5, 5))
    found = []
    for i in range(count):
        picture = pixels(size, size, i + seed).astype(np.float64) / 255
        picture = picture + source.normal(0, 0.1 + 0.05 * seed, picture.shape)
        windows = np.lib.stride_tricks.sliding_window_view(picture, (5, 5), axis=(0, 1))
        maps = np.einsum("hwcij,kcij->khw", windows, kernels)
        found.append(np.maximum(maps, 0).mean((1, 2)))
    return np.array(found)


@pytest.mark.parametrize("counts", [(30, 25), (7, 9), (40, 5)])
def test_fid_against_scipy(counts):
    real, fake = features(counts[0], 24, 0), features(counts[1], 24, 1)
    c_real, c_fake = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(c_real @ c_fake)
    wanted = (
        ((real.mean(0) - fake.mean(0)) ** 2).sum()
        + np.trace(c_real)
        + np.trace(c_fake)
        - 2 * np.trace(root).real
    )
    # SciPy's root of a singular matrix is good to half the digits only
    digits = 1e-7 if min(counts) > 12 else 1e-5
    assert metrics.fid(real, fake) == pytest.approx(wanted, rel=digits)


def test_fid_of_gaussians_whose_distance_is_known():
    """Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    source = np.random.default_rng(0)
    x = source.normal(size=(500, 4))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    s1, s2 = np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 2.0, 1.0, 0.5])
    shift = np.array([1.0, 0.0, 0.0, 2.0])
    wanted = (shift**2).sum() + ((s1 - s2) ** 2).sum()
    assert metrics.fid(x * s1, x * s2 + shift) == pytest.approx(wanted, rel=1e-12)
    # fewer images than features takes the other way
    wide = np.concatenate([x * s1, np.zeros((500, 600))], 1)
    other = np.concatenate([x * s2 + shift, np.zeros((500, 600))], 1)
    assert metrics.fid(wide, other) == pytest.approx(wanted, rel=1e-9)
    assert metrics.fid(wide, wide) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "m", "most"), [(10, 8, 1000), (30, 20, 4)])
def test_kid_against_a_loop(n, m, most):
    """Subsets of four: half of the smaller set, or what is asked for."""
    real, fake = features(n, 24, 0), features(m, 24, 1)
    source = np.random.default_rng(5)
    values = []
    for _ in range(20):
        x = real[source.choice(n, 4, replace=False)]
        y = fake[source.choice(m, 4, replace=False)]
        total = 0.0
        for i in range(4):
            for j in range(4):
                if i != j:
                    total += (x[i] @ x[j] / 12 + 1) ** 3 / 12 + (y[i] @ y[j] / 12 + 1) ** 3 / 12
                total -= 2 * (x[i] @ y[j] / 12 + 1) ** 3 / 16
        values.append(total)
    mean, deviation = metrics.kid(real, fake, subsets=20, subset_size=most, seed=5)
    assert mean == pytest.approx(np.mean(values), rel=1e-12)
    assert deviation == pytest.approx(np.std(values), rel=1e-12)


def test_mmd_is_unbiased():
    """Halves of one set are alike: the estimates scatter around 0."""
    x = features(60, 16, 0)
    source = np.random.default_rng(0)
    values = []
    for _ in range(300):
        order = source.permutation(60)
        values.append(metrics.mmd2(x[order[:30]], x[order[30:]]))
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(300)


def test_fid_of_nearly_singular_covariances():
    """The value is that of 50 digits, computed once with mpmath from eigenvalues of C_r C_f."""
    real, fake = features(30, 24, 0), features(25, 24, 1)
    assert np.linalg.cond(np.cov(real, rowvar=False)) > 1e8
    assert metrics.fid(real, fake) == pytest.approx(0.08215177319858829, rel=1e-10)


@pytest.mark.parametrize("bad", [np.zeros((1, 4)), np.zeros(4)])
def test_features_of_too_few_pictures(bad):
    with pytest.raises(ValueError, match="at least two"):
        metrics.fid(bad, np.zeros((3, 4)))


# -------------------------------------------------------------------------------------- Cityscapes
def test_cityscapes_by_hand():
    """Four classes and void: counts written out, and the three scores from them."""
    road, sky, car, person = (metrics.CITYSCAPES[n] for n in ("road", "sky", "car", "person"))
    void = (0, 0, 0)
    real = np.array([[road] * 4, [sky, sky, sky, car], [void] * 4], np.uint8)
    fake = np.array([[road, road, sky, road], [sky, sky, sky, person], [road] * 4], np.uint8)
    counts = metrics.LabelCounts()
    counts.add(real, fake)
    scores = counts.scores()
    assert scores["pixel accuracy"] == 6 / 8
    # road 3 of 4, sky 3 of 3, car 0 of 1
    assert scores["class accuracy"] == pytest.approx((3 / 4 + 1 + 0) / 3)
    # road 3/4, sky 3/4, car 0/1, person 0/1
    assert scores["class IoU"] == pytest.approx((3 / 4 + 3 / 4 + 0 + 0) / 4)
    counts.add(real, real)
    assert counts.scores()["pixel accuracy"] == 14 / 16


def test_cityscapes_takes_the_nearest_colour():
    near_sky = np.array([[[75, 125, 184], [69, 131, 180]]], np.uint8)
    names = list(metrics.CITYSCAPES)
    assert [names[i] for i in metrics.nearest_class(near_sky)[0]] == ["sky", "sky"]
    black = np.zeros((1, 1, 3), np.uint8)
    assert metrics.nearest_class(black, void=True)[0, 0] == metrics.VOID
    assert names[metrics.nearest_class(black)[0, 0]] == "truck"
    every = np.array([list(metrics.CITYSCAPES.values())], np.uint8)
    assert metrics.nearest_class(every, void=True)[0].tolist() == list(range(19))


def test_cityscapes_with_nothing_to_score():
    counts = metrics.LabelCounts()
    counts.add(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8))
    assert all(math.isnan(value) for value in counts.scores().values())


# -------------------------------------------------------------------------------------------- grid
def test_grid_of_noise_and_of_a_plain_picture_is_one():
    noise = torch.randn(4, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 20 + 128
    for period in metrics.GRID_PERIODS:
        torch.testing.assert_close(
            metrics.grid(noise, period), torch.ones(4).double(), atol=0.3, rtol=0
        )
    assert metrics.grid(torch.full((1, 3, 64, 72), 7), 4).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("period", [2, 4, 8])
def test_grid_of_stripes_in_noise(period):
    """White noise of variance s and a cosine of amplitude a along rows: energies in closed form."""
    a, s = 6.0, 4.0
    n = torch.arange(256)
    stripes = a * torch.cos(2 * math.pi * n / period)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(8, 1, 256, 256, generator=generator, dtype=torch.float64) * s**0.5
    # a Hann window of n samples has sum n/2 and sum of squares 3n/8; a cosine has half its
    # amplitude at k, but all of it at the highest frequency
    line = (a if period == 2 else a / 2) ** 2 * (256 / 2) ** 2 / (3 * 256 / 8)
    floor = s + 1 / 12
    want = (line + 2 * floor) / (2 * floor)  # rows have the line, columns only noise
    got = metrics.grid(noise + stripes + 128, period).mean()
    assert float(got) == pytest.approx(want, rel=0.05)
    other = {2: 4, 4: 8, 8: 2}[period]
    assert float(metrics.grid(noise + stripes + 128, other).mean()) == pytest.approx(1, abs=0.1)


def test_grid_needs_room():
    with pytest.raises(ValueError, match="at least 64x64"):
        metrics.grid(torch.zeros(1, 3, 64, 63), 2)
