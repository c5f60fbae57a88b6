"""The command line: what there is, how it is parsed and printed, and what comes back from disk."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

import data
import models
from models import networks
from options.evaluate_options import EvaluateOptions
from options.test_options import TestOptions, share_cores
from options.train_options import TrainOptions
from tests.conformance import probe
from tests.helpers import ROOT, files_below, run, run_process, unaligned
from util.errors import UserError
from util.run.saved_options import read_saved_options

GOLDEN = json.loads((ROOT / "tests" / "conformance" / "golden.json").read_text())["cases"][
    "options"
]

# what this project adds to the original's command lines: default, and kind. An option that is
# added, dropped or changed on purpose is changed here too.
BOTH = {
    "--seed": [None, "value"],
    "--deterministic": [False, "flag"],
    "--dropout": ["that of --no_dropout", "flag"],
    "--precision": ["tf32", "value"],
    "--channels_last": ["auto", "value"],
    "--compile": [False, "flag"],
    "--cuda_graphs": ["auto", "value"],
    "--batch_passes": ["auto", "value"],
    "--fast": [False, "flag"],
    "--ignore_orientation": [False, "flag"],
    "--skip_broken": [False, "flag"],
    "--value_range": [None, "value"],
}
ADDED = {
    "train": BOTH
    | {
        "--use_tensorboard": [False, "flag"],
        "--keep_states": [1, "value"],
        "--max_hours": [None, "value"],
        "--on_nan": ["stop", "value"],
        "--spectral_norm": [False, "flag"],
        "--diffaug": [None, "value"],
        "--cache_images": ["auto", "value"],
        "--accumulate": [1, "value"],
        "--ema": [0.0, "value"],
        "--grad_checkpoint": [False, "flag"],
        "--val_freq": [0, "value"],
        "--val_phase": ["val", "value"],
        "--best_by": [None, "value"],
        "--num_val": ["inf", "value"],
        "--inception_weights": [None, "value"],
        "--lpips_weights": [None, "value"],
    },
    "test": BOTH
    | {
        "--weights": ["auto", "value"],
        "--keep_size": [False, "flag"],
        "--tile": [None, "value"],
        "--tile_overlap": [None, "value"],
        "--tile_mode": [None, "value"],
        "--tile_memory": [1.0, "value"],
        "--tile_scratch": [None, "value"],
        "--only_outputs": [False, "flag"],
        "--output_format": ["png", "value"],
        "--skip_existing": [False, "flag"],
    },
}
# of the models that have a discriminator
ADVERSARIAL = {
    "--gp": [None, "value"],
    "--lambda_gp": [10.0, "value"],
    "--gp_every": [1, "value"],
    "--num_D": [2, "value"],
    "--lambda_feat": [0.0, "value"],
    "--norm_D": [None, "value"],  # or --normD
}
PERCEPTUAL = {"--lambda_vgg": [0.0, "value"], "--vgg_weights": [None, "value"]}
COMMANDS = [name for name in GOLDEN if not name.endswith("/file")]


def test_options_of_the_model_that_only_training_uses(tmp_path, capsys):
    """As in CUT's instructions."""
    words = "--model cut --CUT_mode FastCUT --nce_layers=0,4 --num_test 3".split()
    assert parse(tmp_path, *words, train=False).num_test == 3
    said = "without effect here, since only training uses it: --CUT_mode --nce_layers=0,4\n"
    assert said in capsys.readouterr().out
    for words in ("--lamda_NCE 1", "--CUT_mode None", "--lambda_NC 1"):
        with pytest.raises(SystemExit):
            parse(tmp_path, "--model", "cut", *words.split(), train=False)
        assert f"unknown option '{words.split()[0]}'" in capsys.readouterr().err


def test_options_that_ranks_may_not_have_alike(tmp_path, monkeypatch):
    """Values that are not equal to themselves, or can't be sent, are no reason to stop."""
    options = TrainOptions(["--dataroot", str(tmp_path)])
    options.gather_options()
    options.parser.add_argument("--thresh", type=float, default=float("nan"))
    options.parser.add_argument("--warm", default=lambda: 1)
    options.parser.add_argument("--local_rank", type=int, default=0)
    options.parser.add_argument("--teacher", default="a/b.pth")
    options.parser.set_defaults(started=1.5, table=torch.zeros(2))
    opt = options.parser.parse_args(["--dataroot", str(tmp_path)])
    first: dict = {}
    monkeypatch.setattr("util.distributed.broadcast_object", lambda own: first.update(own) or own)
    options.check_same_on_all_ranks(opt)
    monkeypatch.setattr("util.distributed.broadcast_object", lambda own: first)
    opt.local_rank, opt.teacher, opt.started, opt.warm = 1, "c/d.pth", 2.5, lambda: 2
    options.check_same_on_all_ranks(opt)
    opt.lambda_A = 3.0
    with pytest.raises(UserError, match=r"--lambda_A: 3\.0 here, 10\.0 in the first process"):
        options.check_same_on_all_ranks(opt)


