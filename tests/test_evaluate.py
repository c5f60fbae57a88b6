"""scripts/evaluate.py and --val_freq: what they report, and that training does not notice."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data.aligned_dataset import AlignedDataset
from data.unaligned_dataset import UnalignedDataset
from models import load_generator
from models.pix2pix_model import Pix2PixModel
from options.evaluate_options import EvaluateOptions
from tests.helpers import (
    SHORT,
    TINY,
    aligned,
    damaged_inside,
    picture,
    pixels,
    run,
    succeed,
    unaligned,
)
from util.display.loss_record import read_records
from util.errors import UserError
from util.scores import metrics
from util.scores.evaluation import Evaluator, _Collected, finite_psnr, levels, parse_scores
from util.scores.extractors import _hub_with
from util.scores.report import table
from util.scores.validation import WRITTEN, Validation, validation_options
from util.util import tensor2im

PIX2PIX = "--model pix2pix --netG resnet_6blocks".split()


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> Path:
    """Data of pairs, and a model of one epoch called p."""
    root = tmp_path_factory.mktemp("paired")
    data = aligned(root / "data")
    for i in range(2):
        picture(data / "val" / f"{i}.png", 80, 40, 30 + i)
    where = ["--dataroot", data, "--checkpoints_dir", root, "--name", "p"]
    succeed("train.py", *where, *PIX2PIX, *TINY, *SHORT)
    return root


@pytest.fixture(scope="module")
def unpaired(tmp_path_factory) -> Path:
    """Data of two folders of different length, and a model of one epoch called u."""
    root = tmp_path_factory.mktemp("unpaired")
    data = unaligned(root / "data")
    picture(data / "testB" / "more.png", 40, 40, 77)
    for i in range(2):
        for side in "AB":
            picture(data / f"val{side}" / f"{i}.png", 40, 40, 30 + i)
    where = ["--dataroot", data, "--checkpoints_dir", root, "--name", "u"]
    succeed("train.py", *where, "--model", "cycle_gan", *TINY, *SHORT)
    return root


def evaluate(root: Path, name: str, *words: object) -> dict:
    """The report of scripts/evaluate.py."""
    where = ["--dataroot", root / "data", "--checkpoints_dir", root, "--name", name]
    size = "--gpu_ids -1 --crop_size 32 --scores L1,PSNR,SSIM,MS-SSIM,cycle".split()
    succeed("scripts/evaluate.py", *where, *size, "--results_dir", root / "results", *words)
    (path,) = (root / "results" / name).glob("*/scores.json")
    facts = json.loads(path.read_text())
    assert (path.parent / "scores.txt").read_text().startswith(f"{name}: ")
    path.unlink()
    return facts


# --------------------------------------------------------------------------------------- the report
def test_scores_of_another_data_set_are_not_replaced_in_silence(paired, tmp_path):
    shutil.copytree(paired / "data", tmp_path / "other")
    words = ["--checkpoints_dir", paired, "--name", "p", "--results_dir", tmp_path / "results"]
    words += "--gpu_ids -1 --crop_size 32 --scores L1 --dataroot".split()
    for _ in range(2):
        assert "replaced" not in succeed("scripts/evaluate.py", *words, paired / "data").err
    other = succeed("scripts/evaluate.py", *words, tmp_path / "other")
    path = tmp_path / "results" / "p" / "test_latest" / "scores.json"
    assert f"{path} was made with --dataroot {paired / 'data'} and is replaced" in other.err
    assert json.loads(path.read_text())["dataroot"] == str(tmp_path / "other")


def test_a_plain_folder_is_told_what_helps(paired, tmp_path):
    """Scores need a second side, so no option of this program takes a plain folder."""
    picture(tmp_path / "photos" / "a.png")
    where = ["--checkpoints_dir", paired, "--name", "p", "--dataroot", tmp_path / "photos"]
    said = run("scripts/evaluate.py", *where, "--gpu_ids", -1).err
    assert f"no folder {tmp_path / 'photos' / 'test'}" in said
    assert "move the images there; only test.py --model test and check_dataset.py" in said


def test_scores_of_pairs_are_those_of_saved_pictures(paired):
    """The report against the files that test.py writes, opened and compared one by one."""
    facts = evaluate(paired, "p", "--eval")
    where = ["--dataroot", paired / "data", "--checkpoints_dir", paired, "--name", "p"]
    test = ["--results_dir", paired / "results", "--eval", *PIX2PIX, "--gpu_ids", "-1"]
    succeed("test.py", *where, *test, "--crop_size", 32)
    images = paired / "results" / "p" / "test_latest" / "images"
    values = {"L1": [], "PSNR": [], "SSIM": []}
    for fake in sorted(images.glob("*_fake_B.png")):
        real = fake.with_name(fake.name.replace("fake", "real"))
        a, b = (
            torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1)[None] for p in (fake, real)
        )
        for name, formula in (("L1", metrics.l1), ("PSNR", metrics.psnr), ("SSIM", metrics.ssim)):
            values[name].append(float(formula(a, b)))
    assert len(values["L1"]) == 3
    found = facts["scores"]["fake_B"]
    for name, each in values.items():
        assert found[name]["value"] == pytest.approx(np.mean(each), abs=1e-12)
        assert found[name]["spread"] == pytest.approx(np.std(each), abs=1e-12)
        assert found[name]["pictures"] == 3


def test_scores_of_tiles_are_those_of_tiles(paired):
    shutil.copytree(paired / "p", paired / "bright")
    file = paired / "bright" / "latest_net_G.pth"
    weights = torch.load(file, weights_only=True)  # of a network whose images are nearly grey
    torch.save({name: 10 * w if w.dim() == 4 else w for name, w in weights.items()}, file)
    quick = ["--tile", 16, "--tile_mode", "quick", "--tile_overlap", 0, "--eval"]
    whole = evaluate(paired, "bright", "--keep_size", "--eval")["scores"]["fake_B"]["L1"]["value"]
    tiled = evaluate(paired, "bright", *quick)["scores"]["fake_B"]["L1"]["value"]
    assert abs(whole - tiled) > 1e-3  # tiles have edges of their own
    where = ["--dataroot", paired / "data", "--checkpoints_dir", paired, "--name", "bright"]
    words = ["--results_dir", paired / "tiles", *PIX2PIX, "--gpu_ids", "-1", *quick]
    succeed("test.py", *where, *words)
    images = paired / "tiles" / "bright" / "test_latest" / "images"
    pairs = [(p, p.with_name(p.name.replace("fake", "real"))) for p in images.glob("*_fake_B.png")]
    each = [[np.asarray(Image.open(p), np.float64) for p in pair] for pair in pairs]
    assert tiled == pytest.approx(np.mean([np.abs(a - b).mean() for a, b in each]) / 255, abs=1e-9)


def test_report_says_what_it_holds_for(paired):
    facts = evaluate(paired, "p", "--num_test", 2, "--epoch", 1)
    assert (facts["name"], facts["model"], facts["epoch"]) == ("p", "pix2pix", "1")
    assert facts["pictures"] == 2
    assert (facts["dataroot"], facts["dataset_mode"]) == (str(paired / "data"), "aligned")
    size = {"preprocess": "resize_and_crop", "load_size": 32, "crop_size": 32, "more": ""}
    assert facts["resize"] == size
    assert facts["variant"]["precision"] == "tf32"
    weights = (paired / "p" / "1_net_G.pth").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    assert facts["weights"] == [{"file": "1_net_G.pth", "sha256": digest}]
    assert "176x176" in facts["left_out"]["MS-SSIM"]
    assert facts["variant"]["mode"].startswith("train")
    assert set(facts["variant"]["scores"]) == {"L1", "PSNR", "SSIM"}
    other = ["--keep_size", "--tile", 16, "--tile_mode", "quick", "--precision", "bf16", "--eval"]
    facts = evaluate(paired, "p", "--num_test", 2, "--epoch", 1, *other)
    assert facts["resize"]["more"] == "--keep_size --tile 16 --tile_mode quick"
    assert facts["variant"]["precision"] == "bf16"
    assert "--tile 16" in table(facts)
    assert "eval mode, bf16" in table(facts)


def test_columns_of_the_table_do_not_touch(paired):
    facts = evaluate(paired, "p", "--epoch", 1)
    long = {"value": 0.25171, "spread": 0.000662134, "pictures": 1234567890}
    facts["scores"] = {"a_picture_of_ones_own": {"class accuracy": long, "L1": long}}
    facts["left_out"] = {}
    *_, heading, first, second = table(facts).splitlines()
    row = ["a_picture_of_ones_own", "class accuracy", "0.25171", "0.00066213", "1234567890"]
    assert re.split("  +", first) == [*row, "higher"]
    assert re.split("  +", second) == [row[0], "L1", *row[2:], "lower"]
    ends = [line.index(w) + len(w) for line, w in [(heading, "spread"), (first, "0.00066213")]]
    assert ends[0] == ends[1]


@pytest.mark.filterwarnings("error")  # such as NumPy's about the mean of nothing
def test_what_is_left_out_has_no_row(paired):
    """Images of 32x32 are too small for the grid score, each `grid N` of it."""
    facts = evaluate(paired, "p", "--scores", "L1,grid")
    assert "64x64" in facts["left_out"]["grid"]
    assert {name for scores in facts["scores"].values() for name in scores} == {"L1"}


def test_cycle_of_unpaired_data(unpaired):
    facts = evaluate(unpaired, "u")
    assert set(facts["scores"]) == {"rec_A", "rec_B"}
    there = load_generator(unpaired / "u", "AtoB", device="cpu")
    back = load_generator(unpaired / "u", "BtoA", device="cpu")
    # testB has one image more, so the first of testA comes twice, and counts once
    values = []
    for name in ("0", "1", "2"):
        real = Image.open(unpaired / "data" / "testA" / f"{name}.png")
        real = real.resize((32, 32), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(real)).permute(2, 0, 1)[None].float() / 127.5 - 1
        rec = tensor2im(back(there(x)))
        values.append(np.abs(rec / 255 - np.asarray(real) / 255).mean())
    found = facts["scores"]["rec_A"]["cycle"]
    assert found["value"] == pytest.approx(np.mean(values), abs=1e-5)
    assert (found["pictures"], facts["scores"]["rec_B"]["cycle"]["pictures"]) == (3, 4)
    assert facts["left_out"]["L1"] == "the images are not paired"
    assert list(facts["left_out"]) == sorted(facts["left_out"])


def test_cycle_gan_on_pairs_has_both_kinds(paired, unpaired, tmp_path):
    where = ["--dataroot", paired / "data", "--checkpoints_dir", unpaired, "--name", "u"]
    words = "--gpu_ids -1 --crop_size 32 --dataset_mode aligned --scores L1,cycle".split()
    succeed("scripts/evaluate.py", *where, *words, "--results_dir", tmp_path)
    facts = json.loads((tmp_path / "u" / "test_latest" / "scores.json").read_text())
    assert {k: set(v) for k, v in facts["scores"].items()} == {
        "fake_A": {"L1"},
        "fake_B": {"L1"},
        "rec_A": {"cycle"},
        "rec_B": {"cycle"},
    }


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_one_generator_on_pairs(paired, tmp_path, direction):
    """--model test takes the side of the direction, and is compared with the other one."""
    where = ["--dataroot", paired / "data", "--checkpoints_dir", paired, "--name", "p"]
    words = "--gpu_ids -1 --crop_size 32 --model test --dataset_mode aligned --scores L1 --eval"
    more = ["--direction", direction, "--results_dir", tmp_path, "--model_suffix", ""]
    succeed("scripts/evaluate.py", *where, *words.split(), *more)
    facts = json.loads((tmp_path / "p" / "test_latest" / "scores.json").read_text())
    G = load_generator(paired / "p", device="cpu", eval=True)
    values = []
    for i in range(3):
        both = Image.open(paired / "data" / "test" / f"{i}.png")
        sides = [both.crop((0, 0, 40, 40)), both.crop((40, 0, 80, 40))]
        a, b = (s.resize((32, 32), Image.Resampling.BICUBIC) for s in sides)
        a, b = (a, b) if direction == "AtoB" else (b, a)
        values.append(np.abs(np.asarray(G(a), float) - np.asarray(b, float)).mean() / 255)
    assert facts["scores"]["fake_B"]["L1"]["value"] == pytest.approx(np.mean(values), abs=1e-5)


def test_cityscapes_labels_are_scored(paired, tmp_path):
    facts = evaluate(paired, "p", "--cityscapes", "--eval")
    assert "no label images" in facts["left_out"]["cityscapes"]
    assert "class IoU" not in facts["scores"]["fake_B"]

    colours = np.array(list(metrics.CITYSCAPES.values()), np.uint8)
    labels = colours[np.random.default_rng(0).integers(0, 19, (32, 32))]
    (tmp_path / "test").mkdir()
    Image.fromarray(np.hstack([pixels(32, 32), labels])).save(tmp_path / "test" / "0.png")
    facts = evaluate(paired, "p", "--cityscapes", "--eval", "--dataroot", tmp_path)
    found = facts["scores"]["fake_B"]
    for name in ("pixel accuracy", "class accuracy", "class IoU"):
        assert 0 <= found[name]["value"] <= 1
    assert "nearest colour" in facts["variant"]["scores"]["pixel accuracy"]
    assert found["L1"]["spread"] is None  # of one image


@pytest.mark.parametrize("labelled", ["A", "B"])
def test_photographs_are_not_scored_as_labels(labelled):
    """A CycleGAN makes both: the images of the side that is painted in the labels' colours."""
    rng = np.random.default_rng(0)
    road, sky = ((np.array(metrics.CITYSCAPES[n]) / 127.5 - 1) for n in ("road", "sky"))
    half = rng.random((1, 1, 16, 16)) < 0.5
    labels = torch.tensor(np.where(half, road[None, :, None, None], sky[None, :, None, None]))
    other = "B" if labelled == "A" else "A"
    visuals = {f"real_{labelled}": labels, f"fake_{labelled}": labels.flip(3)}
    visuals |= {f"{kind}_{other}": torch.rand(1, 3, 16, 16) * 2 - 1 for kind in ("real", "fake")}
    opt = SimpleNamespace(dataset_mode="aligned", direction="AtoB", model="cycle_gan")
    model = mock.Mock(get_current_visuals=lambda: visuals)
    evaluator = Evaluator(opt, True, ["L1"], cityscapes=True)  # type: ignore[arg-type]
    scores = evaluator.run(model, [{"A_paths": ["a"], "B_paths": ["b"]}], 1).scores
    agree = float((half == half[..., ::-1]).mean())
    assert scores[f"fake_{labelled}"]["pixel accuracy"].value == pytest.approx(agree)
    assert set(scores[f"fake_{other}"]) == {"L1"}


