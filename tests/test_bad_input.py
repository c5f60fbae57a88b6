"""A user's mistake: one line on stderr that names the thing, no zero exit code, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models import networks
from tests.helpers import (
    SHORT,
    TINY,
    Finished,
    aligned,
    damaged_inside,
    files_below,
    picture,
    run,
    run_process,
    truncated,
    unaligned,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return aligned(unaligned(tmp_path_factory.mktemp("pictures")))


class Place:
    """Where a program may write, and what it wrote."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkpoints, self.results = folder / "checkpoints", folder / "results"

    def flags(self, program: str) -> list[str]:
        results = ["--results_dir", str(self.results)] if program == "test.py" else SHORT
        return ["--checkpoints_dir", str(self.checkpoints), "--gpu_ids", "-1", *results]

    def run(self, program: str, *words: object) -> Finished:
        return run(program, *self.flags(program), *words)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path / "out")


def assert_one_line(result: Finished, code: int, *named: object) -> None:
    assert result.code == code, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.out
    for text in named:
        assert str(text) in lines[0]


def assert_nothing_written(place: Place) -> None:
    assert not place.folder.exists(), files_below(place.folder)


# ------------------------------------------------------------------------------- the command line
COMMAND_LINES = {
    "model": (["--model", "cyclegan"], ["unknown model 'cyclegan'", "cycle_gan", "pix2pix"]),
    "path as model": (["--model", "../x"], ["unknown model '../x'"]),
    "contract as model": (["--model", "base"], ["unknown model 'base'", "cycle_gan"]),
    "dataset": (["--dataset_mode", "pairs"], ["unknown dataset 'pairs'", "aligned", "single"]),
    "netG": (["--netG", "resnet_3blocks"], ["--netG", "resnet_3blocks", "unet_128"]),
    "norm": (["--norm", "layer"], ["--norm", "layer", "instance"]),
    "option": (["--lamda_A", "3"], ["--lamda_A"]),
    "load_size": (["--load_size", "30", "--crop_size", "64"], ["--load_size 30", "--crop_size 64"]),
    "gpu": (["--gpu_ids", "3"], ["--gpu_ids 3", "no GPU 3"]),
    "direction": (["--direction", "both"], ["--direction", "both", "AtoB"]),
    # without w1 the system would look for another place than results are written to
    "dots in a name": (["--name", "w1/../x"], ["--name", "'w1/../x'", "without '..'"]),
    "preprocess": (["--preprocess", "resize"], ["--preprocess", "resize_and_crop"]),
    "init_gain": (["--init_gain", "nan"], ["--init_gain", "nan"]),
    "endless range": (["--value_range", "0", "inf"], ["--value_range 0 inf"]),
    "part of an option": (["--suffix", "{ngf.x}"], ["--suffix '{ngf.x}'"]),
}
TRAINING_ONLY = {
    "netD": (["--netD", "patch"], ["--netD", "patch", "pixel"]),
    "policy": (["--lr_policy", "exp"], ["--lr_policy", "exp", "cosine"]),
    "gan_mode": (["--gan_mode", "relative"], ["--gan_mode", "relative", "lsgan"]),
    "identity": (
        ["--input_nc", "1", "--lambda_identity", "0.5"],
        ["--lambda_identity 0.5", "--input_nc", "1 and 3"],
    ),
    "identity by default": (["--output_nc", "1"], ["--lambda_identity 0.5", "3 and 1"]),
    "test model": (["--model", "test"], ["--model test"]),
    "port": (["--display_port", "99999"], ["--display_port", "at most 65535"]),
    "on_nan": (["--on_nan", "ignore"], ["--on_nan", "ignore"]),
    "momentum": (["--model", "cut", "--beta2", "1.5"], ["--beta2", "1.5", "below 1"]),
    "negative weight": (["--model", "cut", "--lambda_NCE", "-1"], ["--lambda_NCE", "at least 0"]),
    "no loss": (
        ["--model", "cut", "--lambda_GAN", "0", "--lambda_NCE", "0"],
        ["--lambda_GAN 0", "--lambda_NCE 0"],
    ),
    "positions that shift": (
        ["--model", "cut", "--CUT_mode", "FastCUT", "--crop_size", "34"],
        ["--crop_size 34", "multiple of 4"],
    ),
    "no epoch": (["--n_epochs", "0", "--n_epochs_decay", "0"], ["--n_epochs 0", "nothing"]),
    "beyond the end": (
        ["--n_epochs", "1", "--n_epochs_decay", "1", "--epoch_count", "5"],
        ["--epoch_count 5", "--continue_train"],
    ),
}
TESTING_ONLY = {"no width": (["--aspect_ratio", "nan"], ["--aspect_ratio", "nan"])}
ALL_LINES = [
    *(("train.py", *case) for case in (COMMAND_LINES | TRAINING_ONLY).values()),
    *(("test.py", *case) for case in (COMMAND_LINES | TESTING_ONLY).values()),
]


