"""train.py and test.py from end to end, on tiny images: what they say, and what they leave."""

from __future__ import annotations

import errno
import html
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from data import create_dataset
from models import create_model, networks
from models.pix2pix_model import Pix2PixModel
from options.test_options import TestOptions
from options.train_options import TrainOptions
from tests.helpers import (
    SHORT,
    TINY,
    aligned,
    files_below,
    picture,
    pixels,
    run,
    seed_all,
    succeed,
    unaligned,
    undisturbed,
)
from util import util
from util.display.page import PageLogger
from util.result_names import ResultNames, result_name
from util.util import crossed


@pytest.fixture(autouse=True)
def _random_sources():
    with undisturbed():
        seed_all(1)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return aligned(unaligned(tmp_path_factory.mktemp("pictures")))


def train(data: Path, out: Path, model: str, *words: object):
    common = ["--dataroot", data, "--checkpoints_dir", out / "c", "--name", "x"]
    return succeed("train.py", *common, *TINY, *SHORT, "--model", model, *words)


def translate(data: Path, out: Path, model: str, *words: object):
    common = ["--dataroot", data, "--checkpoints_dir", out / "c", "--name", "x"]
    flags = ["--results_dir", out / "r", "--gpu_ids", "-1", "--crop_size", "32"]
    return succeed("test.py", *common, *flags, "--num_threads", "0", "--model", model, *words)


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "c/x/losses.jsonl").read_text().splitlines()]


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


class Page(HTMLParser):
    """Texts, tags, and files that a page shows and links to."""

    def __init__(self, path: Path):
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        if tag == "img":
            self.images.append(unquote(found["src"]))
        elif tag == "a":
            self.links.append(unquote(found["href"]))

    def handle_data(self, data):
        self.texts.append(data.strip())


# ------------------------------------------------------------------------------ train, then test
MODELS = {
    "cycle_gan": (
        ["G_A", "G_B", "D_A", "D_B"],
        ["D_A", "G_A", "cycle_A", "idt_A", "D_B", "G_B", "cycle_B", "idt_B"],
        ["real_A", "fake_B", "rec_A", "real_B", "fake_A", "rec_B"],
        "UnalignedDataset",
        "CycleGANModel",
    ),
    "pix2pix": (
        ["G", "D"],
        ["G_GAN", "G_L1", "D_real", "D_fake"],
        ["real_A", "fake_B", "real_B"],
        "AlignedDataset",
        "Pix2PixModel",
    ),
    "colorization": (
        ["G", "D"],
        ["G_GAN", "G_L1", "D_real", "D_fake"],
        ["real_A", "real_B_rgb", "fake_B_rgb"],
        "ColorizationDataset",
        "ColorizationModel",
    ),
    "template": (["G"], ["G"], ["data_A", "data_B", "output"], "AlignedDataset", "TemplateModel"),
}
LINE = r"\(epoch: 1, iters: {}, time: \d+\.\d{{3}}, data: \d+\.\d{{3}}\) {}"


