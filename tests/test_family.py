"""CUT, FastCUT, DCLGAN and anti-aliased sampling: the published numbers, and closed forms."""

from __future__ import annotations

import gzip
import json
import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data import create_dataset
from data.base_dataset import reader
from models import create_model, load_generator, networks, patch_nce
from models.antialias import BlurredConv2d, BlurredConvTranspose2d, Downsample, Upsample
from models.speed.layout import contiguous_gradients
from models.speed.prepared import prepared
from models.weights import explain_mismatch
from options.test_options import TestOptions
from options.train_options import TrainOptions
from tests.conformance import family
from tests.conformance.compare import assert_conforms
from tests.helpers import ROOT, SHORT, TINY, aligned, run, succeed, unaligned, undisturbed

GOLDEN = json.loads(
    gzip.decompress((ROOT / "tests" / "conformance" / "golden_family.json.gz").read_bytes())
)["cases"]
LIMITS = 1e-6, 1e-5


@pytest.fixture(autouse=True)
def _random_sources():
    with undisturbed():
        yield


def assert_same(golden: object, ours: object, where: str) -> None:
    # through JSON, as the golden record went: tuples become lists
    assert_conforms(golden, json.loads(json.dumps(ours)), where, *LIMITS)


# ---------------------------------------------------------------------------- the published codes
@pytest.mark.parametrize("name", family.DEFAULTS)
def test_defaults(name, tmp_path):
    golden = GOLDEN["defaults"][name]
    assert_same(golden, family.defaults(name, tmp_path, list(golden)), name)


@pytest.mark.parametrize("name", GOLDEN["nets"])
def test_networks(name, tmp_path):
    golden = {k: v for k, v in GOLDEN["nets"][name].items() if k != "filters"}
    with family.in_float64():
        assert_same(golden, family.nets(name, tmp_path), name)


@pytest.mark.parametrize("name", family.STEPS)
def test_four_iterations(name, tmp_path):
    case = {"CUT": "cut", "FastCUT": "cut", "DCL": "dcl"}.get(name.split("/")[0], "original")
    with family.in_float64():
        assert_same(GOLDEN[case][name], family.steps(name, tmp_path), name)


def test_all_that_is_recorded_is_held():
    recorded = {name for case in ("cut", "dcl", "original") for name in GOLDEN[case]}
    assert recorded == set(family.STEPS)
    assert set(GOLDEN) == {"defaults", "nets", "cut", "dcl", "original"}
    assert set(GOLDEN["defaults"]) == set(family.DEFAULTS)


# ------------------------------------------------------------------------------- the parts of them
def test_downsampling_is_a_binomial_blur_of_every_second_pixel():
    x = torch.randn(2, 3, 9, 12, dtype=torch.float64)
    got = Downsample(3).double()(x)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    row = (0.25, 0.5, 0.25)
    blurred = torch.zeros_like(x)
    for i in range(3):
        for j in range(3):
            blurred += row[i] * row[j] * padded[..., i : i + 9, j : j + 12]
    torch.testing.assert_close(got, blurred[..., ::2, ::2])
    assert got.shape == (2, 3, 5, 6)


def test_upsampling_is_a_blur_between_zeros():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    zeros = padded.new_zeros(2, 3, 18, 16)
    zeros[..., ::2, ::2] = padded
    row = (0.25, 0.75, 0.75, 0.25)
    wanted = sum(
        row[i] * row[j] * zeros[..., i + 2 : i + 12, j + 2 : j + 10]
        for i in range(4)
        for j in range(4)
    )
    torch.testing.assert_close(Upsample(3).double()(x), wanted)
    flat = torch.full((1, 3, 6, 6), 0.7)
    torch.testing.assert_close(Upsample(3)(flat), torch.full((1, 3, 12, 12), 0.7))