def test_levels_are_those_of_saved_pictures():
    x = torch.linspace(-1.1, 1.1, 3 * 50 * 40).reshape(1, 3, 50, 40)
    assert np.array_equal(levels(x)[0].permute(1, 2, 0).numpy(), tensor2im(x))
    array = np.random.default_rng(0).random((7, 5, 3)) * 255
    assert np.array_equal(levels(array)[0].permute(1, 2, 0).numpy(), tensor2im(array))


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["--scores", "L1,beauty"], "beauty is no score", 2),
        (["--scores", ","], "nothing is no score", 2),
        (["--scores", "L1", "--dataset_mode", "single", "--model", "test"], "nothing could be", 1),
        (["--scores", "FID", "--inception_weights", "nowhere.pth"], "nowhere.pth", 1),
        (["--scores", "LPIPS", "--lpips_weights", "nowhere.pth"], "nowhere.pth", 1),
    ],
)
def test_mistakes_are_one_line(paired, tmp_path, words, said, code):
    if "FID" in words:
        pytest.importorskip("torch_fidelity")
    if "LPIPS" in words:
        pytest.importorskip("torchmetrics")
    folder = paired / "data" / ("test" if "single" in words else "")
    where = ["--dataroot", folder, "--checkpoints_dir", paired, "--name", "p"]
    result = run("scripts/evaluate.py", *where, "--gpu_ids", -1, "--results_dir", tmp_path, *words)
    assert result.code == code
    assert said in result.err
    assert result.err.count("\n") == 1


