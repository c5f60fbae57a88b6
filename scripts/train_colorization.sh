#!/usr/bin/env bash
# Train pix2pix to colour grey images (works in Lab).
# Flags given here are appended and take precedence: bash scripts/train_colorization.sh --gpu_ids -1
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/train.py" \
    --dataroot ./datasets/colorization --name color_pix2pix \
    --model colorization --dataset_mode colorization \
    "$@"
