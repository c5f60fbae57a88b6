"""Two minutes of scripts/soak.py, with the same seed each time; and that it can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="uses /proc and process groups"),
]


def soak(root: Path, *words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "scripts" / "soak.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_two_minutes_without_a_difference():
    result = soak(ROOT, "--minutes", 2, "--seed", 1)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "| trainings compared, without a difference |" in result.stdout


@pytest.mark.parametrize(
    ("file", "line", "instead"),
    [
        ("util/randomness.py", "    torch.set_rng_state(state[", "    (state["),
        ("util/files.py", "        yield temporary\n", "        temporary = path; yield path\n"),
    ],
    ids=["random state not restored", "files written in place"],
)
def test_finds_a_fault_made_on_purpose(tmp_path, file, line, instead):
    """In a copy of the code with this fault, it ends with a difference."""
    for folder in ("data", "models", "options", "scripts", "util"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "train.py", tmp_path)
    code = (tmp_path / file).read_text()
    assert code.count(line) == 1
    (tmp_path / file).write_text(code.replace(line, instead))
    result = soak(tmp_path, "--minutes", 5, "--seed", 1)
    assert result.returncode == 1, result.stdout[-3000:]
    assert "DIFFERENCE: " in result.stdout
    assert "Error" not in result.stderr
