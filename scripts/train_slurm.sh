#!/usr/bin/env bash
# Train on the machines of a Slurm job; arguments go to train.py. See docs/distributed.md.
#
#   sbatch scripts/train_slurm.sh --dataroot ./datasets/maps --name maps --model cycle_gan
#   sbatch --nodes=4 scripts/train_slurm.sh ...      options of Slurm come first
#
# One task per machine: torchrun starts a process for each of its GPUs. Two minutes before the time
# limit, and when the job is preempted, all save and stop. Slurm requeues a preempted job; after the
# time limit, submit the same command again: --continue_train resumes from what was saved.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    echo "train_slurm.sh: not in a job of Slurm; start it with sbatch scripts/train_slurm.sh ..." >&2
    exit 2
fi

# Slurm runs a copy of this file from a folder of its own
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 1
if [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# jobs that share a machine must not use the same port
port=$((20000 + SLURM_JOB_ID % 20000))

# without this, a machine that comes back can't rejoin
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# since Slurm 22.05, srun does not inherit --cpus-per-task, and a task may be left with one core
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

srun torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node="${SLURM_GPUS_ON_NODE:-1}" \
    --max-restarts=3 \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$first:$port" \
    train.py --display_id 0 --continue_train "$@"