@pytest.mark.filterwarnings("error::UserWarning")  # in a program of its own they would go to stderr
@pytest.mark.parametrize("model", list(MODELS))
def test_train_and_test(model, pictures, tmp_path):
    nets, losses, labels, dataset_class, model_class = MODELS[model]
    words = ["--print_freq", "1", "--display_freq", "1", "--update_html_freq", "1"]
    result = train(pictures, tmp_path, model, *words)
    said = result.out.splitlines()
    assert result.err == ""
    assert f"dataset [{dataset_class}] was created" in said
    assert "The number of training images = 3" in said
    assert f"model [{model_class}] was created" in said
    assert any(line.startswith("End of epoch 1 / 1") for line in said)

    folder = tmp_path / "c" / "x"
    for name in nets:
        state = load(folder / f"1_net_{name}.pth")
        latest = load(folder / f"latest_net_{name}.pth")
        assert list(state) == list(latest)
        assert all(torch.equal(state[k], latest[k]) for k in state)
        learned = sum(v.numel() for k, v in state.items() if re.search(r"(weight|bias)$", k))
        assert f"[Network {name}] Total number of parameters : {learned / 1e6:.3f} M" in said
    assert {p.name for p in folder.glob("*_net_*.pth")} == {
        f"{epoch}_net_{name}.pth" for epoch in ("1", "latest") for name in nets
    }

    number = r"-?\d+\.\d{3}"
    numbers = " ".join(f"{name}: {number}" for name in losses)
    log = (folder / "loss_log.txt").read_text().splitlines()
    assert re.fullmatch(r"=+ Training Loss \(.*\) =+", log[0])
    assert len(log) == 4
    for i, line in enumerate(log[1:], start=1):
        assert re.fullmatch(LINE.format(i, numbers), line), line
        assert line in said

    result = translate(pictures, tmp_path, model, "--num_test", "all")
    images = tmp_path / "r" / "x" / "test_latest" / "images"
    expected = [f"{i}_{label}.png" for i in range(3) for label in labels]
    assert files_below(images) == sorted(expected)
    assert {Image.open(images / f).size for f in expected} == {(32, 32)}
    page = Page(images.parent / "index.html")
    assert page.images == [f"images/{f}" for f in expected]  # in the order of the model
    assert str(images.parent / "index.html") in result.out.splitlines()[-1]


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix"])
def test_results_are_what_the_weights_give(model, pictures, tmp_path):
    train(pictures, tmp_path, model, "--no_dropout")
    translate(pictures, tmp_path, model)
    name = "G_A" if model == "cycle_gan" else "G"
    norm = "instance" if model == "cycle_gan" else "batch"
    net = networks.define_G(3, 3, 4, "resnet_6blocks", norm)  # as built: in training mode
    net.load_state_dict(load(tmp_path / "c" / "x" / f"latest_net_{name}.pth"))
    images = tmp_path / "r" / "x" / "test_latest" / "images"
    for i in range(3):
        if model == "cycle_gan":
            source = Image.open(pictures / "testA" / f"{i}.png")
        else:
            source = Image.open(pictures / "test" / f"{i}.png").crop((0, 0, 40, 40))
        scaled = np.asarray(source.resize((32, 32), Image.Resampling.BICUBIC))
        x = torch.from_numpy(scaled.transpose(2, 0, 1)[None] / 127.5 - 1).float()
        with torch.no_grad():
            y = net(x)[0].numpy()
        wanted = np.rint((y.transpose(1, 2, 0).astype(np.float64) + 1) * 127.5)
        got = np.asarray(Image.open(images / f"{i}_fake_B.png")).astype(float)
        assert abs(got - wanted).max() <= 1
        assert (got == wanted).mean() > 0.99
        np.testing.assert_array_equal(Image.open(images / f"{i}_real_A.png"), scaled)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_weights(workers, pictures, tmp_path):
    found = []
    for name, threads in (("a", 0), ("b", workers)):
        words = ["--num_threads", threads, "--seed", "8", "--batch_size", "2"]
        train(pictures, tmp_path / name, "pix2pix", *words)
        found.append(load(tmp_path / name / "c" / "x" / "latest_net_G.pth"))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    train(pictures, tmp_path / "c", "pix2pix", "--seed", "9", "--batch_size", "2")
    other = load(tmp_path / "c" / "c" / "x" / "latest_net_G.pth")
    assert not all(torch.equal(found[0][k], other[k]) for k in other)


# ----------------------------------------------------------------------------------------- wgangp
@pytest.mark.parametrize(
    ("model", "names"), [("cycle_gan", ["gp_A", "gp_B"]), ("pix2pix", ["D_gp"])]
)
def test_gradient_penalty_is_logged(model, names, pictures, tmp_path):
    train(pictures, tmp_path, model, "--gan_mode", "wgangp", "--print_freq", "1")
    for record in records(tmp_path):
        for name in names:
            assert record["losses"][name] > 0
    assert f" {names[-1]}: " in (tmp_path / "c" / "x" / "loss_log.txt").read_text()


