#!/usr/bin/env bash
# Training on several nodes under SLURM: one torchrun per node, which starts one process per GPU.
#
#   sbatch --nodes 4 scripts/slurm_train.sh --data-path /path/to/imagenet/train --model DiT-XL/2
#
# Two minutes before the time is up SLURM signals this script, which passes SIGTERM on: train.py saves and exits, the job
# queues itself again, and resumes by --resume auto. Any other failure ends the job, a wrong flag for instance. The results
# folder must be on a shared file system.
#SBATCH --job-name=dit-family
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the root of the repository}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:${RDZV_PORT:-29500}" \
    train.py --resume auto "$@" &
training=$!
time_is_up=no
trap 'time_is_up=yes; kill -TERM "$training"' TERM

status=0
wait "$training" || status=$?
if [ "$time_is_up" = yes ]; then
    wait "$training" || true # the trap cut the first wait short; the run is still saving
    echo "slurm_train: out of time, saved, queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