def test_channels_of_ones_own(tmp_path):
    """A model or a dataset of one's own may add channels to images."""
    opt = argparse.Namespace(model="pix2pix", dataset_mode="aligned", value_range=None)
    opt.input_nc, opt.output_nc = 4, 5
    with pytest.raises(UserError, match="--input_nc 4"):
        data.check_channels(opt)
    for own in ({"model": "mine"}, {"dataset_mode": "mine"}, {"value_range": [0, 1]}):
        data.check_channels(argparse.Namespace(**{**vars(opt), **own}))


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line_is_frozen(name, tmp_path):
    added = dict(ADDED[name.split("/")[0]])
    if name in ("train/cycle_gan", "train/pix2pix", "train/colorization"):
        added |= ADVERSARIAL
    if name in ("train/pix2pix", "train/colorization"):
        added |= PERCEPTUAL
    added["--dropout"] = [GOLDEN[name]["--no_dropout"][0], "flag"]
    for flag in ("--antialias", "--no_antialias", "--no_antialias_up"):
        added[flag] = [True, "flag"]
    ours = probe.command_line(name, tmp_path)
    del ours["--help"]
    # --load_iter "0": argparse turns a default that is a text into a number
    assert ours == GOLDEN[name] | added


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_complete(name, tmp_path, capsys):
    program, model = name.split("/")
    kind = TrainOptions if program == "train" else TestOptions
    with pytest.raises(SystemExit) as end:
        kind(["--model", model, "--help"]).parse()
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in GOLDEN[name].keys() | ADDED[program].keys():
        assert f"{option} " in text or f"{option}\n" in text, option


def test_help_shows_what_model_and_dataset_add(capsys):
    words = ["--model", "template", "--dataset_mode", "template", "-h"]
    with pytest.raises(SystemExit):
        TrainOptions(words).parse()
    text = " ".join(capsys.readouterr().out.split())
    assert "--lambda_regression LAMBDA_REGRESSION weight of the regression loss [1.0]" in text
    assert "--new_dataset_option" in text
    assert "--lambda_L1" not in text


SLIP = """
from {package}.base_{kind} import Base{Kind}

class {name}{Kind}(Base{Kind}):
    @staticmethod
    def modify_commandline_options(parser, is_train):
        {line}
"""


@pytest.mark.parametrize(
    ("package", "kind", "flag"), [(models, "model", "--model"), (data, "dataset", "--dataset_mode")]
)
@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        (
            "forgot",
            "parser.add_argument('--new')",
            "returns None: it must end with `return parser`",
        ),
        ("again", "parser.add_argument('--lr')", "adds --lr, which exists already"),
    ],
)
def test_slips_in_a_file_of_ones_own(
    package, kind, flag, name, line, said, tmp_path, monkeypatch, capsys
):
    file, Name, Kind = f"{name}_{kind}.py", name.capitalize(), kind.capitalize()
    text = SLIP.format(package=package.__name__, kind=kind, Kind=Kind, name=Name, line=line)
    (tmp_path / file).write_text(text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, flag, name)
    assert end.value.code == 2
    err = capsys.readouterr().err
    where = f"{Name}{Kind}.modify_commandline_options in {package.__name__}/{file}"
    assert f"{where} {said}" in err
    assert err.count("\n") == 1


# ----------------------------------------------------------------------------------------- parsing
def parse(tmp_path: Path, *words: str, train: bool = True):
    kind = TrainOptions if train else TestOptions
    where = ["--dataroot", str(tmp_path), "--checkpoints_dir", str(tmp_path / "c")]
    return kind([*where, "--gpu_ids", "-1", *words]).parse(save=False)