def critic_step(model_name: str, weight: float, folder: Path):
    """One backward pass of a discriminator with a penalty of this weight, always from one state."""
    words = ["--dataroot", str(folder), "--checkpoints_dir", str(folder), "--model", model_name]
    words += [*TINY, "--gan_mode", "wgangp", "--lambda_gp", str(weight), "--pool_size", "0"]
    opt = TrainOptions(words).parse(save=False)
    seed_all(2)
    model = create_model(opt)
    model.setup(opt)
    batch = {k: torch.rand(1, 3, 32, 32) * 2 - 1 for k in "AB"}
    model.set_input({**batch, "A_paths": ["a"], "B_paths": ["b"]})
    model.forward()
    seed_all(4)
    if model_name == "cycle_gan":
        model.backward_D_A()
        net, penalty, loss = model.netD_A, model.loss_gp_A, model.loss_D_A
        real, fake = model.real_B, model.fake_B
    else:
        model.backward_D()
        net, penalty, loss = model.netD, model.loss_D_gp, model.loss_D
        real = torch.cat([model.real_A, model.real_B], 1)
        fake = torch.cat([model.real_A, model.fake_B], 1)
    gradients = [p.grad.clone() for p in net.parameters()]
    penalty = torch.as_tensor(penalty).item()
    return net, real, fake.detach(), penalty, loss.item(), gradients


