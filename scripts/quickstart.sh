#!/usr/bin/env bash
# From nothing to a page of translated pictures: install, train a small CycleGAN that turns shaded
# relief into satellite pictures (40 tiles of 128x128 that come along), translate the test tiles.
#
# Usage: scripts/quickstart.sh
#
# After the installation about six minutes on two free cores; a GPU is used if there is one. What
# was stopped goes on; delete checkpoints/quickstart to train anew.
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

# What makes minutes on a CPU enough: a U-Net keeps the shape of the land from the start, few
# filters are quick, and so few steps want batches of two and a higher rate. The identity loss is as
# strong as the cycle, to keep sea, forest and desert apart. Blurs behind the doublings
# (--no_antialias leaves the halvings as they are) and averaged weights leave no checkerboards.
# Moving and cutting what the discriminators see keeps them from learning 20 tiles by heart.
settings=(--netG unet_128 --ngf 16 --ndf 32 --antialias --no_antialias --ema 0.995
    --diffaug translation,cutout --lr 0.001 --lambda_A 7 --lambda_B 5 --lambda_identity 1
    --n_epochs 50 --n_epochs_decay 98 --fast --seed 3 --num_threads 0 --display_id 0
    --save_epoch_freq 1000 --continue_train)

begun=$SECONDS
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=(--gpu_ids 0)
    echo "quickstart: training on the GPU"
    "$python" train.py "${common[@]}" "${device[@]}" "${settings[@]}" --batch_size 2
else
    device=(--gpu_ids -1)
    echo "quickstart: training on two processor cores, about six minutes if they are free"
    # a process for each of the two pictures of a batch, so that both cores compute
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    launch='import sys; from util.distributed.launch import launch; sys.exit(launch(2, sys.argv[1:]))'
    "$python" -c "$launch" train.py "${common[@]}" "${device[@]}" "${settings[@]}"
fi
"$python" test.py "${common[@]}" "${device[@]}" --num_test all

page="results/$name/test_latest/index.html"
if [ ! -e "$page" ]; then
    echo "quickstart: test.py ended well but wrote no $page" >&2
    exit 1
fi
echo "quickstart: done in $((SECONDS - begun)) s; open $PWD/$page"