def test_model_and_dataset_change_defaults(tmp_path):
    opt = parse(tmp_path)
    assert (opt.model, opt.netG, opt.norm, opt.no_dropout) == (
        "cycle_gan",
        "resnet_9blocks",
        "instance",
        True,
    )
    opt = parse(tmp_path, "--model", "pix2pix")
    assert (opt.netG, opt.norm, opt.dataset_mode, opt.gan_mode, opt.pool_size) == (
        "unet_256",
        "batch",
        "aligned",
        "vanilla",
        0,
    )
    # the model chooses the dataset, which then has its say
    opt = parse(tmp_path, "--model", "colorization")
    assert (opt.dataset_mode, opt.input_nc, opt.output_nc) == ("colorization", 1, 2)
    # what is given wins over both, wherever it stands
    opt = parse(tmp_path, "--norm", "none", "--model", "pix2pix", "--netG", "unet_128")
    assert (opt.norm, opt.netG) == ("none", "unet_128")


def test_an_option_of_another_model_is_unknown(tmp_path, capsys):
    assert parse(tmp_path, "--model", "pix2pix", "--lambda_L1", "7").lambda_L1 == 7.0
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, "--model", "cycle_gan", "--lambda_L1", "7")
    assert end.value.code == 2
    assert "unknown option '--lambda_L1'" in capsys.readouterr().err


def test_dropout_can_be_turned_on_and_off(tmp_path):
    assert parse(tmp_path).no_dropout is True
    assert parse(tmp_path, "--dropout").no_dropout is False
    assert parse(tmp_path, "--model", "pix2pix").no_dropout is False
    assert parse(tmp_path, "--model", "pix2pix", "--no_dropout").no_dropout is True


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--lambda_identiti", "--lambda_identity"),
        ("--batchsize", "--batch_size"),
        ("--lambda_l1", "--lambda_L1"),  # not --lambda_A: another model has it in other letters
    ],
)
def test_did_you_mean(given, meant, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, given, "3")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"unknown option '{given}'; did you mean {meant}?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("given", ["--dataroott", "--data_root", "--dataroot_=x"])
def test_a_misspelt_dataroot_is_not_called_missing(given, capsys):
    with pytest.raises(SystemExit) as end:
        TrainOptions([given, "x", "--name", "y"]).parse()
    assert end.value.code == 2
    assert f"unknown option '{given}'; did you mean --dataroot?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "extra"),
    [
        ("--name my photos", "photos"),  # a name with a space, or what the shell makes of a pattern
        ("--no_flip True", "True"),
        ("--value_range 0 1 2", "2"),
    ],
)
def test_a_word_too_many(words, extra, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, *words.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"'{extra}' is no option and belongs to none: put a name" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "given", "meant"),
    [("--model", "cyclegan", "cycle_gan"), ("--dataset_mode", "algined", "aligned")],
)
def test_did_you_mean_a_name(option, given, meant, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, option, given)
    assert f"; did you mean {meant}?" in capsys.readouterr().err


def test_an_option_of_another_model(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "--lambda_L1=50")
    hint = "unknown option '--lambda_L1=50' of --model cycle_gan: it belongs to"
    assert f"{hint} colorization and pix2pix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--netG resnet", "resnet_9blocks"),
        ("--direction both", "BtoA"),
        ("--batch_size 0", "at least 1"),
        ("--batch_size two", "'two' is not a whole number"),
        ("--lr -1", "at least 0"),
        ("--lr nan", "--lr"),
        ("--beta1 1", "below 1"),
        ("--num_threads -1", "at least 0"),
        ("--norm", "expected one argument"),
        ("--input_nc 3 --model colorization", "L and ab"),
    ],
)
def test_bad_values(words, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, *words.split())
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words.split()[0] in error
    assert named in error
    assert error.count("\n") == 1


def test_num_test(tmp_path):
    assert parse(tmp_path, train=False).num_test == 50
    assert parse(tmp_path, "--num_test", "7", train=False).num_test == 7
    assert parse(tmp_path, "--num_test", "all", train=False).num_test == float("inf")


def test_testing_loads_as_large_as_it_crops(tmp_path):
    assert parse(tmp_path, train=False).load_size == 256
    assert parse(tmp_path, "--crop_size", "64", train=False).load_size == 64
    words = ("--crop_size", "64", "--load_size", "70")
    assert parse(tmp_path, *words, train=False).load_size == 70


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        ("{netG}_{norm}", "x_unet_256_batch"),
        ("{load_size}", "x_286"),
        ("{lambda_L1}_{direction}", "x_100.0_AtoB"),
        ("plain", "x_plain"),
    ],
)
def test_suffix_is_filled_in(suffix, name, tmp_path):
    words = ["--name", "x", "--model", "pix2pix", "--suffix", suffix]
    assert parse(tmp_path, *words).name == name


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/../../x", "..", ".", ""])
def test_a_name_that_leaves_the_checkpoints_is_refused(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, "--name", name)
    assert stop.value.code == 2
    assert "is not a folder inside --checkpoints_dir" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, "--name", "x", "--suffix", "/../../{model}")
    assert stop.value.code == 2
    assert "--suffix" in capsys.readouterr().err


