"""scripts/benchmark.py measures what it says, in its smallest setting."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import networks
from tests.helpers import ROOT, run, run_process, unaligned

SMALL = (
    "--gpu_ids -1 --size 32 --netG resnet_6blocks --ngf 4 --ndf 4 --rounds 2 --seconds 0.2"
).split()


def benchmark(*words: object):
    return run_process(ROOT / "scripts" / "benchmark.py", *words)


def test_training(tmp_path):
    """Two settings that work, two batch sizes, and a setting that fails and leaves the others."""
    file = tmp_path / "found.json"
    result = benchmark(
        *SMALL, "--settings", "plain", "--set", "mine=--precision bf16", "--set",
        "wrong=--norm nonsense", "--batch_sizes", "1,2", "--json", file, "--profile",
        tmp_path / "traces",
    )  # fmt: skip
    assert result.code == 1
    assert result.err.splitlines()[-1].endswith("not measured: wrong; the table says why")
    found = json.loads(file.read_text())
    assert [table["batch_size"] for table in found["tables"]] == [1, 2]
    assert found["machine"]["torch"] == torch.__version__
    for table in found["tables"]:
        assert table["bf16_matmul_tflops"] > 0
        plain, mine, wrong = table["settings"]
        assert [s["setting"] for s in (plain, mine, wrong)] == ["plain", "mine", "wrong"]
        assert "--norm" in wrong["failed"]
        assert plain["ratio"] == 1
        for setting in (plain, mine):
            assert len(setting["rates"]) == 2
            assert min(setting["rates"]) <= setting["median"] <= max(setting["rates"])
            assert setting["peak_bytes"] > 2**20
            assert setting["split_s"]["forward/backward"] > setting["split_s"]["optimizer"] > 0
        # the work of an image is the same, so the two are in proportion
        ratio = mine["tflops"] / plain["tflops"]
        assert ratio == pytest.approx(mine["median"] / plain["median"], rel=1e-6)
    rows = [line for line in result.out.splitlines() if line.startswith("| ")]
    assert [row.split()[1] for row in rows] == ["setting", "plain", "mine", "wrong"] * 2
    assert "--norm" in rows[3]
    assert "Self CPU" in result.out
    traces = sorted(p.name for p in (tmp_path / "traces").iterdir())
    assert traces == [f"{s}_batch{n}.json" for s in ("mine", "plain") for n in (1, 2)]
    events = json.loads((tmp_path / "traces" / "plain_batch1.json").read_text())["traceEvents"]
    assert any("convolution" in str(event.get("name")) for event in events)


def test_work_of_the_default_generator():
    """What the table's TFLOP/s count, layer by layer: 49.6 billion products for 256x256.

    The 57 billion that are often quoted count transposed convolutions from their outputs, of whose
    products three in four are with the zeros in between.
    """
    with torch.device("meta"):
        net = networks.ResnetGenerator(3, 3, 64, torch.nn.InstanceNorm2d, n_blocks=9)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 256, 256))
    conv = (
        256 * 256 * 64 * 3 * 49  # 7x7
        + 128 * 128 * 128 * 64 * 9 + 64 * 64 * 256 * 128 * 9  # down
        + 18 * 64 * 64 * 256 * 256 * 9  # blocks
        + 64 * 64 * 128 * 256 * 9 + 128 * 128 * 64 * 128 * 9  # up, counted from the inputs
        + 256 * 256 * 3 * 64 * 49
    )  # fmt: skip
    assert counter.get_total_flops() == 2 * conv
    from_outputs = conv + 3 * (64 * 64 * 128 * 256 * 9 + 128 * 128 * 64 * 128 * 9)
    assert from_outputs / 1e9 == pytest.approx(57, abs=0.5)


def test_loading_and_translating(tmp_path):
    data = unaligned(tmp_path / "data", 4)
    loading = benchmark(
        "--loader", "--dataroot", data, "--gpu_ids", -1, "--settings", "plain,default",
        "--num_threads", 0, "--load_size", 40, "--crop_size", 32, "--seconds", 0.2, "--rounds", 2,
    )  # fmt: skip
    assert loading.code == 0, loading.err
    assert "samples/s" in loading.out
    translating = benchmark(
        "--translate", 3, "--size", 32, "--gpu_ids", -1, "--netG", "resnet_6blocks", "--ngf", 4,
        "--settings", "plain", "--set", "mine=--batch_size 2", "--rounds", 1,
    )  # fmt: skip
    assert translating.code == 0, translating.err
    rows = [line for line in translating.out.splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    assert all(float(row.split("|")[2]) > 0 for row in rows[1:])


def test_without_the_first_setting_there_are_no_ratios(tmp_path):
    data = unaligned(tmp_path / "data", 4)
    result = benchmark(
        "--loader", "--dataroot", data, "--gpu_ids", -1, "--settings", "", "--set",
        "first=--norm nonsense", "--set", "mine=--serial_batches", "--num_threads", 0, "--seconds",
        0.2, "--load_size", 40, "--crop_size", 32, "--rounds", 1,
    )  # fmt: skip
    assert result.code == 1
    assert result.err.splitlines()[-1].endswith("not measured: first; the table says why")
    rows = [line.split("|") for line in result.out.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows] == ["setting", "first", "mine"]
    assert float(rows[2][2]) > 0
    assert rows[2][4].strip() == "-"


def test_several_processes(tmp_path):
    """Two reductions an iteration, of as many bytes as the networks have gradients."""
    file = tmp_path / "found.json"
    result = benchmark(*SMALL, "--distributed", "1,2", "--rounds", 1, "--json", file)
    assert result.code == 0, result.err
    one, two = json.loads(file.read_text())["tables"][0]["processes"]
    assert one["efficiency"] == 1
    assert two["efficiency"] > 0
    assert (one["turns"][0]["reductions"], two["turns"][0]["reductions"]) == (0, 2)
    nets = [networks.define_G(3, 3, 4, "resnet_6blocks", "instance")]
    nets.append(networks.define_D(3, 4, "basic", norm="instance"))
    tensors = [p.numel() for net in nets for p in net.parameters()]
    # a number more for each tensor: whether it has a gradient
    assert two["turns"][0]["bytes"] == 2 * 4 * (sum(tensors) + len(tensors))


def test_when_nothing_works():
    result = benchmark(
        "--gpu_ids", -1, "--settings", "", "--set", "a=--no_such_option", "--rounds", 1
    )
    assert result.code == 1
    assert "unknown option '--no_such_option'" in result.out
    assert "Traceback" not in result.err
    assert "round 1" not in result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--settings", "plain,quick"], "there is no 'quick'"),
        (["--ngff", "3"], "unknown option '--ngff'"),
        (["--ngff", "3", "--translate", "2"], "unknown option '--ngff'"),
        (["--set", "x"], "say NAME=FLAGS"),
        (["--batch_sizes", "1,a"], "give numbers"),
        (["--loader"], "--loader needs --dataroot"),
        (["--rounds", "0"], "at least 1"),
        (["--translate", "-2"], "at least 0"),
        (["--distributed", "1", "--translate", "9"], "choose one"),
        (["--json", "nowhere/x.json"], "there is no such folder"),
        (["--distributed", "two"], "give numbers of processes"),
    ],
)
def test_mistakes(words, said):
    result = run("scripts/benchmark.py", *words)
    assert result.code == 2
    assert said in result.err
    assert len(result.err.splitlines()) == 1
