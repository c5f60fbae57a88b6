#!/usr/bin/env bash
# Train pix2pix on facades: from labels (B) to photographs (A), paired.
# Flags given here are appended and take precedence: bash scripts/train_pix2pix.sh --gpu_ids -1
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/train.py" \
    --dataroot ./datasets/facades --name facades_pix2pix \
    --model pix2pix --netG unet_256 --direction BtoA --lambda_L1 100 \
    --dataset_mode aligned --norm batch --pool_size 0 \
    "$@"
