#!/usr/bin/env bash
# Colour the test images with the model of train_colorization.sh.
# Flags given here are appended and take precedence: bash scripts/test_colorization.sh --gpu_ids -1
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/test.py" \
    --dataroot ./datasets/colorization --name color_pix2pix \
    --model colorization --dataset_mode colorization \
    "$@"
