#!/usr/bin/env bash
# Training on several nodes under SLURM: one torchrun per node, which starts one process per GPU.
#
#   sbatch --nodes 4 scripts/slurm_train.sh --data-path /path/to/imagenet/train --model DiT-XL/2
#
# Two minutes before the time is up, or when the job is preempted, SLURM signals this script, which passes SIGTERM on:
# train.py saves and exits, the job queues itself again, and resumes by --resume auto. Any other failure ends the job, a
# wrong flag for instance. The results folder must be on a shared file system.
#SBATCH --job-name=dit-family
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the root of the repository}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*} # the first; a pipe to head could end scontrol, and with it this script
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 # seconds for the save; torchrun's own 30 are short for large networks

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-gpu}" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:${RDZV_PORT:-29500}" \
    train.py --resume auto "$@" &
training=$!
stopping=no
stop() {
    stopping=yes
    trap '' USR1 TERM # a second signal would end the run before it has saved
    kill -TERM "$training" || true
}
trap stop USR1 TERM

status=0
wait "$training" || status=$?
if [ "$stopping" = yes ]; then
    status=0
    wait "$training" || status=$? # the trap cut the first wait short; the run is still saving
    [ "$status" = 0 ] || status=75
fi
if [ "$status" = 75 ]; then # train.py's status after a signal
    echo "slurm_train: stopped by a signal, queued again"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