@pytest.mark.parametrize("model", ["cycle_gan", "pix2pix"])
def test_gradient_penalty_is_in_the_loss_and_its_gradients(model, tmp_path):
    net, real, fake, none, plain, without = critic_step(model, 0, tmp_path)
    with torch.no_grad():
        critic = ((net(fake).mean() - net(real).mean()) / 2).item()
    assert none == 0
    assert plain == pytest.approx(critic, rel=1e-4, abs=1e-6)

    net, real, fake, penalty, loss, gradients = critic_step(model, 7, tmp_path)
    # from the definition: 7 (|gradient at a random point between| - 1)^2
    seed_all(4)
    share = torch.rand(1, 1, 1, 1)
    point = (share * real + (1 - share) * fake).detach().requires_grad_()
    (slope,) = torch.autograd.grad(net(point).sum(), point, create_graph=True)
    expected = 7 * (slope.flatten().norm() - 1) ** 2
    assert penalty == pytest.approx(expected.item(), rel=1e-4)
    assert loss == pytest.approx(critic + penalty, rel=1e-4)
    added = torch.autograd.grad(expected, list(net.parameters()), allow_unused=True)
    for got, before, more in zip(gradients, without, added, strict=True):
        more = torch.zeros_like(got) if more is None else more
        torch.testing.assert_close(got, before + more, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------ when things happen
def test_crossing_a_multiple():
    for batch in (1, 2, 3, 7, 12):
        counts = range(0, 100, batch)
        hits = sum(crossed(5, a, a + batch) for a in counts)
        end = counts[-1] + batch
        assert hits == (end // 5 if batch <= 5 else len(counts))


def test_frequencies_count_pictures_whatever_the_batch_size(tmp_path):
    data = aligned(tmp_path / "data", count=7)
    words = ["--batch_size", "3", "--n_epochs", "2", "--print_freq", "5", "--save_latest_freq", "4"]
    result = train(data, tmp_path, "template", *words, "--save_by_iter")
    # after each batch 3, 6, 7 and then 10, 13, 14 images have gone by
    assert [(r["epoch"], r["iters"], r["images"]) for r in records(tmp_path)] == [
        (1, 6, 6),
        (2, 3, 10),
    ]
    kept = {p.name for p in (tmp_path / "c" / "x").glob("iter_*_net_G.pth")}
    assert kept == {f"iter_{n}_net_G.pth" for n in (6, 10, 13)}
    assert result.out.count("saving the latest model") == 3

    translate(data, tmp_path, "template", "--load_iter", "10")
    assert (tmp_path / "r" / "x" / "test_latest_iter10" / "index.html").exists()


@pytest.mark.parametrize(
    ("every", "shown"), [(100, [7, 14, 21]), (10, [7, 10, 20]), (7, [7, 14, 21])]
)
def test_an_epoch_too_short_for_the_frequency_shows_its_end(every, shown, tmp_path):
    data = aligned(tmp_path / "data", count=7)
    words = ["--batch_size", "3", "--n_epochs", "3", "--print_freq", every]
    train(data, tmp_path, "template", *words)
    # batches end at 3, 6, 7, 10, 13, 14, 17, 20 and 21 images
    assert [r["images"] for r in records(tmp_path)] == shown
    log = (tmp_path / "c" / "x" / "loss_log.txt").read_text()
    assert len(re.findall(r"^\(epoch: \d, iters: \d, time: ", log, re.MULTILINE)) == len(shown)


@pytest.mark.parametrize(
    ("epochs", "every", "kept"), [(1, 5, {1}), (3, 2, {2, 3}), (4, 2, {2, 4}), (2, 1, {1, 2})]
)
def test_the_last_epoch_is_always_saved(epochs, every, kept, pictures, tmp_path):
    decay = epochs // 2  # both kinds of epochs count
    words = ["--n_epochs", epochs - decay, "--n_epochs_decay", decay, "--save_epoch_freq", every]
    train(pictures, tmp_path, "template", *words)
    folder = tmp_path / "c" / "x"
    assert {p.name for p in folder.glob("*_net_G.pth")} == {
        "latest_net_G.pth",
        *(f"{epoch}_net_G.pth" for epoch in kept),
    }
    last, latest = load(folder / f"{epochs}_net_G.pth"), load(folder / "latest_net_G.pth")
    assert all(torch.equal(last[k], latest[k]) for k in last)


def test_past_the_last_epoch_it_says_how_to_go_on(pictures, tmp_path):
    train(pictures, tmp_path, "template")
    before = load(tmp_path / "c" / "x" / "latest_net_G.pth")
    result = train(pictures, tmp_path, "template", "--continue_train")
    assert "nothing to do: epoch 1 of 1 is done" in result.out
    assert "--n_epochs" in result.out
    after = load(tmp_path / "c" / "x" / "latest_net_G.pth")
    assert all(torch.equal(before[k], after[k]) for k in before)


# ------------------------------------------------------------------------------------------ results
@pytest.fixture(scope="module")
def constant(tmp_path_factory) -> Path:
    """Experiments whose generators paint everything in one grey, by the name of the generator."""
    folder = tmp_path_factory.mktemp("constant")
    greys = {"cyc": {"G_A": 100, "G_B": 200}, "pix": {"G": 50}}
    for experiment, nets in greys.items():
        for name, grey in nets.items():
            net = networks.define_G(3, 3, 2, "resnet_6blocks", "instance")
            with torch.no_grad():
                net.model[-2].weight.zero_()
                net.model[-2].bias.fill_(math.atanh(grey / 127.5 - 1))
            path = folder / "c" / experiment / f"latest_net_{name}.pth"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(net.state_dict(), path)
    for experiment, direction in (("cyc", "AtoB"), ("back", "BtoA")):
        text = {"netG": "resnet_6blocks", "ngf": 2, "no_dropout": True, "model": "cycle_gan"}
        text |= {"direction": direction, "input_nc": 3, "output_nc": 3, "norm": "instance"}
        (folder / "c" / experiment).mkdir(exist_ok=True)
        lines = [f"{k:>25}: {v!s:<30}" for k, v in text.items()]
        (folder / "c" / experiment / "train_opt.txt").write_text("\n".join(lines))
    for name in ("G_A", "G_B"):
        weights = folder / "c" / "cyc" / f"latest_net_{name}.pth"
        (folder / "c" / "back" / weights.name).write_bytes(weights.read_bytes())
    return folder


def paint(constant: Path, data: Path, out: Path, name: str, *words: object):
    common = ["--dataroot", data, "--checkpoints_dir", constant / "c", "--name", name]
    flags = ["--results_dir", out, "--gpu_ids", "-1", "--crop_size", "32", "--num_threads", "0"]
    return succeed("test.py", *common, *flags, *words)


PIX = "--netG resnet_6blocks --ngf 2 --no_dropout".split()


@pytest.mark.parametrize(
    ("name", "words", "grey"),
    [
        ("pix", PIX, 50),
        ("pix", [*PIX, "--direction", "BtoA"], 50),
        ("cyc", [], 100),
        ("cyc", ["--direction", "AtoB"], 100),
        ("cyc", ["--direction", "BtoA"], 200),
        ("cyc", ["--model_suffix", "_B"], 200),
        # trained from B to A: G_A goes that way, and it is the way it goes unless told
        ("back", [], 100),
        ("back", ["--direction", "BtoA"], 100),
        ("back", ["--direction", "AtoB"], 200),
    ],
)
def test_the_generator_is_found_by_the_direction(name, words, grey, constant, tmp_path):
    picture(tmp_path / "data" / "0.png")
    paint(constant, tmp_path / "data", tmp_path / "r", name, "--model", "test", *words)
    fake = Image.open(tmp_path / "r" / name / "test_latest" / "images" / "0_fake.png")
    assert np.unique(np.asarray(fake)).tolist() == [grey]


@pytest.mark.parametrize(
    ("words", "count", "said"),
    [
        ([], 50, "translating 50 of 53 images (--num_test all takes them all)"),
        (["--num_test", "2"], 2, "translating 2 of 53 images (--num_test all takes them all)"),
        (["--num_test", "all"], 53, "translating 53 of 53 images"),
        (["--num_test", "99"], 53, "translating 53 of 53 images"),
    ],
)
def test_it_says_how_many_of_how_many(words, count, said, constant, tmp_path):
    for i in range(53):
        picture(tmp_path / "data" / f"{i:02d}.png", 8, 8, k=i)
    small = ["--crop_size", "8", "--load_size", "8"]
    flags = ["--model", "test", *small, *words]
    result = paint(constant, tmp_path / "data", tmp_path / "r", "cyc", *flags)
    assert said in result.out.splitlines()
    images = tmp_path / "r" / "cyc" / "test_latest" / "images"
    assert len(list(images.glob("*_fake.png"))) == count
    assert len(Page(images.parent / "index.html").images) == 2 * count


def test_results_of_the_same_name_are_kept_apart(constant, tmp_path):
    names = ["a.png", "b.jpg", "b.png", "deep/er/a.png", "sub/a.png"]
    for i, name in enumerate(names):
        picture(tmp_path / "data" / name, 32, 32, k=i)
    paint(constant, tmp_path / "data", tmp_path / "r", "cyc", "--model", "test")
    folder = tmp_path / "r" / "cyc" / "test_latest"
    found = files_below(folder / "images")
    stems = {f.removesuffix("_real.png") for f in found if f.endswith("_real.png")}
    assert {"a", "b", "sub/a", "deep/er/a"} <= stems
    assert len(stems) == 5
    page = Page(folder / "index.html")
    assert sorted(page.images) == sorted(f"images/{f}" for f in found)
    for name, stem in (("a.png", "a"), ("sub/a.png", "sub/a"), ("deep/er/a.png", "deep/er/a")):
        shown = np.asarray(Image.open(folder / "images" / f"{stem}_real.png"))
        np.testing.assert_array_equal(shown, pixels(32, 32, k=names.index(name)))


def test_a_picture_that_is_taken_again_and_again_has_a_name_each_time():
    taken: set[str] = set()
    names = [result_name(path, taken) for path in ("a.png", "b.png") * 4]
    assert names[:2] == ["a", "b"]
    assert len(set(names)) == 8


@pytest.mark.parametrize(("ratio", "width"), [("1.5", 48), ("0.5", 16), ("1", 32)])
def test_aspect_ratio_scales_the_width(ratio, width, constant, tmp_path):
    picture(tmp_path / "data" / "0.png", 32, 32)
    flags = ["--model", "test", "--aspect_ratio", ratio]
    paint(constant, tmp_path / "data", tmp_path / "r", "cyc", *flags)
    images = tmp_path / "r" / "cyc" / "test_latest" / "images"
    real = Image.open(images / "0_real.png")
    assert real.size == (width, 32)
    source = Image.fromarray(pixels(32, 32)).resize((width, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(real), np.asarray(source))


def test_file_names_are_escaped_on_the_page(constant, tmp_path):
    names = ["<b>x&y.png", "quo\"te's.png", "per%20cent #1?.png", "grüße 你好.png"]
    for name in names:
        picture(tmp_path / "data" / name, 32, 32)
    paint(constant, tmp_path / "data", tmp_path / "r", "cyc", "--model", "test")
    page = Page(tmp_path / "r" / "cyc" / "test_latest" / "index.html")
    assert "b" not in page.tags
    assert "<b>" not in page.source
    stems = [Path(name).stem for name in names]
    assert set(stems) <= set(page.texts)
    assert html.escape("<b>x&y", quote=False) in page.source
    shown = {image for image in page.images if image.endswith("_fake.png")}
    assert shown == {f"images/{stem}_fake.png" for stem in stems}
    for image in [*page.images, *page.links]:
        assert (tmp_path / "r" / "cyc" / "test_latest" / image).is_file()


def test_the_title_of_the_page_is_escaped(constant, tmp_path):
    picture(tmp_path / "data" / "0.png", 32, 32)
    target = constant / "c" / "<i>x&y"
    target.mkdir()
    for path in (constant / "c" / "cyc").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    paint(constant, tmp_path / "data", tmp_path / "r", target.name, "--model", "test")
    page = Page(tmp_path / "r" / target.name / "test_latest" / "index.html")
    assert "i" not in page.tags
    assert any("<i>x&y" in text for text in page.texts)


# ---------------------------------------------------------------------------- the training page
PAGES = "--display_freq 2 --update_html_freq 2".split()


def test_the_training_page_lists_what_exists(pictures, tmp_path):
    words = ["--n_epochs", "2", "--save_epoch_freq", "1", "--print_freq", "1", *PAGES]
    train(pictures, tmp_path, "template", *words)
    web = tmp_path / "c" / "x" / "web"
    page = Page(web / "index.html")
    expected = [
        f"images/epoch{epoch:03d}_{label}.png"
        for epoch in (2, 1)  # the newest first
        for label in ("data_A", "data_B", "output")
    ]
    assert [i for i in page.images if i.startswith("images/")] == expected
    assert all((web / file).is_file() for file in [*page.images, *page.links])

    for path in (web / "images").glob("epoch001_*"):
        path.unlink()
    train(pictures, tmp_path, "template", *words, "--n_epochs", "3", "--continue_train")
    page = Page(web / "index.html")
    assert {re.match(r"images/epoch(\d+)", i)[1] for i in page.images if "epoch" in i} == {
        "002",
        "003",
    }
    assert all((web / file).is_file() for file in [*page.images, *page.links])


def test_no_page_unless_wanted(pictures, tmp_path):
    train(pictures, tmp_path, "template", *PAGES, "--no_html")
    assert not (tmp_path / "c" / "x" / "web").exists()
    assert (tmp_path / "c" / "x" / "loss_log.txt").exists()


def test_suffix_names_the_folder(pictures, tmp_path):
    train(pictures, tmp_path, "template", "--suffix", "{netG}_{ngf}")
    assert (tmp_path / "c" / "x_resnet_6blocks_4" / "latest_net_G.pth").exists()
    assert not (tmp_path / "c" / "x").exists()


def test_verbose_prints_the_layers(pictures, tmp_path):
    assert "ReflectionPad2d" in train(pictures, tmp_path, "template", "--verbose").out
    assert "ReflectionPad2d" not in train(pictures, tmp_path / "quiet", "template").out


# --------------------------------------------------------------------------------- small helpers
def test_every_level_survives_the_way_to_a_picture():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    array = np.stack([levels, levels[::-1], levels.T], axis=-1)
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy()).float()[None] / 255 * 2 - 1
    np.testing.assert_array_equal(util.tensor2im(tensor), array)


def test_pictures_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 3.0])
    image = util.tensor2im(values.reshape(1, 1, 1, 6))
    assert image.shape == (1, 6, 3)
    assert image.dtype == np.uint8
    assert image[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]
    assert util.tensor2im(np.array([[[0.6, 254.4, 300.0]]])).tolist() == [[[1, 254, 255]]]