def test_blurred_convolutions():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    row = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    kernel = torch.outer(row, row).expand(3, 1, 3, 3)

    down = BlurredConv2d(3, 5, 4, 2, 1).double()
    plain = nn.Conv2d(3, 5, 4, 2, 1).double()
    plain.load_state_dict({k: v for k, v in down.state_dict().items() if k != "filt"})
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    torch.testing.assert_close(down(x), plain(blurred))

    up = BlurredConvTranspose2d(5, 3, 4, 2, 1).double()
    plain = nn.ConvTranspose2d(5, 3, 4, 2, 1).double()
    plain.load_state_dict({k: v for k, v in up.state_dict().items() if k != "filt"})
    y = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    blurred = F.conv2d(F.pad(plain(y), (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    torch.testing.assert_close(up(y), blurred)
    # whatever the weights are, what is flat stays flat away from the border
    flat = torch.ones(1, 5, 6, 6, dtype=torch.float64)
    assert plain(flat)[0, :, 3:-3, 3:-3].std((1, 2)).min() > 1e-3
    assert up(flat)[0, :, 3:-3, 3:-3].std((1, 2)).max() < 1e-12
    assert up(y[..., :1, :1]).shape == (2, 3, 2, 2)
    assert down(x[..., :2, :2]).shape == (2, 5, 1, 1)


@pytest.mark.parametrize("all_negatives", [False, True])
def test_contrastive_loss_in_closed_form(all_negatives):
    query = F.normalize(torch.randn(2, 5, 7, dtype=torch.float64), dim=2)
    key = F.normalize(torch.randn(2, 5, 7, dtype=torch.float64), dim=2)
    wanted = []
    for n in range(2):
        others = range(2) if all_negatives else [n]
        for i in range(5):
            positive = math.exp(float(query[n, i] @ key[n, i]) / 0.5)
            negatives = math.exp(-10 / 0.5) + sum(
                math.exp(float(query[n, i] @ key[m, j]) / 0.5)
                for m in others
                for j in range(5)
                if (m, j) != (n, i)
            )
            wanted.append(-math.log(positive / (positive + negatives)))
    loss = patch_nce.PatchNCELoss(0.5, all_negatives)(query, key)
    assert loss.item() == pytest.approx(sum(wanted) / 10, rel=1e-12)


def test_places_are_the_same_for_query_and_key_and_none_comes_twice():
    features = [torch.randn(3, 4, 6, 5), torch.randn(3, 2, 2, 3)]
    places = patch_nce.sample_positions(features, 20)
    assert [p.shape for p in places] == [(3, 20), (3, 6)]
    assert all(len(set(row.tolist())) == len(row) for p in places for row in p)
    assert not torch.equal(places[0][0], places[0][1])  # each image has its own
    net = patch_nce.define_F([4, 2], "sample")
    first, second = net(features, places)
    wanted = F.normalize(features[0].flatten(2)[1, :, places[0][1]].T, dim=1)
    torch.testing.assert_close(first[1], wanted)
    assert second.shape == (3, 6, 2)


def test_features_are_what_layers_return():
    net = networks.define_G(3, 3, 4, "resnet_6blocks", "instance", antialias=True)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        output, features = net(x, [0, 4, 12])
        torch.testing.assert_close(output, net(x))
        for number, feature in zip([0, 4, 12], features, strict=True):
            torch.testing.assert_close(feature, net.model[: number + 1](x))
        alone = net(x, [0, 4, 12], encode_only=True)
    assert all(torch.equal(a, b) for a, b in zip(alone, features, strict=True))
    assert net.channels_of([0, 4, 12]) == [f.shape[1] for f in features]


@pytest.mark.parametrize(
    ("norm", "dropout", "same"),
    [("instance", False, True), ("batch", False, False), ("instance", True, False)],
)
def test_features_come_from_a_pass_of_several_pictures_only_if_they_are_the_same(
    norm, dropout, same
):
    """With batch norm or dropout the contrastive loss needs another pass."""
    net = networks.define_G(3, 3, 4, "resnet_6blocks", norm, dropout)
    pictures = list(torch.rand(2, 1, 3, 16, 16))
    outputs, features = patch_nce.translate(net, pictures, [0, 4])
    assert [x.shape for x in outputs] == [(1, 3, 16, 16)] * 2
    if not same:
        assert features == [None, None]
        return
    for x, found in zip(pictures, features, strict=True):
        torch.testing.assert_close(found, net(x, [0, 4], encode_only=True))


def test_small_features_of_half_precision_have_length_1():
    """Their squares would be 0 in float16."""
    feature = torch.full((1, 4, 2, 2), 1e-5, dtype=torch.float16)
    (rows,) = patch_nce.define_F([4], "sample")([feature], [torch.arange(4)[None]])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, torch.full((1, 4, 4), 0.5), rtol=0.01, atol=0)


# ------------------------------------------------------------------------------ gradients, compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_are_right_in_every_memory_order(batch, layout):
    torch.manual_seed(0)
    x = torch.randn(batch, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.InstanceNorm2d(4)).double()
    contiguous_gradients([net])
    contiguous_gradients([net])  # twice is once
    assert len(net[1]._forward_hooks) == 1
    slope = torch.randn(batch, 4, 6, 5, dtype=torch.float64)
    (got,) = torch.autograd.grad(net(x), x, slope.to(memory_format=layout))
    y = net[0](x)
    centred = y - y.mean((2, 3), keepdim=True)
    normed = centred / (centred.square().mean((2, 3), keepdim=True) + 1e-5).sqrt()
    (wanted,) = torch.autograd.grad(normed, x, slope)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_follows_a_norm_may_change_it_in_place(layout):
    """As the networks of the original do: `nn.ReLU(True)` after an instance norm."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    gradients = []
    for in_place in (False, True):
        net = nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.ReLU(in_place)).double()
        contiguous_gradients([net])
        gradients += torch.autograd.grad(net(x), x, slope.to(memory_format=layout))
    y = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), False, True) + 1e-5).sqrt()
    (wanted,) = torch.autograd.grad(y.relu(), x, slope)
    for got in gradients:
        torch.testing.assert_close(got, wanted)


def test_a_step_of_cut_with_one_picture_equals_one_of_two_equal_pictures(tmp_path):
    """What `train.py` computes; the kernel alone gives other gradients for one than for two."""
    gradients = []
    with family.in_float64():
        for batch in (1, 2):
            model: Any = family.build(
                f"{family.CUT} --netG resnet_6blocks --nce_layers 0,4,12", batch, tmp_path
            )
            contiguous_gradients(model.networks().values())
            one = family.wave((1, 3, 32, 32), 5).double()
            both = {"A": one.repeat(batch, 1, 1, 1), "B": one.flip(2).repeat(batch, 1, 1, 1)}
            model.set_input({**both, "A_paths": [], "B_paths": []})
            model.forward()
            model.backward_G()
            gradients.append([p.grad.clone() for p in model.netG.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


KINDS = {
    "cycle_gan": "--model cycle_gan",
    "antialias": "--model cycle_gan --antialias --gan_mode hinge",
    "pix2pix": "--model pix2pix --gan_mode nonsaturating",
    "CUT": "--model cut --nce_layers 0,4,8,12",
    "FastCUT": "--model cut --CUT_mode fastcut --nce_layers 0,4,8,12 --gan_mode wgangp",
    "dcl": "--model dcl --nce_layers 4,8,12",
}


def tiny_model(words: str, folder, dataroot: object = "none"):
    argv = ["--dataroot", str(dataroot), "--checkpoints_dir", str(folder), *TINY, *words.split()]
    opt = TrainOptions(argv).parse(save=False)
    model = create_model(opt)
    model.setup(opt)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_networks_all_learn(kind, tmp_path):
    """A compiler may take weights for constants once they were frozen.

    All of the compiler but the generation of code, which `test_acceleration.py` checks.
    """
    torch.compiler.reset()
    model = tiny_model(KINDS[kind], tmp_path)
    for net in model.networks().values():
        prepared(net).compile(backend="aot_eager", dynamic=False)  # as --compile does
    picture = {"A": torch.randn(1, 3, 32, 32), "B": torch.randn(1, 3, 32, 32)}
    for _ in range(2):
        before = model.network_states()
        before = {n: {k: v.clone() for k, v in s.items()} for n, s in before.items()}
        model.set_input({**picture, "A_paths": ["a"], "B_paths": ["b"]})
        model.optimize_parameters()
        for name, state in model.network_states().items():
            weights = [k for k in state if k.endswith("weight")]
            assert weights
            still = [k for k in weights if torch.equal(state[k], before[name][k])]
            assert not still, (name, still)


TILES = ROOT / "datasets" / "worldmaps_mini" / "unaligned"


@pytest.mark.parametrize("kind", ["CUT", "FastCUT", "dcl"])
def test_bf16_gives_nearly_the_same_losses_on_tiles(kind, tmp_path):
    losses: dict[str, dict[str, float]] = {"fp32": {}, "bf16": {}}
    for precision, found in losses.items():
        torch.manual_seed(0)
        words = f"{KINDS[kind]} --init_type normal --precision {precision} --batch_size 2"
        model: Any = tiny_model(words.replace("wgangp", "lsgan"), tmp_path, TILES)
        model.set_input(next(iter(create_dataset(model.opt))))
        with undisturbed():
            random.seed(1)
            model.optimize_parameters()
        found.update(model.get_current_losses())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("kind", ["CUT", "FastCUT", "dcl"])
def test_shared_passes_give_the_same_numbers(kind, flipped, monkeypatch, tmp_path):
    monkeypatch.setattr(random, "random", lambda: 0.1 if flipped else 0.9)
    ends = []
    with family.in_float64():
        sides = {side: family.wave((1, 3, 32, 32), k).double() for k, side in enumerate("AB")}
        for passes in ("off", "on"):
            torch.manual_seed(0)
            words = f"{KINDS[kind]} --flip_equivariance --num_patches 20 --batch_passes {passes}"
            model: Any = tiny_model(words.replace("wgangp", "lsgan"), tmp_path)
            contiguous_gradients(model.networks().values())
            for _ in range(2):
                model.set_input({**sides, "A_paths": ["a"], "B_paths": ["b"]})
                model.optimize_parameters()
            ends.append((model.get_current_losses(), model.network_states()))
    (apart, weights_apart), (shared, weights_shared) = ends
    assert shared == pytest.approx(apart, rel=1e-7)
    for name, state in weights_apart.items():
        # of a step of 2e-4; biases in front of a norm move by rounding alone
        torch.testing.assert_close(weights_shared[name], state, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["CUT", "dcl"])
def test_pictures_of_different_sizes(kind, tmp_path):
    model = tiny_model(KINDS[kind], tmp_path)
    sides = {"A": torch.rand(1, 3, 32, 40), "B": torch.rand(1, 3, 36, 32)}
    model.set_input({**sides, "A_paths": ["a"], "B_paths": ["b"]})
    model.optimize_parameters()
    visuals = model.get_current_visuals()
    assert visuals["fake_B"].shape == sides["A"].shape
    assert visuals["idt_B"].shape == sides["B" if kind == "CUT" else "A"].shape


@pytest.mark.parametrize("kind", ["cycle_gan", "pix2pix", "CUT", "dcl"])
def test_results_are_named_after_what_is_translated(kind, tmp_path):
    """BtoA: after the files of B. Pages and messages on NaN name them."""
    model: Any = tiny_model(f"{KINDS[kind]} --direction BtoA", tmp_path)
    sides = {"A": torch.zeros(1, 3, 32, 32), "B": torch.ones(1, 3, 32, 32)}
    model.set_input({**sides, "A_paths": ["a.png"], "B_paths": ["b.png"]})
    assert torch.equal(model.real_A, sides["B"])
    assert model.get_image_paths() == ["b.png"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("cycle_gan", "--lambda_identity 0"),
        ("antialias", "--lambda_identity 0"),
        ("pix2pix", ""),
        ("dcl", "--nce_idt False"),
    ],
)
def test_sides_of_different_channels(kind, more, tmp_path):
    model: Any = tiny_model(f"{KINDS[kind]} {more} --input_nc 1 --output_nc 3", tmp_path)
    sides = {"A": torch.rand(1, 1, 32, 32), "B": torch.rand(1, 3, 32, 32)}
    model.set_input({**sides, "A_paths": ["a"], "B_paths": ["b"]})
    model.optimize_parameters()
    shown = {name: x.shape[1] for name, x in model.get_current_visuals().items()}
    channels = {"real_A": 1, "fake_B": 3, "real_B": 3, "fake_A": 1, "rec_A": 1, "rec_B": 3}
    assert shown == {name: channels[name] for name in shown}


@pytest.mark.parametrize(("drawn", "flipped"), [(0.49, True), (0.51, False)])
@pytest.mark.parametrize("kind", ["FastCUT", "dcl"])
def test_half_of_the_inputs_are_flipped(kind, drawn, flipped, monkeypatch, tmp_path):
    model: Any = tiny_model(f"{KINDS[kind]} --flip_equivariance", tmp_path)
    A, B = torch.rand(2, 1, 3, 32, 32)
    model.set_input({"A": A, "B": B, "A_paths": ["a"], "B_paths": ["b"]})
    monkeypatch.setattr(random, "random", lambda: drawn)
    model.forward()
    assert model.flipped is flipped


def test_a_flipped_step_of_dcl_compares_the_same_places(monkeypatch, tmp_path):
    """The recorded steps of DCL have no flips. With all places no draw is in the result."""
    monkeypatch.setattr(random, "random", lambda: 0.1)
    model: Any = tiny_model(f"{KINDS['dcl']} --flip_equivariance --num_patches 9999", tmp_path)
    A, B = torch.rand(2, 1, 3, 32, 32)
    model.set_input({"A": A, "B": B, "A_paths": ["a"], "B_paths": ["b"]})
    model.forward()
    with torch.no_grad():
        model.compute_G_loss()
        torch.testing.assert_close(model.fake_B, model.netG_A(A.flip(3)))
        torch.testing.assert_close(model.idt_A, model.netG_A(B))  # B is not flipped
        queries = model.netG_B(model.fake_B, model.nce_layers, encode_only=True)
        queries = [q.flip(3) for q in queries]
        keys = model.netG_A(A, model.nce_layers, encode_only=True)
        nets = model.netF2, model.netF1
        wanted = 2 * patch_nce.contrast(model.criterionNCE, queries, keys, *nets, 9999)
    assert model.loss_NCE1.item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["CUT", "dcl"])
def test_the_pool_and_both_betas_count(kind, tmp_path):
    model: Any = tiny_model(f"{KINDS[kind]} --pool_size 1 --beta1 0.3 --beta2 0.7", tmp_path)
    A, B = torch.rand(2, 1, 3, 32, 32)
    model.set_input({"A": A, "B": B, "A_paths": ["a"], "B_paths": ["b"]})
    model.optimize_parameters()
    assert len(model.fake_B_pool.images) == 1
    betas = [o.param_groups[0]["betas"] for o in model.optimizers]
    # the published code of DCL gives F torch's own
    assert betas == [(0.3, 0.7)] * 2 + [(0.9, 0.999) if kind == "dcl" else (0.3, 0.7)]


# ------------------------------------------------------------------------------------ the programs
@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return aligned(unaligned(tmp_path_factory.mktemp("pictures"), 2), 2)


def words(pictures, folder, *more: str) -> list[object]:
    where = ["--dataroot", pictures, "--checkpoints_dir", folder, "--name", "x"]
    return [*where, *TINY, *more]


def saved(folder) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}.{key}": value
        for path in sorted((folder / "x").glob("latest_net_*.pth"))
        for key, value in torch.load(path, weights_only=True).items()
    }


@pytest.mark.parametrize(
    ("kind", "workers"), [("CUT", 0), ("CUT", 2), ("FastCUT", 0), ("FastCUT", 2), ("dcl", 2)]
)
def test_resume_is_exact(kind, workers, tmp_path):
    """Two epochs of two images, of which the second decays; stopped after each iteration."""
    flags = [*SHORT, *KINDS[kind].split(), "--num_patches", "20", "--no_html", "--n_epochs", "1"]
    flags += ["--n_epochs_decay", "1", "--num_threads", str(workers), "--max_dataset_size", "2"]
    whole = succeed("train.py", *words(TILES, tmp_path / "whole", *flags))
    assert "epoch 2: images are scaled to 32 from now on" in whole.out
    again = words(TILES, tmp_path / "parts", *flags, "--continue_train")
    for _ in range(3):
        assert "stopped" in run("train.py", *again, "--max_hours", "0").out
    assert "epoch 2: images are scaled to 32 from now on" in succeed("train.py", *again).out
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert any("net_F" in name for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("kind", ["CUT", "dcl", "antialias"])
def test_what_is_trained_translates(kind, pictures, tmp_path):
    flags = [*SHORT, *KINDS[kind].split(), "--no_html"]
    normG = [] if kind == "antialias" else ["--normG", "batch"]
    succeed("train.py", *words(pictures, tmp_path, *flags, *normG))
    where = ["--checkpoints_dir", tmp_path, "--name", "x", "--gpu_ids", "-1", "--crop_size", "32"]
    results = ["--results_dir", tmp_path / "results"]
    name = KINDS[kind].split()[1]
    succeed("test.py", "--dataroot", pictures, *where, *results, "--model", name)
    for direction in ("AtoB", "BtoA") if kind != "CUT" else ("AtoB",):
        side = pictures / ("testA" if direction == "AtoB" else "testB")
        one = ["--dataroot", side, "--model", "test", "--direction", direction]
        result = succeed("test.py", *one, *where, *results, "--tile", "16")
        suffix = "" if kind == "CUT" else "_A" if direction == "AtoB" else "_B"
        assert f"latest_net_G{suffix}.pth" in result.out
    generator = load_generator(tmp_path / "x", device="cpu")
    sampling = [m for m in generator.net.modules() if isinstance(m, (Downsample, Upsample))]
    assert len(sampling) == 4
    assert any(isinstance(m, nn.BatchNorm2d) for m in generator.net.modules()) == bool(normG)
    assert generator(torch.zeros(3, 50, 41)).shape == (3, 50, 41)


@pytest.mark.parametrize("form", ["torchscript", "onnx"])
def test_anti_aliased_generators_are_exported(form, tmp_path):
    from models.inference.export import (
        export,
        frozen,
        has_free_sizes,
        largest_difference,
        need_packages,
        reader,
    )

    if form == "onnx":
        pytest.importorskip("onnxruntime")
        if not has_free_sizes():
            pytest.skip("needs a newer PyTorch")
        need_packages("onnx", ("onnx", "onnxscript"))
    net = networks.define_G(
        3, 3, 4, "resnet_6blocks", "instance", antialias=True, antialias_up=True
    )
    net = frozen(net)
    path = tmp_path / "G"
    export(net, 3, form, path, {})
    sizes = [(1, 64, 64), (2, 37, 50)]
    found = largest_difference(net, reader(form, path), 3, sizes)
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("cache", ["ram", "off"])
def test_decaying_epochs_load_at_the_size_of_the_crop(workers, cache, pictures, tmp_path):
    flags = ["--model", "cut", "--n_epochs", "1", "--cache_images", cache, "--no_flip"]
    flags += ["--num_threads", workers]

    def epoch(number: int, start: int, *more: str) -> list[torch.Tensor]:
        opt = TrainOptions([str(w) for w in words(pictures, tmp_path, *flags, *more)]).parse(False)
        dataset = create_dataset(opt)
        try:
            for before in range(1, number):  # a cache that is full of the other size
                dataset.set_epoch(before)
                list(dataset)
            dataset.set_epoch(number, start)
            return [batch["A"] for batch in dataset]
        finally:
            dataset.close()

    flags_of_whole = "--dataroot x --gpu_ids -1 --load_size 32 --crop_size 32 --no_flip".split()
    whole = reader(TrainOptions(flags_of_whole).parse(False), 3)
    scaled = [whole(str(path)) for path in sorted((pictures / "trainA").glob("*.png"))]
    for start in (0, 1):
        batches = epoch(2, start)
        assert len(batches) == 2 - start
        assert all(any(torch.equal(b[0], s) for s in scaled) for b in batches)
    # what a dataset writes into the options is for the model too
    opt = TrainOptions([str(w) for w in words(pictures, tmp_path, *flags)]).parse(False)
    assert create_dataset(opt).dataset.opt is opt
    for batches in (epoch(1, 0), epoch(2, 0, "--decay_at_crop_size", "False")):
        assert not any(torch.equal(b[0], s) for b in batches for s in scaled)


# --------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model cut --netG unet_256", "--model cut compares layers of a ResNet"),
        ("--model dcl --netG unet_128", "choose from resnet_9blocks, resnet_6blocks"),
        ("--model dcl --output_nc 1", "--nce_idt needs --input_nc and --output_nc to be equal"),
        ("--model cut --output_nc 1", "--input_nc 3 and --output_nc 1 must be equal"),
        ("--model cut --output_nc 1 --nce_idt False", "must be equal: choose --model dcl"),
        ("--model cut --nce_layers 4,2", "'4,2': numbers in rising order"),
        ("--model cut --nce_layers 0,32", "resnet_9blocks has layers 0 to 31, and no 32"),
        ("--model dcl --netG resnet_6blocks --nce_layers 4,29", "has layers 0 to 28, and no 29"),
        ("--model cut --no_antialias --nce_layers 0,30", "has layers 0 to 29, and no 30"),
        ("--model cut --CUT_mode UT", "invalid choice: 'UT'"),
        ("--model cut --CUT_mode FastCUT --crop_size 34", "choose a multiple of 4"),
        ("--model cut --nce_idt maybe", "'maybe' is neither True nor False"),
        ("--model cut --num_patches 0", "--num_patches: 0 is too small"),
        ("--model cut --nce_T 0", "--nce_T"),
        ("--model cut --norm batch", "has --normG and --normD in place of --norm"),
    ],
)
def test_options_that_do_not_fit(flags, said, capsys):
    with pytest.raises(SystemExit) as end:
        TrainOptions(["--dataroot", "none", "--gpu_ids", "-1", *flags.split()]).parse(save=False)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("", ("CUT", 1.0, True, False, 200)),
        ("--CUT_mode fastcut", ("FastCUT", 10.0, False, True, 150)),
        ("--CUT_mode FASTCUT --lambda_NCE 3", ("FastCUT", 3.0, False, True, 150)),
        ("--lambda_NCE 3 --nce_idt --CUT_mode FastCUT", ("FastCUT", 3.0, True, True, 150)),
        ("--nce_idt False --n_epochs 7", ("CUT", 1.0, False, False, 7)),
    ],
)
def test_modes(flags, wanted):
    words = ["--dataroot", "none", "--gpu_ids", "-1", "--model", "cut", *flags.split()]
    opt = TrainOptions(words).parse(save=False)
    names = ("CUT_mode", "lambda_NCE", "nce_idt", "flip_equivariance", "n_epochs")
    assert tuple(getattr(opt, name) for name in names) == wanted


@pytest.mark.parametrize("built", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("there", [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("netG", ["resnet_6blocks", "unet_128"])
def test_weights_name_the_flags_of_their_sampling(netG, there, built, tmp_path):
    def generator(down: bool, up: bool) -> nn.Module:
        return networks.define_G(3, 3, 2, netG, antialias=down, antialias_up=up)

    message = explain_mismatch("G", generator(*there).state_dict(), generator(*built))
    if there == built:
        assert message is None
        return
    assert message is not None
    flags = message.partition("; set ")[2].split()
    opt = TestOptions(
        ["--dataroot", "none", "--gpu_ids", "-1", "--checkpoints_dir", str(tmp_path), *flags]
    ).parse(save=False)
    assert (not opt.no_antialias, not opt.no_antialias_up) == there