@pytest.mark.parametrize(
    ("program", "words", "named"), ALL_LINES, ids=[f"{c[0]} {' '.join(c[1])}" for c in ALL_LINES]
)
def test_command_line(program, words, named, pictures, place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    result = place.run(program, "--dataroot", pictures, *words)
    assert_one_line(result, 2, program, *named)
    assert_nothing_written(place)


@pytest.mark.parametrize("program", ["train.py", "test.py"])
def test_dataroot_is_required(program, place):
    assert_one_line(place.run(program), 2, "--dataroot")
    assert_nothing_written(place)


# ------------------------------------------------------------------------------------- the images
def train(place: Place, dataroot: Path, model: str = "cycle_gan", *words: object) -> Finished:
    return place.run("train.py", *TINY, "--dataroot", dataroot, "--model", model, *words)


@pytest.mark.parametrize(
    ("model", "folder"), [("cycle_gan", "trainA"), ("pix2pix", "train"), ("colorization", "train")]
)
@pytest.mark.parametrize("exists", [True, False])
def test_dataroot_is_missing_or_empty(model, folder, exists, place, tmp_path):
    dataroot = tmp_path / "photos"
    if exists:
        (dataroot / "holiday").mkdir(parents=True)
    result = train(
        place, dataroot, model, *(["--netG", "unet_128"] if model != "cycle_gan" else [])
    )
    assert_one_line(
        result,
        1,
        f"no folder {dataroot / folder}",
        "holiday" if exists else "photos is not there; ",
    )
    assert_nothing_written(place)


@pytest.mark.parametrize("empty", ["A", "B"])
def test_pictures_in_one_of_two_folders(empty, place, tmp_path):
    dataroot = unaligned(tmp_path / "photos")
    folder = dataroot / f"train{empty}"
    for path in folder.iterdir():
        path.rename(path.with_suffix(".doc"))
    assert_one_line(train(place, dataroot), 1, f"no images in {folder}", ".png", "3 .doc")
    for path in folder.iterdir():
        path.unlink()
    assert_one_line(train(place, dataroot), 1, f"no images in {folder}", "found nothing")
    folder.rmdir()
    other = {"A": "B", "B": "A"}[empty]
    assert_one_line(train(place, dataroot), 1, f"no folder {folder}", f"train{other}")
    assert_nothing_written(place)


def test_dataroot_is_a_file(place, tmp_path):
    path = picture(tmp_path / "photo.png")
    assert_one_line(train(place, path), 1, f"no folder {path / 'trainA'}")
    assert_nothing_written(place)


FOLDERS = {  # what a user has, and what is said of it
    "names of one's own": (["cats/1.png", "dogs/1.png"], "has cats, dogs); put the images there"),
    "one kind": (["trainB/1.png"], "has trainB); put the images there"),
    "no folders": (["1.png", "2.png"], "has 2 images); move the images there"),
    "nothing": ([], "has neither folders nor images)"),
    "a level too high": (["photos/trainA/1.png"], "has photos); say --dataroot"),
    "only those for testing": (
        ["testA/1.png", "testB/1.png"],
        "has testA, testB); say --phase test, or rename them",
    ),
    "pairs": (
        ["train/1.png"],
        "has train); for pairs side by side in one file say --model pix2pix",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_names(kind, place, tmp_path):
    files, said = FOLDERS[kind]
    dataroot = tmp_path / "data"
    dataroot.mkdir()
    for name in files:
        picture(dataroot / name)
    what = f"no folder {dataroot / 'trainA'}: images of A and B are read from trainA and trainB"
    assert_one_line(train(place, dataroot), 1, what, f"({dataroot} {said}")


@pytest.mark.parametrize("kind", ["cut off", "text", "empty"])
def test_a_corrupt_picture(kind, place, tmp_path):
    dataroot = unaligned(tmp_path / "photos")
    path = dataroot / "trainB" / "1.png"
    truncated(path)
    if kind != "cut off":
        path.write_text("this is no image" if kind == "text" else "")
    assert_one_line(train(place, dataroot), 1, "can't read the image", path, "--skip_broken")
    assert_nothing_written(place)


def test_a_picture_damaged_inside(place, tmp_path):
    # nothing short of decoding all images finds it before the training has begun
    dataroot = unaligned(tmp_path / "photos")
    path = damaged_inside(dataroot / "trainA" / "1.png")
    assert_one_line(train(place, dataroot), 1, "can't read the image", path, "--skip_broken")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("model", "side"), [("cycle_gan", "trainB"), ("pix2pix", "train")])
def test_a_picture_smaller_than_the_crop(model, side, workers, place, tmp_path):
    dataroot = aligned(unaligned(tmp_path / "photos"))
    path = picture(dataroot / side / "1.png", 62 if model == "pix2pix" else 31, 50)
    words = ["--preprocess", "crop", "--num_threads", workers, "--n_epochs", "3"]
    result = train(place, dataroot, model, *words)
    assert_one_line(result, 1, path, "31x50", "--crop_size 32")
    assert_nothing_written(place)


def test_a_pair_of_odd_width(place, tmp_path):
    dataroot = aligned(tmp_path / "photos", count=1)
    path = picture(dataroot / "train" / "0.png", 81, 40)
    assert_one_line(train(place, dataroot, "pix2pix"), 1, path, "81x40", "even width")
    assert not list(place.checkpoints.rglob("*.pth"))


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_of_two_sizes_make_no_batch(workers, place, tmp_path):
    dataroot = unaligned(tmp_path / "photos", 1)
    for side in "AB":
        picture(dataroot / f"train{side}" / "1.png", 48, 56, 7)
    words = ["--preprocess", "none", "--batch_size", 2, "--num_threads", workers]
    result = train(place, dataroot, "cycle_gan", *words)
    assert_one_line(result, 1, "40x40", "48x56", "--batch_size 1", "--preprocess resize_and_crop")


def test_two_folders_for_a_model_of_pairs(place, tmp_path):
    dataroot = unaligned(tmp_path / "photos")
    picture(dataroot / "trainB" / "other.png")
    result = train(place, dataroot, "pix2pix", "--netG", "unet_128")
    assert_one_line(result, 1, "files of the same names: 1 have no", "say --model cycle_gan")


def test_pairs_for_a_model_of_two_folders(place, tmp_path):
    dataroot = aligned(tmp_path / "photos")
    result = train(place, dataroot)
    assert_one_line(result, 1, f"no folder {dataroot / 'trainA'}", "pairs", "--model pix2pix")
    assert_nothing_written(place)


def test_model_and_dataset_that_do_not_go_together(pictures, place):
    result = train(place, pictures / "trainA", "cycle_gan", "--dataset_mode", "single")
    assert_one_line(result, 1, "'B'", "--model and --dataset_mode")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("pix2pix", ["--input_nc", "4"]),
        ("pix2pix", ["--output_nc", "2"]),
        ("cut", ["--input_nc", "4", "--output_nc", "4"]),
    ],
)
def test_channels_that_images_do_not_have(model, words, place, tmp_path):
    make = aligned if model == "pix2pix" else unaligned
    result = train(place, make(tmp_path / "data"), model, *words)
    assert_one_line(result, 1, " ".join(words[:2]), "1 or 3 channels", "--value_range")
    assert_nothing_written(place)