class OwnDataset(UnalignedDataset):
    """In the form of the original: it says nothing of pairs, and draws B at random."""

    paired = None

    def __getitem__(self, index):
        A_path, B_path = self.A_paths[index], random.choice(self.B_paths)
        A, B = self.load(A_path, self.transform_A), self.load(B_path, self.transform_B)
        return {"A": A, "B": B, "A_paths": A_path, "B_paths": B_path}


class OwnPairs(OwnDataset):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "B_paths": self.B_paths[index]}


@pytest.mark.parametrize(
    ("kind", "said", "pairs"),
    [(OwnDataset, None, False), (OwnDataset, True, True), (OwnPairs, None, True)],
)
def test_a_dataset_of_ones_own_is_scored_as_what_it_is(
    unpaired, tmp_path, monkeypatch, kind, said, pairs
):
    for side in "AB":
        for name in "pqrst":
            picture(tmp_path / f"test{side}" / f"{name}.png", 40, 40, ord(name) + ord(side))
    monkeypatch.setattr(data, "find_dataset_using_name", lambda name: kind)
    monkeypatch.setattr(kind, "paired", said)
    facts = evaluate(unpaired, "u", "--dataroot", tmp_path, "--num_threads", "0")
    assert ("L1" in facts["scores"].get("fake_B", {})) == pairs
    assert "cycle" in facts["scores"]["rec_A"]
    assert facts["left_out"].get("L1") == (None if pairs else "the images are not paired")