def test_channels_of_pictures():
    five = torch.linspace(-1, 1, 5).reshape(1, 5, 1, 1)
    assert util.tensor2im(five).tolist() == [[[0, 64, 128]]]  # the first three
    assert util.tensor2im(five[:, 1:2]).tolist() == [[[64] * 3]]  # grey
    assert util.tensor2im(five[:, 3:]).tolist() == [[[191] * 3]]  # two: the first, as grey
    assert util.tensor2im(torch.cat([five, -five])).tolist() == [[[0, 64, 128]]]  # first of a batch


def test_print_numpy(capsys):
    util.print_numpy(np.array([[1, 2], [3, 6]], np.uint8), val=True, shp=True)
    shape, values = capsys.readouterr().out.splitlines()
    assert shape == "shape, (2, 2)"
    assert values == "mean = 3.000, min = 1.000, max = 6.000, median = 2.500, std=1.871"


def test_diagnose_network(capsys):
    net = torch.nn.Linear(2, 1)
    net.weight.grad = torch.tensor([[3.0, -1.0]])
    net.bias.grad = torch.tensor([4.0])
    util.diagnose_network(net, "linear")
    name, mean = capsys.readouterr().out.splitlines()
    assert name == "linear"
    assert float(mean) == 3.0  # the mean of 2 and 4


