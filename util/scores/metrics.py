"""Formulas that compare images, sets of images, and images of labels.

Images are tensors (N, C, H, W) with values in [0, 255]. Everything is computed in float64: the
differences between two epochs are small.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5  # of Wang et al. 2004
K1, K2 = 0.01, 0.03
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of Wang et al. 2003
# the window has to fit into the smallest of the five scales, and halving rounds down
MS_SSIM_LEAST = WINDOW * 2 ** (len(MS_SSIM_WEIGHTS) - 1)
GRID_PERIODS = (2, 4, 8)  # pixels
GRID_LEAST = 64  # pixels of a side, so that every frequency has neighbours


# ------------------------------------------------------------------------------------------- pairs
def l1(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each image (N,), as a fraction of the range: 0 to 1."""
    same_shape(a, b)
    return (a.double() - b.double()).abs().flatten(1).mean(1) / PEAK


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise ratio of each image (N,), in dB; infinite for equal ones."""
    same_shape(a, b)
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(PEAK**2 / error)


def _gaussian(channels: int, device: torch.device) -> torch.Tensor:
    x = torch.arange(WINDOW, dtype=torch.float64, device=device) - WINDOW // 2
    weights = torch.exp(-(x**2) / (2 * SIGMA**2))
    return (weights / weights.sum()).expand(channels, 1, WINDOW)


def _blur(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Gaussian means, where the window lies inside the image: each side loses 5 pixels."""
    channels = x.shape[1]
    x = F.conv2d(x, kernel[..., None], groups=channels)
    return F.conv2d(x, kernel[..., None, :], groups=channels)


