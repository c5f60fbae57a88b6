#!/usr/bin/env bash
# From nothing to a page of translated pictures: install, train a small CycleGAN that turns shaded
# relief into satellite pictures (40 tiles of 128x128 that come along), translate the test tiles.
#
# Usage: scripts/quickstart.sh
#
# After the installation about five minutes on a CPU; a GPU is used if there is one.
set -euo pipefail

if [ $# != 0 ]; then
    echo "quickstart: takes no arguments, got '$*'; see train.py and test.py for your own" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python

name=quickstart
common=(--dataroot ./datasets/worldmaps_mini/unaligned --name "$name" --model cycle_gan
    --load_size 128)

# What makes minutes on a CPU enough: a small network that sees crops of a quarter of a tile, a
# discriminator that judges colours alone, a high rate for few steps, and averaged weights. Blurred
# sampling keeps out regular grids.
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=(--gpu_ids 0)
    settings=(--crop_size 128 --ngf 64 --ndf 64 --n_epochs 100 --n_epochs_decay 100)
    echo "quickstart: training on the GPU"
else
    device=(--gpu_ids -1)
    settings=(--preprocess crop --crop_size 64 --ngf 16 --ndf 32 --netD pixel
        --n_epochs 35 --n_epochs_decay 35)
    # A second thread saves a quarter of the time on an idle machine, and costs many times that on
    # a busy one, where the two wait for each other.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    echo "quickstart: training on the CPU, about five minutes"
fi

begun=$SECONDS
"$python" train.py "${common[@]}" "${device[@]}" "${settings[@]}" \
    --netG resnet_6blocks --antialias --ema 0.99 --lr 0.0007 \
    --seed 1 --num_threads 0 --display_id 0 --save_epoch_freq 1000
"$python" test.py "${common[@]}" "${device[@]}" --crop_size 128 --num_test all

page="results/$name/test_latest/index.html"
if [ ! -e "$page" ]; then
    echo "quickstart: test.py ended well but wrote no $page" >&2
    exit 1
fi
echo "quickstart: done in $((SECONDS - begun)) s; open $PWD/$page"