def test_pictures_of_one_file_are_told_apart():
    """Of a dataset of one's own; else only the first would count for FID, KID, grid and cycle."""
    collected = _Collected.__new__(_Collected)
    first, second = ({"real_A": torch.full((1, 3, 4, 4), k, dtype=torch.uint8)} for k in (1, 2))
    names = [collected._source("A", x, {"A": "many.npz"}) for x in (first, second, dict(first))]
    assert names[0] == names[2] != names[1]


def test_names_of_scores():
    assert parse_scores("psnr, fid") == ("PSNR", "FID")
    assert "cycle" in parse_scores("all")
    with pytest.raises(UserError, match="choose from L1, PSNR"):
        parse_scores("")


# ---------------------------------------------------------------------------- FID, KID and LPIPS
def options(root: Path, *words: object) -> object:
    where = ["--dataroot", root / "data", "--checkpoints_dir", root, "--gpu_ids", -1]
    return EvaluateOptions([*map(str, [*where, *words])]).parse(save=False)


@pytest.mark.parametrize(("score", "package"), [("FID", "torch_fidelity"), ("LPIPS", None)])
def test_a_score_without_weights_is_left_out_with_a_reason(
    paired, tmp_path, monkeypatch, score, package
):
    pytest.importorskip(package or "torchmetrics")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    offline = mock.Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    opt = options(paired, "--name", "p")
    evaluator = Evaluator(opt, True, ["L1", score])
    assert evaluator.wanted == {"L1"}
    said = evaluator.left_out[score]
    assert "no route to host" in said
    assert "FILE takes them from a file" in said
    assert "\n" not in said


@pytest.mark.parametrize("score", ["FID", "LPIPS"])
def test_a_score_without_its_package_is_left_out(paired, monkeypatch, score):
    import importlib.util

    found = importlib.util.find_spec
    names = ("torch_fidelity", "torchmetrics")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in names else found(n))
    evaluator = Evaluator(options(paired, "--name", "p"), True, [score])
    assert "pip install torch" in evaluator.left_out[score]