def _ssim_maps(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM and its factor of contrast and structure at each place (Wang et al. 2004, eq. 13)."""
    kernel = _gaussian(a.shape[1], a.device)
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    mean_a, mean_b = _blur(a, kernel), _blur(b, kernel)
    variance_a = _blur(a * a, kernel) - mean_a**2
    variance_b = _blur(b * b, kernel) - mean_b**2
    covariance = _blur(a * b, kernel) - mean_a * mean_b
    contrast = (2 * covariance + c2) / (variance_a + variance_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance * contrast, contrast


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image (N,), the mean over places and channels.

    Raises ValueError for images smaller than the window of 11x11.
    """
    same_shape(a, b)
    _at_least(a, WINDOW, "SSIM")
    return _ssim_maps(a.double(), b.double())[0].flatten(1).mean(1)


def ms_ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity over five scales of each image (N,) (Wang et al. 2003, eq. 7).

    At each scale the mean over places and channels is taken, or 0 if it is negative; between scales
    images are halved by averaging 2x2 pixels. Raises ValueError below 176x176.
    """
    same_shape(a, b)
    _at_least(a, MS_SSIM_LEAST, "MS-SSIM")
    a, b = a.double(), b.double()
    result = torch.ones(len(a), dtype=torch.float64, device=a.device)
    for scale, weight in enumerate(MS_SSIM_WEIGHTS):
        if scale:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        last = scale == len(MS_SSIM_WEIGHTS) - 1
        both, contrast = _ssim_maps(a, b)
        value = (both if last else contrast).flatten(1).mean(1)
        result = result * value.clamp(min=0) ** weight
    return result


def same_shape(a: torch.Tensor, b: torch.Tensor) -> None:
    """Raise ValueError unless two batches (N, C, H, W) have one shape."""
    if a.shape != b.shape or a.dim() != 4:
        raise ValueError(f"two batches (N, C, H, W) of one shape, got {a.shape} and {b.shape}")


def _at_least(a: torch.Tensor, size: int, name: str) -> None:
    if min(a.shape[-2:]) < size:
        height, width = a.shape[-2:]
        raise ValueError(f"{name} needs images of at least {size}x{size}, got {width}x{height}")


# -------------------------------------------------------------------------------------------- grid
def grid(x: torch.Tensor, period: int) -> torch.Tensor:
    """How much a grid with a period of so many pixels stands out in each image (N,): 1 is none.

    The energy at frequency k = n / period, divided by the mean energy at its neighbours k - 3,
    k - 2, k + 2 and k + 3 as far as they exist. The energy is |FFT|^2 of the mean over channels
    along lines of n pixels (the side cut to a multiple of 8) in a Hann window, which spreads a peak
    over k - 1 to k + 1. It is averaged over the lines of an axis, divided by the energy of the
    window, and added up over both axes.
    1/12, the noise of rounding to levels, is added to each pixel's variance, so that a plain
    image has 1.

    Checkerboards of transposed convolutions (Odena et al., Distill 2016) have period 2, 4, ....
    Raises ValueError if a side is below 64 pixels.
    """
    if min(x.shape[-2:]) < GRID_LEAST:
        raise ValueError(f"it needs images of at least {GRID_LEAST}x{GRID_LEAST}")
    grey = x.double().mean(1)
    energy, around = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for lines in (grey, grey.mT):
        n = lines.shape[-1] // 8 * 8
        window = torch.hann_window(n, dtype=torch.float64, device=x.device)
        lines = lines[..., :n] - lines[..., :n].mean(-1, keepdim=True)
        spectrum = torch.fft.rfft(lines * window).abs().square().mean(-2)
        spectrum = (spectrum + window.square().sum() / 12) / window.square().sum()
        k = n // period
        neighbours = [i for i in (k - 3, k - 2, k + 2, k + 3) if i <= n // 2]
        energy += spectrum[:, k]
        around += spectrum[:, neighbours].mean(-1)
    return energy / around


# -------------------------------------------------------------------------------------------- sets
def fid(real: np.ndarray, fake: np.ndarray) -> float:
    """Frechet distance of two sets of features (N, D), (M, D) (Heusel et al. 2017, eq. 6).

    |mean_r - mean_f|^2 + Tr(C_r + C_f - 2 (C_r C_f)^(1/2)), with covariances over N - 1. The trace
    of the root is the sum of the singular values of R F^T for any R^T R = C_r and F^T F = C_f. This
    avoids the root of a matrix that is singular for few images, which would lose half the digits.
    Raises ValueError for fewer than two images.
    """
    real, fake = _features(real), _features(fake)
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (real, fake)]
    distance = np.square(real.mean(0) - fake.mean(0)).sum()
    variances = sum(np.square(x).sum() for x in centred)
    # at most D rows each, with the same covariance
    r, f = (np.linalg.qr(x)[1] if len(x) > x.shape[1] else x for x in centred)
    root = np.linalg.svd(r @ f.T, compute_uv=False).sum()
    return float(max(0.0, distance + variances - 2 * root))


def kid(
    real: np.ndarray, fake: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel distance of two sets of features: mean and standard deviation over random subsets.

    The unbiased estimate of the squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018,
    section 4). A subset is drawn without replacement and holds at most half of the smaller set, or
    all subsets would be alike.
    """
    real, fake = _features(real), _features(fake)
    size = max(2, min(subset_size, min(len(real), len(fake)) // 2))
    source = np.random.default_rng(seed)
    values = [
        mmd2(
            real[source.choice(len(real), size, replace=False)],
            fake[source.choice(len(fake), size, replace=False)],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def mmd2(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD of features (N, D), (M, D) with the kernel (x.y / D + 1)^3."""
    n, m, d = len(x), len(y), x.shape[1]
    within_x, within_y, across = ((u @ v.T / d + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    mean_x = (within_x.sum() - np.trace(within_x)) / (n * (n - 1))
    mean_y = (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(mean_x + mean_y - 2 * across.mean())


def _features(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features (N, D) of at least two images, got {x.shape}")
    return x


# ------------------------------------------------------------------------------------- Cityscapes
# the 19 classes that are scored, and their colours
CITYSCAPES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
# colours in the images of labels that are not scored
CITYSCAPES_VOID = (
    (0, 0, 0),  # unlabeled, ego vehicle, out of region of interest, static
    (111, 74, 0),  # dynamic
    (81, 0, 81),  # ground
    (250, 170, 160),  # parking
    (230, 150, 140),  # rail track
    (180, 165, 180),  # guard rail
    (150, 100, 100),  # bridge
    (150, 120, 90),  # tunnel
    (0, 0, 90),  # caravan
    (0, 0, 110),  # trailer
)
VOID = 255


def nearest_class(picture: np.ndarray, void: bool = False) -> np.ndarray:
    """The Cityscapes class (H, W) whose colour is nearest to each pixel of (H, W, 3), 0 to 18.

    With `void` the colours that are not scored compete as well; pixels nearest to one are `VOID`.
    """
    palette = np.array([*CITYSCAPES.values(), *(CITYSCAPES_VOID if void else ())], np.int64)
    # few colours make up most of such an image: each is looked up once
    flat = picture.reshape(-1, 3).astype(np.int64)
    codes = (flat[:, 0] << 16) | (flat[:, 1] << 8) | flat[:, 2]
    colours, where = np.unique(codes, return_inverse=True)
    channels = np.stack([colours >> 16, (colours >> 8) & 255, colours & 255], 1)
    nearest = np.concatenate(
        [
            ((part[:, None] - palette) ** 2).sum(2).argmin(1)
            for part in np.array_split(channels, len(channels) // 65536 + 1)
        ]
    )
    nearest[nearest >= len(CITYSCAPES)] = VOID
    return nearest[where].astype(np.uint8).reshape(picture.shape[:2])


class LabelCounts:
    """Counts over many images how often each class was taken for which: a confusion matrix."""

    def __init__(self) -> None:
        self.counts = np.zeros((len(CITYSCAPES), len(CITYSCAPES)), np.int64)  # real, predicted
        self._off = 0.0  # levels between real pixels and the colours of their classes, summed

    def add(self, real: np.ndarray, fake: np.ndarray) -> None:
        """Take two images (H, W, 3) of uint8; where the real one is void, nothing counts."""
        truth, guess = nearest_class(real, void=True), nearest_class(fake)
        scored = truth != VOID
        colours = np.array([*CITYSCAPES.values()])[truth[scored]]
        self._off += float(np.abs(real[scored] - colours).mean(-1).sum())
        pairs = truth[scored].astype(np.int64) * len(CITYSCAPES) + guess[scored]
        self.counts += np.bincount(pairs, minlength=self.counts.size).reshape(self.counts.shape)

    def distance(self) -> float:
        """Mean distance of real pixels from the colours of their classes, in levels."""
        return self._off / max(1, int(self.counts.sum()))

    def scores(self) -> dict[str, float]:
        """Accuracy over all pixels, and means over classes of accuracy and of intersection/union.

        All are from 0 to 1. The mean accuracy leaves out classes that no real image has; the mean
        of the other, only those that no translated image has either. NaN if nothing was scored.
        """
        right = np.diag(self.counts).astype(np.float64)
        real, guessed = self.counts.sum(1), self.counts.sum(0)
        union = real + guessed - right
        names = ("pixel accuracy", "class accuracy", "class IoU")
        if not real.any():
            return dict.fromkeys(names, math.nan)
        accuracy, iou = right[real > 0] / real[real > 0], right[union > 0] / union[union > 0]
        values = right.sum() / real.sum(), accuracy.mean(), iou.mean()
        return dict(zip(names, map(float, values), strict=True))
