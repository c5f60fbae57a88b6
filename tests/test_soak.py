"""Two minutes of scripts/soak.py, with the same seed each time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc and process groups")
def test_two_minutes_without_a_difference():
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--minutes", "2", "--seed", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "| trainings compared, without a difference |" in result.stdout
