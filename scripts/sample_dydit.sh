#!/usr/bin/env bash
# 50,000 images of a DyDiT at 256 x 256, sampled as by its authors (DDPM, 250 steps, guidance 1.5), and their scores.
# scripts/sample_0.7.sh and scripts/sample_0.5.sh name the released checkpoints.
#
#   bash scripts/sample_dydit.sh CHECKPOINT VIRTUAL_imagenet256_labeled.npz [more flags of sample_ddp.py]
#
# The checkpoint is a released one by its name (downloaded if need be), a file of it, or one of ours; the layout of its
# routers is recognised. GPUS=N uses N of them. If the samples are already there, they are only scored.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 2 "CHECKPOINT VIRTUAL_imagenet256_labeled.npz" "$@"
checkpoint=${paths[0]} reference=${paths[1]}
name=$(basename "$checkpoint")
samples="${SAMPLES:-samples/$(sed -E 's/\.(pt|pth|safetensors)$//' <<<"$name").npz}"
if ! [ -f "$reference" ]; then
    echo "sample_dydit: $reference: no such file; it is ADM's reference of ImageNet at 256 x 256" >&2
    exit 2
fi
model=()
case "$checkpoint" in *.safetensors) ;; *) model=(--model DyDiT-XL/2) ;; esac # our own files know theirs
if ! [ -f "$samples" ]; then
    "${launch[@]}" sample_ddp.py --ckpt "$checkpoint" ${model[@]+"${model[@]}"} --num-fid-samples 50000 --per-proc-batch-size 32 \
        --cfg-scale 1.5 --num-sampling-steps 250 --output "$samples" "${@:3}"
fi
exec "${launch[@]}" evaluator/evaluator.py "$reference" "$samples"
