#!/usr/bin/env bash
# Train CUT on maps: aerial photographs (A) to maps (B), unpaired, one way.
# Flags given here are appended and take precedence: bash scripts/train_cut.sh --CUT_mode FastCUT
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/train.py" \
    --dataroot ./datasets/maps --name maps_cut \
    --model cut --CUT_mode CUT \
    "$@"