def test_mkdirs(tmp_path):
    util.mkdirs([tmp_path / "a" / "b", str(tmp_path / "c")])
    util.mkdirs(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert (tmp_path / "c").is_dir()


def test_a_new_training_sets_the_weights_of_the_old_one_aside(pictures, tmp_path):
    train(pictures, tmp_path, "pix2pix", "--n_epochs", "2", "--save_epoch_freq", "1")
    folder = tmp_path / "c" / "x"
    old = {p.name: p.read_bytes() for p in folder.glob("*.pth")}
    assert "2_net_G.pth" in old
    out = train(pictures, tmp_path, "pix2pix", "--seed", "4", "--save_epoch_freq", "1").out
    (aside,) = folder.glob("earlier.*")
    time = datetime.strptime(aside.suffix, ".%Y%m%d-%H%M%S")
    assert time <= datetime.now()
    assert (folder / f"web{aside.suffix}" / "index.html").exists()
    assert (folder / f"losses{aside.suffix}.jsonl").exists()
    assert f"were moved to {aside}" in out
    assert {p.name: p.read_bytes() for p in aside.glob("*.pth")} == old
    assert "n_epochs: 2" in (aside / "train_opt.txt").read_text()
    assert {p.name for p in folder.glob("*_net_G.pth")} == {"1_net_G.pth", "latest_net_G.pth"}
    assert (folder / "1_net_G.pth").read_bytes() != old["1_net_G.pth"]
    train(pictures, tmp_path, "pix2pix", "--n_epochs", "2", "--continue_train")
    assert len(list(folder.glob("earlier.*"))) == 1


def full_for_weights(source: Path, target: Path, replace: Callable = os.replace) -> None:
    if Path(source).suffix == ".pth":
        raise OSError(errno.ENOSPC, "No space left on device")
    replace(source, target)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def test_a_training_that_fails_at_once_leaves_the_old_one(pictures, tmp_path, monkeypatch):
    train(pictures, tmp_path, "pix2pix", "--val_freq", "1", "--val_phase", "test")
    old = contents(tmp_path / "c" / "x")
    assert {"latest_net_G.pth", "losses.jsonl", "loss_log.txt", "scores.jsonl"} <= old.keys()
    words = ["--dataroot", pictures, "--checkpoints_dir", tmp_path / "c", "--name", "x"]
    words += [*TINY, *SHORT, "--model", "pix2pix", "--n_epochs", "2"]
    for more in ([], ["--continue_train"]):
        small = run("train.py", *words, "--load_size", 20, "--crop_size", 16, *more)
        assert "can't judge images of 16x16" in small.err
        assert contents(tmp_path / "c" / "x") == old

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full_for_weights)
        assert "can't be moved to" in run("train.py", *words).err
    (aside,) = (tmp_path / "c" / "x").glob("earlier.*")
    shutil.rmtree(aside)  # which has a copy of the options
    assert contents(tmp_path / "c" / "x") == old

    (tmp_path / "c" / "x" / "tb").write_text("in its way")
    old = contents(tmp_path / "c" / "x")
    assert "--use_tensorboard can't write" in run("train.py", *words, "--use_tensorboard").err
    assert contents(tmp_path / "c" / "x") == old

    def misspelt(self):
        return self.no_such_thing

    monkeypatch.setattr(Pix2PixModel, "optimize_parameters", misspelt)
    with pytest.raises(AttributeError, match="no_such_thing"):
        run("train.py", *words)
    assert contents(tmp_path / "c" / "x") == old