def test_a_name_may_be_a_path(tmp_path):
    assert parse(tmp_path, "--name", "maps/first..x").name == "maps/first..x"


@pytest.mark.parametrize("suffix", ["{nothing}", "{", "{}"])
def test_suffix_of_no_option(suffix, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, "--suffix", suffix)
    assert end.value.code == 2
    assert f"--suffix '{suffix}'" in capsys.readouterr().err


def test_a_seed_is_drawn_and_kept(tmp_path):
    drawn = {parse(tmp_path).seed for _ in range(4)}
    assert len(drawn) == 4
    assert all(isinstance(seed, int) for seed in drawn)
    assert parse(tmp_path, "--seed", "0").seed == 0


# ---------------------------------------------------------------------------- printing and saving
def test_options_are_printed_and_saved(tmp_path, capsys):
    words = ["--dataroot", "D", "--checkpoints_dir", str(tmp_path), "--name", "x"]
    words += ["--gpu_ids", "-1", "--model", "pix2pix", "--lr", "0.001", "--seed", "4"]
    TrainOptions(words).parse()
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    start = lines.index("----------------- Options ---------------")
    end = lines.index("----------------- End -------------------")
    body = lines[start + 1 : end]
    # in the original's columns: right-justified names, and defaults where they differ
    assert f"{'lr':>25}: {'0.001':<30}\t[default: 0.0002]" in body
    assert f"{'beta1':>25}: {'0.5':<30}" in body
    # what the model has set is its default
    assert f"{'norm':>25}: {'batch':<30}" in body
    names = [line.split(":")[0].strip() for line in body]
    assert names == sorted(names)
    assert files_below(tmp_path) == ["x/train_opt.txt"]
    assert (tmp_path / "x" / "train_opt.txt").read_text() in printed


def test_saved_options_are_read_back_as_written(tmp_path):
    words = ["--dataroot", "a: b", "--checkpoints_dir", str(tmp_path), "--name", "x"]
    parsed = TrainOptions([*words, "--gpu_ids", "-1", "--lr", "0.001"])
    opt = parsed.parse()
    saved = read_saved_options(tmp_path / "x")
    assert saved["lr"] == "0.001"
    assert saved["dataroot"] == "a: b"
    assert saved["suffix"] == ""
    for name in ("netG", "ngf", "no_dropout", "direction", "n_epochs", "max_dataset_size"):
        assert saved[name] == str(getattr(opt, name))
    assert saved.keys() >= {a.dest for a in parsed.parser._actions} - {"help"}


def test_saved_options_of_the_original(tmp_path):
    # lines as the original wrote them in 2018 and in 2025
    (tmp_path / "train_opt.txt").write_text(
        "----------------- Options ---------------\n"
        "               batch_size: 1                             \n"
        "                     beta1: 0.5                           \n"
        "          checkpoints_dir: ./checkpoints                 \n"
        "                 dataroot: ./datasets/maps               \t[default: None]\n"
        "                     netG: unet_128                      \t[default: unet_256]\n"
        "                     name: maps                          \t[default: experiment_name]\n"
        "               no_dropout: True                          \t[default: False]\n"
        "                   suffix:                               \n"
        "----------------- End -------------------\n"
    )
    assert read_saved_options(tmp_path) == {
        "batch_size": "1",
        "beta1": "0.5",
        "checkpoints_dir": "./checkpoints",
        "dataroot": "./datasets/maps",
        "netG": "unet_128",
        "name": "maps",
        "no_dropout": "True",
        "suffix": "",
    }
    assert read_saved_options(tmp_path / "none") == {}
    (tmp_path / "x" / "train_opt.txt").mkdir(parents=True)  # as if it could not be read
    with pytest.raises(UserError, match=r"can't read .*/train_opt\.txt: Is a directory"):
        read_saved_options(tmp_path / "x")


# ------------------------------------------------------------------------------------ coming back
def experiment(tmp_path: Path, **values: object) -> None:
    """A folder as the original leaves it: options as text, and weights."""
    folder = tmp_path / "c" / "x"
    folder.mkdir(parents=True)
    lines = [
        "----------------- Options ---------------",
        *(f"{k:>25}: {v!s:<30}\t[default: something]" for k, v in values.items()),
        "----------------- End -------------------",
    ]
    (folder / "train_opt.txt").write_text("\n".join(lines) + "\n")
    torch.save({}, folder / "latest_net_G.pth")