@pytest.mark.slow
def test_fid_and_kid_with_weights_from_a_file(unpaired, tmp_path):
    """Inception with random weights: the report names the file, and images count once."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with (
        mock.patch.object(fidelity, "load_state_dict_from_url", return_value={}),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        net = fidelity.FeatureExtractorInceptionV3("x", ["2048"])
    weights = tmp_path / "inception.pth"
    torch.save(net.state_dict(), weights)
    where = ["--dataroot", unpaired / "data", "--checkpoints_dir", unpaired, "--name", "u"]
    words = ["--crop_size", 32, "--scores", "FID,KID", "--inception_weights", weights]
    result = succeed(
        "scripts/evaluate.py", *where, *words, "--gpu_ids", -1, "--results_dir", tmp_path
    )
    assert "not the released" in result.err
    assert "FID and KID of 3 images depend on that number" in result.err
    facts = json.loads((tmp_path / "u" / "test_latest" / "scores.json").read_text())
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    expected = {"file": "inception.pth", "sha256": digest, "released": False}
    assert facts["extractors"]["inception"] == expected
    # testA has three images, testB four
    assert facts["scores"]["fake_B"]["FID"]["pictures"] == 3
    assert facts["scores"]["fake_A"]["FID"]["pictures"] == 4
    assert facts["scores"]["fake_A"]["KID"]["spread"] > 0

    net = net.eval()

    def look(pictures: list[np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
            return np.concatenate([net(x[None])[0].numpy() for x in batch])

    G = load_generator(unpaired / "u", "AtoB", device="cpu")
    sides = {}
    for side, count in (("A", ["0", "1", "2"]), ("B", ["0", "1", "2", "more"])):
        opened = [Image.open(unpaired / "data" / f"test{side}" / f"{n}.png") for n in count]
        sides[side] = [p.resize((32, 32), Image.Resampling.BICUBIC) for p in opened]
    fake = [np.asarray(G(p)) for p in sides["A"]]
    wanted = metrics.fid(look([np.asarray(p) for p in sides["B"]]), look(fake))
    assert facts["scores"]["fake_B"]["FID"]["value"] == pytest.approx(wanted, rel=1e-3)

    more = ["--model", "test", "--dataset_mode", "unaligned", "--direction", "BtoA"]
    more += ["--results_dir", tmp_path / "single", "--gpu_ids", -1]
    succeed("scripts/evaluate.py", *where, *words, *more)
    single = json.loads((tmp_path / "single" / "u" / "test_latest" / "scores.json").read_text())
    fid = facts["scores"]["fake_A"]["FID"]["value"]
    assert single["scores"]["fake_B"]["FID"]["value"] == pytest.approx(fid, rel=1e-6)


@pytest.mark.slow
def test_lpips_with_weights_from_a_file(tmp_path):
    """AlexNet with random weights, against the formula of the paper written out."""
    pytest.importorskip("torchmetrics")
    import torchmetrics.functional.image.lpips as theirs
    from torchvision.models import alexnet

    from util.scores.extractors import Lpips

    torch.manual_seed(0)
    net = alexnet(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "alexnet.pth")
    lpips = Lpips(str(tmp_path / "alexnet.pth"))
    assert not lpips.weights.released
    heads = torch.load(
        Path(theirs.__file__).parent / "lpips_models" / "alex.pth",
        map_location="cpu",
        weights_only=True,
    )
    a, b = (torch.from_numpy(pixels(64, 64, k)).permute(2, 0, 1)[None].contiguous() for k in (0, 3))
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x, y = ((p.float() / 127.5 - 1 - shift) / scale for p in (a, b))
    total, stage = 0.0, 0
    with torch.no_grad():
        for layer in net.features:
            x, y = layer(x), layer(y)
            if isinstance(layer, torch.nn.ReLU):
                p, q = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
                weight = heads[f"lin{stage}.model.1.weight"]
                total += float(((p - q) ** 2 * weight).sum(1).mean())
                stage += 1
    assert stage == 5
    assert lpips(a, b) == pytest.approx(total, rel=1e-4)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="no weights of torchvision's AlexNet"):
        Lpips(str(tmp_path / "other.pth"))


def test_the_cache_of_downloads_is_where_it_was():
    """Else later downloads of the process would go to a folder that is deleted."""
    before = torch.hub.get_dir()
    with _hub_with("x.pth", {}):
        assert torch.hub.get_dir() != before
    assert torch.hub.get_dir() == before


# ----------------------------------------------------------------------------------- while training
def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("latest_net_*.pth")):
        state = torch.load(path, weights_only=True)
        found |= {f"{path.name}:{key}": value for key, value in state.items()}
    return found


@pytest.mark.parametrize("model", ["pix2pix", "cycle_gan"])
def test_training_does_not_notice_validation(paired, unpaired, tmp_path, model):
    """Dropout, batch norm, image pools, orders and crops: all end in the same weights."""
    root = paired if model == "pix2pix" else unpaired
    where = ["--dataroot", root / "data", "--checkpoints_dir", tmp_path]
    words = [*TINY, *SHORT, "--n_epochs", 3, "--pool_size", 2, "--model", model, "--no_html"]
    words += ["--netG", "resnet_6blocks", "--norm", "batch", "--dropout", "--batch_size", 2]
    for name, freq in (("without", 0), ("with", 1)):
        succeed("train.py", *where, "--name", name, *words, "--val_freq", freq)
    assert not (tmp_path / "without" / "scores.jsonl").exists()
    assert (tmp_path / "with" / "scores.jsonl").exists()
    wanted, ours = weights_of(tmp_path / "without"), weights_of(tmp_path / "with")
    assert wanted.keys() == ours.keys()
    assert [key for key in wanted if not torch.equal(wanted[key], ours[key])] == []


@pytest.mark.parametrize(
    ("preprocess", "load_size"),
    [("resize_and_crop", 256), ("scale_width_and_crop", 256), ("crop", 286), ("scale_width", 286)],
)
def test_whole_pictures_are_validated_as_in_testing(preprocess, load_size):
    opt = Namespace(preprocess=preprocess, load_size=286, crop_size=256, val_phase="val")
    val = validation_options(opt)
    assert (val.load_size, val.crop_size) == (load_size, 256)
    assert (val.phase, val.isTrain, val.eval, val.no_flip) == ("val", False, False, True)
    assert (opt.load_size, hasattr(opt, "no_flip")) == (286, False)  # those of the training stay


def test_best_weights_are_kept_across_a_resume(paired, tmp_path):
    """In one piece and in two: the same scores, the same best, and the figures in every view."""
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path]
    words = [*PIX2PIX, *TINY, *SHORT, "--val_freq", 1, "--best_by", "PSNR", "--lr", "0.01"]
    one = succeed("train.py", *where, "--name", "one", *words, "--n_epochs", 4)
    succeed("train.py", *where, "--name", "two", *words, "--n_epochs", 2)
    # as if killed after the second epoch of a training of four: the rate was the same
    said = succeed("train.py", *where, "--name", "two", *words, "--n_epochs", 4, "--continue_train")
    assert "best so far: PSNR" in said.out
    records = [read_records(tmp_path / name / "scores.jsonl", "scores") for name in ("one", "two")]
    for record in (r for records_of in records for r in records_of):
        del record["seconds"]
    assert [r["epoch"] for r in records[0]] == [1, 2, 3, 4]
    assert records[0] == records[1]
    values = [r["scores"]["PSNR"] for r in records[0]]
    best = int(np.argmax(values)) + 1
    assert f"\nbest: PSNR {max(values):.5g} of epoch {best}, kept as best_net_" in one.out
    for name in ("one", "two"):
        facts = json.loads((tmp_path / name / "best_scores.json").read_text())
        assert (facts["by"], facts["epoch"]) == ("PSNR", best)
        assert facts["value"] == max(values)
        digest = hashlib.sha256((tmp_path / name / "best_net_G.pth").read_bytes()).hexdigest()
        assert facts["weights"] == [{"file": "best_net_G.pth", "sha256": digest}]
    assert one.out.count(", val) L1: ") == 4
    assert (tmp_path / "one" / "loss_log.txt").read_text().count(", val) L1: ") == 4
    assert "(epoch: 4, val)" in (tmp_path / "one" / "web" / "index.html").read_text()
    load_generator(tmp_path / "one", epoch="best", device="cpu")


def test_the_best_of_epochs_that_are_given_up_does_not_count(paired, tmp_path):
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    words = [*PIX2PIX, *TINY, *SHORT, "--val_freq", 1, "--n_epochs", 3]
    words += ["--keep_states", 3, "--save_epoch_freq", 1]
    succeed("train.py", *where, *words, "--lr", "0.01")
    back = succeed("train.py", *where, *words, "--lr", "0", "--continue_train", "--epoch", 1)
    records = read_records(tmp_path / "x" / "scores.jsonl", "scores")
    assert [r["epoch"] for r in records] == [1, 2, 3]
    facts = json.loads((tmp_path / "x" / "best_scores.json").read_text())
    assert facts["value"] == min(r["scores"]["L1"] for r in records)
    assert "is later than this" in back.out or facts["epoch"] == 1


def test_a_training_that_was_killed_before_its_first_save_starts_anew(paired, tmp_path):
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    words = [*PIX2PIX, *TINY, *SHORT, "--val_freq", 1]
    succeed("train.py", *where, *words)
    for path in (tmp_path / "x").glob("*.pth"):  # leave only what validation has written
        if not path.name.startswith("best_net_"):
            path.unlink()
    (tmp_path / "x" / "best_net_D.pth").rename(tmp_path / "x" / f"{WRITTEN}_net_D.pth")
    again = succeed("train.py", *where, *words, "--continue_train")
    assert "so this starts from scratch" in again.out
    assert "best so far" not in again.out
    (earlier,) = (tmp_path / "x").glob("earlier.*")
    assert (earlier / "best_net_G.pth").exists()


@pytest.mark.parametrize("how", ["signal", "--max_hours"])
def test_a_stop_does_not_wait_for_the_end_of_validation(paired, tmp_path, monkeypatch, how):
    """It goes on with that validation, to the same weights and scores, and always gets on."""
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path]
    words = [*PIX2PIX, *TINY, *SHORT, "--val_freq", 1, "--n_epochs", 2]
    succeed("train.py", *where, "--name", "whole", *words)
    limit = ["--max_hours", 1e-9] if how == "--max_hours" else []
    scored = []
    until = Validation._until

    def counted(self, stopping):
        for item in until(self, stopping):
            scored.append(item["A_paths"])
            if how == "signal" and len(scored) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    monkeypatch.setattr(Validation, "_until", counted)
    for _ in range(12):
        finished = run("train.py", *where, "--name", "x", *words, "--continue_train", *limit)
        assert finished.code in (0, 128 + signal.SIGTERM), finished.err
        if "trained: " in finished.out:
            break
        assert "stopped: " in finished.out
    # one of two images before the signal, and all of two epochs
    assert len(scored) == (5 if how == "signal" else 4)
    wanted, ours = weights_of(tmp_path / "whole"), weights_of(tmp_path / "x")
    assert [key for key in wanted if not torch.equal(wanted[key], ours[key])] == []
    records = [read_records(tmp_path / n / "scores.jsonl", "scores") for n in ("whole", "x")]
    assert [r["scores"] for r in records[0]] == [r["scores"] for r in records[1]]


def test_the_best_of_other_pictures_does_not_count(paired, tmp_path):
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    words = [*PIX2PIX, *TINY, *SHORT, "--val_freq", 1]
    succeed("train.py", *where, *words)
    again = succeed("train.py", *where, *words, "--n_epochs", 2, "--continue_train", "--num_val", 1)
    assert "the best so far is of 2 images of val of data" in again.err
    facts = json.loads((tmp_path / "x" / "best_scores.json").read_text())
    assert facts["epoch"] == 2
    assert facts["of"] == "1 images of val of data (resize_and_crop, 32, AtoB)"
    # of another size, too
    words += ["--n_epochs", 3, "--continue_train", "--num_val", 1, "--crop_size", 40]
    assert "it is reset" in succeed("train.py", *where, *words, "--load_size", 40).err
    for path in (tmp_path / "x").glob("best_net_*"):
        path.unlink()
    words += ["--load_size", 40, "--n_epochs", 4]
    assert "are gone: the best score is reset" in succeed("train.py", *where, *words).err


def test_the_best_by_other_weights_does_not_count(tmp_path, capsys):
    validation = Validation.__new__(Validation)
    validation.folder, validation.by, validation.validated_on = tmp_path, "LPIPS", "val"
    best = {"by": "LPIPS", "value": 0.5, "epoch": 1, "images": 9}
    facts = best | {"of": "val", "extractors": {"lpips": {"file": "x.pth", "sha256": "a"}}}
    (tmp_path / "best_scores.json").write_text(json.dumps(facts))
    (tmp_path / "best_mine.pt").touch()  # a model may name its files in its own way
    for validation.extractor, wanted in (("a", best), ("", best), ("b", None)):
        assert validation._read_best() == wanted
    assert "by other weights for LPIPS: it is reset" in capsys.readouterr().err


def test_what_can_not_be_scored_does_not_end_a_training(paired, tmp_path, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(paired / "data", data)
    damaged_inside(data / "val" / "0.png")
    where = ["--dataroot", data, "--checkpoints_dir", tmp_path, "--name", "x"]
    words = [*PIX2PIX, *TINY, *SHORT, "--val_freq", 1]
    result = succeed("train.py", *where, *words)
    assert "warning: no scores of epoch 1: can't read the image" in result.err
    assert (tmp_path / "x" / "latest_net_G.pth").exists()
    again = succeed("train.py", *where, *words, "--skip_broken")
    assert "--skip_broken skipped 1:" in again.out
    monkeypatch.setattr(metrics, "l1", mock.Mock(side_effect=KeyError("a bug")))
    again = succeed("train.py", *where, *words, "--skip_broken")
    assert "warning: no scores of epoch 1: KeyError: 'a bug'" in again.err


def test_the_mean_of_psnr_is_finite():
    a = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
    b = a.clone()
    b[0, 0, 0, 0] ^= 1
    assert float(finite_psnr(a, b)) == pytest.approx(float(metrics.psnr(a, b)))
    assert float(finite_psnr(a, a)) == pytest.approx(float(metrics.psnr(a, b)))


def test_nan_gives_no_scores(paired, tmp_path):
    shutil.copytree(paired / "p", tmp_path / "p")
    path = tmp_path / "p" / "latest_net_G.pth"
    state = torch.load(path)
    next(iter(state.values())).view(-1)[0] = torch.nan
    torch.save(state, path)
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path, "--name", "p"]
    where += ["--gpu_ids", -1, "--crop_size", 32, "--results_dir", tmp_path]
    result = run("scripts/evaluate.py", *where)
    assert result.code == 1
    assert "L1: fake_B has NaN" in result.err


@pytest.mark.parametrize(("words", "told"), [([], True), (["--preprocess", "crop"], False)])
def test_other_sizes_than_in_training_are_said(paired, tmp_path, words, told):
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    crop = ["--preprocess", "crop", "--crop_size", 32, "--load_size", 32]
    succeed("train.py", *where, *PIX2PIX, *TINY, *SHORT, *crop)
    more = ["--gpu_ids", -1, "--results_dir", tmp_path, "--scores", "L1", *words]
    more += ["--crop_size", 32] if words else []
    out = succeed("scripts/evaluate.py", *where, *more).out
    assert ("unlike in the training, which had --preprocess crop --crop_size 32" in out) is told


def test_scores_of_an_earlier_training_are_not_those_of_a_new_one(paired, tmp_path):
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    words = [*PIX2PIX, *TINY, *SHORT]
    succeed("train.py", *where, *words, "--val_freq", 1)
    succeed("train.py", *where, *words)
    assert read_records(tmp_path / "x" / "scores.jsonl", "scores") == []
    assert len(list((tmp_path / "x").glob("scores.*.jsonl"))) == 1
    assert "val) L1" not in (tmp_path / "x" / "web" / "index.html").read_text()
    more = ["--val_freq", 1, "--n_epochs", 2, "--continue_train"]
    succeed("train.py", *where, *words, *more)
    records = read_records(tmp_path / "x" / "scores.jsonl", "scores")
    assert [r["epoch"] for r in records] == [2]


def test_the_best_is_set_aside_where_weights_alone_are_gone_on_with(paired, tmp_path):
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    words = [*PIX2PIX, *TINY, *SHORT, "--val_freq", 1]
    succeed("train.py", *where, *words)
    names = ("best_net_G.pth", "best_scores.json")
    best = {name: (tmp_path / "x" / name).read_bytes() for name in names}
    for path in (tmp_path / "x").glob("*_train_state.pth"):
        path.unlink()
    again = succeed("train.py", *where, *words, "--continue_train")
    assert "the best weights so far under this name were moved to" in again.out
    (earlier,) = (tmp_path / "x").glob("earlier.*")
    assert {name: (earlier / name).read_bytes() for name in names} == best
    assert not (earlier / "latest_net_G.pth").exists()
    for path in (tmp_path / "x").glob("*_train_state.pth"):
        path.unlink()
    succeed("train.py", *where, *words, "--continue_train", "--epoch", "best")
    assert len(list((tmp_path / "x").glob("earlier.*"))) == 1  # not what it goes on from


def test_best_of_unpaired_is_by_the_cycle(unpaired, tmp_path):
    where = ["--dataroot", unpaired / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    succeed("train.py", *where, "--model", "cycle_gan", *TINY, *SHORT, "--val_freq", 1)
    facts = json.loads((tmp_path / "x" / "best_scores.json").read_text())
    each = [facts["scores"][visual]["cycle"]["value"] for visual in ("rec_A", "rec_B")]
    assert facts["by"] == "cycle"
    assert facts["value"] == pytest.approx(sum(each) / 2)
    (record,) = read_records(tmp_path / "x" / "scores.jsonl", "scores")
    assert set(record["scores"]) == {"cycle rec_A", "cycle rec_B"}


def test_scores_in_tensorboard(paired, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    where = ["--dataroot", paired / "data", "--checkpoints_dir", tmp_path, "--name", "x"]
    words = [*PIX2PIX, *TINY, *SHORT, "--val_freq", 1, "--use_tensorboard", "--no_html"]
    succeed("train.py", *where, *words)
    events = accumulator.EventAccumulator(str(tmp_path / "x" / "tb")).Reload()
    (record,) = read_records(tmp_path / "x" / "scores.jsonl", "scores")
    (point,) = events.Scalars("val/PSNR")
    assert point.value == pytest.approx(record["scores"]["PSNR"], rel=1e-6)
    assert point.step == record["images"] == 3


def test_scores_on_the_live_page(tmp_path):
    """A table in a window of its own, newest first, with those of before a resume."""
    pytest.importorskip("visdom")
    from tests.visdom_helpers import Server, wait_for, windows
    from util.display.visdom_logger import VisdomLogger

    def record(epoch: int) -> dict:
        scores = {"L1": epoch / 7, "<b>": 2.0}
        best = {"by": "L1", "value": 1 / 7, "epoch": 1}
        facts = {"epoch": epoch, "images": epoch, "progress": float(epoch), "phase": "val"}
        return {**facts, "scores": scores, "best": best}

    server = Server(tmp_path)
    try:
        address = "http://127.0.0.1"
        logger = VisdomLogger(address, server.port, title="t", scores=[record(1)])
        logger.log_scores(record(2))
        logger.close()
        shown = wait_for(lambda: windows(server.port).get("t-1-scores"))
    finally:
        server.kill()
    text = shown["content"]
    assert shown["title"] == "t: scores on val"
    assert text.index(">0.2857<") < text.index("<b>1</b>") < text.index(">0.1429<")
    assert "&lt;b&gt;" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--best_by", "SSIM", "--model", "cycle_gan"], "--best_by SSIM needs pairs"),
        (["--model", "cut", "--best_by", "cycle"], "--model cut has no image that went there"),
        (
            ["--model", "pix2pix", "--dataroot", "elsewhere"],
            "needs images to score (--val_phase val)",
        ),
    ],
)
def test_what_can_not_be_validated_is_said_before_training(unpaired, tmp_path, words, said):
    root = aligned(tmp_path / "elsewhere") if "elsewhere" in words else unpaired / "data"
    words = [root if word == "elsewhere" else word for word in words]
    where = ["--dataroot", root, "--checkpoints_dir", tmp_path, "--name", "x"]
    netG = ["--netG", "resnet_6blocks"]
    result = run("train.py", *where, *TINY, *SHORT, "--val_freq", 1, *words, *netG)
    assert result.code == 1
    assert said in result.err
    assert "End of epoch" not in result.out


@pytest.mark.parametrize("layout", [aligned, unaligned])
@pytest.mark.parametrize("phases", [["train"], ["train", "test"]])
def test_a_missing_folder_for_validation_is_that_of_the_layout(tmp_path, layout, phases):
    root = layout(tmp_path / "data")
    for folder in root.iterdir():
        if folder.name.rstrip("AB") not in phases:
            shutil.rmtree(folder)
    where = ["--dataroot", root, "--checkpoints_dir", tmp_path, "--name", "x"]
    result = run("train.py", *where, *TINY, *SHORT, *PIX2PIX, "--val_freq", 1)
    ends = ["A", "B"] if layout is unaligned else [""]
    assert f"no folder {root / ('val' + ends[0])}: " in result.err
    assert f"are read from {' and '.join('val' + end for end in ends)} in --dataroot" in result.err
    what = "say --val_phase test, or rename them" if "test" in phases else "put the images there"
    assert f"); {what}" in result.err
    assert result.code == 1


def test_models_that_name_no_pictures(paired, tmp_path, monkeypatch):
    """They can be scored, but not written to a page."""
    set_input, item = Pix2PixModel.set_input, AlignedDataset.__getitem__

    def unnamed(self, input):
        set_input(self, {"A_paths": [], "B_paths": [], **input})
        self.image_paths = []

    def without_paths(self, index):
        return {k: v for k, v in item(self, index).items() if not k.endswith("_paths")}

    monkeypatch.setattr(Pix2PixModel, "set_input", unnamed)
    monkeypatch.setattr(AlignedDataset, "__getitem__", without_paths)
    facts = evaluate(paired, "p", "--num_threads", "0")
    assert facts["scores"]["fake_B"]["L1"]["pictures"] == 3
    where = ["--dataroot", paired / "data", "--checkpoints_dir", paired, "--name", "p"]
    words = ["--results_dir", tmp_path, *PIX2PIX, "--gpu_ids", "-1", "--crop_size", 32]
    result = run("test.py", *where, *words)
    assert (result.code, "set self.image_paths in set_input" in result.err) == (1, True)
