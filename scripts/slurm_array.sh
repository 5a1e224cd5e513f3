#!/usr/bin/env bash
# Sampling, extraction or evaluation under SLURM: each task of an array makes one part (--shard).
#
#   sbatch --array=1-8 scripts/slurm_array.sh sample_ddp.py --ckpt DiT-XL-2-256x256 --output samples.npz
#   sbatch --array=1-8 scripts/slurm_array.sh scripts/extract_latents.py --data-path images --output latents
#   sbatch --array=1-8 scripts/slurm_array.sh evaluator/evaluator.py VIRTUAL_imagenet256_labeled.npz samples.npz
#
# scripts/slurm_merge.sh puts the parts together. A task that is preempted is queued again, and continues its part. To
# repeat some parts of eight: SHARDS=8 sbatch --array=3,5 ... The folder must be on a shared file system.
#SBATCH --job-name=dit-family-part
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=4:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the root of the repository}"
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    echo "slurm_array: no array: give sbatch --array=1-n for n parts" >&2
    exit 2
fi
if [ -z "${SHARDS:-}" ] && [ "$SLURM_ARRAY_TASK_MIN-$SLURM_ARRAY_TASK_MAX" != "1-$SLURM_ARRAY_TASK_COUNT" ]; then
    echo "slurm_array: --array is not 1-n; to make some of n parts, set SHARDS=n" >&2
    exit 2
fi
launcher=(python)
if [ "${SLURM_GPUS_ON_NODE:-1}" -gt 1 ]; then
    launcher=(torchrun --standalone --nproc-per-node "$SLURM_GPUS_ON_NODE")
fi
exec "${launcher[@]}" "$@" --shard "$SLURM_ARRAY_TASK_ID/${SHARDS:-$SLURM_ARRAY_TASK_COUNT}"