def test_weights_that_were_set_aside_are_named(pictures, tmp_path):
    train(pictures, tmp_path, "pix2pix")
    train(pictures, tmp_path, "pix2pix")
    folder = tmp_path / "c" / "x"
    for path in folder.glob("*.pth"):  # as after a kill before the first save
        path.unlink()
    (aside,) = folder.glob("earlier.*")
    said = f"an earlier training's weights are in {aside}: move them back to use them"
    words = ["--dataroot", pictures, "--checkpoints_dir", tmp_path / "c", "--name", "x"]
    assert said in run("test.py", *words, "--model", "pix2pix", "--gpu_ids", "-1").err
    assert said in train(pictures, tmp_path, "pix2pix", "--continue_train").out


def test_the_page_has_pictures_by_its_own_frequency(tmp_path):
    """Also where --display_freq does not divide --update_html_freq."""
    data = aligned(tmp_path / "data", count=20)
    words = "--display_freq 8 --update_html_freq 5 --print_freq 100 --n_epochs 1".split()
    seen = []

    def watched(self, pictures, step):
        seen.append((step["images"], step["save"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PageLogger, "show_pictures", watched)
        train(data, tmp_path, "template", *words)
    assert [images for images, save in seen if save] == [5, 10, 15, 20]
    assert {8, 16} <= {images for images, _ in seen}


def test_a_training_may_go_on_with_another_size_and_beta(tmp_path):
    data = unaligned(tmp_path / "data", 4)
    words = ["--batch_size", "2", "--pool_size", "2", "--lr_policy", "linear"]
    train(data, tmp_path, "cycle_gan", *words, "--n_epochs", "2")
    more = ["--n_epochs", "4", "--continue_train", "--load_size", "44", "--crop_size", "40"]
    result = train(data, tmp_path, "cycle_gan", *words, *more, "--beta1", "0.9", "--seed", "7")
    assert "--seed 7 is ignored: this training goes on with 3" in result.err
    more = [*more, "--beta1", "0.9"]
    assert "--seed" not in train(data, tmp_path, "cycle_gan", *words, *more, "--n_epochs", "5").err
    state = torch.load(tmp_path / "c" / "x" / "latest_train_state.pth", weights_only=True)
    groups = [o["param_groups"][0] for o in state["model"]["optimizers"]]
    assert [group["betas"] for group in groups] == [(0.9, 0.999)] * 2


def test_names_of_pairs_do_not_depend_on_the_number_of_processes(tmp_path):
    data = aligned(tmp_path / "data", count=4)
    argv = ["--dataroot", data, "--model", "pix2pix", "--name", "x", "--gpu_ids", "-1"]
    opt = TestOptions([*map(str, argv), "--checkpoints_dir", str(tmp_path)]).parse(save=False)
    dataset = create_dataset(opt, batch_size=1).dataset
    paths = [dataset[i]["A_paths"] for i in range(len(dataset))]
    whole = ResultNames(dataset, range(len(paths)), len(paths))
    parts = [ResultNames(dataset, range(rank, len(paths), 2), len(paths)) for rank in range(2)]
    wanted = [whole.next(path) for path in paths]
    assert [name for _, name in wanted] == [Path(path).stem for path in paths]
    assert [parts[i % 2].next(path) for i, path in enumerate(paths)] == wanted


def test_what_is_not_given_any_more_is_told(tmp_path):
    data = aligned(tmp_path / "data")
    train(data, tmp_path, "template", "--on_nan", "skip", "--precision", "fp32")
    again = train(data, tmp_path, "template", "--n_epochs", "2", "--continue_train")
    assert "this was trained with on_nan=skip, precision=fp32, which is not given now" in again.err
