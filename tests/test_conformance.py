"""Same numbers and names as the original: weights, outputs, losses, images, options, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from models import networks
from tests.conformance import probe
from tests.conformance.compare import assert_conforms, checks
from tests.helpers import ROOT, undisturbed

GOLDEN = json.loads((ROOT / "tests" / "conformance" / "golden.json").read_text())["cases"]


def each(case: str):
    """Run a test for each record of a case."""
    return pytest.mark.parametrize("name", list(GOLDEN[case]))


@pytest.fixture(autouse=True)
def _random_sources():
    with undisturbed():
        yield


def assert_same(case: str, name: str, ours: object) -> None:
    # through JSON, as the golden record went: tuples become lists
    assert_conforms(GOLDEN[case][name], json.loads(json.dumps(ours)), f"{case}: {name}")


@each("networks")
def test_networks(name):
    assert_same("networks", name, probe.network(name))


@each("losses")
def test_losses(name):
    assert_same("losses", name, probe.loss(name))


@each("schedules")
def test_schedules(name):
    # exact: the usual limits are as large as a rate
    assert_conforms(GOLDEN["schedules"][name], probe.schedule(name), name, 1e-12, 1e-5)


@each("pool")
def test_pool(name):
    assert_same("pool", name, probe.pool(name))


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    probe.data_pictures(folder)
    return folder


@each("data")
def test_data(name, data_sets):
    assert_same("data", name, probe.dataset(name, data_sets))


@each("options")
def test_options(name, tmp_path):
    assert_same("options", name, probe.command_line(name, tmp_path))


@each("test_cli")
def test_testing_program(name, tmp_path):
    assert_same("test_cli", name, probe.testing(name, tmp_path))


def test_training_program(tmp_path):
    for name in GOLDEN["train_cli"]:  # one after the other, in one folder
        assert_same("train_cli", name, probe.training(name, tmp_path))


def test_every_record_is_probed():
    assert set(GOLDEN) == {
        *("networks", "losses", "schedules", "pool", "data", "options"),
        *("test_cli", "train_cli"),
    }
    assert list(GOLDEN["train_cli"]) == ["cycle", "cycle_continue", "pix_iter"]
    count = sum(1 for _ in checks(GOLDEN, GOLDEN, ""))
    assert count > 16000  # names and numbers that have to agree


@pytest.mark.parametrize("norm", list(networks.NORMS))
@pytest.mark.parametrize("netG", list(networks.GENERATORS))
def test_names_of_generator_weights(netG, norm):
    # the synchronized batch norm keeps what the plain one keeps
    recorded = "batch" if norm == "syncbatch" else norm
    for drop in ("drop", "nodrop"):
        net = networks.define_G(3, 3, 8, netG, norm=norm, use_dropout=drop == "drop")
        golden = GOLDEN["networks"][f"G/{netG}/{recorded}/{drop}/3to3"]["keys"]
        assert probe.keys(net) == golden


@pytest.mark.parametrize("norm", list(networks.NORMS))
@pytest.mark.parametrize(
    ("netD", "layers"),
    [("basic", 3), ("n_layers", 1), ("n_layers", 2), ("n_layers", 5), ("pixel", 3)],
)
def test_names_of_discriminator_weights(netD, layers, norm):
    recorded = "batch" if norm == "syncbatch" else norm
    net = networks.define_D(3, 8, netD, n_layers_D=layers, norm=norm)
    assert probe.keys(net) == GOLDEN["networks"][f"D/{netD}{layers}/{recorded}"]["keys"]


def test_registries_hold_what_is_recorded():
    generators = {name.split("/")[1] for name in GOLDEN["networks"] if name.startswith("G/")}
    assert generators == set(networks.GENERATORS)
    discriminators = {name.split("/")[1][:-1] for name in GOLDEN["networks"] if name[0] == "D"}
    assert discriminators | {"multiscale"} == set(networks.DISCRIMINATORS)  # ours


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["at"].__setitem__(1, 0.502), "r/at[1]: 0.5 != 0.502"),
        (lambda r: r["at"].pop(), "r/at: [0.25, 0.5] != [0.25]"),
        (lambda r: r.pop("shape"), "r/shape: missing"),
        (lambda r: r.update(shape=[2, 4]), "r/shape[1]: 3 != 4"),
        (lambda r: r.update(flag=1), "r/flag: True != 1"),
        (lambda r: r["files"].remove("a"), "r/files: no ['a']"),
        (lambda r: r["pixels"].update(mean=101.5), "r/pixels/mean: 100.0 != 101.5"),
        (lambda r: r.update(name="B"), "r/name: 'A' != 'B'"),
    ],
)
def test_a_difference_is_seen(change, said):
    golden = {
        "shape": [2, 3],
        "at": [0.25, 0.5],
        "flag": True,
        "files": ["a", "b"],
        "pixels": {"mean": 100.0},
        "name": "A",
    }
    ours = copy.deepcopy(golden)
    ours["more"], ours["pixels"]["mean"] = 1, 100.9
    assert not any(checks(golden, ours, "r"))
    change(ours)
    found = [text for text in checks(golden, ours, "r") if text]
    assert len(found) == 1
    assert found[0] == said
