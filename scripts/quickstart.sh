#!/usr/bin/env bash
# From nothing to a page of translated images: install, train a small CycleGAN that turns shaded
# relief into satellite images (40 included tiles of 128x128), and translate the test tiles.
#
# Usage: scripts/quickstart.sh
#
# After the installation, this takes about six minutes on two free cores; a GPU is used if there is
# one. A run that was stopped is resumed; delete checkpoints/quickstart to start from scratch.
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
    --load_size 128 --crop_size 128)

# Why minutes on a CPU are enough: a U-Net keeps the shape of the land from the start, few filters
# are fast, and so few steps need batches of two and a higher learning rate. The identity loss is as
# strong as the cycle loss, to keep sea, forest and desert apart. Anti-aliased upsampling (but not
# downsampling: --no_antialias) and averaged weights avoid checkerboards. Translation and cutout of
# what the discriminators see keep them from memorizing 20 tiles.
settings=(--netG unet_128 --ngf 16 --ndf 32 --antialias --no_antialias --ema 0.995
    --diffaug translation,cutout --lr 0.001 --lambda_A 7 --lambda_B 5 --lambda_identity 1
    --n_epochs 50 --n_epochs_decay 98 --fast --seed 3 --num_threads 0 --display_id 0
    --save_epoch_freq 1000 --continue_train)

begun=$SECONDS
trap 'echo "quickstart: stopped; scripts/quickstart.sh goes on from here" >&2; exit 130' INT
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=(--gpu_ids 0)
    echo "quickstart: training on the GPU"
    "$python" train.py "${common[@]}" "${device[@]}" "${settings[@]}" --batch_size 2
else
    device=(--gpu_ids -1)
    echo "quickstart: training on two processor cores, about six minutes if they are free"
    # one process per image of a batch of two, so that both cores compute
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    launch='import sys; from util.distributed.launch import launch; sys.exit(launch(2, sys.argv[1:]))'
    "$python" -c "$launch" train.py "${common[@]}" "${device[@]}" "${settings[@]}"
fi
"$python" test.py "${common[@]}" "${device[@]}" --num_test all

echo "quickstart: done in $((SECONDS - begun)) s; open $PWD/results/$name/test_latest/index.html"