def test_pictures_too_small_for_the_discriminator(pictures, place):
    result = train(place, pictures, "cycle_gan", "--crop_size", "16")
    assert_one_line(result, 1, "16x16", "--crop_size", "--n_layers_D 3")
    assert not list(place.checkpoints.rglob("*.pth"))


# -------------------------------------------------------------------------------------- the weights
def translate(place: Place, dataroot: Path, *words: object) -> Finished:
    flags = ["--crop_size", "32", "--load_size", "32", "--num_threads", "0"]
    return place.run("test.py", *flags, "--dataroot", dataroot, *words)


def save(place: Place, name: str, file: str, **options: object) -> Path:
    net = networks.define_G(3, 3, 4, "resnet_6blocks", **options)
    path = place.checkpoints / name / file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return path


@pytest.mark.parametrize("model", ["test", "cycle_gan"])
def test_an_experiment_that_does_not_exist(model, pictures, place):
    dataroot = pictures / "testA" if model == "test" else pictures
    result = translate(place, dataroot, "--name", "horse2zebra", "--model", model)
    assert_one_line(result, 1, "no experiment --name horse2zebra", place.checkpoints)
    assert_nothing_written(place)
    save(place, "maps", "latest_net_G.pth", norm="instance")
    save(place, "facades", "latest_net_G.pth", norm="instance")
    before = files_below(place.folder)
    result = translate(place, dataroot, "--name", "horse2zebra", "--model", model)
    assert_one_line(result, 1, "--name horse2zebra", "there are facades, maps")
    assert files_below(place.folder) == before
    assert not (place.checkpoints / "horse2zebra").exists()


