#!/usr/bin/env bash
# Translate the test images of maps both ways with the model of train_cyclegan.sh.
# Flags given here are appended and take precedence: bash scripts/test_cyclegan.sh --gpu_ids -1
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" > /dev/null || python=python3

exec "$python" "$root/test.py" \
    --dataroot ./datasets/maps --name maps_cyclegan \
    --model cycle_gan --phase test --no_dropout \
    "$@"