SAVED = {
    "netG": "unet_128",
    "norm": "batch",
    "ngf": 16,
    "no_dropout": False,
    "input_nc": 1,
    "output_nc": 2,
    "direction": "BtoA",
    "lr": 0.5,
    "batch_size": 9,
}
RESTORED = ("netG", "norm", "ngf", "no_dropout", "input_nc", "output_nc", "direction")


def test_architecture_comes_back_at_test_time(tmp_path, capsys):
    experiment(tmp_path, **SAVED)
    opt = parse(tmp_path, "--name", "x", "--model", "cycle_gan", train=False)
    assert [getattr(opt, name) for name in RESTORED] == [SAVED[name] for name in RESTORED]
    assert opt.batch_size == 1  # this is no matter of the architecture
    told = [line for line in capsys.readouterr().out.splitlines() if "options taken from" in line]
    assert len(told) == 1
    assert str(tmp_path / "c" / "x" / "train_opt.txt") in told[0]
    assert all(f"{name}={SAVED[name]}" in told[0] for name in RESTORED)


@pytest.mark.parametrize(("direction", "channels"), [("AtoB", (2, 1)), ("BtoA", (1, 2))])
@pytest.mark.parametrize("trained", ["cycle_gan", "pix2pix"])
def test_channels_change_places_for_the_other_generator(trained, direction, channels, tmp_path):
    """Of a model that has one for each direction; that of pix2pix stays what it is."""
    experiment(tmp_path, **SAVED, model=trained)  # BtoA, of 1 to 2 channels
    opt = parse(tmp_path, "--name", "x", "--direction", direction, train=False)
    assert opt.model == "test"
    assert (opt.input_nc, opt.output_nc) == (channels if trained == "cycle_gan" else (1, 2))


@pytest.mark.parametrize(
    ("words", "train"),
    [(["--model", "cycle_gan"], False), (["--continue_train"], True)],
)
def test_a_direction_against_the_training_is_said(words, train, tmp_path, capsys):
    experiment(tmp_path, **{**SAVED, "input_nc": 3, "output_nc": 3})
    parse(tmp_path, "--name", "x", *words, "--direction", "BtoA", train=train)
    assert "--direction" not in capsys.readouterr().err
    parse(tmp_path, "--name", "x", *words, "--direction", "AtoB", train=train)
    assert "--direction AtoB, but this experiment was trained --direction BtoA" in (
        capsys.readouterr().err
    )


def test_options_that_are_dropped_in_going_on_are_said(tmp_path, capsys):
    experiment(tmp_path, netG="unet_128", crop_size=128, lr=0.0002, batch_size=4, display_freq=7)
    words = ["--name", "x", "--continue_train"]
    parse(tmp_path, *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert "with batch_size=4, crop_size=128, which is not given now" in line
    assert "continues with batch_size=1, crop_size=256" in line
    parse(tmp_path, *words, "--batch_size", "2", "--crop_size", "128")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [((), True), (("--crop_size", "64"), False), (("--preprocess", "none"), False)],
)
def test_another_size_than_that_of_the_training_is_said(words, said, tmp_path, capsys):
    experiment(tmp_path, **{**SAVED, "preprocess": "resize_and_crop", "crop_size": 128})
    parse(tmp_path, "--name", "x", *words, train=False)
    printed = capsys.readouterr().out
    flags = "which had --preprocess resize_and_crop --crop_size 128\n"
    assert (f"scaled to 256x256, unlike in the training, {flags}" in printed) == said


def test_what_is_given_wins_over_what_was_saved(tmp_path, capsys):
    experiment(tmp_path, **SAVED)
    words = "--name x --model cycle_gan --netG resnet_6blocks --no_dropout --ngf=8".split()
    opt = parse(tmp_path, *words, train=False)
    assert (opt.netG, opt.no_dropout, opt.ngf, opt.norm) == ("resnet_6blocks", True, 8, "batch")
    told = capsys.readouterr().out
    assert "norm=batch" in told
    assert "netG=unet_128" not in told


def test_nothing_comes_back_without_weights_or_in_a_new_training(tmp_path, capsys):
    experiment(tmp_path, **SAVED)
    assert parse(tmp_path, "--name", "x").netG == "resnet_9blocks"
    assert parse(tmp_path, "--name", "y", train=False).netG == "resnet_9blocks"
    (tmp_path / "c" / "x" / "latest_net_G.pth").unlink()
    assert parse(tmp_path, "--name", "x", train=False).netG == "resnet_9blocks"
    assert "options taken" not in capsys.readouterr().out


