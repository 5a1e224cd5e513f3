#!/usr/bin/env bash
# 50,000 images of a DyDiT at 256 x 256, as the authors drew theirs (DDPM, 250 steps, guidance 1.5), and their scores.
# scripts/sample_0.7.sh and scripts/sample_0.5.sh name the released checkpoints.
#
#   bash scripts/sample_dydit.sh CHECKPOINT VIRTUAL_imagenet256_labeled.npz [more flags of sample_ddp.py]
#
# The checkpoint is a released file or one of ours; the layout of its routers is found out. GPUS=N uses N of them.
# Running the command again with the samples there scores them only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage="usage: bash $0 CHECKPOINT VIRTUAL_imagenet256_labeled.npz [flags of sample_ddp.py]"
checkpoint="${1:?$usage}"
reference="${2:?$usage}"
samples="${SAMPLES:-samples/$(basename "${checkpoint%.*}").npz}"
for file in "$checkpoint" "$reference"; do
    [ -f "$file" ] || { echo "sample_dydit: $file: no such file; $usage" >&2; exit 2; }
done
model=()
case "$checkpoint" in *.safetensors) ;; *) model=(--model DyDiT-XL/2) ;; esac # ours know theirs
if ! [ -f "$samples" ]; then
    torchrun --standalone --nproc-per-node "${GPUS:-gpu}" sample_ddp.py --ckpt "$checkpoint" "${model[@]}" \
        --num-fid-samples 50000 --per-proc-batch-size 32 --cfg-scale 1.5 --num-sampling-steps 250 --output "$samples" "${@:3}"
fi
torchrun --standalone --nproc-per-node "${GPUS:-gpu}" evaluator/evaluator.py "$reference" "$samples"
