#!/usr/bin/env bash
# The merge of parts that an array of scripts/slurm_array.sh makes, once all of its tasks have succeeded.
#
#   job=$(sbatch --parsable --array=1-8 scripts/slurm_array.sh sample_ddp.py --ckpt DiT-XL-2-256x256 --output samples.npz)
#   sbatch --dependency=afterok:$job scripts/slurm_merge.sh 'samples.*-of-8.npz' --output samples.npz
#
# The pattern is quoted, since there are no parts yet. The scores of features need the device of the evaluation: add
# --gpus-per-task=1.
#SBATCH --job-name=dit-family-merge
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=1:00:00
#SBATCH --kill-on-invalid-dep=yes
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the root of the repository}"
pattern=${1:?give the pattern of the parts, in quotes}
shift
IFS= # names of files may have spaces
# shellcheck disable=SC2086  # the pattern is expanded here
exec python scripts/merge.py $pattern "$@"