def test_architecture_comes_back_from_a_training_state_alone(tmp_path):
    # as after a kill in the first save, before the weights by themselves are written
    experiment(tmp_path, **{**SAVED, "input_nc": 3, "output_nc": 3})
    (tmp_path / "c" / "x" / "latest_net_G.pth").rename(tmp_path / "c/x/latest_train_state.pth")
    assert parse(tmp_path, "--name", "x", "--continue_train").netG == "unet_128"


@pytest.mark.parametrize("train", [True, False])
def test_the_phase_of_the_data_does_not_decide_where_options_are_saved(train, tmp_path):
    experiment(tmp_path, **SAVED)
    folder = tmp_path / "c" / "x"
    before = (folder / "train_opt.txt").read_text()
    kind = TrainOptions if train else TestOptions
    options = kind(
        ["--dataroot", "a", "--checkpoints_dir", str(tmp_path / "c"), "--name", "x"]
        + ["--gpu_ids", "-1", "--phase", "test" if train else "train", "--model", "cycle_gan"]
    )
    options.parse()
    assert (folder / "test_opt.txt").exists() != train
    assert ((folder / "train_opt.txt").read_text() != before) == train


def test_scores_take_the_model_of_an_experiment_with_a_suffix(tmp_path):
    experiment(tmp_path, **SAVED, model="pix2pix")
    (tmp_path / "c" / "x").rename(tmp_path / "c" / "x_4")
    where = ["--checkpoints_dir", str(tmp_path / "c"), "--name", "x", "--suffix", "4"]
    opt = EvaluateOptions(["--dataroot", "a", "--gpu_ids", "-1", *where]).parse(save=False)
    assert (opt.model, opt.netG) == ("pix2pix", "unet_128")


def test_architecture_comes_back_in_a_continued_training(tmp_path):
    experiment(tmp_path, **{**SAVED, "input_nc": 3, "output_nc": 3}, ndf=5, n_layers_D=2, seed=77)
    opt = parse(tmp_path, "--name", "x", "--continue_train")
    assert (opt.netG, opt.ndf, opt.n_layers_D, opt.seed, opt.lr) == ("unet_128", 5, 2, 77, 0.0002)


@pytest.mark.parametrize("line", [{"netG": "resnet_3blocks"}, {"ngf": "many"}, {"norm": "layer"}])
def test_a_saved_value_that_is_not_allowed_is_passed_over(line, tmp_path):
    experiment(tmp_path, **line)
    opt = parse(tmp_path, "--name", "x", train=False)
    assert (opt.netG, opt.ngf, opt.norm) == ("resnet_9blocks", 64, "instance")


# ---------------------------------------------------------------------------------------- devices
@pytest.fixture
def gpus(monkeypatch):
    """Pretend that the machine has so many GPUs."""

    def pretend(count: int) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        return chosen

    return pretend


def parse_gpus(tmp_path: Path, ids: str | None):
    words = ["--dataroot", str(tmp_path), "--checkpoints_dir", str(tmp_path)]
    return TrainOptions([*words, *(["--gpu_ids", ids] if ids else [])]).parse(save=False)


@pytest.mark.parametrize(
    ("count", "ids", "device", "used"),
    [
        (1, None, "cuda:0", [0]),
        (1, "0", "cuda:0", [0]),
        (4, "2", "cuda:2", [2]),
        (4, "1,3", "cuda:1", [1, 3]),
        (4, "-1", "cpu", []),
        (0, "-1", "cpu", []),
        (0, None, "cpu", []),
    ],
)
def test_devices(count, ids, device, used, gpus, tmp_path):
    gpus(count)
    opt = parse_gpus(tmp_path, ids)
    assert (opt.device, opt.gpu_ids) == (torch.device(device), used)


@pytest.mark.parametrize(
    ("words", "recorded", "said"),
    [
        ("", True, ""),
        ("--compile", True, ""),
        ("--cuda_graphs off", False, ""),
        ("--cuda_graphs off --compile", False, "--compile is off: not in this test"),
        ("--accumulate 2", False, ""),
        ("--model template", False, ""),
        ("--model template --cuda_graphs", False, "--cuda_graphs is off: a TemplateModel does"),
        ("--on_nan skip --cuda_graphs", False, "--cuda_graphs is off: not with --on_nan skip"),
    ],
)
def test_what_is_recorded_on_a_gpu(words, recorded, said, gpus, tmp_path, monkeypatch, capsys):
    gpus(1)
    monkeypatch.setattr("options.base_options.why_not_compile", lambda *a: "not in this test")
    folders = ["--dataroot", str(tmp_path), "--checkpoints_dir", str(tmp_path)]
    opt = TrainOptions([*folders, *words.split()]).parse(save=False)
    assert opt.cuda_graphs is recorded
    out = capsys.readouterr().out
    assert said in out
    assert ("--cuda_graphs is off" in out) is said.startswith("--cuda_graphs is off")


