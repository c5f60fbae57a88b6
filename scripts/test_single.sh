#!/usr/bin/env bash
# Translate a folder of label images without photographs with the model of train_pix2pix.sh.
# The downloaded facades have pairs (facades/test) but no testB: put label images there, or name a
# folder of your own: bash scripts/test_single.sh --dataroot ./my_labels
# Flags given here are appended and take precedence: bash scripts/test_single.sh --gpu_ids -1
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/test.py" \
    --dataroot ./datasets/facades/testB/ --name facades_pix2pix \
    --model test --netG unet_256 --direction BtoA \
    --dataset_mode single --norm batch \
    "$@"