@pytest.mark.parametrize("words", [["--epoch", "7"], ["--load_iter", "7"], ["--epoch", "best"]])
def test_an_epoch_that_does_not_exist(words, pictures, place):
    save(place, "x", "latest_net_G.pth", norm="instance")
    for epoch in (5, 10):
        save(place, "x", f"{epoch}_net_G.pth", norm="instance")
        save(place, "x", f"{epoch}_net_D.pth", norm="instance")
    before = files_below(place.folder)
    result = translate(place, pictures / "testA", "--name", "x", *words)
    hint = "; best needs training with --val_freq" if "best" in words else ""
    assert_one_line(result, 1, f"{words[1]}_net_G.pth: there are 5, 10, latest{hint}")
    assert files_below(place.folder) == before


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ([], "set --ngf 4"),
        (["--ngf", "4", "--netG", "resnet_9blocks"], "set --netG resnet_6blocks"),
        (["--ngf", "4", "--netG", "unet_128"], "--netG resnet_6blocks"),
        (["--ngf", "4", "--norm", "batch", "--no_dropout"], "set --norm instance"),
        (["--ngf", "4", "--dropout"], "set --no_dropout"),
        (["--ngf", "4", "--no_dropout", "--input_nc", "1"], "set --input_nc 3"),
    ],
)
def test_weights_that_do_not_fit(words, flag, pictures, place):
    path = save(place, "x", "latest_net_G.pth", norm="instance")
    before = files_below(place.folder)
    defaults = ["--netG", "resnet_6blocks", "--no_dropout"] if "--dropout" not in words else []
    defaults = defaults or ["--netG", "resnet_6blocks"]
    result = translate(place, pictures / "testA", "--name", "x", *defaults, *words)
    assert_one_line(result, 1, path, flag)
    assert files_below(place.folder) == before


def trained_with(path: Path, **options: object) -> None:
    text = "\n".join(f"{k:>25}: {v!s:<30}" for k, v in options.items())
    (path.parent / "train_opt.txt").write_text(text)


def test_a_model_of_another_kind(pictures, place):
    path = save(place, "x", "latest_net_G_A.pth", norm="instance")
    trained_with(path, model="cycle_gan", netG="resnet_6blocks", ngf=4, no_dropout=True)
    result = translate(place, pictures, "--name", "x", "--model", "pix2pix")
    assert_one_line(result, 1, "latest_net_G.pth", "x was trained with --model cycle_gan")


@pytest.mark.parametrize("program", ["test.py", "scripts/evaluate.py"])
def test_the_dataset_of_the_training_is_named(program, pictures, place):
    path = save(place, "x", "latest_net_G.pth", norm="instance")
    trained_with(path, model="pix2pix", dataset_mode="csvpairs", netG="resnet_6blocks", ngf=4)
    words = ["--dataroot", pictures / "testA", "--name", "x", "--model", "pix2pix"]
    where = place.flags("test.py")
    result = run(program, *where, *words)
    assert_one_line(result, 1, "no folder", "was trained with --dataset_mode csvpairs: say that")


def test_a_misspelt_phase(pictures, place):
    words = ["--dataroot", pictures, "--name", "x", "--model", "cycle_gan", "--phase", "tests"]
    result = run("test.py", *place.flags("test.py"), *words)
    assert_one_line(result, 1, f"no folder {pictures}/testsA", "say --phase test,")


def test_options_that_can_be_left_out(pictures, place):
    path = save(place, "x", "latest_net_G.pth", norm="instance")
    trained_with(path, model="pix2pix", netG="resnet_6blocks", ngf=4, no_dropout=True)
    wrong = ["--netG", "unet_128", "--ngf", 8]
    result = translate(place, pictures / "testA", "--name", "x", "--model", "test", *wrong)
    assert_one_line(result, 1, path, "--netG resnet_6blocks", "or leave out --netG, --ngf:")


def test_no_name(pictures, place):
    save(place, "maps", "latest_net_G.pth", norm="instance")
    result = translate(place, pictures / "testA")
    assert_one_line(result, 1, "there are maps", "--name was not given")


def test_a_colorization_model_is_not_for_any_folder(pictures, place):
    path = save(place, "x", "latest_net_G.pth", norm="instance")
    trained_with(path, model="colorization", ngf=4)
    result = translate(place, pictures / "testA", "--name", "x", "--model", "test")
    assert_one_line(result, 2, "x was trained with --model colorization", "say --model")