def test_falling_back_to_the_cpu_is_said_once(gpus, tmp_path, capsys):
    gpus(0)
    parse_gpus(tmp_path, None)
    said = [line for line in capsys.readouterr().out.splitlines() if "no GPU" in line]
    assert len(said) == 1
    assert "CPU" in said[0]
    parse_gpus(tmp_path, "-1")  # asked for
    assert "no GPU" not in capsys.readouterr().out


def test_mps_is_used_where_it_is_the_only_accelerator(gpus, tmp_path, monkeypatch):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    opt = parse_gpus(tmp_path, None)
    assert (opt.device, opt.gpu_ids) == (torch.device("mps"), [])
    gpus(1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert parse_gpus(tmp_path, None).device == torch.device("cuda:0")


@pytest.mark.parametrize(
    ("count", "ids", "named"),
    [
        (1, "3", "no GPU 3, this machine has GPU 0 only"),
        (2, "0,2", "no GPU 2, this machine has GPUs 0 to 1"),
        (0, "1", "no GPU 1, this machine has no GPU"),
        (1, "zero", "--gpu_ids 'zero'"),
    ],
)
def test_a_gpu_that_is_not_there(count, ids, named, gpus, tmp_path, capsys):
    gpus(count)
    with pytest.raises(SystemExit) as end:
        parse_gpus(tmp_path, ids)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert "--gpu_ids" in error
    assert error.count("\n") == 1


# ------------------------------------------------------------------------------------ exit codes
def test_exit_codes(tmp_path):
    data = unaligned(tmp_path / "data")
    common = ["--checkpoints_dir", tmp_path / "c", "--gpu_ids", "-1"]
    assert run("train.py", "--help").code == 0
    assert run("train.py", "--dataroot", data, *common, "--netG", "x").code == 2
    assert run("train.py", *common).code == 2  # --dataroot is required
    assert run("train.py", "--dataroot", tmp_path / "none", *common).code == 1
    assert run("test.py", "--dataroot", data / "testA", "--name", "none", *common).code == 1


def test_registries_are_the_choices(tmp_path):
    parsed = TrainOptions(["--dataroot", ".", "--checkpoints_dir", str(tmp_path)])
    parsed.parse(save=False)
    choices = {a.dest: list(a.choices) for a in parsed.parser._actions if a.choices}
    assert choices["netG"] == list(networks.GENERATORS)
    assert choices["netD"] == list(networks.DISCRIMINATORS)
    assert choices["norm"] == ["instance", "batch", "syncbatch", "none"]
    assert choices["lr_policy"] == ["linear", "step", "plateau", "cosine"]
    assert choices["gan_mode"] == list(networks.GAN_MODES)
    assert choices["direction"] == ["AtoB", "BtoA"]


def test_help_as_a_program():
    result = run_process("train.py", "--help")
    assert result.code == 0
    assert result.err == ""
    assert "--lambda_identity" in result.out


@pytest.mark.parametrize(
    ("cores", "computing", "shares"),
    [
        (2, 2, (0, 2)),  # nothing to spare
        (2, 1, (1, 1)),  # OMP_NUM_THREADS=1 leaves one
        (1, 1, (0, 1)),
        (4, 4, (1, 3)),
        (16, 16, (4, 12)),
        (16, 4, (4, 4)),
    ],
)
def test_threads_share_the_cores_of_a_cpu(cores, computing, shares):
    """Those that compute and those that read and write are together no more than the cores."""
    found = share_cores(cores, computing, 4)
    assert found == shares
    assert sum(found) <= cores


def test_scoring_computes_on_all_cores(tmp_path, monkeypatch):
    """The process that computes reads the images too."""
    monkeypatch.setattr("util.distributed.cores", lambda: 16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    words = ["--dataroot", str(tmp_path), "--checkpoints_dir", str(tmp_path), "--gpu_ids", "-1"]
    assert EvaluateOptions(words).parse(save=False).num_threads == 0
    assert not asked
    TestOptions(words).parse(save=False)
    assert asked == [12]


def test_given_threads_are_left_alone(tmp_path):
    assert parse(tmp_path, "--num_threads", "3", train=False).num_threads == 3


def test_recorded_networks_need_a_gpu_and_every_gradient(tmp_path, capsys):
    assert not parse(tmp_path, "--cuda_graphs", "--compile", train=False).cuda_graphs
    assert "--cuda_graphs is off: it needs a CUDA device" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, "--cuda_graphs", "--accumulate", "2")
    assert end.value.code == 2
    assert "--cuda_graphs and --accumulate 2 exclude each other" in capsys.readouterr().err


def test_what_scores_in_training_need(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, "--best_by", "SSIM")
    assert end.value.code == 2
    assert "--best_by has no effect without validation: add --val_freq" in capsys.readouterr().err
    assert parse(tmp_path, "--best_by", "SSIM", "--val_freq", "2").best_by == "SSIM"


def test_command_lines_of_2017_and_2018(tmp_path, capsys):
    """As on the page of the original then, and with all that has another name now."""
    old = "--niter 3 --niter_decay=4 --batchSize 2 --loadSize=70 --fineSize 64 --nThreads 1 "
    old += "--which_direction BtoA --which_model_netG unet_128 --which_model_netD pixel "
    old += "--no_lsgan --identity 0.1 --display_single_pane_ncols 2 --resize_or_crop crop "
    old += "--align_data --use_dropout --lr_policy lambda"
    new = "--n_epochs 3 --n_epochs_decay 4 --batch_size 2 --load_size 70 --crop_size 64 "
    new += "--num_threads 1 --direction BtoA --netG unet_128 --netD pixel "
    new += "--gan_mode vanilla --lambda_identity 0.1 --display_ncols 2 --preprocess crop "
    new += "--dataset_mode aligned --dropout --lr_policy linear"
    found, wanted = (vars(parse(tmp_path, *words.split(), "--seed", "1")) for words in (old, new))
    assert found == wanted
    assert "--niter is an older name of --n_epochs\n" in capsys.readouterr().out
    old, new = (f"--model pix2pix --{name} 7" for name in ("lambda_A", "lambda_L1"))
    found, wanted = (vars(parse(tmp_path, *words.split(), "--seed", "1")) for words in (old, new))
    assert found == wanted
    assert parse(tmp_path, "--lambda_A", "7").lambda_A == 7
    assert not hasattr(parse(tmp_path), "lambda_L1")  # cycle_gan
    test = [("--how_many 7 --which_epoch 9", 7, "9"), ("--ntest 8", 8, "latest")]
    for words, num_test, epoch in test:
        opt = parse(tmp_path, *words.split(), train=False)
        assert (opt.num_test, opt.epoch) == (num_test, epoch)


@pytest.mark.parametrize(
    ("old", "new"), [("sync_batch", "syncbatch"), ("sync_instance", "instance")]
)
def test_norms_by_the_names_in_the_instructions_of_the_original(tmp_path, old, new):
    assert parse(tmp_path, "--norm", old).norm == new


def test_an_older_name_with_a_wrong_value(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "--which_direction", "up")
    assert "argument --direction: invalid choice: 'up'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--epoch", "3"], ["--load_iter", "400"]])
