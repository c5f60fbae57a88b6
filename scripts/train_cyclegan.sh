#!/usr/bin/env bash
# Train CycleGAN on maps: aerial photographs (A) and maps (B), unpaired.
# Flags given here are appended and take precedence: bash scripts/train_cyclegan.sh --gpu_ids -1
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/train.py" \
    --dataroot ./datasets/maps --name maps_cyclegan \
    --model cycle_gan --pool_size 50 --no_dropout \
    "$@"
