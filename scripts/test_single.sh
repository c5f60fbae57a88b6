#!/usr/bin/env bash
# Translate a folder of labels that have no partner with what train_pix2pix.sh made.
# The downloaded facades have pairs (facades/test) and no testB: put pictures of labels alone there,
# or name a folder of your own: bash scripts/test_single.sh --dataroot ./my_labels
# Flags given here are added and win: bash scripts/test_single.sh --gpu_ids -1
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/test.py" \
    --dataroot ./datasets/facades/testB/ --name facades_pix2pix \
    --model test --netG unet_256 --direction BtoA \
    --dataset_mode single --norm batch \
    "$@"