def test_a_save_to_go_on_from_needs_continue_train(tmp_path, capsys, words):
    with pytest.raises(SystemExit):
        parse(tmp_path, *words)
    assert f"{' '.join(words)} has no effect" in capsys.readouterr().err
    assert parse(tmp_path, "--epoch", "latest").epoch == "latest"


@pytest.mark.parametrize(
    ("file", "words", "resumes"),
    [
        ("", "", False),
        ("best_net_G.pth", "", False),  # a validation before the first save
        ("latest_net_G.pth", "", True),
        ("3_train_state.pth", "", True),
        ("", "--epoch 3", True),  # an error later, which names what there is
    ],
)
def test_continue_train_is_off_if_there_is_nothing_to_resume(file, words, resumes, tmp_path):
    """As some models read it themselves, to initialize what would come from the files."""
    folder = tmp_path / "c" / "first"
    folder.mkdir(parents=True)
    if file:
        (folder / file).touch()
    opt = parse(tmp_path, "--name", "first", "--continue_train", *words.split())
    assert opt.continue_train == resumes


def test_best_weights_alone_keep_the_architecture(tmp_path):
    """A run that was killed between its first validation and its first save."""
    folder = tmp_path / "c" / "first"
    folder.mkdir(parents=True)
    (folder / "best_net_G.pth").touch()
    (folder / "train_opt.txt").write_text("ngf: 7\n")
    opt = parse(tmp_path, "--name", "first", "--continue_train")
    assert (opt.continue_train, opt.ngf) == (False, 7)
