#!/usr/bin/env bash
# Turn the test labels of facades into photographs with the model of train_pix2pix.sh.
# Flags given here are appended and take precedence: bash scripts/test_pix2pix.sh --gpu_ids -1
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/test.py" \
    --dataroot ./datasets/facades --name facades_pix2pix \
    --model pix2pix --netG unet_256 --direction BtoA \
    --dataset_mode aligned --norm batch \
    "$@"
