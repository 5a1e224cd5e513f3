#!/usr/bin/env bash
# 2,048 clips of a Skip-Latte, sampled as published (DDPM, 250 steps, UCF101 at guidance scale 7), and their Frechet video
# distance. scripts/sample_latte_ffs.sh, _sky.sh, _taichi.sh and _ucf101.sh name the released checkpoints.
#
#   bash scripts/sample_latte.sh CHECKPOINT REAL_CLIPS.npz [more flags of sample_ddp.py, such as --cache-interval 2]
#
# The checkpoint is a released one by its name (downloaded if need be), a file of it, or one of ours. Real clips are
# (N, F, H, W, 3) uint8, or a folder of videos. If the samples are already there, they are only scored.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 2 "CHECKPOINT REAL_CLIPS.npz" "$@"
checkpoint=${paths[0]} reference=${paths[1]}
samples="${SAMPLES:-samples/$(basename "$checkpoint" | sed -E 's/\.(pt|safetensors)$//').npz}"
if ! [ -e "$reference" ]; then
    echo "sample_latte: $reference: no such file or folder; it holds real clips of the data set" >&2
    exit 2
fi
if ! [ -f "$samples" ]; then
    "${launch[@]}" sample_ddp.py --ckpt "$checkpoint" --num-fid-samples 2048 --output "$samples" "${@:3}"
fi
exec "${launch[@]}" evaluator/evaluator.py "$reference" "$samples" --num-reference 2048 --num-samples 2048