@pytest.mark.parametrize("more", [[], ["--only_outputs"]])
def test_results_that_can_not_be_written(more, pictures, place):
    save(place, "x", "latest_net_G.pth", norm="instance")
    place.results.touch()  # a file where the folder should be
    words = ["--name", "x", "--ngf", 4, "--netG", "resnet_6blocks", "--no_dropout", *more]
    result = translate(place, pictures / "testA", *words)
    assert_one_line(result, 1, f"can't write to {place.results}", "--results_dir")


def test_weights_packed_by_other_programs(pictures, place):
    path = save(place, "x", "latest_net_G.pth", norm="instance")
    words = ["--name", "x", "--ngf", 4, "--netG", "resnet_6blocks", "--no_dropout"]
    words += ["--only_outputs", "--num_test", 1]
    assert translate(place, pictures / "testA", *words).code == 0
    file = place.results / "x" / "test_latest" / "0.png"
    plain = file.read_bytes()
    file.unlink()
    state = torch.load(path)
    torch.save({"state_dict": state, "epoch": 3}, path)
    assert translate(place, pictures / "testA", *words).code == 0
    assert file.read_bytes() == plain
    torch.save({"model": state, "epoch": 3}, path)
    result = translate(place, pictures / "testA", *words)
    assert_one_line(result, 1, f"{path} holds a dictionary of model, epoch", "state_dict")
    for change, said in {
        "to_sparse": "model.1.weight is sparse or has no values",
        "char": "netG was saved with model.1.weight of torch.int8",
    }.items():
        torch.save({k: getattr(v, change)() for k, v in state.items()}, path)
        assert_one_line(translate(place, pictures / "testA", *words), 1, path.name, said)


@pytest.mark.parametrize("content", ["nothing", "text", "half", "code"])
def test_weights_that_can_not_be_read(content, pictures, place):
    path = save(place, "x", "latest_net_G.pth", norm="instance")
    whole = path.read_bytes()
    if content == "code":
        torch.save({"model": networks.PixelDiscriminator(3, 2)}, path)
    else:
        path.write_bytes({"nothing": b"", "text": b"hello", "half": whole[:5000]}[content])
    before = files_below(place.folder)
    result = translate(place, pictures / "testA", "--name", "x", "--ngf", "4")
    assert_one_line(result, 1, path)
    assert files_below(place.folder) == before


@pytest.mark.parametrize("kind", ["missing", "empty", "corrupt"])
def test_pictures_to_translate(kind, place, tmp_path):
    save(place, "x", "latest_net_G.pth", norm="instance")
    before = files_below(place.folder)
    dataroot = tmp_path / "photos"
    if kind != "missing":
        dataroot.mkdir()
    if kind == "corrupt":
        picture(dataroot / "0.png")
        truncated(dataroot / "1.png")
    words = ["--name", "x", "--ngf", "4", "--netG", "resnet_6blocks", "--no_dropout"]
    result = translate(place, dataroot, *words)
    assert_one_line(result, 1, dataroot / "1.png" if kind == "corrupt" else dataroot)
    assert files_below(place.folder) == before


def test_continuing_with_weights_that_do_not_fit(pictures, place):
    for name in ("G_A", "G_B", "D_A", "D_B"):
        save(place, "x", f"latest_net_{name}.pth", norm="instance")
    before = files_below(place.folder)
    words = ["--name", "x", "--continue_train", "--ngf", "8", "--no_dropout"]
    result = train(place, pictures, "cycle_gan", *words)
    assert_one_line(result, 1, "latest_net_G_A.pth", "set --ngf 4")
    assert files_below(place.folder) == before


# ------------------------------------------------------------------------ once more, for real
@pytest.mark.parametrize(
    ("program", "words", "code", "named"),
    [
        ("train.py", ["--norm", "layer"], 2, "--norm"),
        ("train.py", ["--dataroot", "{nowhere}"], 1, "nowhere"),
        ("test.py", ["--name", "horse2zebra"], 1, "--name horse2zebra"),
    ],
)
def test_as_processes(program, words, code, named, pictures, place):
    words = [w.format(nowhere=place.folder / "nowhere") for w in words]
    dataroot = pictures if program == "train.py" else pictures / "testA"
    result = run_process(program, *place.flags(program), "--dataroot", dataroot, *words)
    assert_one_line(result, code, named)
    assert_nothing_written(place)


@pytest.mark.slow
def test_a_damaged_picture_in_a_worker_as_a_process(place, tmp_path):
    dataroot = unaligned(tmp_path / "photos")
    path = damaged_inside(dataroot / "trainA" / "1.png")
    words = ["--dataroot", dataroot, *TINY, "--num_threads", "2"]
    result = run_process("train.py", *place.flags("train.py"), *words)
    assert_one_line(result, 1, "can't read the image", path)
