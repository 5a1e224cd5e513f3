#!/usr/bin/env bash
# Skip-LatteT2V-XL/2 from the weights of a plain Latte, in the two published stages: first the skip units alone, then
# everything. Clips of 16 frames at 512 x 512 with captions, 32 a step in two micro-batches, AdamW with a constant learning
# rate of 1e-4, EMA 0.99985, updates with a gradient norm above 0.02 dropped (arXiv 2411.17616).
#
#   bash scripts/train_latte_t2v.sh 1 /path/to/latents /path/to/latte/transformer [more flags of train.py]
#   bash scripts/train_latte_t2v.sh 2 /path/to/latents results/000-Skip-LatteT2V-XL-2/checkpoints/0165000.safetensors
#
# Latents with captions are made by scripts/extract_latents.py --captions; weights of Latte are the transformer folder of
# maxin-cn/Latte-1. The same command again resumes the run. Of the released weights only the sum of both stages is known,
# at most 165,000 updates. They were trained with four single frames behind every clip, which stored latents do not have.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/recipe_common.sh"
begin_recipe "${BASH_SOURCE[0]}" 3 "STAGE /path/to/latents /path/to/weights" "$@"
case "$1" in
    1) stage=(--train-only added) ;;
    2) stage=() ;;
    *) echo "train_latte_t2v: stage $1: must be 1 (the skip units) or 2 (everything)" >&2; exit 2 ;;
esac
exec "${launch[@]}" --max-restarts 3 train.py --dataset latents --data-path "${paths[1]}" --model Skip-LatteT2V-XL/2 \
    --init-from "${paths[2]}" ${stage[@]+"${stage[@]}"} --global-batch-size 32 --grad-accum 2 --lr 1e-4 \
    --max-steps 165000 --skip-updates-above 0.02 --ema-decay 0.99985 --precision bf16 --grad-checkpointing \
    --ckpt-every 5000 --results-dir "${RESULTS:-results/latte_t2v_stage$1}" --resume auto "${@:4}"
